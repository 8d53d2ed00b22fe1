//! Edits cluster 0 so that the edit survives a power cut, and mends headers that a power cut has torn.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use super::file::{Journal, sync_folder};
use super::judge::{compare, has_clean_names, has_header, seen};
use super::place::{FoundJournal, JOURNAL, SWITCH, find, place, places};
use super::record::{BLOCK, Block, Guard, Header, MAX_BLOCKS, Phase, Purpose, Record, SECTOR, sector_crcs};
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
pub(super) fn end_edit(
    host: &dyn Host,
    path: &Path,
    file: &dyn Storage,
    found: &FoundJournal,
) -> Result<bool> {
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

/// Removes what lies at a place, durably.
pub(super) fn remove(host: &dyn Host, place: &Place) -> Result<()> {
    match place.unlink(host) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(&place.path(), FileOp::Remove, None, e))
        }
        _ => sync_folder(host, place),
    }
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
pub(super) fn hold_at(
    host: &dyn Host,
    path: &Path,
    place: &Place,
    no_locks: bool,
) -> Result<Arc<dyn Storage>> {
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
