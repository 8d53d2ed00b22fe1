//! Ends a merge that another client has started.

use qmp_client::qapi::qmp::JobStatus;
use qmp_client::{Disk, End, Job, Machine, conclude};
use serde_json::json;

use super::trouble::{self, Session};
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::hint::{Hint, HintKind};
use crate::output::Console;
use crate::output::human::printable;

/// Completes its job, and tells the result from the graph.
pub(super) fn end(
    session: &Session<'_>,
    machine: &Machine<'_>,
    disk: &Disk,
    end: End,
    console: &Console,
) -> Result<Exit, Failure> {
    let (graph, monitor) = (machine.graph(), machine.monitor());
    let jobs = graph.jobs(monitor).map_err(|e| session.failure(&e))?;
    let found = jobs.iter().find(|(_, of)| of.is_some_and(|of| of.name() == disk.name()));
    let Some((state, _)) = found else { return Err(trouble::no_job(session, disk)) };
    let (name, id) = (printable(disk.name()), printable(&state.id));
    let job = Job::new(monitor, &state.id);
    // One of ours is refused, whatever its status is.
    if !job.is_of_merge()
        && !matches!((end, state.status), (End::Pivot, JobStatus::ready) | (_, JobStatus::pending))
    {
        let wanted = if end == End::Pivot { "ready" } else { "pending" };
        return Err(Report {
            kind: "not-ready",
            message: format!(
                "the job {id} of {name}, which another client started, is {:?}, not {wanted}",
                state.status
            ),
            hint: Hint::command(HintKind::LiveLook, "see how far it is", session.other(&["jobs"])).into(),
            exit: Exit::FAILED,
        }
        .into());
    }
    let now = conclude(monitor, disk, &job).map_err(|e| session.failure(&e))?;
    let (was, is) = (&disk.active().file, &now.active().file);
    let layers = now.layers().len();
    console
        .event(
            "result",
            json!({
                "disk": now.name(), "status": if was == is { "switched" } else { "pivoted" }, "job": state.id,
                "active": is, "layers": layers,
            }),
        )
        .map_err(|e| e.behind(ENDED))?;
    let chain = session.other(&["chain", disk.name()]);
    console.result(&format!(
        "the job {id} is done: {name} writes to {} now, and its chain has {layers} {}\nthe chain: {chain}",
        printable(is),
        if layers == 1 { "layer" } else { "layers" },
    ))
    .map_err(|e| e.behind(ENDED))?;
    if was != is {
        console.note(&format!(
            "what starts the virtual machine must name {} (format {}) in the place of {} from now on; do not start it with \
             {} again",
            printable(is),
            printable(&now.active().format),
            printable(was),
            printable(was)
        ));
    }
    Ok(Exit::DONE)
}

/// What is said if the result cannot be printed.
const ENDED: &str = "the job is done";
