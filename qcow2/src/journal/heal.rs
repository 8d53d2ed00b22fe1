//! Edits cluster 0 so that the edit survives a power cut, and mends headers that a power cut has torn.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use super::file::{Journal, sync_folder};
use super::judge::{compare, has_clean_names, has_header, seen};
use super::place::{FoundJournal, JOURNAL, SWITCH, find, is_beside, place, places};
use super::record::{BLOCK, Block, Guard, Header, MAX_BLOCKS, Phase, Purpose, Record, SECTOR, sector_crcs};
use super::unnamed::sweep_unnamed;
use crate::error::{Error, FileOp, Refusal, Result};
use crate::format::is_qcow2;
use crate::stamp::{FileFate, Stamp};
use crate::storage::{
    Access, FileKind, FileStat, Host, LockMode, Place, Storage, if_there, leads_nowhere, lock,
    may_be_unlocked,
};

/// An edit of the header of an image, whose file is held under lock.
#[derive(Debug)]
pub(crate) struct Edit<'a> {
    /// The image.
    pub(crate) path: &'a Path,
    /// Its file.
    pub(crate) file: &'a dyn Storage,
    /// Offsets and bytes, in order. Each write must be durable before the next.
    pub(crate) writes: Vec<(u64, Vec<u8>)>,
    /// Whether the header is either the old or the new one even if only some of the sectors were written.
    pub(crate) atomic: bool,
}

/// Carries out edits of different images in parallel. The record of each is durable beside its image or in
/// `dir` before the edit begins, so that an edit which a power cut tears can be redone. The records are removed
/// afterwards.
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
            let written = edit.file.write_all_at(bytes, *at);
            written.map_err(|e| Error::io(edit.path, FileOp::Write, Some(*at), e))?;
            edit.file.sync().map_err(|e| Error::barrier(edit.path, e))
        })
    })?;
    records.iter().try_for_each(|record| record.remove_name(host))?;
    sync_names()
}

/// Writes the record of an edit. Its content is durable, its name not yet.
pub(super) fn record(host: &dyn Host, edit: &Edit<'_>, dir: Option<&Path>) -> Result<Journal> {
    let place = place(host, edit.path, edit.file, dir, SWITCH)?;
    let now = Stamp::of(host, edit.path, edit.file)?;
    let end = edit.writes.iter().map(|(at, bytes)| at + bytes.len() as u64).max().unwrap_or(0);
    let len = now.times.len.max(end);
    let blocks = edited(edit, end).map_err(|e| Error::io(edit.path, FileOp::Read, Some(0), e))?;
    let header = Header {
        nonce: nonce(),
        purpose: Purpose::Header { atomic: edit.atomic },
        max_blocks: blocks.len().clamp(1, MAX_BLOCKS) as u32,
        guard: Guard::Stamp,
        boot: host.boot(),
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
        has_emptied: false,
        samples: Vec::new(),
    };
    Journal::create_with(host, &place, header, blocks, len)
}

/// The blocks that an edit changes, before and after. The last write ends at `end`.
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

/// A random number to tell this journal's records from those of others.
pub(crate) fn nonce() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::process::id())
}

/// Mends the header of the image at `path` if a power cut has torn it. The content comes from the record of an
/// edit or from a journal, beside the image or in `dir`, whose owner may write the image. The image is locked
/// for that. Records of edits that are done, or were not begun, are removed. Returns whether the header was
/// written.
///
/// # Errors
/// [`Error::InUse`] if there is something to do but somebody holds the image; [`Refusal::NoLocks`] if the file
/// system has no locks, unless `no_locks`; [`Refusal::JournalOfAnother`]; [`Refusal::JournalVersion`]; the
/// system's.
pub(crate) fn heal(host: &dyn Host, path: &Path, dir: Option<&Path>, no_locks: bool) -> Result<bool> {
    let file = match host.open(path, Access::Read) {
        Ok(file) => file,
        // An image that cannot be opened is told where it is used.
        Err(e) if leads_nowhere(&e) || e.kind() == std::io::ErrorKind::PermissionDenied => return Ok(false),
        Err(e) => return Err(Error::io(path, FileOp::Open, None, e)),
    };
    let image = Place::of_file(host, path, &*file)?;
    let hold = || hold(host, path, &image, &*file, no_locks);
    let mut is_written = false;
    if let Some(found) = find(host, path, &*file, dir, Access::Read, SWITCH)? {
        let file = hold()?;
        is_written = end_edit(host, path, &*file, &found)?;
    }
    // A record that is not whole: an edit begins only when its record is durable, so this one was not begun.
    let owner = file.stat().map_err(|e| Error::io(path, FileOp::Stat, None, e))?.owner;
    for record in places(host, &image, dir, SWITCH)? {
        let stat =
            if_there(record.stat(host)).map_err(|e| Error::io(&record.path(), FileOp::Stat, None, e))?;
        let may =
            |stat: FileStat| stat.kind == FileKind::Regular && stat.owner.may_speak_for(&owner, host.user());
        if stat.is_some_and(may) && Journal::open(host, &record, Access::Read)?.is_none() {
            let _held = hold()?;
            remove(host, &record)?;
        }
    }
    let Some(found) = torn_under_a_journal(host, path, &*file, dir)? else { return Ok(is_written) };
    let FoundJournal { journal, last: Some(last), .. } = &found else { return Ok(is_written) };
    let file = hold()?;
    let was = seen(journal, Some(last), 0, &found.now, host.boot())?;
    write_back(path, &*file, last)?;
    // Healing writes to the image. The journal must note the new times, or they would look like somebody else's write.
    if matches!(was, FileFate::Untouched | FileFate::Moved | FileFate::Unsure)
        && let Some((journal, Some(last))) = Journal::open(host, journal.place(), Access::ReadWrite)?
    {
        // From now on the times cannot tell whether the image was as the work wrote it.
        let known = last.known.first().is_some_and(|known| {
            (known.len, known.modified_ns) == (found.now.times.len, found.now.times.modified_ns)
        });
        journal.note_healed(&*file, &last, was == FileFate::Unsure || !known)?;
    }
    Ok(true)
}

/// Whether a power cut has torn the header of the image at `path`, or stopped an edit of it half-way, so that
/// [`heal`] has something to mend. Nothing is changed.
///
/// # Errors
/// As [`heal`].
pub(crate) fn is_torn_header(host: &dyn Host, path: &Path, dir: Option<&Path>) -> Result<bool> {
    let file = match host.open(path, Access::Read) {
        Ok(file) => file,
        // An image that cannot be opened is told where it is used.
        Err(e) if leads_nowhere(&e) || e.kind() == std::io::ErrorKind::PermissionDenied => return Ok(false),
        Err(e) => return Err(Error::io(path, FileOp::Open, None, e)),
    };
    if let Some(found) = find(host, path, &*file, dir, Access::Read, SWITCH)?
        && matches!(judge_edit(host, path, &*file, &found)?, Edited::Between(_))
    {
        return Ok(true);
    }
    Ok(torn_under_a_journal(host, path, &*file, dir)?.is_some())
}

/// The journal from which a torn header can be mended; `None` if the header is not torn.
fn torn_under_a_journal(
    host: &dyn Host,
    path: &Path,
    file: &dyn Storage,
    dir: Option<&Path>,
) -> Result<Option<FoundJournal>> {
    let Some(found) = find(host, path, file, dir, Access::Read, JOURNAL)? else { return Ok(None) };
    let FoundJournal { journal, last: Some(last), .. } = &found else { return Ok(None) };
    // A running work holds the journal, and is changing the image: nothing is torn.
    if last.target != 0 || journal.is_held()? {
        return Ok(None);
    }
    let failed = |e| Error::io(path, FileOp::Read, Some(0), e);
    let whole = has_header(file).map_err(failed)? && has_clean_names(file).map_err(failed)?;
    let has_header = last.blocks.first().is_some_and(|block| block.number == 0 && is_qcow2(&block.bytes));
    let torn = match whole {
        false => has_header && is_torn(host, path, file, &found, last)?,
        // The sector with the dirty bit may be written, and another sector of the same record may be torn.
        true => has_header && is_torn_beside_the_dirty_bit(host, path, file, &found, last)?,
    };
    if !torn || seen(journal, Some(last), 0, &found.now, host.boot())? == FileFate::Older {
        return Ok(None);
    }
    // While the system has not restarted there was no power cut. Then several unknown sectors do not come from
    // a torn write, but from an image that was restored from a copy at once.
    let is_same_run = last.boot.zip(host.boot()).is_some_and(|(then, now)| then.id == now.id);
    let foreign = compare(last, file).map_err(failed)?.foreign;
    Ok((!is_same_run || foreign < 2).then_some(found))
}

/// How far the edit of a header got, as its record and the image tell.
enum Edited<'a> {
    /// The record belongs to another file, and stays.
    Elsewhere,
    /// The edit is done, or was not begun.
    Whole,
    /// The edit was stopped half-way, or a sector is torn.
    Between(&'a Record),
}

/// Judges how far the edit of a record got in the image at `path`. A record that was made for another file of
/// that name counts only if every sector that it does not change is as the record found it.
fn judge_edit<'a>(
    host: &dyn Host,
    path: &Path,
    file: &dyn Storage,
    found: &'a FoundJournal,
) -> Result<Edited<'a>> {
    let FoundJournal { journal, last, .. } = found;
    let (Some(last), Purpose::Header { .. }) = (last, journal.header().purpose) else {
        return Ok(if found.is_same_file() { Edited::Whole } else { Edited::Elsewhere });
    };
    let failed = |e| Error::io(path, FileOp::Read, Some(0), e);
    if !found.is_same_file() {
        let sectors = compare(last, file).map_err(failed)?;
        let is_torn = !has_header(file).map_err(failed)?;
        match (sectors.foreign, is_torn) {
            (0, _) => {}
            (_, true) if sectors.beside == 0 => {}
            (_, true) => {
                let journal = journal.path().to_owned();
                return Err(Error::refused(path, Refusal::JournalOfAnother { journal }));
            }
            (_, false) => return Ok(Edited::Elsewhere),
        }
    }
    Ok(if is_between(host, path, file, found, last)? { Edited::Between(last) } else { Edited::Whole })
}

/// Redoes the edit of a record if it was stopped half-way or torn, and removes the record. A record of another
/// file stays. The image at `path` must be locked. Returns whether the header was written.
fn end_edit(host: &dyn Host, path: &Path, file: &dyn Storage, found: &FoundJournal) -> Result<bool> {
    let is_written = match judge_edit(host, path, file, found)? {
        Edited::Elsewhere => return Ok(false),
        Edited::Whole => false,
        Edited::Between(last) => {
            write_back(path, file, last)?;
            true
        }
    };
    found.journal.remove(host)?;
    Ok(is_written)
}

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

/// Removes what lies at a place, durably.
fn remove(host: &dyn Host, place: &Place) -> Result<()> {
    match place.unlink(host) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(&place.path(), FileOp::Remove, None, e))
        }
        _ => sync_folder(host, place),
    }
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

/// Whether the record of an edit lies beside the image at `path`.
pub(crate) fn has_edit(host: &dyn Host, path: &Path) -> bool {
    let Ok(file) = host.open(path, Access::Read) else { return false };
    find(host, path, &*file, None, Access::Read, SWITCH).is_ok_and(|found| found.is_some())
}

/// Whether the edit of a record was begun, but not completed.
fn is_between(
    host: &dyn Host,
    path: &Path,
    file: &dyn Storage,
    found: &FoundJournal,
    last: &Record,
) -> Result<bool> {
    let sectors = compare(last, file).map_err(|e| Error::io(path, FileOp::Read, Some(0), e))?;
    // A torn edit leaves sectors alone that it does not change, and its block 0 is a qcow2 header. Anything
    // else is not our edit.
    let is_image = last.blocks.iter().all(|block| block.number > 0 || is_qcow2(&block.bytes));
    if sectors.beside > 0 || !is_image {
        return Ok(false);
    }
    let atomic = matches!(found.journal.header().purpose, Purpose::Header { atomic: true });
    let between = !atomic && sectors.foreign == 0 && sectors.old > 0 && sectors.new > 0;
    Ok(between
        || (!atomic && sectors.foreign > 0 && is_as_left(host, found, last)?)
        || is_torn(host, path, file, found, last)?)
}

/// Whether the file is the one of the record, and its times tell of nobody who has written since. Then a sector that the
/// record changes, and that is neither old nor new, is torn, whatever the header says: garbage in the extensions may
/// decode, and end their list too early.
fn is_as_left(host: &dyn Host, found: &FoundJournal, last: &Record) -> Result<bool> {
    let seen = seen(&found.journal, Some(last), 0, &found.now, host.boot())?;
    Ok(found.is_same_file() && matches!(seen, FileFate::Untouched | FileFate::Moved | FileFate::Unsure))
}

/// Whether a power cut tore the header while this record was written into it. A header that decodes, but has
/// names that are not text, is torn behind its first bytes.
fn is_torn(
    host: &dyn Host,
    path: &Path,
    file: &dyn Storage,
    found: &FoundJournal,
    last: &Record,
) -> Result<bool> {
    let failed = |e| Error::io(path, FileOp::Read, Some(0), e);
    let sectors = compare(last, file).map_err(failed)?;
    if !has_header(file).map_err(failed)? {
        return Ok(found.is_same_file() || sectors.beside == 0);
    }
    let is_newer = seen(&found.journal, Some(last), 0, &found.now, host.boot())? == FileFate::Newer;
    Ok(sectors.foreign > 0 && !is_newer && !has_clean_names(file).map_err(failed)?)
}

/// Whether a power cut has torn sectors that were written together with the one that holds the dirty bit. That
/// one is whole, so the bit alone would say that the work is done, or has not begun.
fn is_torn_beside_the_dirty_bit(
    host: &dyn Host,
    path: &Path,
    file: &dyn Storage,
    found: &FoundJournal,
    last: &Record,
) -> Result<bool> {
    let header = found.journal.header();
    if !matches!(header.guard, Guard::DirtyBit { .. }) || !matches!(last.phase, Phase::Arming | Phase::Done) {
        return Ok(false);
    }
    let failed = |e| Error::io(path, FileOp::Read, Some(0), e);
    let sectors = compare(last, file).map_err(failed)?;
    let mut head = [0; SECTOR];
    file.read_exact_or_zero(&mut head, 0).map_err(failed)?;
    let is_written = last.blocks.first().is_some_and(|block| block.bytes.starts_with(&head));
    // If the image is newer than the record, somebody has used it since, and the header is theirs.
    let seen = seen(&found.journal, Some(last), 0, &found.now, host.boot())?;
    Ok(sectors.foreign > 0
        && is_written
        && matches!(seen, FileFate::Untouched | FileFate::Moved | FileFate::Unsure))
}

/// Writes the sectors of a record that the file does not hold yet, and no others: a power cut may tear every
/// sector that is written.
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
    file.sync().map_err(|e| Error::barrier(path, e))
}

/// Opens the image at `place` for writing and locks it. It must still be the file `opened`.
fn hold(
    host: &dyn Host,
    path: &Path,
    place: &Place,
    opened: &dyn Storage,
    no_locks: bool,
) -> Result<Arc<dyn Storage>> {
    let file = place.reopen(host, opened)?;
    lock_to_write(host, path, &*file, no_locks)?;
    Ok(file)
}

/// Opens the image at `place` for writing and locks it.
fn hold_at(host: &dyn Host, path: &Path, place: &Place, no_locks: bool) -> Result<Arc<dyn Storage>> {
    let file = place.open(host, Access::ReadWrite).map_err(|e| Error::io(path, FileOp::Open, None, e))?;
    lock_to_write(host, path, &*file, no_locks)?;
    Ok(file)
}

fn lock_to_write(host: &dyn Host, path: &Path, file: &dyn Storage, no_locks: bool) -> Result<()> {
    lock(host, path, file, LockMode::Write)?;
    if file.has_locks() {
        return Ok(());
    }
    let id = file.stat().map_err(|e| Error::io(path, FileOp::Stat, None, e))?.id;
    may_be_unlocked(host, path, id, file, Access::ReadWrite, no_locks)
}
