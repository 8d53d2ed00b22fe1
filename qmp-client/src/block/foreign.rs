//! Ends a job that another client has started. No state file tells its purpose, so the graph shows whether it
//! succeeded.

use qapi::qmp::JobStatus;

use crate::block::flush::Means;
use crate::block::graph::{Disk, Graph, holds_requests};
use crate::block::jobs::{Goal, Job, LONGEST_STEP, Waited, Watch, failed, stuck};

use crate::error::{Error, Refusal, Result};
use crate::qmp::monitor::Monitor;

/// Completes a job that is ready or pending, whoever started it, and returns the disk as it is then. If the job
/// has concluded and QEMU keeps it, only its result is taken.
///
/// A job that QEMU does not keep takes its error with it. So the chain decides: it must have changed. The data
/// that a pending job has written is flushed first, if a way to do that is found.
///
/// # Errors
/// [`Error::Refused`] if the job belongs to a merge of this library, which only a client with its state file
/// may end, or if it is neither ready, pending nor concluded; [`Error::Job`] if it failed, does not end, or
/// left the chain unchanged.
pub fn conclude<M: Monitor + ?Sized>(monitor: &M, disk: &Disk, job: &Job<'_, M>) -> Result<Disk> {
    if job.is_of_merge() {
        return Err(Refusal::NoStateFound { job: job.id().to_owned() }.into());
    }
    match job.state()?.map(|state| state.status) {
        Some(JobStatus::ready) => job.complete()?,
        Some(JobStatus::pending) => {}
        Some(JobStatus::concluded) => {
            job.take_result()?;
            return now(monitor, disk)?
                .ok_or_else(|| failed(job, "it has ended, and its disk is gone".into()));
        }
        Some(status) => {
            let wanted = vec![JobStatus::ready, JobStatus::pending];
            return Err(Refusal::JobStatus { job: job.id().to_owned(), status, wanted }.into());
        }
        None => return Err(Refusal::JobGone { job: job.id().to_owned() }.into()),
    }
    let mut waited = job.wait(Goal::Pending, Some(LONGEST_STEP), &mut |_| Watch::GoOn)?;
    // Some jobs finalize themselves.
    if let Waited::Reached(_) = waited {
        flush(monitor, disk, job)?;
        match job.finalize() {
            Ok(()) | Err(Error::Command { .. }) => {}
            Err(error) => return Err(error),
        }
        waited = job.wait(Goal::Concluded, Some(LONGEST_STEP), &mut |_| Watch::GoOn)?;
    }
    match waited {
        Waited::Reached(_) | Waited::Concluded(_) => match job.take_result() {
            Ok(_) => {}
            // QEMU forgot it between two questions; the graph shows how it ended.
            Err(Error::Job { .. }) if job.state()?.is_none() && changed(monitor, disk)?.is_some() => {}
            Err(error) => return Err(error),
        },
        Waited::Vanished => {}
        other => return Err(stuck(job, &other)),
    }
    changed(monitor, disk)?
        .ok_or_else(|| failed(job, "it has ended, and the disk has the chain that it had".into()))
}

/// Flushes all layers that are open for writing, because a pending job may have written any of them. If no way
/// to do that is found, it is left to QEMU, as it would be without this client.
fn flush<M: Monitor + ?Sized>(monitor: &M, disk: &Disk, job: &Job<'_, M>) -> Result<()> {
    // A mirror, and an active commit is one, has flushed its target and holds all requests: a flush would hang.
    if holds_requests(monitor, job.id())? {
        return Ok(());
    }
    let Some(disk) = now(monitor, disk)? else { return Ok(()) };
    for layer in disk.layers().iter().filter(|layer| !layer.read_only) {
        match Means::find(monitor, &layer.node, None).and_then(|means| means.flush(monitor, &layer.node)) {
            Ok(()) | Err(Error::NotFlushed { .. } | Error::Flush { .. } | Error::Command { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The same disk as it is now.
fn now(monitor: &(impl Monitor + ?Sized), before: &Disk) -> Result<Option<Disk>> {
    let graph = Graph::ask(monitor)?;
    let same = |one: Option<&str>, other: Option<&str>| one.is_some() && one == other;
    let is_it = |disk: &&Disk| {
        same(disk.qdev(), before.qdev())
            || same(disk.export(), before.export())
            || disk.name() == before.name()
    };
    Ok(graph.disks().iter().find(is_it).cloned())
}

/// The same disk as it is now, if its chain is another by now.
fn changed(monitor: &(impl Monitor + ?Sized), before: &Disk) -> Result<Option<Disk>> {
    let nodes = |disk: &Disk| disk.layers().iter().map(|layer| layer.node.clone()).collect::<Vec<_>>();
    Ok(now(monitor, before)?.filter(|now| nodes(now) != nodes(before)))
}
