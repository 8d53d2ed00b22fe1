//! The verbs about jobs, whoever started them.

use qmp_client::qapi::qmp::JobStatus;
use qmp_client::{Connection, Disk, Graph, Job, JobState};
use serde_json::{Value, json};

use super::trouble::{self, Session};
use crate::cli::LiveVerb;
use crate::failure::Failure;
use crate::output::Console;
use crate::output::human::{Table, printable};
use crate::output::size;

/// Prints all jobs.
pub(super) fn list(
    session: &Session<'_>,
    monitor: &Connection,
    graph: &Graph,
    console: &Console,
) -> Result<(), Failure> {
    let jobs = graph.jobs(monitor).map_err(|e| session.failure(&e))?;
    if console.is_json() {
        return console.document(&jobs.iter().map(|(job, disk)| json(job, *disk)).collect());
    }
    if jobs.is_empty() {
        return console.result("no job");
    }
    let mut table = Table::new(&["DISK", "TYPE", "STATUS", ">DONE", ">OF", ">LIMIT", "JOB"]);
    for (job, disk) in &jobs {
        let limit = job.block.as_ref().filter(|b| b.speed > 0).map(|b| size::short(b.speed) + "/s");
        let cells = [
            disk.map_or("-", Disk::name),
            &job.kind,
            &status(job),
            &size::short(job.done),
            &size::short(job.total),
            limit.as_deref().unwrap_or("none"),
            &job.id,
        ];
        table.row(cells.map(printable).into());
    }
    console.result(&table.render())
}

/// Pauses, resumes, cancels or slows the job of a disk.
pub(super) fn steer(
    session: &Session<'_>,
    monitor: &Connection,
    graph: &Graph,
    disk: &Disk,
    console: &Console,
) -> Result<(), Failure> {
    let fail = |e: qmp_client::Error| session.failure(&e);
    let of_this = |(_, of): &(JobState, Option<&Disk>)| of.is_some_and(|of| of.name() == disk.name());
    let all = graph.jobs(monitor).map_err(fail)?;
    // What has concluded cannot be steered: one that still runs, if there is one, is meant.
    let (ended, at_work): (Vec<_>, Vec<_>) =
        all.iter().filter(|entry| of_this(entry)).partition(|(job, _)| job.status == JobStatus::concluded);
    let Some((state, _)) = at_work.first().or(ended.first()) else {
        return Err(trouble::no_job(session, disk));
    };
    let job = Job::new(monitor, &state.id);
    let (name, id) = (printable(disk.name()), printable(&state.id));
    let what = format!("the {} of {name} (job {id})", printable(&state.kind));
    let done = match session.verb {
        LiveVerb::Pause { .. } => job.pause().map(|()| format!("{what} is halted")),
        LiveVerb::Resume { .. } => job.resume().map(|()| format!("{what} goes on")),
        LiveVerb::Speed { rate: 0, .. } => {
            job.set_speed(0).map(|()| format!("{what} is not limited any more"))
        }
        LiveVerb::Speed { rate, .. } => {
            job.set_speed(*rate).map(|()| format!("{what} is limited to {}/s", size::short(*rate)))
        }
        _ => qmp_client::cancel(&job).map(|()| {
            format!("{what} is cancelled; the disk's chain is as it was, and what was copied stays copied")
        }),
    };
    let done = done.map_err(fail)?;
    if console.is_json() {
        let now = job.state().map_err(fail)?;
        let mut out = json(now.as_ref().unwrap_or(state), Some(disk));
        if now.is_none() {
            // QEMU's word for a job that it has forgotten.
            out["status"] = "null".into();
        }
        return console.document(&out);
    }
    console.result(&done)
}

/// `running`, or why it stands still.
fn status(job: &JobState) -> String {
    let mut text = word(job.status);
    if job.is_stalled() {
        let why = job.block.as_ref().map_or("", |b| b.io_status.as_str());
        text += if why == "nospace" { ": no space" } else { ": input/output error" };
    } else if let Some(error) = &job.error {
        text = format!("{text}: {error}");
    }
    text
}

/// QEMU's word for a status.
fn word(status: JobStatus) -> String {
    serde_json::to_value(status).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

/// A job with the fields of `query-jobs` and `query-block-jobs`, and its disk.
fn json(job: &JobState, disk: Option<&Disk>) -> Value {
    let mut out = json!({
        "disk": disk.map(Disk::name),
        "id": job.id,
        "type": job.kind,
        "status": word(job.status),
        "current-progress": job.done,
        "total-progress": job.total,
    });
    if let Some(block) = &job.block {
        out["io-status"] = block.io_status.as_str().into();
        out["speed"] = block.speed.into();
        out["auto-finalize"] = block.auto_finalize.into();
        out["auto-dismiss"] = block.auto_dismiss.into();
    }
    if let Some(error) = &job.error {
        out["error"] = error.as_str().into();
    }
    out
}
