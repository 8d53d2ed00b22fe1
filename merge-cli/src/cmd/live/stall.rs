//! Tells why a job stands still, and what to do about it.

use std::path::Path;

use qcow2::storage::{Host, OsHost};
use qmp_client::{JobState, Outline};
use serde_json::json;

use super::trouble::Session;
use crate::output::Console;
use crate::output::human::printable;
use crate::output::size;

/// Tells it once for each time that the job comes to a halt.
pub(super) fn explain(session: &Session<'_>, console: &Console, merge: &Outline, job: &JobState) {
    let why = job.block.as_ref().map_or("failed", |block| block.io_status.as_str());
    let file = merge.target().map_or("", |layer| layer.file.as_str());
    let folder = Path::new(file).parent().filter(|_| file.starts_with('/'));
    let free = folder.and_then(|folder| OsHost.free_space(folder).ok().flatten());
    // A reader that went away must not stop a merge; the result will tell.
    let _ = console.event(
        "stalled",
        json!({ "io-status": why, "file": file, "done": job.done, "total": job.total, "free-space": free }),
    );
    if console.is_json() {
        return;
    }
    let resume = session.other(&["resume", &merge.disk]);
    let what = match (why, folder) {
        ("nospace", Some(folder)) => format!(
            "no space is left in {} for {} ({} free)",
            folder.display(),
            printable(file),
            free.map_or("an unknown amount".to_owned(), size::short)
        ),
        ("nospace", None) => format!("no space is left for {}", printable(file)),
        _ => format!("QEMU met an input/output error while it copied to {}", printable(file)),
    };
    // QEMU counts holes for the other kinds.
    let rest = if merge.merges_active() {
        format!("; {} are still to be copied", size::short(job.total.saturating_sub(job.done)))
    } else {
        String::new()
    };
    let remedy = if why == "nospace" { "make room" } else { "mend that" };
    console.warn(&format!(
        "the job stands still: {what}{rest}\n\
         nothing is lost, and the guest goes on; {remedy}, then in another terminal: {resume}\n\
         this command waits for it"
    ));
}

/// Tells that the job goes on.
pub(super) fn over(console: &Console) {
    // A reader that went away must not stop a merge; the result will tell.
    let _ = console.event("resumed", json!({}));
    if !console.is_json() {
        console.note("the job goes on");
    }
}
