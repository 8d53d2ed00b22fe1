//! Checks before a merge begins that nothing will make it fail, or do harm, half-way.

use qapi::qmp;
use serde_json::json;

use super::{Direction, Procedure};
use crate::block::graph::{Disk, Layer};
use crate::block::ids::{MERGES, job_prefix};
use crate::block::jobs::jobs;
use crate::error::{Error, Refusal, Result};
use crate::qmp::monitor::{Execute, Monitor};

/// Checks that need only the graph.
pub(super) fn plan(merge: &Procedure) -> Result<()> {
    let chain = merge.chain();
    ownership(&chain)?;
    let takes_part = |layer: &&Layer| layer.index >= merge.span.base && layer.index <= merge.span.top + 1;
    chain.iter().filter(takes_part).try_for_each(Disk::is_told)?;
    if let (Direction::Down, Some(top)) = (merge.direction, merge.merged.first()) {
        sizes(merge, top)?;
    }
    bitmaps(merge)
}

/// Refuses a commit after which the disk, or a layer above, would show other bytes, or have another size.
fn sizes(merge: &Procedure, top: &Layer) -> Result<()> {
    let base = &merge.receiver;
    let driver = base.protocol.as_deref().unwrap_or(&base.format);
    if merge.grows() && driver != "file" {
        return refuse(Refusal::CannotGrow {
            file: base.file.clone(),
            size: base.virtual_size,
            needed: top.virtual_size,
            driver: driver.to_owned(),
        });
    }
    let is_short = top.virtual_size < base.virtual_size;
    match &merge.overlay {
        // QEMU shows base's old bytes where top showed zeros.
        Some(above) if is_short && top.virtual_size < above.virtual_size => {
            refuse(Refusal::ShortTop { top: top.file.clone(), base: base.file.clone() })
        }
        // The trial write of the overlay's header would write the wrong format.
        Some(above) if above.format != top.format => {
            refuse(Refusal::FormatsDiffer { overlay: above.file.clone(), top: top.file.clone() })
        }
        None if is_short => refuse(Refusal::DiskWouldGrow { base: base.file.clone(), top: top.file.clone() }),
        _ => Ok(()),
    }
}

/// Refuses a disk that belongs to libvirt.
fn ownership(chain: &[Layer]) -> Result<()> {
    match chain.iter().find(|layer| layer.node.starts_with("libvirt-")) {
        Some(layer) => Err(Error::Managed { node: layer.node.clone() }),
        None => Ok(()),
    }
}

/// Refuses to lose the persistent bitmaps of merged layers.
fn bitmaps(merge: &Procedure) -> Result<()> {
    let names: Vec<_> = merge.merged.iter().flat_map(|layer| &layer.bitmaps).cloned().collect();
    if merge.options.drop_bitmaps || names.is_empty() { Ok(()) } else { refuse(Refusal::Bitmaps { names }) }
}

/// Refuses while the guest is being migrated, and while another merge of this disk exists, in either direction.
pub(super) fn circumstances(monitor: &(impl Monitor + ?Sized), disk: &str) -> Result<()> {
    if let Some(status) = known(monitor, "query-status")? {
        let status = status["status"].as_str().unwrap_or_default().to_owned();
        if ["inmigrate", "finish-migrate", "postmigrate", "save-vm", "restore-vm"].contains(&&*status) {
            return refuse(Refusal::GuestMoves { status });
        }
    }
    if let Some(migration) = known(monitor, "query-migrate")? {
        let status = migration["status"].as_str().unwrap_or("none").to_owned();
        if !["none", "completed", "failed", "cancelled"].contains(&&*status) {
            return refuse(Refusal::Migration { status });
        }
    }
    let own = MERGES.map(|kind| job_prefix(kind, disk));
    match jobs(monitor)?.into_iter().find(|job| own.iter().any(|prefix| job.id.starts_with(prefix))) {
        Some(job) => refuse(Refusal::JobExists { job: job.id, status: job.status }),
        None => Ok(()),
    }
}

/// Tries whether the overlay above top can be switched at the end, by letting QEMU write its header with the
/// name that it already has; and whether base can be flushed before that.
///
/// QEMU 10.0.2 opens that file for writing only at the end of the job, and crashes if it cannot. The trial
/// needs the same rights, but fails with an error.
pub(super) fn overlay(merge: &Procedure, monitor: &(impl Monitor + ?Sized)) -> Result<()> {
    if merge.grows() && known(monitor, "query-status")?.is_none() {
        return refuse(Refusal::GrowsUnflushed { base: merge.receiver.file.clone() });
    }
    let same = same_name(merge).ok_or(Refusal::NoBackingName)?;
    monitor.execute(&same).map(drop)
}

/// The command that writes the present backing name of the overlay above top again. `None` if it has no name,
/// if there is no such overlay, and for a pull, which has the overlay open for writing anyway.
pub(super) fn same_name(merge: &Procedure) -> Option<qmp::change_backing_file> {
    let above = merge.overlay.as_ref().filter(|_| merge.direction == Direction::Down)?;
    Some(qmp::change_backing_file {
        device: merge.root.clone(),
        image_node_name: above.node.clone(),
        backing_file: above.backing.as_ref()?.name.clone(),
    })
}

/// The answer to a query that a storage daemon does not know: `None` then.
fn known(monitor: &(impl Monitor + ?Sized), command: &str) -> Result<Option<serde_json::Value>> {
    match monitor.query(command, json!({})) {
        Ok(answer) => Ok(Some(answer)),
        Err(Error::Command { failure, .. }) if failure.class == "CommandNotFound" => Ok(None),
        Err(error) => Err(error),
    }
}

fn refuse(reason: Refusal) -> Result<()> {
    Err(reason.into())
}
