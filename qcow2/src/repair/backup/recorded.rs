//! A file under repair. Every change is durable in a backup before it is made.

use std::io;

use super::record::{BackupWriter, PIECE, RecordKind};
use crate::storage::{Flush, PAGE, PageOverlay, Pages, Storage};

/// A file, and the backup of the changes to it. Writes wait in memory until a barrier, or until there are
/// [`PIECE`] bytes of them.
pub(in crate::repair) type Recorded<'a> = PageOverlay<'a, Backup>;

/// The backup of the changes to a file.
#[derive(Debug)]
pub(in crate::repair) struct Backup {
    out: BackupWriter,
    records: u64,
    barriers: u64,
}

impl<'a> Recorded<'a> {
    pub(super) fn over(file: &'a dyn Storage, out: BackupWriter) -> Self {
        Self::new(file, Backup { out, records: 0, barriers: 0 })
    }

    /// Notes in the backup that the repair has ended.
    ///
    /// # Errors
    /// The system's.
    pub(in crate::repair) fn note_end(self) -> io::Result<()> {
        let Backup { mut out, records, .. } = self.end()?;
        out.put(RecordKind::Repaired, records, 0, &[])?;
        out.sync()
    }
}

impl Backup {
    /// Records the waiting writes with the bytes that they replace; when the records are durable, writes them
    /// to the file.
    fn carry_out(&mut self, file: &dyn Storage, pages: &mut Pages<()>) -> io::Result<()> {
        if pages.is_empty() {
            return Ok(());
        }
        // Record whole sectors, even if the file ends inside one.
        pages.for_each_run(u64::MAX, |at, after| {
            let mut before = vec![0; after.len()];
            file.read_exact_or_zero(&mut before, at)?;
            self.out.put(RecordKind::Change, at, self.barriers, &[&before, after])?;
            self.records += 1;
            Ok(())
        })?;
        self.out.sync()?;
        let len = pages.size_over(file.size()?);
        pages.for_each_run(len, |at, bytes| file.write_live(bytes, at))?;
        pages.clear();
        Ok(())
    }
}

impl Flush for Backup {
    fn make_room(&mut self, file: &dyn Storage, pages: &mut Pages<()>) -> io::Result<()> {
        match pages.len() as u64 * PAGE < PIECE {
            true => Ok(()),
            false => self.carry_out(file, pages),
        }
    }

    fn barrier(&mut self, file: &dyn Storage, pages: &mut Pages<()>) -> io::Result<()> {
        self.carry_out(file, pages)?;
        self.barriers += 1;
        file.sync()
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
        recorded.note_end().unwrap();
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
