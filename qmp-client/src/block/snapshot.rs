//! New overlays for several disks at one moment.

use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, io};

use serde_json::{Value, json};

use crate::block::graph::{Disk, Graph};
use crate::block::jobs::{Goal, Job, Waited, Watch};
use crate::block::procedure::unique;
use crate::error::{Error, Result};
use crate::qmp::monitor::{Execute, Monitor};

/// Puts a new qcow2 overlay on each of these disks, all in one transaction: either every guest write is
/// before all of the new overlays, or after all. The paths are absolute, and the same for QEMU as here.
///
/// Returns the disks as they are now. If anything fails, the files and nodes that were made are removed and
/// every disk is as it was.
///
/// # Errors
/// [`Error::Refused`] if a file exists already, has no absolute path or no folder, is named twice, or if a
/// disk is; the first error of QEMU's otherwise.
pub fn snapshot(monitor: &(impl Monitor + ?Sized), overlays: &[(&Disk, &Path)]) -> Result<Vec<Disk>> {
    check(overlays)?;
    let mut made = Vec::new();
    let done = make_all(monitor, overlays, &mut made);
    if let Err(error) = done {
        undo(monitor, &made);
        return Err(error);
    }
    let graph = Graph::ask(monitor)?;
    made.iter()
        .map(|overlay| {
            let found = graph.disks().iter().find(|d| d.active().node == overlay.node);
            found
                .cloned()
                .ok_or_else(|| refused(format!("QEMU shows no disk with the node {}", overlay.node)))
        })
        .collect()
}

/// An overlay as far as it was made.
struct Overlay {
    path: PathBuf,
    storage: String,
    node: String,
}

fn check(overlays: &[(&Disk, &Path)]) -> Result<()> {
    for (place, (disk, path)) in overlays.iter().enumerate() {
        let shown = path.display();
        let (before, _) = overlays.split_at(place);
        if before.iter().any(|(other, file)| other.name() == disk.name() || file == path) {
            return Err(refused(format!(
                "{}={shown} names a disk or a file that is named twice",
                disk.name()
            )));
        }
        if !path.is_absolute() || path.to_str().is_none() {
            return Err(refused(format!(
                "{shown} is no absolute path in UTF-8, and QEMU may run in another folder"
            )));
        }
        match fs::symlink_metadata(path) {
            Ok(_) => return Err(refused(format!("{shown} exists; a snapshot would overwrite it"))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(refused(format!("{shown}: {error}"))),
        }
        if !path.parent().is_some_and(Path::is_dir) {
            return Err(refused(format!("the folder of {shown} does not exist")));
        }
        backing_name(disk)?;
    }
    Ok(())
}

/// The name under which the new overlay finds the layer that is active now.
fn backing_name(disk: &Disk) -> Result<&str> {
    let file = disk.active().file.as_str();
    let address = file.find(':').is_some_and(|colon| !file[..colon].contains('/'));
    if file.starts_with("json:") || !(file.starts_with('/') || address) {
        return Err(refused(format!("'{file}' is no name by which an overlay elsewhere can find it")));
    }
    Ok(file)
}

fn make_all(
    monitor: &(impl Monitor + ?Sized),
    overlays: &[(&Disk, &Path)],
    made: &mut Vec<Overlay>,
) -> Result<()> {
    let mut actions = Vec::new();
    for (disk, path) in overlays {
        let active = disk.active();
        let name = unique();
        let (storage, node) = (format!("snap-{name}-file"), format!("snap-{name}"));
        made.push(Overlay { path: path.to_path_buf(), storage: storage.clone(), node: node.clone() });
        create(monitor, json!({"driver": "file", "filename": path, "size": 0}))?;
        add(monitor, json!({"driver": "file", "filename": path, "node-name": storage}))?;
        create(
            monitor,
            json!({
                "driver": "qcow2", "file": storage, "size": active.virtual_size,
                "backing-file": backing_name(disk)?, "backing-fmt": active.format,
            }),
        )?;
        // Its backing file is the disk that is in use: it must not be opened a second time.
        add(monitor, json!({"driver": "qcow2", "file": storage, "node-name": node, "backing": null}))?;
        actions.push(json!({"type": "blockdev-snapshot", "data": {"node": active.node, "overlay": node}}));
    }
    monitor.query("transaction", json!({"actions": actions})).map(drop)
}

fn create(monitor: &(impl Monitor + ?Sized), options: Value) -> Result<()> {
    let id = format!("create-{}", unique());
    monitor.query("blockdev-create", json!({"job-id": id, "options": options}))?;
    let job = Job::new(monitor, id);
    match job.wait(Goal::Concluded, Some(Duration::from_secs(600)), &mut |_| Watch::GoOn)? {
        Waited::Reached(_) | Waited::Vanished => job.take_result().map(drop),
        _ => Err(Error::Job { id: job.id().to_owned(), why: "it does not end".into() }),
    }
}

fn add(monitor: &(impl Monitor + ?Sized), options: Value) -> Result<()> {
    monitor.query("blockdev-add", options).map(drop)
}

/// Removes what was made. The first error has been told; what fails here was not made, or cannot be helped.
fn undo(monitor: &(impl Monitor + ?Sized), made: &[Overlay]) {
    for overlay in made {
        for node in [&overlay.node, &overlay.storage] {
            let _ = monitor.query("blockdev-del", json!({"node-name": node}));
        }
        // A file that QEMU holds is in use after all: the answer to the transaction was lost, perhaps.
        let query = "query-named-block-nodes";
        let held = monitor.query(query, json!({"flat": true})).map_or(true, |nodes| {
            let nodes = nodes.as_array().map_or(&[][..], Vec::as_slice);
            nodes.iter().any(|n| n["node-name"] == overlay.storage.as_str())
        });
        if !held {
            let _ = fs::remove_file(&overlay.path);
        }
    }
}

fn refused(why: String) -> Error {
    Error::Refused { why }
}
