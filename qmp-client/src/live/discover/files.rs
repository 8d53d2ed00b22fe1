//! Finds the files that a QEMU has open, and whether the same names lead to the same files here.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::block::graph::{Disk, Layer};
use crate::block::servers::nbd_server;
use crate::qmp::connection::Connection;
use qcow2::storage::{FileId, Host, OsHost};

/// The open files of a QEMU, as far as they can be seen.
#[derive(Debug, Default)]
pub struct Files {
    /// The process, if it runs on this host.
    process: Option<u32>,
    /// The files that it has open, by their names in its own view; `None` if they may not be read.
    open: Option<Vec<(PathBuf, FileId)>>,
}

/// Whether a layer's file can be reached from here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// It is this file.
    Here(PathBuf, FileId),
    /// A file of that name exists here, but QEMU has another one open: it may run in a container.
    Other,
    /// There is no such file here: it is on another host, or no file at all.
    Elsewhere,
}

impl Files {
    /// The files of the process that answers a monitor.
    pub(crate) fn of(monitor: &Connection) -> Self {
        let process = monitor.peer();
        Self { process, open: process.and_then(open_files) }
    }

    /// The socket of the NBD server that QEMU runs already.
    pub(crate) fn nbd_server(&self) -> Option<PathBuf> {
        self.process.and_then(nbd_server)
    }

    /// The absolute name of a file that QEMU opened by a relative name: the only open file whose path ends with
    /// that name.
    pub(crate) fn absolute(&self, name: &str) -> Option<String> {
        let is_plain = !name.starts_with('/') && !name.contains(':');
        let relative = Path::new(name.trim_start_matches("./"));
        let open = self.open.as_ref().filter(|_| is_plain)?;
        let mut meant: Vec<_> = open.iter().filter(|(path, _)| path.ends_with(relative)).collect();
        meant.dedup_by_key(|(_, id)| *id);
        match meant.as_slice() {
            [(path, id)] if file_id(path) == Some(*id) => path.to_str().map(str::to_owned),
            _ => None,
        }
    }

    /// Where the file of a layer is.
    pub(crate) fn place(&self, layer: &Layer) -> Place {
        let path = Path::new(&layer.file);
        let Some(id) = path.is_absolute().then(|| file_id(path)).flatten() else { return Place::Elsewhere };
        if self.is_elsewhere(id) { Place::Other } else { Place::Here(path.to_owned(), id) }
    }

    /// Whether the files of the process can be seen, and this one is not open.
    pub(crate) fn is_elsewhere(&self, id: FileId) -> bool {
        self.open.as_ref().is_some_and(|open| !open.iter().any(|(_, other)| *other == id))
    }

    /// Whether the process can be seen to have this file open.
    pub(crate) fn has_open(&self, id: FileId) -> bool {
        self.open.iter().flatten().any(|(_, open)| *open == id)
    }

    /// The layers of a disk whose names lead to other files here than in QEMU.
    pub(crate) fn strangers<'a>(&self, disk: &'a Disk) -> Vec<&'a Layer> {
        disk.layers().iter().filter(|layer| self.place(layer) == Place::Other).collect()
    }
}

/// The file to which a name leads here.
pub(crate) fn file_id(path: &Path) -> Option<FileId> {
    OsHost.stat(path).ok().map(|stat| stat.id)
}

fn open_files(pid: u32) -> Option<Vec<(PathBuf, FileId)>> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    let mut seen = BTreeSet::new();
    let mut files = Vec::new();
    for entry in entries.flatten() {
        let link = entry.path();
        // Sockets and pipes have no absolute name.
        let Some(name) = fs::read_link(&link).ok().filter(|name| name.is_absolute()) else { continue };
        if let Some(id) = file_id(&link)
            && seen.insert((name.clone(), id))
        {
            files.push((name, id));
        }
    }
    Some(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(folder: &Path, names: &[&str]) -> Files {
        let open = names.iter().map(|name| {
            let path = folder.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "x").unwrap();
            let id = file_id(&path).unwrap();
            (path, id)
        });
        Files { process: None, open: Some(open.collect()) }
    }

    #[test]
    fn a_relative_name_is_known_if_only_one_open_file_ends_like_it() {
        let folder = tempfile::tempdir().unwrap();
        let files = files(folder.path(), &["vm/a.img", "vm/b.img", "other/b.img", "xa.img"]);
        let path = |name: &str| Some(folder.path().join(name).to_str().unwrap().to_owned());
        assert_eq!(files.absolute("a.img"), path("vm/a.img"));
        assert_eq!(files.absolute("./vm/b.img"), path("vm/b.img"));
        for unknown in ["b.img", "c.img", "nbd:a.img", "/vm/a.img"] {
            assert_eq!(files.absolute(unknown), None, "{unknown}");
        }
        // The name leads to another file by now.
        fs::write(folder.path().join("vm/a.img2"), "y").unwrap();
        fs::rename(folder.path().join("vm/a.img2"), folder.path().join("vm/a.img")).unwrap();
        assert_eq!(files.absolute("a.img"), None);
        assert_eq!(Files::default().absolute("vm/b.img"), None);
    }

    #[test]
    fn the_files_of_a_process_are_seen() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = open_files(std::process::id()).unwrap();
        assert!(open.contains(&(file.path().to_owned(), file_id(file.path()).unwrap())), "{open:?}");
        assert_eq!(open_files(u32::MAX), None);
    }
}
