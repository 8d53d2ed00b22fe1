//! `qmerge live`: what a running QEMU has, and what can be asked of it.

mod after;
mod checks;
mod commit;
mod drive;
mod end;
mod estimate;
mod files;
mod foreign;
mod guard;
mod jobs;
mod left;
mod look;
mod managed;
mod merge;
mod obstacle;
mod outcome;
mod plan;
mod pull;
pub(super) mod recover;
mod siblings;
mod snapshot;
mod stall;
mod states;
mod tidy;
mod trouble;

use std::ffi::OsString;

use qmp_client::{Address, Connection, Disk, Graph, Options};

use self::files::Files;
use self::plan::End;

use self::trouble::Session;
use crate::cli::{LiveArgs, LiveVerb};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Console;

/// Connects and does it. A monitor that belongs to somebody else is only looked at.
pub(super) fn run(args: &LiveArgs, words: &[OsString], console: &Console) -> Result<Exit, Failure> {
    if let LiveVerb::Recover(recover) = &args.verb {
        return recover::run(recover, args.qmp.as_ref(), words, console);
    }
    let Some(address) = &args.qmp else { return Err(trouble::no_address(&args.verb)) };
    let session = Session { address, verb: &args.verb, words };
    guard::place(&session)?;
    let monitor = Connection::connect(address, &connection_options()).map_err(|e| session.failure(&e))?;
    guard::process(&session, &monitor)?;
    let graph = ask(&session, &monitor, &Files::of(&monitor))?;
    match &args.verb {
        LiveVerb::Commit(args) => return merge::commit(&session, monitor, &graph, args, console),
        LiveVerb::Pull(args) => return merge::pull(&session, monitor, &graph, args, console),
        LiveVerb::Finish(args) => return end::run(&session, monitor, &graph, args, End::Finish, console),
        LiveVerb::Pivot(args) => return end::run(&session, monitor, &graph, args, End::Pivot, console),
        LiveVerb::List => look::list(&graph, console),
        LiveVerb::Chain { disk } => look::chain(find(&graph, disk, &session)?, console),
        LiveVerb::Snapshot { overlays, allow_plaintext } => {
            snapshot::run(&session, &monitor, &graph, overlays, *allow_plaintext, console)
        }
        LiveVerb::Jobs => jobs::list(&session, &monitor, &graph, console),
        LiveVerb::Pause { disk }
        | LiveVerb::Resume { disk }
        | LiveVerb::Cancel { disk }
        | LiveVerb::Speed { disk, .. } => {
            let disk = find(&graph, disk, &session)?;
            guard::disk(&session, disk)?;
            jobs::steer(&session, &monitor, &graph, disk, console)
        }
        // It needs no monitor, and was dealt with before.
        LiveVerb::Recover(_) => Ok(()),
    }?;
    Ok(Exit::DONE)
}

fn connection_options() -> Options {
    Options { allow_tcp: true, ..Options::default() }
}

/// The disks, with names of files as they are from here.
fn ask(session: &Session<'_>, monitor: &Connection, files: &Files) -> Result<Graph, Failure> {
    let graph = Graph::ask(monitor).map_err(|e| session.failure(&e))?;
    Ok(graph.with_files(&|name| files.absolute(name)))
}

fn find<'a>(graph: &'a Graph, name: &str, session: &Session<'_>) -> Result<&'a Disk, Failure> {
    graph.disk(name).map_err(|e| session.failure(&e))
}

/// The address as it follows `--qmp`.
fn option(address: &Address) -> String {
    format!("--qmp {}", crate::output::human::shell_word(&address.to_string()))
}
