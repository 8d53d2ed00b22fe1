//! A file under repair whose changes are durable in a backup before they are made.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::SECTOR;
use super::record::{BackupWriter, PIECE, RecordKind};
use crate::storage::{CopyError, FileStat, LockError, LockMode, Storage};

/// A file, and the backup of what is written to it. Writes wait in memory, at most [`PIECE`] bytes of them, until
/// a barrier, or until somebody reads what they are about.
#[derive(Debug)]
pub(in crate::repair) struct Recorded<'a> {
    file: &'a dyn Storage,
    work: Mutex<BackupWork>,
}

#[derive(Debug)]
struct BackupWork {
    backup: BackupWriter,
    /// By the first byte of the first sector. No two touch the same sector.
    waiting: BTreeMap<u64, Waiting>,
    bytes: u64,
    records: u64,
    barriers: u64,
}

#[derive(Debug)]
struct Waiting {
    offset: u64,
    bytes: Vec<u8>,
}

impl Waiting {
    /// The sectors that it changes, in bytes.
    fn sectors(&self) -> Range<u64> {
        sectors(self.offset, self.bytes.len() as u64)
    }
}

fn sectors(offset: u64, len: u64) -> Range<u64> {
    let end = offset.saturating_add(len);
    offset / SECTOR * SECTOR..end.checked_next_multiple_of(SECTOR).unwrap_or(end)
}

impl<'a> Recorded<'a> {
    pub(super) fn over(file: &'a dyn Storage, backup: BackupWriter) -> Self {
        let work = BackupWork { backup, waiting: BTreeMap::new(), bytes: 0, records: 0, barriers: 0 };
        Self { file, work: Mutex::new(work) }
    }

    /// Notes that the repair has ended.
    ///
    /// # Errors
    /// The system's.
    pub(in crate::repair) fn end(self) -> io::Result<()> {
        self.sync()?;
        let mut work = self.work();
        let records = work.records;
        work.backup.put(RecordKind::Repaired, records, 0, &[])?;
        work.backup.sync()
    }

    fn work(&self) -> MutexGuard<'_, BackupWork> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does what waits, if any of it lies in these bytes.
    fn settle(&self, bytes: Range<u64>) -> io::Result<()> {
        let mut work = self.work();
        if work.touches(&bytes) { work.carry_out(self.file) } else { Ok(()) }
    }
}

impl BackupWork {
    fn touches(&self, bytes: &Range<u64>) -> bool {
        let last = self.waiting.range(..bytes.end).next_back();
        last.is_some_and(|(_, waiting)| waiting.sectors().end > bytes.start)
    }

    /// Records what waits, with what is there now, and writes it when that is durable.
    fn carry_out(&mut self, file: &dyn Storage) -> io::Result<()> {
        for (&start, waiting) in &self.waiting {
            let end = waiting.sectors().end;
            let mut before = vec![0; (end - start) as usize];
            file.read_exact_or_zero(&mut before, start)?;
            let mut after = before.clone();
            let at = (waiting.offset - start) as usize;
            if let Some(place) = after.get_mut(at..at + waiting.bytes.len()) {
                place.copy_from_slice(&waiting.bytes);
            }
            self.backup.put(RecordKind::Change, start, self.barriers, &[&before, &after])?;
            self.records += 1;
        }
        if self.waiting.is_empty() {
            return Ok(());
        }
        self.backup.sync()?;
        self.bytes = 0;
        for waiting in std::mem::take(&mut self.waiting).into_values() {
            file.write_live(&waiting.bytes, waiting.offset)?;
        }
        Ok(())
    }
}

fn unsupported<T>() -> io::Result<T> {
    Err(io::ErrorKind::Unsupported.into())
}

impl Storage for Recorded<'_> {
    fn size(&self) -> io::Result<u64> {
        self.settle(0..u64::MAX)?;
        self.file.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.settle(offset..offset.saturating_add(buf.len() as u64))?;
        self.file.read_at(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut work = self.work();
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let whole = PIECE - at % PIECE;
            let (piece, more) = rest.split_at(rest.len().min(whole as usize));
            let sectors = sectors(at, piece.len() as u64);
            if work.touches(&sectors) || work.bytes >= PIECE {
                work.carry_out(self.file)?;
            }
            work.bytes += sectors.end - sectors.start;
            work.waiting.insert(sectors.start, Waiting { offset: at, bytes: piece.to_vec() });
            at += piece.len() as u64;
            rest = more;
        }
        Ok(())
    }

    fn write_zeroes(&self, _offset: u64, _len: u64) -> io::Result<()> {
        unsupported()
    }

    fn punch_hole(&self, _offset: u64, _len: u64) -> io::Result<()> {
        // What the repair frees, a restore takes back.
        Ok(())
    }

    fn copy_from(&self, _: &dyn Storage, _: u64, at: u64, _: u64) -> Result<(), CopyError> {
        unsupported().map_err(CopyError::write(at))
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        unsupported()
    }

    fn sync(&self) -> io::Result<()> {
        let mut work = self.work();
        work.carry_out(self.file)?;
        work.barriers += 1;
        self.file.sync()
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.settle(0..u64::MAX)?;
        self.file.next_data(offset)
    }

    fn stat(&self) -> io::Result<FileStat> {
        self.file.stat()
    }

    fn lock(&self, mode: LockMode) -> Result<(), LockError> {
        self.file.lock(mode)
    }

    fn used_by_others(&self) -> io::Result<Option<LockMode>> {
        self.file.used_by_others()
    }

    fn drop_cache(&self) -> io::Result<()> {
        self.file.drop_cache()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::repair::backup::record::{BackupReader, RecordPosition};
    use crate::storage::{Access, Host, MemHost};

    #[test]
    fn what_is_written_is_read_and_recorded_before_it_is_there() {
        let (host, path) = (MemHost::new(), Path::new("/backup"));
        let mut model: Vec<u8> = (0..20_000u32).map(|n| n as u8).collect();
        host.add("/image", &model).unwrap();
        let before = model.clone();
        let file = host.open(Path::new("/image"), Access::ReadWrite).unwrap();
        let recorded = Recorded::over(&*file, BackupWriter::new(path, host.create_new(path).unwrap()));
        let writes = [(10, 3), (4090, 10), (0, 4096), (8000, 9000), (19_999, 5), (30_000, 7), (512, 1)];
        for (n, (at, len)) in writes.into_iter().enumerate() {
            let bytes = vec![0xa0 + n as u8; len];
            recorded.write_live(&bytes, at as u64).unwrap();
            model.resize(model.len().max(at + len), 0);
            model[at..at + len].copy_from_slice(&bytes);
            let mut seen = vec![0; 40];
            recorded.read_exact_or_zero(&mut seen, at as u64).unwrap();
            assert_eq!(seen[..len.min(40)], bytes[..len.min(40)]);
        }
        recorded.write_all_at(&vec![9; 3 << 20], 40_000).unwrap();
        model.resize(40_000, 0);
        model.resize(40_000 + (3 << 20), 9);
        recorded.sync().unwrap();
        recorded.end().unwrap();
        assert!(host.content("/image").unwrap() == model);
        // Backwards through the records is backwards in time.
        let file = host.open(path, Access::Read).unwrap();
        let reader = BackupReader::of(path, &*file).unwrap();
        let (mut records, mut place) = (Vec::new(), RecordPosition::START);
        while let Some(record) = reader.next(place).unwrap() {
            place = record.place();
            records.push(record);
        }
        assert_eq!(records.pop().unwrap().kind, RecordKind::Repaired);
        for record in records.iter().rev() {
            let (at, half) = (record.first as usize, record.content.len() / 2);
            model.resize(model.len().max(at + half), 0);
            assert!(model[at..at + half] == record.content[half..], "{at:#x}");
            model[at..at + half].copy_from_slice(&record.content[..half]);
        }
        assert!(model[..before.len()] == before && model[before.len()..].iter().all(|b| *b == 0));
    }
}
