//! The end of a job that another client has started: no state file tells what it is for, so the graph is the judge.

use qapi::qmp::JobStatus;

use crate::error::{Error, Result};
use crate::graph::{Disk, Graph};
use crate::jobs::{Goal, Job, Waited, Watch};
use crate::monitor::Monitor;
use crate::procedure::{LONGEST_STEP, failed, stuck};

/// Has a job that is ready or pending, whoever started it, do what it is for, and returns the disk as it is then.
///
/// A job that is not kept by QEMU takes its error with it, so what counts is the chain: it must be another than
/// before. Base is not flushed first, because nobody knows which layer that is.
///
/// # Errors
/// [`Error::Refused`] if the job is neither ready nor pending; [`Error::Job`] if it failed, does not end, or the disk
/// has the chain that it had.
pub fn conclude<M: Monitor + ?Sized>(monitor: &M, disk: &Disk, job: &Job<'_, M>) -> Result<Disk> {
    match job.state()?.map(|state| state.status) {
        Some(JobStatus::ready) => job.complete()?,
        Some(JobStatus::pending) => {}
        status => {
            let status = status.map_or("gone".to_owned(), |status| format!("{status:?}"));
            return Err(Error::Refused { why: format!("the job {} is {status}, not ready", job.id()) });
        }
    }
    let mut waited = job.wait(Goal::Pending, Some(LONGEST_STEP), &mut |_| Watch::GoOn)?;
    // Some jobs finalize themselves.
    if let Waited::Reached(_) = waited {
        match job.finalize() {
            Ok(()) | Err(Error::Command { .. }) => {}
            Err(error) => return Err(error),
        }
        waited = job.wait(Goal::Concluded, Some(LONGEST_STEP), &mut |_| Watch::GoOn)?;
    }
    match waited {
        Waited::Reached(_) | Waited::Concluded(_) => match job.take_result() {
            Ok(_) => {}
            // It was forgotten between two questions; the graph knows.
            Err(Error::Job { .. }) if job.state()?.is_none() && changed(monitor, disk)?.is_some() => {}
            Err(error) => return Err(error),
        },
        Waited::Vanished => {}
        other => return Err(stuck(job, &other)),
    }
    changed(monitor, disk)?
        .ok_or_else(|| failed(job, "it has ended, and the disk has the chain that it had".into()))
}

/// The disk of this name, if its chain is another by now.
fn changed(monitor: &(impl Monitor + ?Sized), before: &Disk) -> Result<Option<Disk>> {
    let graph = Graph::ask(monitor)?;
    let now = graph.disks().iter().find(|disk| disk.name() == before.name());
    let nodes = |disk: &Disk| disk.layers().iter().map(|layer| layer.node.clone()).collect::<Vec<_>>();
    Ok(now.filter(|now| nodes(now) != nodes(before)).cloned())
}
