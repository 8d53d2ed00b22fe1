//! The steps that merges in both directions share.

use std::collections::hash_map::RandomState;
use std::fmt::Write as _;
use std::hash::BuildHasher;
use std::path::Path;
use std::time::Duration;

use qapi::Command;
use qapi::qmp::{self, JobStatus};
use serde_json::Value;

use crate::block::flush::flush;
use crate::block::graph::{Disk, Graph, Layer};
use crate::block::jobs::{Goal, Job, Waited, Watch};
use crate::error::{Error, Result};
use crate::qmp::monitor::{Execute, Monitor};

/// How long a step that copies nothing may take; QEMU lets the disk's I/O finish first.
pub(crate) const LONGEST_STEP: Duration = Duration::from_secs(600);

/// What a merge left.
#[derive(Clone, Debug)]
pub struct Merged {
    /// The disk as it is now.
    pub disk: Disk,
    /// Nodes of merged layers that QEMU keeps open, each with its reason.
    pub still_open: Vec<(String, String)>,
}

/// Eight hexadecimal digits, others each time. Should they ever meet a name that is in use, QEMU refuses it.
pub(crate) fn unique() -> String {
    // The standard library's only source of randomness.
    let bits = RandomState::new().hash_one(std::process::id());
    format!("{:08x}", bits & 0xffff_ffff)
}

/// What the ids of all jobs of this kind on this disk begin with, and those of no other disk.
pub(crate) fn job_prefix(kind: &str, disk: &str) -> String {
    let mut prefix = format!("{kind}.");
    for byte in disk.bytes() {
        if byte.is_ascii_alphanumeric() || byte == b'-' {
            prefix.push(char::from(byte));
        } else {
            // Writing to a string does not fail.
            let _ = write!(prefix, "_{byte:02x}");
        }
    }
    prefix + "."
}

/// The job's status, which is one of those wanted, or concluded: ended by somebody else, or by this client before
/// it was interrupted.
pub(crate) fn require<M: Monitor + ?Sized>(job: &Job<'_, M>, wanted: &[JobStatus]) -> Result<JobStatus> {
    match job.state()?.map(|state| state.status) {
        Some(status) if wanted.contains(&status) || status == JobStatus::concluded => Ok(status),
        Some(status) => {
            Err(Error::Refused { why: format!("the job {} is {status:?}, not {wanted:?}", job.id()) })
        }
        None => Err(failed(job, "QEMU does not know it".into())),
    }
}

/// Has an active commit that is ready hold the guest's writes, with base equal to the active layer. False if it has
/// concluded instead.
pub(crate) fn hold<M: Monitor + ?Sized>(job: &Job<'_, M>) -> Result<bool> {
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

/// Has a pending job switch, and waits until it has concluded.
pub(crate) fn switch<M: Monitor + ?Sized>(job: &Job<'_, M>) -> Result<()> {
    if let Err(error) = job.finalize()
        // Another client may have been faster.
        && job.state()?.is_none_or(|state| state.status == JobStatus::pending)
    {
        return Err(error);
    }
    match job.wait(Goal::Concluded, Some(LONGEST_STEP), &mut |_| Watch::GoOn)? {
        Waited::Reached(_) | Waited::Vanished => Ok(()),
        other => Err(stuck(job, &other)),
    }
}

/// The same for a job that QEMU forgets as soon as it has concluded. Returns its error, if it told one.
pub(crate) fn switch_unkept<M: Monitor + ?Sized>(job: &Job<'_, M>, monitor: &M) -> Result<Option<String>> {
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

/// A header that a merge changes, as QEMU has it afterwards.
pub(crate) struct Renamed<'a> {
    /// The node of the overlay.
    pub(crate) overlay: &'a str,
    /// The backing name that it has then.
    pub(crate) name: Option<&'a str>,
}

/// Looks whether a disk has the chain that is left, and the header the name that it should have, for QEMU may have
/// changed the one and failed at the other; then lets go of the layers that are no longer needed. `server` is the socket
/// of an NBD server that QEMU runs already.
pub(crate) fn wrap_up<M: Monitor + ?Sized>(
    job: &Job<'_, M>,
    monitor: &M,
    merged: &[Layer],
    left: &[Layer],
    renamed: Option<&Renamed<'_>>,
    server: Option<&Path>,
) -> Result<Merged> {
    let Some(disk) = with_chain(monitor, left)? else {
        let nodes: Vec<&str> = left.iter().map(|l| l.node.as_str()).collect();
        let why = format!("it has ended, but no disk has the chain {}", nodes.join(", "));
        return Err(failed(job, why));
    };
    if let Some(renamed) = renamed
        && let Some(overlay) = disk.layers().iter().find(|layer| layer.node == renamed.overlay)
        && overlay.backing.as_ref().map(|backing| backing.name.as_str()) != renamed.name
    {
        let expected = renamed.name.unwrap_or("nothing");
        let found = overlay.backing.as_ref().map_or("nothing", |backing| &backing.name);
        let why = format!("{} names {found} as its backing file, and should name {expected}", overlay.file);
        return Err(failed(job, why));
    }
    Ok(Merged { disk, still_open: let_go(monitor, merged, left, server)? })
}

/// Closes layers that are no longer needed, once the overlay that named them durably names another backing file: QEMU
/// writes that name, and does not wait until it is on the disk. A power cut would leave the old name, so whoever
/// removes these layers earlier may lose the chain.
pub(crate) fn let_go(
    monitor: &(impl Monitor + ?Sized),
    merged: &[Layer],
    left: &[Layer],
    server: Option<&Path>,
) -> Result<Vec<(String, String)>> {
    let top = merged.iter().map(|layer| layer.index).max();
    // The layers that are left come from the top.
    if let Some(overlay) = left.iter().rfind(|layer| Some(layer.index) > top) {
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
pub(crate) fn chain(merged: &[Layer], left: &[Layer]) -> Vec<Layer> {
    let mut chain: Vec<Layer> = merged.iter().chain(left).cloned().collect();
    chain.sort_by_key(|layer| std::cmp::Reverse(layer.index));
    chain
}

/// What layers hold on disk together, if that is known of each.
pub(crate) fn bytes(layers: &[Layer]) -> Option<u64> {
    layers.iter().try_fold(0_u64, |sum, layer| sum.checked_add(layer.actual_size?))
}

/// Cancels the job, waits until it has ended, and lets QEMU forget it, so that another one can start on the disk.
///
/// It may be any job, whoever started it. What a commit has copied stays copied.
///
/// # Errors
/// Those of the commands; [`Error::Job`] if it was done before it was cancelled, or does not come to an end.
pub fn cancel<M: Monitor + ?Sized>(job: &Job<'_, M>) -> Result<()> {
    job.cancel()?;
    match job.wait(Goal::Concluded, Some(LONGEST_STEP), &mut |_| Watch::GoOn)? {
        Waited::Reached(_) => match job.take_result() {
            // A cancelled job is one that failed.
            Err(Error::Job { .. }) => Ok(()),
            Err(error) => Err(error),
            Ok(_) => Err(failed(job, "it was done before it was cancelled".into())),
        },
        Waited::Vanished => Ok(()),
        other => Err(stuck(job, &other)),
    }
}

/// A command and its arguments, as they are sent.
pub(crate) fn written<C: Command>(command: &C) -> Result<(&'static str, Value)> {
    let arguments = serde_json::to_value(command)
        .map_err(|source| Error::Request { command: C::NAME.to_owned(), source })?;
    Ok((C::NAME, arguments))
}

/// The commands that end a pending job, which is `kept` until it is dismissed, and close the layers that are given up.
pub(crate) fn end_of(job: &str, kept: bool, given_up: &[Layer]) -> Result<Vec<(&'static str, Value)>> {
    let finalize = written(&qmp::job_finalize { id: job.to_owned() });
    let dismiss = kept.then(|| written(&qmp::job_dismiss { id: job.to_owned() }));
    let closed = to_close(given_up).map(|node| written(&qmp::blockdev_del { node_name: node.clone() }));
    [Some(finalize), dismiss].into_iter().flatten().chain(closed).collect()
}

/// The error of a job that does not come to an end.
pub(crate) fn stuck<M: Monitor + ?Sized>(job: &Job<'_, M>, waited: &Waited) -> Error {
    let why = match waited {
        Waited::Stalled(_) => "it met an error and stands still".into(),
        Waited::Vanished => "it has vanished".into(),
        Waited::TimeUp(job) | Waited::Concluded(job) | Waited::Reached(job) | Waited::Stopped(job) => {
            format!("it is {:?}", job.status)
        }
    };
    failed(job, why)
}

pub(crate) fn failed<M: Monitor + ?Sized>(job: &Job<'_, M>, why: String) -> Error {
    Error::Job { id: job.id().to_owned(), why }
}

/// Closes nodes that have names of the user's: QEMU keeps them, and their files, open.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_of_different_disks_never_meet() {
        assert_eq!(job_prefix("merge", "vda"), "merge.vda.");
        let disks = ["a.b", "a-b", "a_b", "a", "a.", "a_2eb", "/a/b", "\u{e4}"];
        for one in disks {
            let prefix = job_prefix("merge", one);
            assert!(prefix.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b)), "{prefix}");
            for other in disks.into_iter().filter(|other| *other != one) {
                assert!(!job_prefix("merge", other).starts_with(&prefix), "{one} {other}");
            }
        }
    }
}
