//! Ends what killed processes have left in folders: edits of headers that were stopped, and journals that were being made.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::file::Journal;
use super::heal::{end_edit, hold_at, remove};
use super::place::{FoundJournal, SWITCH, is_beside};
use super::unnamed::sweep_unnamed;
use crate::error::{Error, FileOp, Refusal, Result};
use crate::stamp::Stamp;
use crate::storage::{Access, FileKind, Host, Place, if_there, leads_nowhere};

/// Finishes edits of headers in `folders` that a power cut has stopped, for images that nobody holds, and
/// removes unfinished journal files of killed processes. A record counts only for the image beside it, and only
/// if its owner may write that image: anybody may have put it there, and it could name any file. In `dir`,
/// which the caller has chosen, records may name images elsewhere. On file systems without locks nothing is
/// done, unless `no_locks`.
///
/// # Errors
/// The system's.
pub(crate) fn sweep(host: &dyn Host, folders: &[PathBuf], dir: Option<&Path>, no_locks: bool) -> Result<()> {
    let folders = folders.iter().map(|folder| (folder.as_path(), false));
    for (folder, may_be_elsewhere) in folders.chain(dir.map(|dir| (dir, true))) {
        let failed = |op| move |e| Error::io(folder, op, None, e);
        // A folder that may not be listed is skipped.
        let may = |e: &std::io::Error| e.kind() != std::io::ErrorKind::PermissionDenied;
        let opened = match host.canonicalize(folder).and_then(|folder| host.folder(&folder)) {
            Err(e) if may(&e) => if_there(Err(e)).map_err(failed(FileOp::Open))?,
            other => other.ok(),
        };
        let Some(opened) = opened.map(Arc::new) else { continue };
        let names = match host.list_in(&opened) {
            Err(e) if may(&e) => if_there(Err(e)).map_err(failed(FileOp::List))?,
            other => other.ok(),
        };
        let folder = opened;
        for name in names.unwrap_or_default() {
            let place = Place::within(Arc::clone(&folder), &name);
            sweep_unnamed(host, &place, no_locks)?;
            if name.as_bytes().ends_with(SWITCH.as_bytes()) {
                match sweep_one(host, &place, may_be_elsewhere, no_locks) {
                    // It stays where it is; no image of this chain needs it.
                    Err(Error::Refused {
                        reason:
                            Refusal::JournalVersion { .. } | Refusal::JournalOfAnother { .. } | Refusal::NoLocks,
                        ..
                    }) => {}
                    swept => swept?,
                }
            }
        }
    }
    Ok(())
}

fn sweep_one(host: &dyn Host, record: &Place, may_be_elsewhere: bool, no_locks: bool) -> Result<()> {
    // Look at the owner first: a record that does not count need not be readable.
    let failed = |e| Error::io(&record.path(), FileOp::Stat, None, e);
    let owner = match record.stat(host) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        stat => match stat.map_err(failed)? {
            stat if stat.kind == FileKind::Regular => stat.owner,
            // Only a regular file can be a record of ours.
            _ => return Ok(()),
        },
    };
    let Some(image) = image_of(host, record, may_be_elsewhere)? else { return Ok(()) };
    let path = image.path();
    // An image in use may be in the middle of its edit.
    let file = match hold_at(host, &path, &image, no_locks) {
        Ok(file) => file,
        Err(Error::InUse { .. }) => return Ok(()),
        Err(Error::Io { source, .. })
            if leads_nowhere(&source)
                || matches!(
                    source.kind(),
                    std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem
                ) =>
        {
            return Ok(());
        }
        Err(e) => return Err(e),
    };
    let disk = file.stat().map_err(|e| Error::io(&path, FileOp::Stat, None, e))?.owner;
    if !owner.may_speak_for(&disk, host.user()) {
        return Ok(());
    }
    if let Some((journal, last)) = Journal::open(host, record, Access::Read)? {
        if !journal.owner()?.may_speak_for(&disk, host.user()) {
            return Ok(());
        }
        let found = FoundJournal { journal, last, now: Stamp::of(host, &path, &*file)? };
        // In a shared folder, the record may belong to another file that had this name.
        if may_be_elsewhere && !found.is_same_file() {
            return Ok(());
        }
        return end_edit(host, &path, &*file, &found).map(drop);
    }
    remove(host, record)
}

/// The image that a record belongs to: the one beside it, by the record's name; or, if images may lie
/// elsewhere, the one that the record names.
///
/// # Errors
/// The system's.
fn image_of(host: &dyn Host, record: &Place, may_be_elsewhere: bool) -> Result<Option<Place>> {
    let failed = |e| Error::io(&record.path(), FileOp::Stat, None, e);
    let name = record.name().as_bytes();
    let short = name.strip_prefix(b".").and_then(|name| name.strip_suffix(SWITCH.as_bytes()));
    let beside = short.map(OsStr::from_bytes).filter(|name| is_beside(record, name, SWITCH));
    if let Some(name) = beside.filter(|_| !may_be_elsewhere) {
        let image = record.beside(name);
        if if_there(image.stat(host)).map_err(failed)?.is_some() {
            return Ok(Some(image));
        }
    }
    // The record's name was shortened, or it belongs to an image elsewhere: its header has the whole path.
    let Some((journal, _)) = Journal::open(host, record, Access::Read)? else { return Ok(None) };
    let Some(named) = journal.header().targets.first().map(|target| &target.path) else { return Ok(None) };
    if may_be_elsewhere {
        return if_there(Place::at(host, named)).map_err(failed);
    }
    Ok(named.file_name().filter(|name| is_beside(record, name, SWITCH)).map(|name| record.beside(name)))
}
