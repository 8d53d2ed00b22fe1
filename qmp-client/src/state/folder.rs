//! Accesses state files in folders that are opened once: names are looked up relative to the folder's
//! descriptor, no link is followed, and only files of root or the caller are believed.

use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::sync::Arc;

use qcow2::storage::{Access, FileKind, Folder, Host, OsHost, Owner, Place, Storage};

use super::StateTrouble;
use super::litter::NewFile;
use super::stamp::if_there;
use crate::error::StateFault;

/// The longest state file, in bytes. A state takes some hundred bytes for each layer.
const LONGEST: u64 = 16 << 20;
/// The permission of the group, or of everybody, to write.
const BY_OTHERS: u32 = 0o022;

type FolderResult<T> = Result<T, StateTrouble>;

/// The place that a path names. Links in its folder's path are followed, but not a link at its last name.
/// `None` if there is no such folder.
pub(super) fn place(path: &Path) -> FolderResult<Option<Place>> {
    Ok(if_there(Place::named(&OsHost, path))?)
}

/// Opens a folder, links followed.
pub(super) fn open(path: &Path) -> io::Result<Arc<Folder>> {
    OsHost.folder(&OsHost.canonicalize(path)?).map(Arc::new)
}

/// The content of a file that nobody but root or the caller can have written; `None` if there is no such file.
///
/// Anybody who may write the file could make root write and remove files elsewhere, so a file that others may
/// write is refused.
pub(super) fn read(place: &Place) -> FolderResult<Option<Vec<u8>>> {
    let Some(file) = opened(place)? else { return Ok(None) };
    let len = usize::try_from(file.size()?.min(LONGEST)).unwrap_or(usize::MAX);
    let mut text = vec![0; len];
    file.read_exact_or_zero(&mut text, 0)?;
    Ok(Some(text))
}

/// Replaces a file atomically by one with this text, durably.
pub(super) fn replace(place: &Place, text: &[u8]) -> FolderResult<()> {
    let new = NewFile::beside(place)?;
    new.write_all(text)?;
    new.put(place.name())?;
    Ok(place.sync(&OsHost)?)
}

/// Removes a file that root or the caller wrote, durably; nothing if there is none.
pub(super) fn remove(place: &Place) -> FolderResult<()> {
    let Some(file) = opened(place)? else { return Ok(()) };
    if place.unlink_file(&OsHost, &*file)? {
        place.sync(&OsHost)?;
    }
    Ok(())
}

/// Opens a regular file whose owner is believed.
fn opened(place: &Place) -> FolderResult<Option<Arc<dyn Storage>>> {
    // Look first: merely opening a device can have effects. A link that is put there after this look is not
    // followed.
    match unless_gone(place.stat(&OsHost))? {
        None => return Ok(None),
        Some(stat) if stat.kind == FileKind::Regular => {}
        Some(_) => return Err(StateFault::NoPlainFile.into()),
    }
    let Some(file) = unless_gone(place.open(&OsHost, Access::Read))? else { return Ok(None) };
    let stat = file.stat()?;
    if stat.kind != FileKind::Regular {
        return Err(StateFault::NoPlainFile.into());
    }
    believe(stat.owner)?;
    Ok(Some(file))
}

/// `None` if nothing has the name. All other errors remain errors: a link in the place of the file must not
/// count as a missing file.
fn unless_gone<T>(said: io::Result<T>) -> io::Result<Option<T>> {
    match said {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn believe(owner: Owner) -> FolderResult<()> {
    if ![0, OsHost.user()].contains(&owner.user) {
        return Err(StateFault::OfStranger { user: owner.user }.into());
    }
    if owner.mode & BY_OTHERS != 0 { Err(StateFault::OthersMayWrite.into()) } else { Ok(()) }
}

/// The names in a folder that have this beginning and this end, sorted.
pub(super) fn names(folder: &Folder, begin: &str, end: &str) -> io::Result<Vec<std::ffi::OsString>> {
    let is_meant = |name: &OsStr| {
        let name = name.as_encoded_bytes();
        name.starts_with(begin.as_bytes()) && name.ends_with(end.as_bytes())
    };
    let mut names = OsHost.list_in(folder)?;
    names.retain(|name| is_meant(name));
    names.sort();
    Ok(names)
}
