//! A backup that was read once as a whole: which image it belongs to, and where its parts are.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use super::SECTOR;
use super::record::{BackupReader, BackupRecord, PIECE, RecordKind, RecordPosition};
use crate::error::Result;
use crate::stamp::{Stamp, Times};
use crate::storage::FileId;

/// The most times that a repair writes the header.
const HEADERS: usize = 16;

/// The content of a sector.
pub(super) type Sector = [u8; SECTOR as usize];

/// A backup whose metadata is whole.
#[derive(Debug)]
pub(super) struct Saved<'a> {
    reader: BackupReader<'a>,
    /// The stamp of the image, as far as the backup holds it.
    pub(super) image: Stamp,
    /// The first sector before the repair, and after each write to it.
    pub(super) headers: Vec<Sector>,
    /// The highest end of a change in the image, in bytes.
    pub(super) changes_end: u64,
    /// Whether a restore began and did not end.
    pub(super) is_restoring: bool,
    /// Where the records of the metadata begin and end.
    metadata: (RecordPosition, RecordPosition),
    /// Where the records of changes begin and end.
    changes: (RecordPosition, RecordPosition),
    /// The position behind the last record.
    pub(super) end: RecordPosition,
}

/// What may follow the metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BackupPhase {
    /// Changes.
    Repair,
    /// The marks of restores.
    Restore,
}

impl<'a> Saved<'a> {
    /// Reads a backup from its beginning to its end.
    ///
    /// # Errors
    /// The system's, and a backup that is damaged or lacks part of the metadata.
    pub(super) fn read(reader: BackupReader<'a>) -> Result<Self> {
        let start = RecordPosition::START.end;
        let first = reader.next(RecordPosition::START)?.filter(|record| record.kind == RecordKind::Image);
        let first = first.ok_or_else(|| reader.damaged(start, "the record of the image is not whole"))?;
        let Some(image) = identity(&first) else {
            return Err(reader.damaged(start, "it does not say which image it is about"));
        };
        let place = first.place();
        let mut saved = Self {
            reader,
            image,
            headers: Vec::new(),
            changes_end: 0,
            is_restoring: false,
            metadata: (place, place),
            changes: (place, place),
            end: place,
        };
        saved.read_metadata()?;
        saved.read_changes()?;
        Ok(saved)
    }

    fn read_metadata(&mut self) -> Result<()> {
        let mut kept = 0u64;
        loop {
            let Some(record) = self.reader.next(self.end)? else {
                return Err(self.reader.damaged(self.end.end, "from here on the metadata is not whole"));
            };
            let bad = |what| Err(self.reader.damaged(self.end.end, what));
            let end = record.first.checked_add(record.content.len() as u64);
            let is_inside = end.is_some_and(|end| end <= self.image.times.len);
            match record.kind {
                RecordKind::Kept if !record.first.is_multiple_of(SECTOR) || !is_inside => {
                    return bad("metadata lies outside the image");
                }
                RecordKind::Kept => {
                    if record.first == 0 && self.headers.is_empty() {
                        self.headers.push(sector(&record.content));
                    }
                    kept += 1;
                }
                RecordKind::Full if record.first != kept => return bad("some of the metadata is missing"),
                RecordKind::Full if self.headers.is_empty() => return bad("the header is missing"),
                RecordKind::Full => {
                    self.metadata.1 = self.end;
                    self.end = record.place();
                    self.changes = (self.end, self.end);
                    return Ok(());
                }
                _ => return bad("this record does not belong into the metadata"),
            }
            self.end = record.place();
        }
    }

    fn read_changes(&mut self) -> Result<()> {
        let mut phase = BackupPhase::Repair;
        let mut changes = 0u64;
        while let Some(record) = self.reader.next(self.end)? {
            let follows = match (record.kind, phase) {
                (RecordKind::Change, BackupPhase::Repair) => {
                    changes += 1;
                    self.changes.1 = record.place();
                    self.note_change(&record)
                }
                (RecordKind::Repaired, BackupPhase::Repair) => {
                    phase = BackupPhase::Restore;
                    record.first == changes
                }
                (RecordKind::Restoring, _) => {
                    phase = BackupPhase::Restore;
                    !std::mem::replace(&mut self.is_restoring, true)
                }
                (RecordKind::Restored, BackupPhase::Restore) => {
                    std::mem::replace(&mut self.is_restoring, false)
                }
                _ => false,
            };
            if !follows {
                return Err(self.reader.damaged(self.end.end, "this record does not fit those before it"));
            }
            self.end = record.place();
        }
        Ok(())
    }

    /// Takes a change in; false if the record is no valid change.
    fn note_change(&mut self, record: &BackupRecord) -> bool {
        let (before, after) = halves(record);
        let len = before.len() as u64;
        let fits = before.len() == after.len() && (1..=PIECE).contains(&len);
        let Some(end) = record.first.checked_add(len).filter(|&end| fits && end <= i64::MAX as u64) else {
            return false;
        };
        self.changes_end = self.changes_end.max(end);
        if record.first == 0 {
            self.headers.push(sector(after));
        }
        let is_of_sectors = record.first.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR);
        let is_inside = !self.image.is_device || end <= self.image.times.len.next_multiple_of(SECTOR);
        is_of_sectors && is_inside && self.headers.len() <= HEADERS
    }

    /// Where the last record ends, if bytes that are no record follow it.
    pub(super) fn breaks_off(&self) -> Option<u64> {
        (self.end.end < self.reader.len()).then_some(self.end.end)
    }

    /// Calls `f` with each record of metadata.
    ///
    /// # Errors
    /// Those of `f`; a backup that changes meanwhile.
    pub(super) fn for_each_kept(&self, f: impl FnMut(&BackupRecord) -> Result<()>) -> Result<()> {
        self.for_each(self.metadata, f)
    }

    /// Calls `f` with each change, the first one first.
    ///
    /// # Errors
    /// Those of `f`; a backup that changes meanwhile.
    pub(super) fn for_each_change(&self, f: impl FnMut(&BackupRecord) -> Result<()>) -> Result<()> {
        self.for_each(self.changes, f)
    }

    fn for_each(
        &self,
        (mut place, end): (RecordPosition, RecordPosition),
        mut f: impl FnMut(&BackupRecord) -> Result<()>,
    ) -> Result<()> {
        while place != end {
            let Some(record) = self.reader.next(place)? else { return Err(self.is_changing(place.end)) };
            f(&record)?;
            place = record.place();
        }
        Ok(())
    }

    /// Calls `f` with each change, the last one first.
    ///
    /// # Errors
    /// Those of `f`; a backup that changes meanwhile.
    pub(super) fn for_each_change_back(&self, mut f: impl FnMut(&BackupRecord) -> Result<()>) -> Result<()> {
        let mut link = self.changes.1.last;
        while link != self.changes.0.last {
            let record = self.reader.at(link.at)?.filter(|record| record.link == link);
            let Some(record) = record.filter(|record| record.before.at < link.at) else {
                return Err(self.is_changing(link.at));
            };
            f(&record)?;
            link = record.before;
        }
        Ok(())
    }

    fn is_changing(&self, at: u64) -> crate::Error {
        self.reader.damaged(at, "a record has changed while it was in use")
    }
}

/// The sectors before a change, and after it.
pub(super) fn halves(change: &BackupRecord) -> (&[u8], &[u8]) {
    change.content.split_at(change.content.len() / 2)
}

fn sector(bytes: &[u8]) -> Sector {
    let mut sector = [0; SECTOR as usize];
    sector.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    sector
}

/// The stamp of the image that a backup belongs to.
fn identity(record: &BackupRecord) -> Option<Stamp> {
    let (device, rest) = record.content.split_first_chunk::<8>()?;
    let (inode, path) = rest.split_first_chunk::<8>()?;
    Some(Stamp {
        path: OsStr::from_bytes(path).into(),
        id: FileId { device: u64::from_be_bytes(*device), inode: u64::from_be_bytes(*inode) },
        is_device: record.second == 1,
        file_system: None,
        born_ns: None,
        times: Times { len: record.first, ..Times::default() },
        head_crc: 0,
    })
}
