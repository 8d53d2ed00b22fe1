//! The verbs about jobs, whoever started them.

use qmp_client::qapi::qmp::JobStatus;
use qmp_client::{Disk, Job, JobState, Machine, Outline, Phase, Unfinished};
use serde_json::Value;

use super::trouble::{self, Session};
use crate::cli::LiveVerb;
use crate::failure::Failure;
use crate::output::Console;
use crate::output::human::{Table, list as listed, printable};
use crate::output::json::{only, value};
use crate::output::size;

/// Prints all jobs.
pub(super) fn list(session: &Session<'_>, machine: &Machine<'_>, console: &Console) -> Result<(), Failure> {
    let (graph, monitor) = (machine.graph(), machine.monitor());
    let jobs = graph.jobs(monitor).map_err(|e| session.failure(&e))?;
    let known = machine.unfinished(graph.disks(), None).map_err(|e| session.failure(&e))?;
    for merge in machine.let_guests_go_on(&known).map_err(|e| session.failure(&e))? {
        console.note(&format!(
            "the guest was still paused by a client of the merge of {} that was killed, and goes on now",
            printable(&merge.outline().disk)
        ));
    }
    let (under_way, left): (Vec<Outline>, Vec<Outline>) = known
        .iter()
        .map(Unfinished::outline)
        .partition(|merge| jobs.iter().any(|(job, _)| job.id == merge.job));
    if console.is_json() {
        let merge = |job: &JobState| under_way.iter().find(|merge| merge.job == job.id);
        return console.document(&jobs.iter().map(|(job, disk)| json(job, *disk, merge(job))).collect());
    }
    // A switched merge still has files to clean up; a merge that only copied data has lost nothing.
    for merge in left.iter().filter(|merge| merge.phase != Phase::Copying) {
        let disk = printable(&merge.disk);
        console.note(&format!(
            "an earlier merge of {disk} is not cleaned up after ({}); its disk is {}: {}",
            merge.state_file().display(),
            printable(&merge.valid_top),
            session.other(&["recover", &merge.disk])
        ));
    }
    let unnoted = |merge: &Unfinished| graph.disks().iter().any(|d| machine.is_switched_unnoted(merge, d));
    for merge in known.iter().filter(|merge| unnoted(merge)).map(Unfinished::outline) {
        if under_way.iter().any(|other| other.job == merge.job) {
            continue;
        }
        console.note(&format!(
            "{} has the chain that its merge leaves, and no switch is noted ({}): another client has switched, perhaps: {}",
            printable(&merge.disk),
            merge.state_file().display(),
            session.other(&["recover", &merge.disk])
        ));
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
    let merges: String = under_way.iter().map(|merge| format!("\n{}", in_words(merge))).collect();
    console.result(&(table.render() + &merges))
}

/// `vda: b.qcow2, a.qcow2 into base.raw, not switched yet; the image that holds the disk is c.qcow2`
fn in_words(state: &Outline) -> String {
    let merged = listed(state.merged().map(|layer| &layer.file));
    let target = state.target().map_or(String::new(), |layer| printable(&layer.file));
    let phase = match state.phase {
        Phase::Copying => "not switched yet",
        Phase::Switching => "about to switch",
        Phase::Switched => "switched",
    };
    let (disk, top) = (printable(&state.disk), printable(&state.valid_top));
    format!("{disk}: {merged} into {target}, {phase}; the image that holds the disk is {top}")
}

/// Pauses, resumes, cancels or slows the job of a disk.
pub(super) fn steer(
    session: &Session<'_>,
    machine: &Machine<'_>,
    disk: &Disk,
    console: &Console,
) -> Result<(), Failure> {
    let (graph, monitor) = (machine.graph(), machine.monitor());
    let fail = |e: qmp_client::Error| session.failure(&e);
    let of_this = |(_, of): &(JobState, Option<&Disk>)| of.is_some_and(|of| of.name() == disk.name());
    let all = graph.jobs(monitor).map_err(fail)?;
    // A concluded job cannot be steered. If another job of the disk still runs, the user means that one.
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
        _ => machine.cancel(disk, &job, session.verb.state_dir()).map(|()| {
            format!("{what} is cancelled; the disk's chain is as it was, and what was copied stays copied")
        }),
    };
    let done = done.map_err(fail)?;
    if console.is_json() {
        let now = job.state().map_err(fail)?;
        let mut out = json(now.as_ref().unwrap_or(state), Some(disk), None);
        if now.is_none() {
            // QEMU's status for a job that it has forgotten.
            out["status"] = "null".into();
        }
        return console.document(&out).map_err(|e| e.behind("QEMU has done what it was told"));
    }
    console.result(&done).map_err(|e| e.behind(&done))
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

/// A job with its disk, and the merge that it belongs to if that is known.
fn json(job: &JobState, disk: Option<&Disk>, merge: Option<&Outline>) -> Value {
    let mut out = value(job);
    out["disk"] = disk.map(Disk::name).into();
    if let Some(merge) = merge {
        let keys = ["kind", "phase", "base", "obsolete", "valid-top", "state-file"];
        out["merge"] = only(merge, &keys);
    }
    out
}
