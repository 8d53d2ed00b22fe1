//! Signs that somebody else uses a file of a chain, though no image names it.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::Layer;
use super::name::possible_paths;
use super::siblings::{is_empty, is_kept, read_names, was_empty};
use crate::storage::{Access, FileId, FileKind, Host, NameKind, if_there};

/// An image whose backing name leads to no file, and ends in the file name of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Lookalike {
    /// The image.
    pub path: PathBuf,
    /// The layer that it may have used before one of the two files was moved.
    pub may_use: FileId,
    /// Whether its disk is as large as the layer's, and it does not state another backing format.
    pub fits: bool,
}

/// What was found among the files, and which of them could not be read.
#[derive(Debug)]
pub(crate) struct Looked<T> {
    pub(crate) found: Vec<T>,
    pub(crate) unreadable: Vec<(PathBuf, io::Error)>,
}

impl<T: Send> Looked<T> {
    fn at(files: &[PathBuf], look: impl Fn(&Path) -> io::Result<Option<T>> + Sync) -> Self {
        let mut all = Self { found: Vec::new(), unreadable: Vec::new() };
        let looked: Vec<_> = files.par_iter().map(|path| (path, look(path))).collect();
        for (path, result) in looked {
            match result {
                Ok(found) => all.found.extend(found),
                Err(e) => all.unreadable.push((path.clone(), e)),
            }
        }
        all
    }
}

/// The images among `files` that may have used one of the layers before one of the two files was moved: the
/// backing name leads to no file and ends in the layer's file name, and no file of that name lies beside the
/// image.
pub(crate) fn find_lookalikes(host: &dyn Host, files: &[PathBuf], layers: &[Layer]) -> Looked<Lookalike> {
    let names: Vec<(OsString, &Layer)> =
        layers.iter().filter_map(|layer| Some((layer.path.file_name()?.to_owned(), layer))).collect();
    Looked::at(files, |path| lookalike(host, path, &names))
}

fn lookalike(host: &dyn Host, path: &Path, names: &[(OsString, &Layer)]) -> io::Result<Option<Lookalike>> {
    // It may have been removed since the search listed it.
    let Some(stat) = if_there(host.stat(path))? else { return Ok(None) };
    if stat.kind != FileKind::Regular || names.iter().any(|(_, layer)| layer.id == stat.id) {
        return Ok(None);
    }
    let Some(file) = if_there(host.open(path, Access::Read))? else { return Ok(None) };
    let Some(cluster0) = read_names(&*file)? else { return Ok(None) };
    // An image that a merge has emptied needs no backing file. If its tables cannot be read, assume that it
    // does.
    if is_kept(&cluster0) || (was_empty(&cluster0) && is_empty(host, path).unwrap_or(false)) {
        return Ok(None);
    }
    let Some(backing) = cluster0.backing_name.as_deref() else { return Ok(None) };
    let led_to = possible_paths(backing, path);
    let layer = names.iter().find(|(name, _)| led_to.iter().any(|led| led.file_name() == Some(name)));
    let Some((name, layer)) = layer else { return Ok(None) };
    for place in led_to.iter().chain([&path.with_file_name(name)]) {
        if if_there(host.stat(place))?.is_some() {
            return Ok(None);
        }
    }
    let stated = cluster0.backing_format();
    let fits = cluster0.header.size == layer.image.virtual_size()
        && stated.is_none_or(|stated| stated == layer.image.format().name());
    Ok(Some(Lookalike { path: path.to_owned(), may_use: layer.id, fits }))
}

/// The other names of a layer's file among `files`: hard links.
///
/// # Errors
/// The layer's own name cannot be followed.
pub(crate) fn other_names(host: &dyn Host, files: &[PathBuf], layer: &Layer) -> io::Result<Looked<PathBuf>> {
    let own = host.canonicalize(&layer.path)?;
    Ok(Looked::at(files, |path| {
        let is_same = if_there(host.stat(path))?.is_some_and(|stat| stat.id == layer.id);
        if !is_same || if_there(host.name_kind(path))? == Some(NameKind::Link) {
            return Ok(None);
        }
        Ok(if_there(host.canonicalize(path))?.filter(|real| *real != own).map(|_| path.to_owned()))
    }))
}
