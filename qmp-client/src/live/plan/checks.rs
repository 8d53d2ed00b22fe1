//! Checks from this host, before a live merge starts, that it will not be harmful or futile.

use super::obstacle::{Leaves, Obstacle};
use super::{Plan, Room};
use crate::block::graph::{Disk, Graph, Layer};
use crate::error::Result;
use crate::live::discover::Files;
use crate::live::hindrance::Hindrance;
use crate::qmp::monitor::Monitor;

/// Refuses to lose the persistent bitmaps of layers that are given up.
pub(super) fn bitmaps(merged: &[Layer], drop: bool) -> Result<()> {
    let names: Vec<_> = merged.iter().flat_map(|layer| layer.bitmaps.clone()).collect();
    if drop || names.is_empty() {
        return Ok(());
    }
    Err(Hindrance::Bitmaps { names }.into())
}

/// Refuses to change what the internal snapshots of these layers show. What a snapshot does not hold itself it reads from
/// the layers below, which change under a merged layer, and are gone under an active one that took in their data.
pub(super) fn snapshots(layers: &[Layer], allowed: bool) -> Result<()> {
    let Some(layer) = layers.iter().find(|layer| layer.snapshots > 0 && !allowed) else { return Ok(()) };
    Err(Hindrance::Snapshots { file: layer.file.clone(), count: layer.snapshots }.into())
}

/// Refuses to write the data of an encrypted layer to an image that is not encrypted.
pub(super) fn plaintext(from: &[Layer], into: &Layer, allowed: bool) -> Result<()> {
    let Some(layer) = from.iter().find(|layer| layer.encrypted && !into.encrypted && !allowed) else {
        return Ok(());
    };
    Err(Hindrance::Plaintext { from: layer.file.clone(), into: into.file.clone() }.into())
}

/// Refuses a pivot after which the old active image would stay as it is: bootable, with old data.
pub(super) fn old_active(leaves: &[Leaves], delete: bool) -> Result<()> {
    let Some(active) = leaves.first() else { return Ok(()) };
    let stays = |obstacle: &&Obstacle| {
        // A layer that will be removed need not be understood.
        !delete || matches!(obstacle, Obstacle::Shared { .. }) || obstacle.hides(&active.layer)
    };
    let Some(obstacle) = active.obstacle.as_ref().filter(stays) else { return Ok(()) };
    Err(Hindrance::StaleActive { file: active.layer.file.clone(), obstacle: obstacle.clone() }.into())
}

/// Refuses a chain whose names lead to other files here than in QEMU, unless the name to be written is given.
pub(super) fn same_files(files: &Files, disk: &Disk, named: bool) -> Result<()> {
    let strangers = files.strangers(disk);
    let Some(first) = strangers.first().filter(|_| !named) else { return Ok(()) };
    Err(Hindrance::NotHere { file: first.file.clone() }.into())
}

/// Refuses while another job works on the disk.
pub(super) fn no_other_job(monitor: &(impl Monitor + ?Sized), graph: &Graph, disk: &Disk) -> Result<()> {
    let jobs = graph.jobs(monitor)?;
    let mut theirs = jobs.iter().filter(|(_, of)| of.is_some_and(|of| of.name() == disk.name()));
    let Some((job, _)) = theirs.next() else { return Ok(()) };
    let disk = disk.name().to_owned();
    Err(Hindrance::JobExists { job: job.id.clone(), kind: job.kind.clone(), disk }.into())
}

/// Whether the receiving file system has room; refuses where it surely has too little.
pub(super) fn room(plan: &Plan) -> Result<Room> {
    let Some((folder, free)) = &plan.room else { return Ok(Room::Unknown) };
    // Count data that has no place in the receiving image yet. Zeros may be there already.
    let needed = if plan.bytes.counted { plan.bytes.new } else { 0 };
    if needed > *free {
        let (file, folder) = (plan.receiver().file.clone(), folder.clone());
        return Err(Hindrance::NoSpace { file, needed, free: *free, folder }.into());
    }
    Ok(if plan.growth() > *free { Room::Scarce } else { Room::Enough })
}
