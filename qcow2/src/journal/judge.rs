//! Judges a journal that was found: may the unfinished work continue in the image as it is now?
//!
//! [`crate::stamp`] tells what happened to the files since the work was stopped. This module adds what only the
//! journal knows: the phase of the work, the dirty bit that the work has set, and the sectors of the last
//! record. Each of these sources is wrong in some cases, so the verdict is "unfinished" only if none of them
//! speaks against it.

use std::io;

use super::file::Journal;
use super::record::{BLOCK, Guard, Phase, Record, SECTOR};
use crate::error::{Error, FileOp, Result};
use crate::format::{Cluster0, FormatError};
use crate::stamp::{FileFate, Stamp, Times, WorkTimes};
use crate::storage::{Boot, Host, Storage};

/// What a journal means for its image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum JournalVerdict {
    /// The work has not begun, or is over: the journal can be removed.
    Over,
    /// The work is over. What remains is to clear the dirty bit, after a proof that this is the work's image.
    Finished,
    /// The work was stopped, and nobody has written to the image since.
    Unfinished,
    /// The work was stopped. Nothing proves that the image is as the work left it, so the data itself must be
    /// checked.
    Unsure,
    /// The image is older than its stamp: it was restored from a copy. The work begins anew.
    PutBack,
    /// The image is another file than that of its stamp: a copy, or a replacement. The work begins anew.
    Copied,
    /// Somebody has written to the image since.
    Foreign,
}

/// A verdict, and what follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Judgement {
    pub(crate) verdict: JournalVerdict,
    /// Whether the blocks of the last record may be written again.
    pub(crate) replays: bool,
    /// Whether a sector of the last record is torn: without the record the image cannot be read.
    pub(crate) is_torn: bool,
    /// Whether the times of the files allow that somebody has written to the image since.
    pub(crate) may_be_newer: bool,
    /// Whether one of the files is older than its stamp.
    pub(crate) is_older: bool,
    /// Whether every file has the length and the time of modification that the last record notes. Then nobody
    /// has written to it since that record, not even the work itself.
    pub(crate) is_as_known: bool,
}

/// The files of an image as they are now: the image itself, and its external data file if it has one.
pub(crate) struct Now<'a> {
    pub(crate) stamps: Vec<Stamp>,
    pub(crate) files: Vec<&'a dyn Storage>,
    /// The image's dirty bit; `None` if its header is broken. An image without such a bit counts as not dirty.
    pub(crate) dirty: Option<bool>,
}

/// Judges the journal of an image.
///
/// # Errors
/// The system's.
pub(crate) fn judge(
    host: &dyn Host,
    journal: &Journal,
    last: Option<&Record>,
    now: &Now<'_>,
) -> Result<Judgement> {
    let (header, boot) = (journal.header(), host.boot());
    let seen = seen_of_all(journal, last, &now.stamps, boot)?;
    let is_older = seen == FileFate::Older;
    let known = |at: usize| last.and_then(|last| last.known.get(at));
    let is_not_newer = |(at, stamp): (usize, &Stamp)| {
        !stamp.is_device && known(at).is_some_and(|known| stamp.times.modified_ns <= known.modified_ns)
    };
    let is_doubtful = last.is_some_and(|last| last.is_doubtful);
    let all_as_known = |at: usize, stamp: &Stamp| known(at).is_some_and(|known| *known == stamp.times);
    let mut may_be_newer = is_doubtful || !now.stamps.iter().enumerate().all(is_not_newer);
    for (at, stamp) in now.stamps.iter().enumerate() {
        // If the clock was set back, a later write has an earlier time.
        may_be_newer |= !all_as_known(at, stamp)
            && work(journal, last, at, boot)?.is_some_and(|work| work.clock_was_set_back());
    }
    let has_known_times = |(at, stamp): (usize, &Stamp)| {
        let same =
            |known: &Times| (known.len, known.modified_ns) == (stamp.times.len, stamp.times.modified_ns);
        !stamp.is_device && known(at).is_some_and(same)
    };
    let is_as_known = !is_doubtful && now.stamps.iter().enumerate().all(has_known_times);
    let as_judged = |verdict, replays, is_torn| Judgement {
        verdict,
        replays,
        is_torn,
        may_be_newer,
        is_older,
        is_as_known,
    };
    let is_newer = seen == FileFate::Newer;
    // Before the dirty bit is set, the work writes nothing to the image. So a later time comes from somebody else, unless
    // the system has restarted and a power cut has taken the bit.
    let has_later_time = |(at, stamp): (usize, &Stamp)| {
        let then = known(at).or_else(|| header.targets.get(at).map(|target| &target.times));
        !stamp.is_device && then.is_some_and(|then| stamp.times.modified_ns > then.modified_ns)
    };
    let begun_at = last.map_or(header.boot, |last| last.boot);
    let is_written = begun_at.zip(boot).is_some_and(|(then, now)| then.id == now.id)
        && now.dirty == Some(false)
        && now.stamps.iter().enumerate().any(has_later_time);
    let Some(last) = last else {
        return Ok(as_judged(
            if is_newer || (is_written && header.guard != Guard::Stamp) {
                JournalVerdict::Foreign
            } else {
                JournalVerdict::Over
            },
            false,
            false,
        ));
    };
    let sectors = match now.files.get(usize::from(last.target)) {
        Some(file) => {
            compare(last, *file).map_err(|e| Error::io(journal.path(), FileOp::CompareWith, None, e))?
        }
        None => SectorCounts::default(),
    };
    let is_stamped = header.guard == Guard::Stamp;
    let verdict = match (is_stamped, now.dirty, last.phase) {
        (_, _, Phase::Removing) => JournalVerdict::Over,
        // The work noted that it was done after its last write to the image, and an older image lacks that
        // write.
        (_, _, Phase::Done) if matches!(seen, FileFate::Older) => JournalVerdict::PutBack,
        (true, _, Phase::Done) => JournalVerdict::Over,
        // The bit is clear and the file is newer: somebody has used the finished image since.
        (false, Some(false), Phase::Done) if is_newer && !is_doubtful => JournalVerdict::Over,
        // An image that was restored from a copy at once, or whose header was mended, may have the same bit. So
        // the data must be checked.
        (false, _, Phase::Done) => JournalVerdict::Finished,
        (false, Some(false), Phase::Arming) if is_newer || is_written => JournalVerdict::Foreign,
        (false, Some(false), Phase::Arming) => JournalVerdict::Over,
        (false, Some(false), _) => match seen {
            FileFate::Older => JournalVerdict::PutBack,
            FileFate::Copied | FileFate::Other => JournalVerdict::Copied,
            _ => JournalVerdict::Foreign,
        },
        _ => match seen {
            // Without a dirty bit, only the time shows a foreign write. With one, QEMU would have cleared the
            // bit.
            FileFate::Newer if is_stamped => JournalVerdict::Foreign,
            FileFate::Older => JournalVerdict::PutBack,
            FileFate::Copied | FileFate::Other => JournalVerdict::Copied,
            // The system has not restarted, so no power cut has torn a sector: somebody else has written there.
            FileFate::Untouched | FileFate::Moved
                if is_stamped && sectors.foreign > 0 && is_same(last, boot) =>
            {
                JournalVerdict::Foreign
            }
            FileFate::Untouched | FileFate::Moved => JournalVerdict::Unfinished,
            // A sector that the record does not change is not as the record found it. No torn write explains
            // that.
            FileFate::Unsure | FileFate::Newer if sectors.beside > 0 && may_be_newer => {
                JournalVerdict::Foreign
            }
            FileFate::Unsure | FileFate::Newer if sectors.beside > 0 => JournalVerdict::PutBack,
            FileFate::Unsure | FileFate::Newer => JournalVerdict::Unsure,
        },
    };
    let replays = match verdict {
        // If no sector of the record was written, the image is whole without the record. An image that was
        // restored within a second of the kill looks the same, but the record does not fit it. So the record is
        // not used.
        JournalVerdict::Unfinished => !is_stamped || sectors.new > 0 || sectors.foreign > 0,
        JournalVerdict::Unsure | JournalVerdict::Copied => sectors.foreign > 0 && sectors.beside == 0,
        _ => false,
    };
    Ok(as_judged(verdict, replays, sectors.foreign > 0))
}

/// Whether the system has not restarted since a record was written.
fn is_same(last: &Record, boot: Option<Boot>) -> bool {
    last.boot.zip(boot).is_some_and(|(then, now)| then.id == now.id)
}

/// What has happened to one target of a journal since the work was stopped. `now` is its present stamp.
///
/// # Errors
/// The system's.
pub(super) fn seen(
    journal: &Journal,
    last: Option<&Record>,
    at: usize,
    now: &Stamp,
    boot: Option<Boot>,
) -> Result<FileFate> {
    let Some(then) = journal.header().targets.get(at) else { return Ok(FileFate::Other) };
    let work = work(journal, last, at, boot)?;
    Ok(work.map_or(FileFate::Other, |work| then.judge(&work, now)))
}

/// Until when the work wrote to one of its targets, as far as the journal tells; `None` if it has no such
/// target.
fn work(
    journal: &Journal,
    last: Option<&Record>,
    at: usize,
    boot: Option<Boot>,
) -> Result<Option<WorkTimes>> {
    let Some(then) = journal.header().targets.get(at) else { return Ok(None) };
    let alive_ns = match last {
        Some(last) if last.stopped => None,
        _ => Some(journal.modified_ns()?),
    };
    let known = last.and_then(|last| last.known.get(at)).copied().unwrap_or(then.times);
    let run = last.map_or(journal.header().boot, |last| last.boot);
    Ok(Some(WorkTimes { known, alive_ns, boot: run, now: boot }))
}

/// What has happened to the targets of a journal: of their fates, the one that speaks most against continuing.
fn seen_of_all(
    journal: &Journal,
    last: Option<&Record>,
    now: &[Stamp],
    boot: Option<Boot>,
) -> Result<FileFate> {
    if journal.header().targets.len() != now.len() {
        return Ok(FileFate::Other);
    }
    let all = now.iter().enumerate().map(|(at, now)| seen(journal, last, at, now, boot));
    let weight = |seen: &FileFate| match seen {
        FileFate::Untouched => 0,
        FileFate::Moved => 1,
        FileFate::Unsure => 2,
        FileFate::Other => 3,
        FileFate::Copied => 4,
        FileFate::Older => 5,
        FileFate::Newer => 6,
    };
    Ok(all.collect::<Result<Vec<_>>>()?.into_iter().max_by_key(weight).unwrap_or(FileFate::Other))
}

/// How many sectors of a record's blocks are in which state in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct SectorCounts {
    /// The record changes them, and the file has the old bytes.
    pub(super) old: usize,
    /// The record changes them, and the file has the new bytes.
    pub(super) new: usize,
    /// The file has neither the old nor the new bytes: torn, or written by somebody else.
    pub(super) foreign: usize,
    /// The foreign ones among those that the record does not change. A power cut cannot have torn these.
    pub(super) beside: usize,
}

pub(super) fn compare(record: &Record, file: &dyn Storage) -> io::Result<SectorCounts> {
    let mut sectors = SectorCounts::default();
    let mut now = vec![0; BLOCK as usize];
    for block in &record.blocks {
        file.read_exact_or_zero(&mut now, block.number * BLOCK)?;
        let new = block.bytes.chunks(SECTOR);
        for (((now, new), before), n) in now.chunks(SECTOR).zip(new).zip(&block.before).zip(0..) {
            // Nothing is written behind the target's length.
            let behind = block.number * BLOCK + n * SECTOR as u64 >= record.len;
            let changes = crc32fast::hash(new) != *before;
            match (now == new, changes, crc32fast::hash(now) == *before) {
                _ if behind => {}
                (true, false, _) => {}
                (true, true, _) => sectors.new += 1,
                (false, true, true) => sectors.old += 1,
                _ => {
                    sectors.foreign += 1;
                    sectors.beside += usize::from(!changes);
                }
            }
        }
    }
    Ok(sectors)
}

/// Whether the image in `file` has a qcow2 header that can be decoded.
pub(super) fn has_header(file: &dyn Storage) -> io::Result<bool> {
    Ok(match cluster0(file)? {
        Some(Ok(_)) => true,
        Some(Err(e)) => e.is_unsupported(),
        None => false,
    })
}

/// Whether the header of the image in `file` can be decoded, and its names are text.
pub(super) fn has_clean_names(file: &dyn Storage) -> io::Result<bool> {
    let Some(Ok(cluster0)) = cluster0(file)? else { return Ok(false) };
    Ok(are_names_clean(&cluster0))
}

/// Whether the names in a header are text.
pub(crate) fn are_names_clean(cluster0: &Cluster0) -> bool {
    let clean = |name: &[u8]| {
        std::str::from_utf8(name)
            .is_ok_and(|name| !name.contains(|c: char| c.is_control() || c == '\u{fffd}'))
    };
    let format = cluster0.backing_format().unwrap_or_default();
    clean(cluster0.backing_name.as_deref().unwrap_or_default()) && clean(format.as_bytes())
}

/// Cluster 0 as a reader decodes it; `None` if it does not begin with a header.
fn cluster0(file: &dyn Storage) -> io::Result<Option<std::result::Result<Cluster0, FormatError>>> {
    let mut bytes = vec![0; BLOCK as usize];
    file.read_exact_or_zero(&mut bytes, 0)?;
    let Ok(cluster0) = Cluster0::decode(&bytes) else { return Ok(None) };
    bytes.resize(cluster0.header.geometry().cluster_size() as usize, 0);
    file.read_exact_or_zero(&mut bytes, 0)?;
    Ok(Some(Cluster0::parse(&bytes)))
}

#[cfg(test)]
#[path = "judge_tests.rs"]
mod tests;
