//! What is asked before a merge begins: all that would make it fail, or do harm, half-way.

use qapi::qmp;
use serde_json::json;

use super::Commit;
use crate::block::flush::Means;
use crate::block::graph::Layer;
use crate::block::jobs::jobs;
use crate::block::procedure::job_prefix;
use crate::error::{Error, Result};
use crate::qmp::monitor::{Execute, Monitor};

/// Checks that need only the graph.
pub(super) fn plan(commit: &Commit) -> Result<()> {
    let refuse = |why: String| Err(Error::Refused { why });
    let (base, top) = (&commit.base, &commit.top);
    ownership(commit.nodes())?;
    let grows = base.virtual_size < top.virtual_size;
    let driver = base.protocol.as_deref().unwrap_or(&base.format);
    if grows && driver != "file" {
        return refuse(format!(
            "{} has {} bytes and must grow to {}, which the driver {driver} cannot do",
            base.file, base.virtual_size, top.virtual_size
        ));
    }
    match &commit.above {
        // QEMU shows base's old bytes where top showed zeros.
        Some(above) if top.virtual_size < above.virtual_size && top.virtual_size < base.virtual_size => {
            return refuse(format!(
                "{} is shorter than the overlay above it and than {}: the bytes of base past its end would \
                 show; stop the guest and merge offline",
                top.file, base.file
            ));
        }
        // The check that the overlay can be written would write the wrong format.
        Some(above) if above.format != top.format => {
            return refuse(format!("{} and {} differ in format", above.file, top.file));
        }
        None if top.virtual_size < base.virtual_size => {
            return refuse(format!(
                "{} is longer than {}: the disk would change its size",
                base.file, top.file
            ));
        }
        _ => {}
    }
    bitmaps(&commit.merged, commit.options.drop_bitmaps)
}

/// Refuses a disk that belongs to libvirt.
pub(crate) fn ownership<'a>(mut nodes: impl Iterator<Item = &'a String>) -> Result<()> {
    match nodes.find(|node| node.starts_with("libvirt-")) {
        Some(node) => Err(Error::Managed { node: node.clone() }),
        None => Ok(()),
    }
}

/// Refuses to lose the persistent bitmaps of layers that are given up.
pub(crate) fn bitmaps(given_up: &[Layer], may_go: bool) -> Result<()> {
    let bitmaps: Vec<_> = given_up.iter().flat_map(|l| &l.bitmaps).cloned().collect();
    if may_go || bitmaps.is_empty() {
        return Ok(());
    }
    Err(Error::Refused { why: format!("these persistent bitmaps would be lost: {}", bitmaps.join(", ")) })
}

/// Checks that need QEMU. They change nothing that a guest sees, and leave it running.
pub(super) fn ask(commit: &Commit, monitor: &(impl Monitor + ?Sized)) -> Result<Option<Means>> {
    circumstances(monitor, &commit.disk)?;
    if commit.is_active() {
        return Ok(None);
    }
    if commit.grows_base() && known(monitor, "query-status")?.is_none() {
        return Err(Error::Refused {
            why: format!(
                "{} must grow, and then this storage daemon cannot make it durable before the switch; merge it with the \
                 active layer, or offline",
                commit.base.file
            ),
        });
    }
    guard(commit, monitor)?;
    Means::find(monitor, &commit.base.node, commit.options.nbd_socket.as_deref()).map(Some)
}

/// Refuses while the guest is being moved, and while a merge of this disk is there, in either direction.
pub(crate) fn circumstances(monitor: &(impl Monitor + ?Sized), disk: &str) -> Result<()> {
    let refuse = |why: String| Err(Error::Refused { why });
    if let Some(status) = known(monitor, "query-status")? {
        let status = status["status"].as_str().unwrap_or_default().to_owned();
        if ["inmigrate", "finish-migrate", "postmigrate", "save-vm", "restore-vm"].contains(&&*status) {
            return refuse(format!("the guest is being moved or saved ({status})"));
        }
    }
    if let Some(migration) = known(monitor, "query-migrate")? {
        let status = migration["status"].as_str().unwrap_or("none").to_owned();
        if !["none", "completed", "failed", "cancelled"].contains(&&*status) {
            return refuse(format!("a migration is under way ({status})"));
        }
    }
    let own = ["merge", "pull"].map(|kind| job_prefix(kind, disk));
    match jobs(monitor)?.into_iter().find(|job| own.iter().any(|prefix| job.id.starts_with(prefix))) {
        Some(job) => refuse(format!("the job {} of this disk is {:?}; end it first", job.id, job.status)),
        None => Ok(()),
    }
}

/// Has QEMU write the header of the overlay above top with the name that it has already.
///
/// QEMU 10.0.2 opens that file for writing only at the end of the job, and crashes if it cannot. This needs
/// the same, and fails with an error.
fn guard(commit: &Commit, monitor: &(impl Monitor + ?Sized)) -> Result<()> {
    let Some(same) = same_name(commit) else {
        return Err(Error::Refused {
            why: "the header of the overlay above top names no backing file".into(),
        });
    };
    monitor.execute(&same).map(drop)
}

/// The command that gives the overlay above top the backing name that it has; none where it has no name, or
/// where there is no such overlay.
pub(super) fn same_name(commit: &Commit) -> Option<qmp::change_backing_file> {
    let above = commit.above.as_ref()?;
    Some(qmp::change_backing_file {
        device: commit.root.clone(),
        image_node_name: above.node.clone(),
        backing_file: above.backing.as_ref()?.name.clone(),
    })
}

/// The answer to a question that a storage daemon does not know.
fn known(monitor: &(impl Monitor + ?Sized), command: &str) -> Result<Option<serde_json::Value>> {
    match monitor.query(command, json!({})) {
        Ok(answer) => Ok(Some(answer)),
        Err(Error::Command { failure, .. }) if failure.class == "CommandNotFound" => Ok(None),
        Err(error) => Err(error),
    }
}
