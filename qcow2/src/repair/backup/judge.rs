//! Judges whether an image may be restored from a backup: only if every sector of its metadata is one that the
//! backup knows.

use std::ops::Range;
use std::path::Path;

use super::SECTOR;
use super::saved::{Saved, Sector, halves};
use super::sectors::Sectors;
use crate::check::CheckOptions;
use crate::error::{Error, FileOp, Refusal, Result};
use crate::format::{Cluster0, parts};
use crate::journal::are_names_clean;
use crate::storage::Storage;

/// The offset of the byte in the header that holds the incompatible feature bit "corrupt", and the bit.
const CORRUPT: (usize, u8) = (parts::DIRTY_AND_CORRUPT, 2);
/// How many ranges are listed; all bytes are counted.
const KEPT_RANGES: usize = 1000;

/// What a restore has to write to the image.
#[derive(Debug, Default)]
pub(super) struct Differences {
    /// How many bytes differ from before the repair.
    pub(super) bytes: u64,
    /// The ranges of these bytes: the first thousand.
    pub(super) ranges: Vec<Range<u64>>,
    /// How long the image is, in bytes.
    pub(super) len: u64,
    /// How long it was before the repair. For a device, its length now.
    pub(super) len_before: u64,
}

/// The first sector with the corrupt mark, which keeps others from writing during a restore. `None` for version
/// 2, which has no such mark.
pub(super) fn marked(header: &Sector) -> Option<Sector> {
    let version = header.get(4..8)?;
    let mut marked = *header;
    *marked.get_mut(CORRUPT.0)? |= CORRUPT.1;
    (version != [0, 0, 0, 2]).then_some(marked)
}

/// Compares the image in `file` with a backup.
///
/// # Errors
/// [`Refusal::WrittenSinceRepair`], cancellation, and the system's.
pub(super) fn judge(
    saved: &Saved<'_>,
    path: &Path,
    file: &dyn Storage,
    options: &CheckOptions<'_>,
) -> Result<Differences> {
    let judge = BackupJudge { saved, path, file, options };
    let len = judge.length()?;
    let (is_header_known, may_be_torn) = judge.header()?;
    let len_before = if saved.image.is_device { len } else { saved.image.times.len };
    let mut found = Differences { len, len_before, ..Differences::default() };
    let header = judge.read(0, SECTOR)?;
    if saved.headers.first().is_some_and(|old| header != old) {
        found.add(0..SECTOR.min(len_before));
    }
    let mut first = 1;
    while first < u64::MAX {
        let mut sectors = Sectors::from(first);
        judge.changes(&mut sectors)?;
        judge.metadata(&sectors)?;
        if let Some(sector) = sectors.first_unknown().filter(|_| !may_be_torn) {
            return Err(judge.foreign(sector * SECTOR));
        }
        for range in sectors.differing() {
            found.add(range.start..range.end.min(len_before));
        }
        first = sectors.window().end;
    }
    match is_header_known {
        true => Ok(found),
        // All other sectors are right, so a power cut may have torn this one.
        false => judge.torn_header().map(|()| found),
    }
}

impl Differences {
    fn add(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        self.bytes += range.end - range.start;
        let is_room = self.ranges.len() < KEPT_RANGES;
        match self.ranges.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ if is_room => self.ranges.push(range),
            _ => {}
        }
    }
}

struct BackupJudge<'a> {
    saved: &'a Saved<'a>,
    path: &'a Path,
    file: &'a dyn Storage,
    options: &'a CheckOptions<'a>,
}

impl BackupJudge<'_> {
    fn refuse(&self, offset: u64, what: impl Into<String>) -> Error {
        let breaks_off = self.saved.breaks_off();
        Error::refused(self.path, Refusal::WrittenSinceRepair { offset, what: what.into(), breaks_off })
    }

    fn foreign(&self, offset: u64) -> Error {
        self.refuse(offset, "the metadata is neither as the backup has it nor as the repair left it")
    }

    fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>> {
        if self.options.cancel.is_some_and(|cancel| cancel.load(std::sync::atomic::Ordering::Relaxed)) {
            return Err(Error::Cancelled);
        }
        let mut bytes = vec![0; len as usize];
        let read = self.file.read_exact_or_zero(&mut bytes, offset);
        read.map_err(|e| Error::io(self.path, FileOp::Read, Some(offset), e)).map(|()| bytes)
    }

    /// Checks the image's length, which a repair and a restore change within bounds only.
    fn length(&self) -> Result<u64> {
        let len = self.file.size().map_err(|e| Error::io(self.path, FileOp::Size, None, e))?;
        let old = self.saved.image.times.len;
        let most = if self.saved.image.is_device { u64::MAX } else { old.max(self.saved.changes_end) };
        match (old..=most).contains(&len) {
            true => Ok(len),
            false => {
                let expected = if len < old { format!("at least {old}") } else { format!("at most {most}") };
                Err(self.refuse(len, format!("it is {len} bytes long, expected {expected}")))
            }
        }
    }

    /// Whether the first sector is one that the backup knows, and whether other sectors may be torn. They may
    /// be only if the mark is there: a restore is under way then, and the mark has kept everybody else from
    /// writing.
    fn header(&self) -> Result<(bool, bool)> {
        let now = self.read(0, SECTOR)?;
        let is = |header: &Sector| now == header;
        let is_known = self.saved.headers.iter().any(is);
        let is_marked = self.saved.headers.iter().filter_map(marked).any(|header| is(&header));
        match (is_known, is_marked, self.saved.is_restoring) {
            (_, true, true) => Ok((true, true)),
            (true, _, _) => Ok((true, false)),
            (false, true, false) => Err(self.refuse(CORRUPT.0 as u64, "it has been marked corrupt")),
            (false, false, true) => Ok((false, false)),
            (false, false, false) => Err(self.foreign(0)),
        }
    }

    /// Checks that a first sector which the backup does not know can be the result of a power cut. It cannot be
    /// if it is a sound header with another meaning: then somebody else has written it.
    fn torn_header(&self) -> Result<()> {
        let now = self.read(0, SECTOR)?;
        let size = self.saved.headers.first().and_then(|old| Cluster0::decode(old).ok());
        let size = size.map_or(SECTOR, |old| old.header.geometry().cluster_size());
        let rest = self.read(0, size)?.split_off(SECTOR as usize);
        let meaning = |header: &[u8]| {
            let cluster0 = Cluster0::decode(&[header, &rest].concat()).ok().filter(are_names_clean)?;
            let names = (cluster0.backing_format(), cluster0.data_file_name(), cluster0.merged_into());
            let names = format!("{names:?}");
            Some((cluster0.header, cluster0.backing_name, names))
        };
        let is_meant = |known: &Sector| meaning(known) == meaning(&now);
        let is_half = |known: &Sector| {
            let (start, end) = now.split_at(now.len() / 2);
            known.starts_with(start) && end.iter().all(|byte| *byte == 0)
        };
        let marked: Vec<Sector> = self.saved.headers.iter().filter_map(marked).collect();
        let mut known = self.saved.headers.iter().chain(&marked);
        match meaning(&now).is_none() || known.any(|known| is_meant(known) || is_half(known)) {
            true => Ok(()),
            false => Err(self.foreign(0)),
        }
    }

    /// Compares the sectors that the repair changed.
    fn changes(&self, sectors: &mut Sectors) -> Result<()> {
        let size = SECTOR as usize;
        self.saved.for_each_change(|record| {
            let (before, after) = halves(record);
            let number = record.first / SECTOR;
            let window = sectors.window();
            if number >= window.end || number + before.len() as u64 / SECTOR <= window.start {
                return Ok(());
            }
            let now = self.read(record.first, before.len() as u64)?;
            let parts = now.chunks(size).zip(before.chunks(size)).zip(after.chunks(size));
            for (((now, before), after), sector) in parts.zip(number..) {
                sectors.changed(sector, now == before, now == after);
            }
            Ok(())
        })
    }

    /// Checks that the metadata that the repair did not change is as it was.
    fn metadata(&self, sectors: &Sectors) -> Result<()> {
        let window = sectors.window();
        self.saved.for_each_kept(|record| {
            let now = self.read(record.first, record.content.len() as u64)?;
            let size = SECTOR as usize;
            let parts = now.chunks(size).zip(record.content.chunks(size)).zip(record.first / SECTOR..);
            for ((now, kept), sector) in parts {
                if now != kept && window.contains(&sector) && !sectors.is_changed(sector) {
                    return Err(self.foreign(sector * SECTOR));
                }
            }
            Ok(())
        })
    }
}
