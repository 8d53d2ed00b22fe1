//! Images whose headers still name files in a folder that was moved.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::name::{BackingName, Spelling, beside};
use super::relink::{absolute, new_backing_name, normalised};
use super::search::Search;
use super::siblings::read_names;
use crate::error::{Error, Result};
use crate::storage::{Access, FileId, FileKind, Host, NameKind, if_there};

/// A folder, or a file, that has another place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MovedFolder {
    /// Its old path, from the root.
    old: PathBuf,
    /// Its new path, from the root.
    new: PathBuf,
}

/// An image that names files in the folder by its old place.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RenamedImage {
    /// The image.
    pub image: PathBuf,
    /// The name that its backing file should have, if that is another one.
    pub backing: Option<OsString>,
    /// The name that its external data file should have, if that is another one.
    pub data_file: Option<OsString>,
}

/// What a search for such images found.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct RenamedImages {
    /// The images, by path.
    pub images: Vec<RenamedImage>,
    /// Files and folders that could not be read, so that nobody knows what they name.
    pub unreadable: Vec<(PathBuf, io::Error)>,
    /// Folders that were left out, as there was too much.
    pub left_out: Vec<PathBuf>,
}

impl MovedFolder {
    /// What lay at `old` lies at `new`. A relative path begins at the working directory; symbolic links are not followed,
    /// since names in headers have the words that somebody typed.
    ///
    /// # Errors
    /// The system's.
    pub fn new(host: &dyn Host, old: &Path, new: &Path) -> Result<Self> {
        Ok(Self { old: normalised(&absolute(host, old)?), new: normalised(&absolute(host, new)?) })
    }

    /// Where a file lies by now that lay at `path`; `None` if it did not lie in the folder.
    fn moved(&self, path: &Path) -> Option<PathBuf> {
        let rest = path.strip_prefix(&self.old).ok()?;
        Some(if rest.as_os_str().is_empty() { self.new.clone() } else { self.new.join(rest) })
    }

    /// Where a file lay that lies at `path`; `None` if it did not lie in the folder.
    fn former(&self, path: &Path) -> Option<PathBuf> {
        Some(self.old.join(path.strip_prefix(&self.new).ok()?))
    }
}

/// Looks through the folders `dirs` and all that is below them for qcow2 images that name their backing file or their data
/// file by the old place of `folder`: absolute names that begin with it, and relative ones that lead nowhere now and would
/// lead to a file by its new place. Symbolic links are not followed. Only headers are read, and no file that an image
/// names is opened; damaged headers are passed over.
///
/// # Errors
/// An I/O error for a folder that does not exist.
pub fn find_renamed(host: &dyn Host, folder: &MovedFolder, dirs: &[PathBuf]) -> Result<RenamedImages> {
    let walked = Search { deep: dirs.to_vec(), ..Search::default() }.walk(host)?;
    let mut found =
        RenamedImages { unreadable: walked.unreadable, left_out: walked.left_out, ..Default::default() };
    let looked: Vec<_> = walked.files.par_iter().map(|path| look(host, folder, path)).collect();
    let mut seen = BTreeSet::new();
    for (path, result) in walked.files.into_iter().zip(looked) {
        match result {
            Ok(Some((image, id))) if seen.insert(id) => found.images.push(image),
            Ok(_) => {}
            Err(e) => found.unreadable.push((path, e)),
        }
    }
    Ok(found)
}

/// The image at `path`, if it has names to be changed.
fn look(host: &dyn Host, folder: &MovedFolder, path: &Path) -> io::Result<Option<(RenamedImage, FileId)>> {
    // Another name of an image lies elsewhere: it is found there, or is none of these.
    if if_there(host.name_kind(path))? != Some(NameKind::File) {
        return Ok(None);
    }
    let Some(stat) = if_there(host.stat(path))?.filter(|stat| stat.kind == FileKind::Regular) else {
        return Ok(None);
    };
    let Some(file) = if_there(host.open(path, Access::Read))? else { return Ok(None) };
    let Some(cluster0) = read_names(&*file)? else { return Ok(None) };
    let named = cluster0.backing_name.as_deref();
    let backing = named.map(|name| new_backing(host, folder, path, name)).transpose()?.flatten();
    let named = cluster0.data_file_name().filter(|_| cluster0.header.has_data_file());
    let data_file = named.map(|name| new_data_file(host, folder, path, name)).transpose()?.flatten();
    let is_renamed = backing.is_some() || data_file.is_some();
    Ok(is_renamed.then(|| (RenamedImage { image: path.to_owned(), backing, data_file }, stat.id)))
}

fn new_backing(
    host: &dyn Host,
    folder: &MovedFolder,
    image: &Path,
    written: &[u8],
) -> io::Result<Option<OsString>> {
    let Ok(name) = BackingName::parse(written) else { return Ok(None) };
    if !name.is_relative() || name.spelling() != Spelling::Path {
        return new_absolute(host, folder, &name, image);
    }
    if is_there(host, &name.resolve(image))? {
        return Ok(None);
    }
    let image = full(host, image)?;
    // The folder of the backing file was moved; or that of the image, and the name began there.
    let from_here = folder.moved(&normalised(&name.resolve(&image)));
    let from_there =
        folder.former(&image).map(|former| normalised(&beside(&former, &name.resolve(Path::new("")))));
    for target in [from_here, from_there].into_iter().flatten() {
        if is_there(host, &target)? {
            let name = new_backing_name(host, written, &image, &target).map_err(into_io)?;
            return Ok(Some(OsString::from_vec(name)));
        }
    }
    Ok(None)
}

fn new_data_file(
    host: &dyn Host,
    folder: &MovedFolder,
    image: &Path,
    written: &[u8],
) -> io::Result<Option<OsString>> {
    match BackingName::parse_data_file(written) {
        Ok(name) => new_absolute(host, folder, &name, image),
        Err(_) => Ok(None),
    }
}

/// A path for a name that does not begin at the image's own folder.
fn new_absolute(
    host: &dyn Host,
    folder: &MovedFolder,
    name: &BackingName,
    image: &Path,
) -> io::Result<Option<OsString>> {
    let path = name.resolve(image);
    let is_relative = path.is_relative();
    let full = normalised(&absolute(host, &path).map_err(into_io)?);
    let Some(moved) = folder.moved(&full) else { return Ok(None) };
    // It has its new name already, if the new place lies in the old one.
    if (is_relative || full.starts_with(&folder.new)) && is_there(host, &path)? {
        return Ok(None);
    }
    Ok((!is_relative || is_there(host, &moved)?).then(|| moved.into_os_string()))
}

/// The path of an image from the root; its own name is no link.
fn full(host: &dyn Host, image: &Path) -> io::Result<PathBuf> {
    Ok(normalised(&absolute(host, image).map_err(into_io)?))
}

fn is_there(host: &dyn Host, path: &Path) -> io::Result<bool> {
    Ok(if_there(host.stat(path))?.is_some())
}

fn into_io(error: Error) -> io::Error {
    match error {
        Error::Io { source, .. } => source,
        other => io::Error::other(other),
    }
}
