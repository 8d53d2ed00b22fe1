//! Undoes the remains of a client that was killed before its snapshot was switched: an empty file, nodes that
//! hold it, a job that created it. No disk writes to it.

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use qcow2::image::{ImageFormat, Qcow2};
use qcow2::storage::{Access, FileKind, OsHost, Place, Storage};
use serde_json::json;

use super::maker::Maker;
use crate::block::flush::user_of;
use crate::block::graph::{Graph, are_alone};
use crate::block::jobs::{Goal, Job, LONGEST_STEP, Waited, Watch, jobs, stuck};
use crate::error::{Error, Result};
use crate::qmp::monitor::{Execute, Monitor};

/// A new overlay that belongs to no disk, and whose client is gone.
#[derive(Clone, Debug)]
pub struct UnfinishedSnapshot {
    /// Its file, by the name that QEMU has for it.
    pub file: PathBuf,
    /// The nodes that hold it, the upper one first.
    nodes: Vec<String>,
    /// The jobs that created it, as far as QEMU keeps them.
    jobs: Vec<String>,
}

/// Finds the new overlays of clients that were killed between the creation of a file and the switch. Overlays
/// of clients that still run on this host do not count.
///
/// # Errors
/// Those of the queries.
pub fn unfinished_snapshots(monitor: &(impl Monitor + ?Sized)) -> Result<Vec<UnfinishedSnapshot>> {
    let mut found: BTreeMap<Maker, Trace> = BTreeMap::new();
    for job in jobs(monitor)? {
        if let Some((maker, file)) = Maker::of_job(&job.id) {
            let trace = found.entry(maker).or_default();
            trace.jobs.push(job.id);
            trace.file = Some(file);
        }
    }
    let nodes = monitor.query("query-named-block-nodes", json!({"flat": true}))?;
    for node in nodes.as_array().into_iter().flatten() {
        let Some(name) = node["node-name"].as_str() else { continue };
        let Some((maker, is_storage)) = Maker::of_node(name) else { continue };
        let trace = found.entry(maker).or_default();
        if is_storage {
            trace.file = trace.file.take().or_else(|| node["file"].as_str().map(str::to_owned));
        }
        trace.nodes.push(name.to_owned());
    }
    found.retain(|maker, _| !maker.lives());
    if found.is_empty() {
        return Ok(Vec::new());
    }
    // After the transaction the nodes belong to a disk. If that disk was unplugged since, they still have a
    // backing node.
    let pairs: Vec<_> = found.keys().map(|maker| (maker.node(), maker.storage())).collect();
    let alone = are_alone(monitor, &pairs)?;
    // As long as the job exists, the overlay cannot belong to a disk; and the job may still use the file's
    // node.
    let is_left = |(trace, alone): (Trace, bool)| (alone || !trace.jobs.is_empty()).then_some(trace);
    let left = found.into_values().zip(alone).filter_map(is_left);
    Ok(left.filter_map(Trace::unfinished).collect())
}

/// What QEMU shows of one new overlay.
#[derive(Default)]
struct Trace {
    file: Option<String>,
    nodes: Vec<String>,
    jobs: Vec<String>,
}

impl Trace {
    fn unfinished(mut self) -> Option<UnfinishedSnapshot> {
        // The node that holds the file has the longer name, so it sorts behind the overlay's node.
        self.nodes.sort_by_key(String::len);
        Some(UnfinishedSnapshot { file: self.file?.into(), nodes: self.nodes, jobs: self.jobs })
    }
}

impl UnfinishedSnapshot {
    /// Undoes it: removes the file, closes the nodes, and lets QEMU forget the jobs. The order matters: a call
    /// that is killed in between leaves a trace for the next one.
    ///
    /// The names of nodes and files come from QEMU, and the caller may have more rights than QEMU. So the file
    /// is removed only if it belongs to QEMU's user, lies in the folder of a disk's active image or in one of
    /// `folders`, is open in QEMU if there is a node for it, and is empty.
    ///
    /// # Errors
    /// Those of the commands; [`Error::File`] if the file cannot be looked at or removed.
    pub fn undo<M: Monitor + ?Sized>(&self, monitor: &M, folders: &[PathBuf]) -> Result<Undone> {
        // A job that is still creating the file uses the node below.
        for id in &self.jobs {
            let job = Job::new(monitor, id.clone());
            match job.wait(Goal::Concluded, Some(LONGEST_STEP), &mut |_| Watch::GoOn)? {
                Waited::Reached(_) => {}
                // Its client is alive after all, in another container or on another host, and has taken the
                // job's result.
                Waited::Vanished => return Ok(Undone::UnderWay),
                other => return Err(stuck(&job, &other)),
            }
        }
        let is_qemus = self.is_made_by(monitor, folders)?;
        let (storage, overlays): (Vec<_>, Vec<_>) =
            self.nodes.iter().partition(|node| matches!(Maker::of_node(node), Some((_, true))));
        let close = |node: &String| monitor.query("blockdev-del", json!({"node-name": node})).map(drop);
        overlays.into_iter().try_for_each(close)?;
        let failed = |source| Error::File { file: self.file.clone(), source };
        let removed = is_qemus && remove_empty(&self.file).map_err(failed)?;
        storage.into_iter().try_for_each(close)?;
        for id in &self.jobs {
            match Job::new(monitor, id.clone()).take_result() {
                Ok(_) | Err(Error::Job { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let is_there = self.file.symlink_metadata().is_ok();
        Ok(match removed {
            true => Undone::Removed,
            false if is_there => Undone::FileStays,
            false => Undone::Closed,
        })
    }

    /// Whether the file is one that this QEMU has made for a snapshot, as far as the system shows.
    fn is_made_by<M: Monitor + ?Sized>(&self, monitor: &M, folders: &[PathBuf]) -> Result<bool> {
        let graph = Graph::ask(monitor)?;
        let Some((process, meta)) = monitor.peer().zip(self.file.symlink_metadata().ok()) else {
            return Ok(false);
        };
        let cwd = fs::read_link(format!("/proc/{process}/cwd")).unwrap_or_default();
        let active = graph.disks().iter().map(|disk| cwd.join(&disk.active().file));
        let beside = active.filter_map(|file| file.parent().map(Path::to_owned));
        let real = |folder: &Path| folder.canonicalize().ok();
        let here = self.file.parent().and_then(real);
        let lies_there = beside.chain(folders.iter().cloned()).any(|f| here.is_some() && real(&f) == here);
        let is_open = self.nodes.is_empty() || has_open(process, &meta);
        Ok(lies_there && is_open && user_of(process) == Some(meta.uid()))
    }
}

/// The result for an unfinished snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Undone {
    /// The file is removed, and QEMU knows nothing of it.
    Removed,
    /// There was no file; QEMU knows nothing of it.
    Closed,
    /// QEMU knows nothing of it any more. The file stays, because it is not empty, or it is not certain that
    /// this QEMU made it.
    FileStays,
    /// Nothing was done: its client is still working on it.
    UnderWay,
}

/// Whether a process can be seen to have this file open.
fn has_open(process: u32, file: &Metadata) -> bool {
    let entries = fs::read_dir(format!("/proc/{process}/fd")).into_iter().flatten().flatten();
    let mut open = entries.filter_map(|entry| fs::metadata(entry.path()).ok());
    open.any(|open| (open.dev(), open.ino()) == (file.dev(), file.ino()))
}

/// Removes a file of length zero or an empty image, unless somebody has it open or it is gone.
pub(super) fn remove_empty(path: &Path) -> io::Result<bool> {
    let host = &OsHost;
    let removed = Place::named(host, path).and_then(|place| {
        let file = place.open(host, Access::Read)?;
        if file.stat()?.kind != FileKind::Regular || file.used_by_others()?.is_some() {
            return Ok(false);
        }
        if !holds_nothing(path, &*file)? || !place.unlink_file(host, &*file)? {
            return Ok(false);
        }
        place.sync(host).map(|()| true)
    });
    match removed {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        removed => removed,
    }
}

/// Whether a file has length zero, or is a qcow2 image with an empty L1 table and no snapshots.
fn holds_nothing(path: &Path, file: &dyn Storage) -> io::Result<bool> {
    if file.size()? == 0 {
        return Ok(true);
    }
    if !matches!(ImageFormat::detect(path, file), Ok(ImageFormat::Qcow2)) {
        return Ok(false);
    }
    // A snapshot does not make images that cannot be decoded.
    let Ok(cluster0) = Qcow2::read_cluster0(path, file) else { return Ok(false) };
    let header = &cluster0.header;
    if header.snapshots != 0 || header.has_data_file() {
        return Ok(false);
    }
    let (mut at, mut left) = (header.l1_offset.get(), header.l1_bytes());
    let mut buffer = vec![0; 1 << 16];
    while left > 0 {
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        let Some(part) = buffer.get_mut(..len) else { break };
        file.read_exact_or_zero(part, at)?;
        if part.iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
        (at, left) = (at.saturating_add(len as u64), left - len as u64);
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::qmp::replay::Replay;

    #[test]
    fn only_what_a_dead_client_has_left_and_no_disk_has_is_found() {
        let living = Maker::next();
        let jobs = json!([{
            "id": "create-ffffffff.1.0-_2fvm_2fa", "type": "create", "status": "concluded",
            "current-progress": 0, "total-progress": 0,
        }]);
        let names = [
            ("snap-ffffffff.1.1-file", "/vm/b"),
            ("snap-ffffffff.1.1", "json:{}"),
            ("snap-ffffffff.1.2-file", "/vm/c"),
            ("snap-ffffffff.1.2", "/vm/c"),
            ("snap-ffffffff.1.3-file", "/vm/d"),
            ("snap-ffffffff.1.3", "/vm/d"),
            (&living.storage(), "/vm/e"),
            ("theirs", "/vm/f"),
        ];
        let nodes = names.map(|(name, file)| json!({"node-name": name, "file": file}));
        let drivers = names
            .iter()
            .zip(1..)
            .map(|((name, _), id)| json!({"id": id, "name": name, "type": "block-driver"}));
        let disk = json!({"id": 90, "name": "", "type": "block-backend"});
        let edge =
            |parent: u32, child: u32, name: &str| json!({"parent": parent, "child": child, "name": name});
        // The second was unplugged, the third is a disk's.
        let edges = [
            edge(2, 1, "file"),
            edge(4, 3, "file"),
            edge(4, 8, "backing"),
            edge(6, 5, "file"),
            edge(90, 6, "root"),
        ];
        let graph = json!({"nodes": drivers.chain([disk]).collect::<Vec<_>>(), "edges": edges});
        let answers = [
            ("query-jobs", jobs),
            ("query-block-jobs", json!([])),
            ("query-named-block-nodes", json!(nodes)),
            ("x-debug-query-block-graph", graph),
        ];
        let told = answers.iter().zip(1..).map(|((name, value), id)| {
            format!("{}\n{}\n", json!({"execute": name, "id": id}), json!({"return": value, "id": id}))
        });
        let found = unfinished_snapshots(&Replay::of(&told.collect::<String>())).unwrap();
        let files: Vec<_> = found.iter().map(|left| left.file.to_str().unwrap()).collect();
        assert_eq!(files, ["/vm/a", "/vm/b"]);
        assert_eq!(found[1].nodes, ["snap-ffffffff.1.1", "snap-ffffffff.1.1-file"]);
    }

    #[test]
    fn only_files_that_hold_nothing_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("empty"), "").unwrap();
        fs::write(at("data"), "x").unwrap();
        fs::write(at("broken"), b"QFI\xfb\0\0\0\x03").unwrap();
        symlink(at("empty"), at("link")).unwrap();
        for (name, removed) in
            [("data", false), ("broken", false), ("gone", false), ("empty", true), ("empty", false)]
        {
            assert_eq!(remove_empty(&at(name)).unwrap(), removed, "{name}");
        }
        assert!(remove_empty(&at("link")).is_err(), "a link is not followed");
        assert!(at("data").exists() && at("broken").exists());
    }
}
