//! The plan of a merge, and the refusal of what this host sees to be harmful or futile.

use super::bytes::{PlannedBytes, free_space, planned_bytes};
use super::{Plan, Request, checks, obstacle};
use crate::block::graph::{Disk, Graph, Layer, Range};
use crate::block::merge::{Direction, MergeOptions, Procedure};
use crate::error::Result;
use crate::live::discover::{Files, Searched, search};

/// Plans a commit.
pub(super) fn commit(
    files: &Files,
    graph: &Graph,
    disk: &Disk,
    range: &Range<'_>,
    request: &Request,
) -> Result<(Procedure, Plan)> {
    let is_merged = |layer: &&Layer| layer.index > range.base.index && layer.index <= range.top.index;
    let merged: Vec<Layer> = disk.layers().iter().filter(is_merged).cloned().collect();
    checks::bitmaps(&merged, request.drop_bitmaps)?;
    checks::snapshots(&merged, request.allow_snapshot_change)?;
    checks::same_files(files, disk, is_named(request))?;
    let commit = Procedure::commit(disk, range, options(files, request, request.drop_bitmaps))?;
    let touched: Vec<&Layer> = merged.iter().chain([range.base]).collect();
    checks::plaintext(&merged, range.base, request.allow_plaintext)?;
    let searched = search(files, graph, disk, &touched, &request.scan, request.allow_shared_base)?;
    let leaves = obstacle::of_merged(files, disk, range.base, &merged, &searched.users, request.no_lock);
    let merges_active = range.above.is_none();
    if merges_active && !request.keep_overlay && !request.allow_stale {
        checks::old_active(&leaves, request.delete)?;
    }
    let plan = Plan {
        disk: disk.clone(),
        job: commit.job_id().to_owned(),
        direction: Direction::Down,
        base: Some(range.base.clone()),
        relink: range.above.map(|above| (above.clone(), commit.backing_file().map(str::to_owned))),
        end: request.end(merges_active),
        delete: request.delete,
        leaves,
        bytes: planned_bytes(disk, files, &merged, range.base),
        room: free_space(files, range.base),
        searched,
        commands: commit.commands()?,
        merged,
    };
    Ok((commit, plan))
}

/// Plans a pull.
pub(super) fn pull(
    files: &Files,
    disk: &Disk,
    base: Option<&Layer>,
    request: &Request,
) -> Result<(Procedure, Plan)> {
    // Bitmaps of the layers that are left are asked about below.
    let pull = Procedure::pull(disk, base, options(files, request, true))?;
    checks::bitmaps(pull.merged(), request.drop_bitmaps)?;
    checks::snapshots(std::slice::from_ref(disk.active()), request.allow_snapshot_change)?;
    checks::plaintext(pull.merged(), disk.active(), request.allow_plaintext)?;
    checks::same_files(files, disk, is_named(request))?;
    let plan = Plan {
        disk: disk.clone(),
        job: pull.job_id().to_owned(),
        direction: Direction::Up,
        base: base.cloned(),
        merged: pull.merged().to_vec(),
        relink: Some((disk.active().clone(), pull.backing_file().map(str::to_owned))),
        end: request.end(false),
        delete: false,
        leaves: Vec::new(),
        // Zeros stay what no layer has, or take no room.
        bytes: PlannedBytes { zero: 0, ..planned_bytes(disk, files, pull.merged(), disk.active()) },
        room: free_space(files, disk.active()),
        searched: Searched::default(),
        commands: pull.commands()?,
    };
    Ok((pull, plan))
}

/// Whether the names of files that QEMU tells need not mean the same here.
fn is_named(request: &Request) -> bool {
    request.backing_file.is_some() || request.state_dir.is_some()
}

fn options(files: &Files, request: &Request, drop_bitmaps: bool) -> MergeOptions {
    MergeOptions {
        backing_file: request.backing_file.clone(),
        speed: request.speed,
        drop_bitmaps,
        nbd_socket: request.nbd_socket.clone().or_else(|| files.nbd_server()),
    }
}
