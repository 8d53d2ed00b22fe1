//! The steps of a merge that QEMU carries out, and the commands for them.

use std::path::Path;
use std::time::Duration;

use qapi::Command;
use qapi::qmp::{self, JobStatus};
use serde_json::Value;

use super::Procedure;
use crate::block::flush::flush;
use crate::block::graph::{Disk, Graph, Layer};
use crate::block::jobs::{Goal, Job, LONGEST_STEP, Waited, Watch, failed, require, stuck};
use crate::error::{Error, Result};
use crate::qmp::monitor::{Execute, Monitor};

/// What a merge left.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Merged {
    /// The disk as it is now.
    pub disk: Disk,
    /// Nodes of merged layers that QEMU keeps open, each with its reason.
    pub still_open: Vec<(String, String)>,
}

/// Lets an active commit that is ready hold the guest's writes, so that base equals the active layer. False if
/// it has concluded instead.
pub(super) fn hold<M: Monitor + ?Sized>(job: &Job<'_, M>) -> Result<bool> {
    let wanted = [JobStatus::ready, JobStatus::waiting, JobStatus::pending];
    if require(job, &wanted)? == JobStatus::ready {
        job.complete()?;
    }
    match job.wait(Goal::Pending, Some(LONGEST_STEP), &mut |_| Watch::GoOn)? {
        Waited::Reached(_) => Ok(true),
        Waited::Concluded(_) => Ok(false),
        other => Err(stuck(job, &other)),
    }
}

/// Lets a pending job switch, and waits until it has concluded.
pub(super) fn switch<M: Monitor + ?Sized>(job: &Job<'_, M>) -> Result<()> {
    if let Err(error) = job.finalize()
        // Another client may have finalised the job already.
        && job.state()?.is_none_or(|state| state.status == JobStatus::pending)
    {
        return Err(error);
    }
    match job.wait(Goal::Concluded, Some(LONGEST_STEP), &mut |_| Watch::GoOn)? {
        Waited::Reached(_) | Waited::Vanished => Ok(()),
        other => Err(stuck(job, &other)),
    }
}

/// As above, for a job that QEMU forgets as soon as it has concluded. Returns its error, if QEMU reported one.
pub(super) fn switch_unkept<M: Monitor + ?Sized>(job: &Job<'_, M>, monitor: &M) -> Result<Option<String>> {
    if let Err(error) = job.finalize()
        && job.state()?.is_some_and(|state| state.status == JobStatus::pending)
    {
        return Err(error);
    }
    let mut why = None;
    while let Some(event) = monitor.next_event(Duration::ZERO)? {
        if event.name == "BLOCK_JOB_COMPLETED" && event.data.get("device").is_some_and(|id| id == job.id()) {
            why = event.data.get("error").and_then(Value::as_str).map(str::to_owned);
        }
    }
    match job.wait(Goal::Concluded, Some(LONGEST_STEP), &mut |_| Watch::GoOn)? {
        Waited::Vanished => Ok(why),
        Waited::Reached(_) => job.take_result().map(|_| why),
        other => Err(stuck(job, &other)),
    }
}

/// Checks that a disk has the chain that the merge leaves, and that the header has the right name: QEMU may
/// have changed one and failed at the other. Then closes the layers that are no longer needed.
pub(super) fn wrap_up<M: Monitor + ?Sized>(
    merge: &Procedure,
    job: &Job<'_, M>,
    monitor: &M,
) -> Result<Merged> {
    let Some(disk) = with_chain(monitor, &merge.layers_after)? else {
        let nodes: Vec<&str> = merge.layers_after.iter().map(|l| l.node.as_str()).collect();
        let why = format!("it has ended, but no disk has the chain {}", nodes.join(", "));
        return Err(failed(job, why));
    };
    let overlay = merge.overlay.as_ref();
    let now = overlay.and_then(|overlay| disk.layers().iter().find(|layer| layer.node == overlay.node));
    if let Some(now) = now {
        let named = now.backing.as_ref().map(|backing| backing.name.as_str());
        if named != merge.backing_file() {
            let (found, expected) = (named.unwrap_or("nothing"), merge.backing_file().unwrap_or("nothing"));
            let why = format!("{} names {found} as its backing file, and should name {expected}", now.file);
            return Err(failed(job, why));
        }
    }
    let server = merge.options.nbd_socket.as_deref();
    Ok(Merged { disk, still_open: let_go(monitor, &merge.merged, &merge.layers_after, server)? })
}

/// Closes layers that are no longer needed, after the overlay's new backing name is durable. QEMU writes that
/// name without waiting for the disk, and after a power cut the old name would be back. So the layers must not
/// be removed earlier.
pub(super) fn let_go(
    monitor: &(impl Monitor + ?Sized),
    merged: &[Layer],
    layers_after: &[Layer],
    server: Option<&Path>,
) -> Result<Vec<(String, String)>> {
    let top = merged.iter().map(|layer| layer.index).max();
    // The remaining layers are listed from the top.
    if let Some(overlay) = layers_after.iter().rfind(|layer| Some(layer.index) > top) {
        flush(monitor, &overlay.node, server)?;
    }
    close(monitor, merged)
}

/// The disk that has just these layers, by their nodes.
pub(crate) fn with_chain(monitor: &(impl Monitor + ?Sized), layers: &[Layer]) -> Result<Option<Disk>> {
    let is_it = |disk: &&Disk| disk.layers().iter().map(|l| &l.node).eq(layers.iter().map(|l| &l.node));
    Ok(Graph::ask(monitor)?.disks().iter().find(is_it).cloned())
}

/// The whole chain, from the layers that go and those that stay.
pub(super) fn chain(merged: &[Layer], layers_after: &[Layer]) -> Vec<Layer> {
    let mut chain: Vec<Layer> = merged.iter().chain(layers_after).cloned().collect();
    chain.sort_by_key(|layer| std::cmp::Reverse(layer.index));
    chain
}

/// A command and its arguments, as they are sent.
pub(super) fn written<C: Command>(command: &C) -> Result<(&'static str, Value)> {
    let arguments = serde_json::to_value(command)
        .map_err(|source| Error::Request { command: C::NAME.to_owned(), source })?;
    Ok((C::NAME, arguments))
}

/// The commands that end a pending job, which must be dismissed if it is `kept`, and close the obsolete layers.
pub(super) fn end_of(job: &str, kept: bool, given_up: &[Layer]) -> Result<Vec<(&'static str, Value)>> {
    let finalize = written(&qmp::job_finalize { id: job.to_owned() });
    let dismiss = kept.then(|| written(&qmp::job_dismiss { id: job.to_owned() }));
    let closed = to_close(given_up).map(|node| written(&qmp::blockdev_del { node_name: node.clone() }));
    [Some(finalize), dismiss].into_iter().flatten().chain(closed).collect()
}

/// Closes nodes with names of the user's choice. QEMU itself keeps these, and their files, open.
fn close(monitor: &(impl Monitor + ?Sized), layers: &[Layer]) -> Result<Vec<(String, String)>> {
    let mut still_open = Vec::new();
    for node in to_close(layers) {
        match monitor.execute(&qmp::blockdev_del { node_name: node.clone() }) {
            Ok(_) => {}
            Err(Error::Command { failure, .. }) => still_open.push((node.clone(), failure.description)),
            Err(error) => return Err(error),
        }
    }
    Ok(still_open)
}

/// The nodes of these layers whose names are not QEMU's own.
fn to_close(layers: &[Layer]) -> impl Iterator<Item = &String> {
    let nodes = layers
        .iter()
        .flat_map(|layer| [Some(&layer.node), layer.protocol_node.as_ref(), layer.data_file_node.as_ref()]);
    nodes.flatten().filter(|node| !node.starts_with('#'))
}
