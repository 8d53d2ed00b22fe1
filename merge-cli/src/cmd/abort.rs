//! `qmerge abort`: gives up a merge that was stopped.

use std::slice;

use qcow2::error::shown;
use qcow2::merge::{self, Aborted, UnfinishedUp};
use qcow2::storage::OsHost;
use serde_json::json;

use super::open;
use crate::call::Call;
use crate::cli::AbortArgs;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::human::list;
use crate::output::json::{merged, path, value};
use crate::output::{Console, size};
use crate::signals::Stop;

/// Leaves base consistent and without a trace of the merge.
pub(super) fn run(args: &AbortArgs, call: &Call, console: &Console) -> Result<Exit, Failure> {
    let stop = Stop::on_signals(call)?;
    let dir = args.journal_dir.as_deref();
    let options = open::options(&args.open);
    let healed = merge::heal_image(&OsHost, &args.base, &options, dir);
    let done = healed.and_then(|healed| {
        if healed {
            open::tell_healed(slice::from_ref(&args.base), console);
        }
        merge::abort(&OsHost, &args.base, &options, dir, stop.flag())
    });
    let done = done.map_err(|e| Failure::engine(&e, call))?;
    let printed = if console.is_json() {
        let unfinished = done.unfinished.as_ref();
        let more = json!({
            "base": path(&args.base),
            "aborted": unfinished.is_some() || done.up.is_some(),
            "pull": matches!(done.up, Some(UnfinishedUp::Pull)),
            "rebase": matches!(done.up, Some(UnfinishedUp::Rebase(_))),
            "bytes-done": unfinished.map_or(0, |unfinished| unfinished.done),
        });
        console.document(&merged(value(&done), more))
    } else {
        console.result(&human(&done, args))
    };
    let has_done = done.unfinished.is_some() || done.up.is_some();
    printed.map_err(|e| if has_done { e.behind("the merge is given up") } else { e })?;
    Ok(Exit::DONE)
}

fn human(done: &Aborted, args: &AbortArgs) -> String {
    let base = shown(&args.base);
    let verb = match &done.up {
        Some(UnfinishedUp::Pull) => Some("pull into"),
        Some(_) => Some("rebase of"),
        None => None,
    };
    if let Some(verb) = verb {
        return format!("gave up the {verb} {base}: it is consistent, and shows what it showed");
    }
    let Some(unfinished) = &done.unfinished else { return format!("no merge into {base} is pending") };
    let mut lines = vec![format!(
        "gave up the merge of {} into {base} at {} %: {} had been written",
        shown(&unfinished.top),
        unfinished.percent,
        size::short(unfinished.done)
    )];
    if done.written_since {
        lines.push(format!("somebody has written to {base} since; only the merge's journal was removed"));
    } else if done.put_back {
        lines.push(format!(
            "{base} is not as the merge left it: it was put back, or copied; nothing that the merge noted was \
             written to it"
        ));
    } else {
        lines.push(format!("{base} is consistent, and the overlays hold all that they held"));
    }
    if !done.restore_points_lost.is_empty() {
        let lost = list(&done.restore_points_lost);
        lines.push(format!("restore points no more, as the merge had begun to write: {lost}"));
    }
    lines.join("\n")
}
