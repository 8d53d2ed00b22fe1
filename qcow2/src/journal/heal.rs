//! Edits of cluster 0 that survive a power cut, and headers made whole after one.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use super::file::{Journal, sync_folder};
use super::judge::{SLACK_NS, compare, has_clean_names, has_header};
use super::place::{JOURNAL, SWITCH, find, identity, is_beside, place, places};
use super::record::{BLOCK, Block, Guard, Header, MAX_BLOCKS, Purpose, Record, SECTOR, sector_crcs};
use crate::error::{Error, FileOp, Result};
use crate::format::is_qcow2;
use crate::storage::{Access, Host, LockError, LockMode, Place, Storage};

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
    let records: Vec<Journal> =
        edits.par_iter().map(|edit| record(host, edit, dir)).collect::<Result<Vec<_>>>()?;
    let folders: BTreeMap<&Path, &Place> =
        records.iter().map(|record| (record.place().folder().path(), record.place())).collect();
    let sync_names = || folders.values().try_for_each(|place| sync_folder(host, place));
    sync_names()?;
    edits.par_iter().try_for_each(|edit| {
        edit.writes.iter().try_for_each(|(at, bytes)| {
            let written = edit.file.write_all_at(bytes, *at).and_then(|()| edit.file.sync());
            written.map_err(|e| Error::io(edit.path, FileOp::Write, Some(*at), e))
        })
    })?;
    records.iter().try_for_each(|record| record.remove_name(host))?;
    sync_names()
}

/// Writes the record of an edit; its name is not durable yet.
pub(super) fn record(host: &dyn Host, edit: &Edit<'_>, dir: Option<&Path>) -> Result<Journal> {
    let place = place(host, edit.path, edit.file, dir, SWITCH)?;
    let now = identity(host, edit.path, edit.file)?;
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
    Journal::create_with(host, &place, header, blocks, len)
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
/// from a journal, beside it or in `dir`, of somebody who may write the image. The image is locked for that. Records of
/// edits that are done, or were not begun, are removed.
///
/// # Errors
/// [`Error::InUse`] if there is something to do, and somebody holds the image; the system's.
pub(crate) fn heal(host: &dyn Host, path: &Path, dir: Option<&Path>) -> Result<()> {
    let Ok(file) = host.open(path, Access::Read) else { return Ok(()) };
    let image = Place::of_file(host, path, &*file)?;
    let hold = || hold(host, path, &image, &*file);
    if let Some((journal, last)) = find(host, path, &*file, dir, Access::Read, SWITCH)? {
        let file = hold()?;
        if let Some(last) = last.filter(|_| matches!(journal.header().purpose, Purpose::Header { .. })) {
            redo_edit(path, &*file, &journal, &last)?;
            journal.remove(host)?;
        }
    }
    // A record that is not whole: the edit was not begun.
    let owner = file.stat().map_err(|e| Error::io(path, FileOp::Stat, None, e))?.owner;
    for record in places(host, &image, dir, SWITCH)? {
        if record.stat(host).is_ok_and(|stat| stat.owner.may_speak_for(&owner, host.user())) {
            let _held = hold()?;
            remove(host, &record)?;
        }
    }
    let failed = |e| Error::io(path, FileOp::Read, Some(0), e);
    let whole = has_header(&*file).map_err(failed)? && has_clean_names(&*file).map_err(failed)?;
    if !whole && let Some((journal, Some(last))) = find(host, path, &*file, dir, Access::Read, JOURNAL)? {
        let first = last.blocks.first().filter(|block| block.number == 0 && is_qcow2(&block.bytes));
        if last.target == 0 && first.is_some() && is_torn(path, &*file, &journal, &last)? {
            let file = hold()?;
            write_back(path, &*file, &last)?;
        }
    }
    Ok(())
}

/// Ends edits of headers that a power cut has left in `folders`, of images that nobody holds. What lies there is only
/// believed about the image beside it, and from somebody who may write that: it may be anybody's, and could name any file.
/// `dir` is the caller's own.
///
/// # Errors
/// The system's.
pub(crate) fn sweep(host: &dyn Host, folders: &[PathBuf], dir: Option<&Path>) -> Result<()> {
    let folders = folders.iter().map(|folder| (folder.as_path(), false));
    for (folder, may_be_elsewhere) in folders.chain(dir.map(|dir| (dir, true))) {
        // What cannot be listed cannot be swept.
        let Ok(folder) = host.canonicalize(folder).and_then(|folder| host.folder(&folder)) else { continue };
        let folder = Arc::new(folder);
        for name in host.list_in(&folder).unwrap_or_default() {
            if name.as_bytes().ends_with(SWITCH.as_bytes()) {
                sweep_one(host, &Place::within(Arc::clone(&folder), name), may_be_elsewhere)?;
            }
        }
    }
    Ok(())
}

fn sweep_one(host: &dyn Host, record: &Place, may_be_elsewhere: bool) -> Result<()> {
    // Before it is opened: what nobody believes need not be able to be read.
    let failed = |e| Error::io(&record.path(), FileOp::Stat, None, e);
    let owner = match record.stat(host) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        stat => stat.map_err(failed)?.owner,
    };
    let Some(image) = image_of(host, record, may_be_elsewhere) else { return Ok(()) };
    let path = image.path();
    // An image in use may be in the middle of its edit.
    let Ok(file) = hold_at(host, &path, &image) else { return Ok(()) };
    let disk = file.stat().map_err(|e| Error::io(&path, FileOp::Stat, None, e))?.owner;
    if !owner.may_speak_for(&disk, host.user()) {
        return Ok(());
    }
    if let Some((journal, last)) = Journal::open(host, record, Access::Read)? {
        if !journal.owner()?.may_speak_for(&disk, host.user()) {
            return Ok(());
        }
        if let Some(last) = last
            && matches!(journal.header().purpose, Purpose::Header { .. })
            && identity(host, &path, &*file)
                .is_ok_and(|now| journal.header().targets.iter().any(|target| target.is_same_file(&now)))
        {
            redo_edit(&path, &*file, &journal, &last)?;
        }
        return journal.remove(host);
    }
    remove(host, record)
}

/// Removes what lies at a place, durably.
fn remove(host: &dyn Host, place: &Place) -> Result<()> {
    match place.unlink(host) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(&place.path(), FileOp::Remove, None, e))
        }
        _ => sync_folder(host, place),
    }
}

/// The image that a record is about: the one beside it, by the record's name, or the one that it names, if it may be elsewhere.
fn image_of(host: &dyn Host, record: &Place, may_be_elsewhere: bool) -> Option<Place> {
    let name = record.name().as_bytes();
    let short = name.strip_prefix(b".").and_then(|name| name.strip_suffix(SWITCH.as_bytes()));
    let beside = short.map(OsStr::from_bytes).filter(|name| is_beside(record, name, SWITCH));
    if let Some(name) = beside.filter(|_| !may_be_elsewhere) {
        let image = record.beside(name);
        if image.stat(host).is_ok() {
            return Some(image);
        }
    }
    // The name is one that was too long, or of an image elsewhere.
    let (journal, _) = Journal::open(host, record, Access::Read).ok()??;
    let named = &journal.header().targets.first()?.path;
    if may_be_elsewhere {
        return Place::at(host, named).ok();
    }
    let name = named.file_name().filter(|name| is_beside(record, name, SWITCH))?;
    Some(record.beside(name))
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
    // The edit tears what it writes, and nothing else; and it is of an image.
    let is_image = last.blocks.iter().all(|block| block.number > 0 || is_qcow2(&block.bytes));
    if sectors.beside > 0 || !is_image {
        return Ok(());
    }
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

/// Writes the sectors of a record that are not in the file, and no others: a power cut may tear what is written.
fn write_back(path: &Path, file: &dyn Storage, last: &Record) -> Result<()> {
    let failed = |op| move |e| Error::io(path, op, Some(0), e);
    let mut now = vec![0; BLOCK as usize];
    for block in &last.blocks {
        file.read_exact_or_zero(&mut now, block.number * BLOCK).map_err(failed(FileOp::Read))?;
        for ((now, new), n) in now.chunks(SECTOR).zip(block.bytes.chunks(SECTOR)).zip(0..) {
            let at = block.number * BLOCK + n * SECTOR as u64;
            let inside = last.len.saturating_sub(at).min(SECTOR as u64) as usize;
            if let Some(new) = new.get(..inside).filter(|new| now.get(..inside) != Some(*new)) {
                file.write_all_at(new, at).map_err(failed(FileOp::Write))?;
            }
        }
    }
    file.sync().map_err(failed(FileOp::Sync))
}

/// Opens the image at `place` for writing, and locks it, if it is still the one in `opened`.
fn hold(host: &dyn Host, path: &Path, place: &Place, opened: &dyn Storage) -> Result<Arc<dyn Storage>> {
    let file = place.reopen(host, opened)?;
    lock(host, path, &*file)?;
    Ok(file)
}

/// Opens the image at `place` for writing, and locks it.
fn hold_at(host: &dyn Host, path: &Path, place: &Place) -> Result<Arc<dyn Storage>> {
    let file = place.open(host, Access::ReadWrite).map_err(|e| Error::io(path, FileOp::Open, None, e))?;
    lock(host, path, &*file)?;
    Ok(file)
}

fn lock(host: &dyn Host, path: &Path, file: &dyn Storage) -> Result<()> {
    file.lock(LockMode::Write).map_err(|e| match e {
        LockError::Held { .. } => {
            let holders = file.stat().map(|stat| host.holders(stat.id)).unwrap_or_default();
            Error::InUse { path: path.to_owned(), holders }
        }
        LockError::Io(e) => Error::io(path, FileOp::Lock, None, e),
    })
}
