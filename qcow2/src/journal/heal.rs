//! Edits of cluster 0 that survive a power cut, and headers made whole after one.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::device::write_in_place;
use super::file::{Journal, sync_folder};
use super::judge::{SLACK_NS, compare, has_clean_names, has_header};
use super::place::{JOURNAL, SWITCH, find, identity, place, places};
use super::record::{BLOCK, Block, Guard, Header, MAX_BLOCKS, Purpose, Record, sector_crcs};
use crate::error::{Error, FileOp, Result};
use crate::format::is_qcow2;
use crate::storage::{Access, Host, LockError, LockMode, Storage};

/// An edit of the header of an image, whose file is held under lock.
#[derive(Debug)]
pub(crate) struct Edit<'a> {
    /// The image.
    pub(crate) path: &'a Path,
    /// Its file.
    pub(crate) file: &'a dyn Storage,
    /// Offsets and bytes, in order; each is to be durable before the next.
    pub(crate) writes: Vec<(u64, Vec<u8>)>,
    /// Whether each state between two sectors is the old header or the new one.
    pub(crate) atomic: bool,
}

/// Carries out edits of different images side by side; each is redone after a power cut that tears it. The
/// records lie beside the images or in `dir`, and are gone afterwards.
///
/// # Errors
/// The system's; a place where no record can be made.
pub(crate) fn edit_headers(host: &dyn Host, edits: &[Edit<'_>], dir: Option<&Path>) -> Result<()> {
    let records: Vec<PathBuf> =
        edits.par_iter().map(|edit| record(host, edit, dir)).collect::<Result<Vec<_>>>()?;
    let folders: BTreeSet<&Path> = records.iter().filter_map(|path| path.parent()).collect();
    let sync_names = || {
        let sync =
            |folder: &&Path| host.sync_dir(folder).map_err(|e| Error::io(folder, FileOp::Sync, None, e));
        folders.iter().try_for_each(sync)
    };
    sync_names()?;
    edits.par_iter().try_for_each(|edit| {
        edit.writes.iter().try_for_each(|(at, bytes)| {
            let written = edit.file.write_all_at(bytes, *at).and_then(|()| edit.file.sync());
            written.map_err(|e| Error::io(edit.path, FileOp::Write, Some(*at), e))
        })
    })?;
    records
        .iter()
        .try_for_each(|path| host.unlink(path).map_err(|e| Error::io(path, FileOp::Remove, None, e)))?;
    sync_names()
}

/// Writes the record of an edit; its name is not durable yet.
pub(super) fn record(host: &dyn Host, edit: &Edit<'_>, dir: Option<&Path>) -> Result<PathBuf> {
    let now = identity(host, edit.path, edit.file)?;
    let path = place(host, edit.path, now.is_device, dir, SWITCH)?;
    let end = edit.writes.iter().map(|(at, bytes)| at + bytes.len() as u64).max().unwrap_or(0);
    let len = now.len.max(end);
    let blocks = edited(edit, end).map_err(|e| Error::io(edit.path, FileOp::Read, Some(0), e))?;
    let header = Header {
        nonce: nonce(),
        purpose: Purpose::Header { atomic: edit.atomic },
        max_blocks: blocks.len().clamp(1, MAX_BLOCKS) as u32,
        guard: Guard::Stamp,
        targets: vec![now],
        layers: Vec::new(),
        base: PathBuf::new(),
        top: PathBuf::new(),
        top_index: 0,
        active: PathBuf::new(),
        new_size: 0,
        zero_until: 0,
        total: 0,
        restore_points_lost: Vec::new(),
    };
    Journal::create_with(host, &path, header, blocks, len)?;
    Ok(path)
}

/// The blocks that an edit touches, before and after; it reaches up to `end`.
fn edited(edit: &Edit<'_>, end: u64) -> std::io::Result<Vec<Block>> {
    let mut old = vec![0; end.next_multiple_of(BLOCK) as usize];
    edit.file.read_exact_or_zero(&mut old, 0)?;
    let mut new = old.clone();
    for (at, bytes) in &edit.writes {
        if let Some(place) = new.get_mut(*at as usize..*at as usize + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }
    let both = old.chunks(BLOCK as usize).zip(new.chunks(BLOCK as usize));
    Ok(both
        .zip(0..)
        .filter(|((old, new), _)| old != new)
        .map(|((old, new), number)| Block { number, before: sector_crcs(old), bytes: new.into() })
        .collect())
}

/// A number that no other journal has.
pub(crate) fn nonce() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::process::id())
}

/// Makes the header of the image at `path` whole if a power cut has torn it: from the record of an edit, or
/// from a journal, beside it or in `dir`. The image is locked for that. Records of edits that are done, or
/// were not begun, are removed.
///
/// # Errors
/// [`Error::InUse`] if there is something to do, and somebody holds the image; the system's.
pub(crate) fn heal(host: &dyn Host, path: &Path, dir: Option<&Path>) -> Result<()> {
    let Ok(file) = host.open(path, Access::Read) else { return Ok(()) };
    if let Some((journal, last)) = find(host, path, &*file, dir, Access::Read, SWITCH)? {
        let file = hold(host, path)?;
        if let Some(last) = last.filter(|_| matches!(journal.header().purpose, Purpose::Header { .. })) {
            redo_edit(path, &*file, &journal, &last)?;
            journal.remove(host)?;
        }
    }
    // A record that is not whole: the edit was not begun.
    for record in places(host, path, dir, SWITCH)? {
        if host.stat(&record).is_ok() {
            let _held = hold(host, path)?;
            host.unlink(&record).map_err(|e| Error::io(&record, FileOp::Remove, None, e))?;
            sync_folder(host, &record)?;
        }
    }
    let failed = |e| Error::io(path, FileOp::Read, Some(0), e);
    let whole = has_header(&*file).map_err(failed)? && has_clean_names(&*file).map_err(failed)?;
    if !whole && let Some((journal, Some(last))) = find(host, path, &*file, dir, Access::Read, JOURNAL)? {
        let first = last.blocks.first().filter(|block| block.number == 0 && is_qcow2(&block.bytes));
        if last.target == 0 && first.is_some() && is_torn(path, &*file, &journal, &last)? {
            let file = hold(host, path)?;
            write_back(path, &*file, &last)?;
        }
    }
    Ok(())
}

/// Ends edits of headers that a power cut has left in `folders`, of images that nobody holds. What lies there is only
/// believed about the image beside it: it may be anybody's, and could name any file. `dir` is the caller's own.
///
/// # Errors
/// The system's.
pub(crate) fn sweep(host: &dyn Host, folders: &[PathBuf], dir: Option<&Path>) -> Result<()> {
    let folders = folders.iter().map(|folder| (folder.as_path(), false));
    for (folder, may_be_elsewhere) in folders.chain(dir.map(|dir| (dir, true))) {
        // What cannot be listed cannot be swept.
        for record in host.list(folder).unwrap_or_default() {
            if record.as_os_str().as_bytes().ends_with(SWITCH.as_bytes()) {
                sweep_one(host, &record, may_be_elsewhere)?;
            }
        }
    }
    Ok(())
}

fn sweep_one(host: &dyn Host, record: &Path, may_be_elsewhere: bool) -> Result<()> {
    let written = Journal::open(host, record, Access::Read)?;
    let image = match &written {
        Some((journal, _)) => journal.header().targets.first().map(|target| target.path.clone()),
        None => image_of(record),
    };
    let is_beside = |image: &PathBuf| {
        places(host, image, None, SWITCH).is_ok_and(|places| places.iter().any(|place| place == record))
    };
    // An image in use may be in the middle of its edit.
    let Some(image) = image.filter(|image| may_be_elsewhere || is_beside(image)) else { return Ok(()) };
    let Ok(file) = hold(host, &image) else { return Ok(()) };
    if let Some((journal, Some(last))) = written
        && matches!(journal.header().purpose, Purpose::Header { .. })
        && identity(host, &image, &*file)
            .is_ok_and(|now| journal.header().targets.iter().any(|target| target.is_same_file(&now)))
    {
        redo_edit(&image, &*file, &journal, &last)?;
    }
    match host.unlink(record) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(record, FileOp::Remove, None, e)),
        _ => sync_folder(host, record),
    }
}

/// The image that a record beside it is about, by the record's name.
fn image_of(record: &Path) -> Option<PathBuf> {
    let name = record.file_name()?.as_bytes();
    let name = name.strip_prefix(b".")?.strip_suffix(SWITCH.as_bytes())?;
    Some(record.with_file_name(OsStr::from_bytes(name)))
}

/// Whether there is a record of an edit of the header of the image at `path`, beside it.
pub fn has_edit(host: &dyn Host, path: &Path) -> bool {
    let Ok(file) = host.open(path, Access::Read) else { return false };
    find(host, path, &*file, None, Access::Read, SWITCH).is_ok_and(|found| found.is_some())
}

/// Redoes an edit that was torn. A header that is whole is left as it is: it is the old one or the new one,
/// or somebody has written another since.
fn redo_edit(path: &Path, file: &dyn Storage, journal: &Journal, last: &Record) -> Result<()> {
    let sectors = compare(last, file).map_err(|e| Error::io(path, FileOp::Read, Some(0), e))?;
    let atomic = matches!(journal.header().purpose, Purpose::Header { atomic: true });
    let between = !atomic && sectors.foreign == 0 && sectors.old > 0 && sectors.new > 0;
    if between || is_torn(path, file, journal, last)? { write_back(path, file, last) } else { Ok(()) }
}

/// Whether the header of an image was torn as it was written with this record. One whose names nobody would write was torn
/// behind its first bytes.
fn is_torn(path: &Path, file: &dyn Storage, journal: &Journal, last: &Record) -> Result<bool> {
    let failed = |e| Error::io(path, FileOp::Read, Some(0), e);
    if !has_header(file).map_err(failed)? {
        return Ok(true);
    }
    let at_once = file.stat().map_err(failed)?.modified_ns <= journal.modified_ns()?.saturating_add(SLACK_NS);
    let is_foreign = compare(last, file).map_err(failed)?.foreign > 0;
    Ok(is_foreign && at_once && !has_clean_names(file).map_err(failed)?)
}

fn write_back(path: &Path, file: &dyn Storage, last: &Record) -> Result<()> {
    let written = write_in_place(file, last.blocks.iter(), last.len).and_then(|()| file.sync());
    written.map_err(|e| Error::io(path, FileOp::Write, Some(0), e))
}

/// Opens the image for writing, and locks it.
fn hold(host: &dyn Host, path: &Path) -> Result<std::sync::Arc<dyn Storage>> {
    let file = host.open(path, Access::ReadWrite).map_err(|e| Error::io(path, FileOp::Open, None, e))?;
    file.lock(LockMode::Write).map_err(|e| match e {
        LockError::Held { .. } => {
            let holders = file.stat().map(|stat| host.holders(stat.id)).unwrap_or_default();
            Error::InUse { path: path.to_owned(), holders }
        }
        LockError::Io(e) => Error::io(path, FileOp::Lock, None, e),
    })?;
    Ok(file)
}
