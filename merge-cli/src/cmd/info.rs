//! `qmerge info`: what an image, or each layer of its chain, is.

mod human;

use std::path::{Path, PathBuf};

use qcow2::ErrorKind;
use qcow2::facts::{ImageFacts, of_chain};
use qcow2::storage::OsHost;
use qmp_client::{Outline, StateFault, Unfinished};
use serde_json::{Value, json};

use super::open;
use crate::call::Call;
use crate::cli::InfoArgs;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Console;
use crate::output::json::{only, path, value};

/// An unfinished live merge: its state file, and the state if it can be read and believed.
type LiveMerge = Option<(PathBuf, Result<Outline, StateFault>)>;

/// Prints what the image is. Without `--chain` no other file is opened.
pub(super) fn run(args: &InfoArgs, call: &Call, console: &Console) -> Result<Exit, Failure> {
    if args.chain {
        return chain(args, call, console);
    }
    let (format, dir) = (args.open.image.format.map(Into::into), args.journal_dir.as_deref());
    let facts = ImageFacts::read(&OsHost, &args.image, format, dir).map_err(|e| Failure::engine(&e, call))?;
    let live = live_merge(&args.image);
    if console.is_json() {
        console.document(&with_live(value(&facts), &live))?;
    } else {
        console.result(&human::image(&facts, &live))?;
    }
    match &facts.problem {
        // A sound image of a format that this engine does not read was shown like any other.
        Some(problem) if problem.kind() != ErrorKind::Unsupported => Err(Failure::engine(problem, call)),
        _ => Ok(Exit::DONE),
    }
}

/// Prints every layer, from the active image down.
fn chain(args: &InfoArgs, call: &Call, console: &Console) -> Result<Exit, Failure> {
    let chain = open::chain(&args.image, &open::options(&args.open), call)?;
    let facts = of_chain(&OsHost, &chain, args.journal_dir.as_deref());
    let facts = facts.map_err(|e| Failure::engine(&e, call))?.into_iter().rev();
    let layers: Vec<_> = facts.map(|layer| (live_merge(&layer.facts.path), layer)).collect();
    if console.is_json() {
        console.document(&layers.iter().map(|(live, layer)| with_live(value(layer), live)).collect())?;
    } else {
        console.result(&human::chain(&layers))?;
    }
    Ok(Exit::DONE)
}

/// The unfinished live merge with this active image.
fn live_merge(image: &Path) -> LiveMerge {
    match Unfinished::beside(image) {
        Ok(merge) => merge.map(|merge| {
            let merge = merge.outline();
            (merge.state_file().to_owned(), Ok(merge))
        }),
        Err(qmp_client::Error::State { path, why }) => Some((path, Err(why))),
        Err(_) => None,
    }
}

fn with_live(mut fields: Value, live: &LiveMerge) -> Value {
    if let Some((file, state)) = live {
        let known = state.as_ref().ok().map(|state| only(state, &["disk", "kind", "phase", "valid-top"]));
        let unknown = json!({ "disk": null, "kind": null, "phase": null, "valid-top": null });
        fields["live-merge"] = known.unwrap_or(unknown);
        fields["live-merge"]["state-file"] = path(file);
    }
    fields
}
