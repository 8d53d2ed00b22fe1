//! Puts new overlays on several disks at one moment.
//!
//! Until the switch, QEMU has a job or a node whose name tells each new file and its maker. By these, the
//! remains of a killed client are found, see [`unfinished_snapshots`].

mod maker;
mod unfinished_snapshot;

use std::path::{Path, PathBuf};
use std::{fs, io};

use serde_json::{Value, json};

use crate::block::graph::{Disk, Graph, Layer};
use crate::block::jobs::{Goal, Job, LONGEST_STEP, Waited, Watch, failed, jobs, stuck};
use crate::error::{Error, Refusal, Result};
use crate::qmp::monitor::{Execute, Monitor};
use maker::Maker;
use unfinished_snapshot::remove_empty;
pub use unfinished_snapshot::{Undone, UnfinishedSnapshot, unfinished_snapshots};

/// Puts a new qcow2 overlay on each of these disks, all in one transaction: every guest write comes before all
/// of the new overlays, or after all. The paths must be absolute, and mean the same files to QEMU as here.
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
            found.cloned().ok_or_else(|| Error::NoSuchNode { node: overlay.node.clone() })
        })
        .collect()
}

/// Whether a layer was made by [`snapshot`], in this QEMU.
pub fn is_of_a_snapshot(layer: &Layer) -> bool {
    Maker::of_node(&layer.node).is_some()
}

/// An overlay as far as it was made.
struct Overlay {
    path: PathBuf,
    storage: String,
    node: String,
    /// Whether QEMU has created the file; before that, a file of this name is somebody else's.
    is_created: bool,
}

fn check(overlays: &[(&Disk, &Path)]) -> Result<()> {
    for (place, (disk, path)) in overlays.iter().enumerate() {
        let file = path.to_path_buf();
        let (before, _) = overlays.split_at(place);
        if before.iter().any(|(other, file)| other.name() == disk.name() || file == path) {
            return Err(Refusal::NamedTwice { disk: disk.name().to_owned(), file }.into());
        }
        if !path.is_absolute() {
            return Err(Refusal::RelativePath { file }.into());
        }
        if path.to_str().is_none() {
            return Err(Refusal::NotUtf8 { file }.into());
        }
        match fs::symlink_metadata(path) {
            Ok(_) => return Err(Refusal::Exists { file }.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(Error::File { file, source }),
        }
        if !path.parent().is_some_and(Path::is_dir) {
            return Err(Refusal::NoFolder { file }.into());
        }
        Disk::is_told(disk.active())?;
        backing_name(disk)?;
    }
    Ok(())
}

/// The name under which the new overlay finds the layer that is active now.
fn backing_name(disk: &Disk) -> Result<&str> {
    let file = disk.active().file.as_str();
    let address = file.find(':').is_some_and(|colon| !file[..colon].contains('/'));
    if file.starts_with("json:") || !(file.starts_with('/') || address) {
        return Err(Refusal::NoNameElsewhere { file: file.to_owned() }.into());
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
        let maker = Maker::next();
        let (storage, node) = (maker.storage(), maker.node());
        // The names were looked at before: QMP carries them.
        let id = maker.job(&path.to_string_lossy());
        let (file, names) = (path.to_path_buf(), (storage.clone(), node.clone()));
        made.push(Overlay { path: file, storage: names.0, node: names.1, is_created: false });
        let job = create(monitor, &id, json!({"driver": "file", "filename": path, "size": 0}))?;
        if let Some(last) = made.last_mut() {
            last.is_created = true;
        }
        add(monitor, json!({"driver": "file", "filename": path, "node-name": storage}))?;
        // Do this not earlier: at every moment a job or a node must tell what was made.
        job.take_result()?;
        let options = json!({
            "driver": "qcow2", "file": storage, "size": active.virtual_size,
            "backing-file": backing_name(disk)?, "backing-fmt": active.format,
        });
        create(monitor, &id, options)?.take_result()?;
        // The backing file is the disk in use, and must not be opened a second time.
        add(monitor, json!({"driver": "qcow2", "file": storage, "node-name": node, "backing": null}))?;
        actions.push(json!({"type": "blockdev-snapshot", "data": {"node": active.node, "overlay": node}}));
    }
    // Check that the files still have their names: a disk must not switch to a file that was removed meanwhile.
    for Overlay { path, .. } in made.iter() {
        fs::symlink_metadata(path).map_err(|source| Error::File { file: path.clone(), source })?;
    }
    monitor.query("transaction", json!({"actions": actions})).map(drop)
}

/// Lets QEMU create something. Its job is kept, because its name tells for whom it was done; a failed one is
/// dismissed.
fn create<'m, M: Monitor + ?Sized>(monitor: &'m M, id: &str, options: Value) -> Result<Job<'m, M>> {
    monitor.query("blockdev-create", json!({"job-id": id, "options": options}))?;
    let job = Job::new(monitor, id);
    match job.wait(Goal::Concluded, Some(LONGEST_STEP), &mut |_| Watch::GoOn)? {
        Waited::Reached(state) if state.error.is_none() => Ok(job),
        Waited::Reached(_) | Waited::Vanished => {
            job.take_result()?;
            Err(failed(&job, "it was dismissed by another client".into()))
        }
        other => Err(stuck(&job, &other)),
    }
}

fn add(monitor: &(impl Monitor + ?Sized), options: Value) -> Result<()> {
    monitor.query("blockdev-add", options).map(drop)
}

/// Removes what was made. Errors are ignored: the first error is the one to report, and what fails here was not
/// made, or cannot be removed.
fn undo(monitor: &(impl Monitor + ?Sized), made: &[Overlay]) {
    for overlay in made {
        let close = |node: &str| {
            let _ = monitor.query("blockdev-del", json!({"node-name": node}));
        };
        close(&overlay.node);
        // If QEMU keeps the overlay's node, it is in use after all: perhaps the answer to the transaction was
        // lost.
        let query = "query-named-block-nodes";
        let held = monitor.query(query, json!({"flat": true})).map_or(true, |nodes| {
            let nodes = nodes.as_array().map_or(&[][..], Vec::as_slice);
            nodes.iter().any(|n| n["node-name"] == overlay.node.as_str())
        });
        // Remove the file first. As long as it exists, a node or a job tells of it, even if this client is
        // killed here.
        if overlay.is_created && !held {
            let _ = remove_empty(&overlay.path);
        }
        close(&overlay.storage);
        let kept = jobs(monitor).unwrap_or_default().into_iter();
        for job in kept.filter(|job| Maker::of_job(&job.id).is_some_and(|(m, _)| m.node() == overlay.node)) {
            let _ = Job::new(monitor, job.id).take_result();
        }
    }
}
