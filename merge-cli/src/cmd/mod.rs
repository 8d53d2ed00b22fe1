//! One module for each verb.

mod abort;
mod check;
mod commit;
mod compare;
mod demo;
mod flatten;
mod info;
mod interrupted;
mod live;
mod map;
mod open;
mod pull;
mod rebase;
mod relink;
mod shown_plan;
mod stopped;
mod up;

use std::ffi::OsString;
use std::path::Path;

use crate::call::{Call, VerbName};
use crate::cli::Verb;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Console;

/// Runs the verb; `words` is the command line after `qmerge`.
pub(crate) fn run(verb: &Verb, words: &[OsString], console: &Console) -> Result<Exit, Failure> {
    let call = |verb, image: &Path| Call { verb, image: image.to_owned(), words: words.to_vec() };
    match verb {
        Verb::Abort(args) => abort::run(args, &call(VerbName::Abort, &args.base), console),
        Verb::Info(args) => info::run(args, &call(VerbName::Info, &args.image), console),
        Verb::Check(args) => check::run(args, &call(VerbName::Check, &args.image), console),
        Verb::Commit(args) => commit::run(args, &call(VerbName::Commit, &args.active), console),
        Verb::Pull(args) => pull::run(args, &call(VerbName::Pull, &args.active), console),
        Verb::Relink(args) => {
            let first = args.paths.first().map_or(Path::new("."), |path| path);
            relink::run(args, &call(VerbName::Relink, first), console)
        }
        Verb::Rebase(args) => rebase::run(args, &call(VerbName::Rebase, &args.image), console),
        Verb::Compare(args) => compare::run(args, &call(VerbName::Compare, &args.first), console),
        Verb::Flatten(args) => flatten::run(args, &call(VerbName::Flatten, &args.active), console),
        Verb::Demo(args) => demo::run(args, &call(VerbName::Demo, Path::new("c.qcow2")), console),
        Verb::Live(args) => live::run(args, words, console),
        Verb::Map(args) => map::run(args, &call(VerbName::Map, &args.image), console),
    }
}
