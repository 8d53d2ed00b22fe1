//! Finds other images that read through base or a merged layer. A merge would change what they show.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use qcow2::chain::{Search, find_users_in};
use qcow2::error::FileOp;
use qcow2::storage::{FileId, OsHost};

use super::files::{Files, Place, file_id};
use crate::block::graph::{Disk, Graph, Layer};
use crate::error::{Error, Result};
use crate::live::hindrance::Hindrance;

/// Where other users of a merge's files were searched, and what stays unknown.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Searched {
    /// The folders.
    pub folders: Vec<PathBuf>,
    /// Files and folders that could not be read.
    pub unreadable: Vec<PathBuf>,
    /// Images that will break, because the user allowed it.
    pub broken: Vec<PathBuf>,
    /// The same images, each with the index of the layer that it uses.
    pub(crate) users: Vec<(usize, PathBuf)>,
}

/// Looks through the graph of QEMU, the folders of the chain, and those of `scan`, for images outside the chain that use one of
/// the `touched` layers.
///
/// # Errors
/// [`Hindrance::SharedInside`] or [`Hindrance::SharedBase`] if there is one, unless that is `allowed`;
/// [`Hindrance::NotSearched`] if a folder cannot be read.
pub(crate) fn search(
    files: &Files,
    graph: &Graph,
    disk: &Disk,
    touched: &[&Layer],
    scan: &[PathBuf],
    allowed: bool,
) -> Result<Searched> {
    let here = |layer: &Layer| match files.place(layer) {
        Place::Here(path, id) => Some((path, id)),
        _ => None,
    };
    let layer_of = |name: &str| {
        let id = Path::new(name).is_absolute().then(|| file_id(Path::new(name))).flatten()?;
        let is_it = |layer: &&&Layer| here(layer).is_some_and(|(_, other)| other == id);
        touched.iter().find(is_it).map(|layer| layer.index)
    };
    let readers = graph.readers(disk, touched, &layer_of);
    if let (Some(reader), false) = (readers.first(), allowed) {
        let used = touched.iter().find(|layer| layer.index == reader.uses).map(|layer| layer.file.clone());
        let (node, file) = (reader.node.clone(), reader.file.clone());
        return Err(Hindrance::SharedInside { used: used.unwrap_or_default(), node, file }.into());
    }
    let chain: Vec<(PathBuf, FileId)> = disk.layers().iter().filter_map(here).collect();
    let targets: Vec<(PathBuf, FileId)> = touched.iter().filter_map(|layer| here(layer)).collect();
    let ids = |files: &[(PathBuf, FileId)]| files.iter().map(|(_, id)| *id).collect::<Vec<_>>();
    let folders: Vec<PathBuf> =
        folders(&chain).map_err(|source| Hindrance::NotSearched { source })?.into_iter().collect();
    let search = Search { folders: folders.clone(), deep: scan.to_vec(), ..Search::default() };
    let folders = [folders, scan.to_vec()].concat();
    let found = find_users_in(&OsHost, &search, &ids(&targets), &ids(&chain))
        .map_err(|source| Hindrance::NotSearched { source })?;
    let mut broken: Vec<PathBuf> = found.users.iter().map(|user| user.path.clone()).collect();
    if let (Some(first), false) = (found.users.first(), allowed) {
        let used = targets.iter().find(|(_, id)| *id == first.uses).map(|(path, _)| path.clone());
        let used = used.unwrap_or_else(|| first.path.clone());
        return Err(Error::from(Hindrance::SharedBase { used, users: broken }));
    }
    let index = |id: FileId| {
        let is_it = |layer: &&&Layer| here(layer).is_some_and(|(_, other)| other == id);
        touched.iter().find(is_it).map(|layer| layer.index)
    };
    let beside = found.users.iter().filter_map(|user| Some((index(user.uses)?, user.path.clone())));
    let inside = readers.iter().map(|reader| (reader.uses, PathBuf::from(&reader.file)));
    let users = beside.chain(inside).collect();
    for reader in &readers {
        let file = PathBuf::from(&reader.file);
        if !broken.contains(&file) {
            broken.push(file);
        }
    }
    let unreadable = found.unreadable.into_iter().map(|(path, _)| path).chain(found.left_out).collect();
    Ok(Searched { folders, unreadable, broken, users })
}

/// The folders by absolute names, which mean the same in another working directory.
pub(crate) fn absolute(folders: &[PathBuf]) -> Vec<PathBuf> {
    folders.iter().map(|folder| std::path::absolute(folder).unwrap_or_else(|_| folder.clone())).collect()
}

/// The folders of files: by the given names, and with links followed.
fn folders(files: &[(PathBuf, FileId)]) -> qcow2::Result<BTreeSet<PathBuf>> {
    let real =
        |path: &Path| path.canonicalize().map_err(|e| qcow2::Error::io(path, FileOp::Resolve, None, e));
    let mut folders = BTreeSet::new();
    for (path, _) in files {
        for name in [path.clone(), real(path)?] {
            folders.extend(name.parent().map(real).transpose()?);
        }
    }
    Ok(folders)
}
