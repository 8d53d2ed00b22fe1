//! A file that is only seemingly written: what a repair would do is found out by doing it here.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;
use std::ops::Range;
use std::sync::{PoisonError, RwLock};

use crate::storage::{CopyError, FileStat, LockError, LockMode, Storage};

const PAGE: u64 = 4096;

/// A view of a file with changes that are held in memory.
#[derive(Debug)]
pub(super) struct Scratch<'a> {
    under: &'a dyn Storage,
    changes: RwLock<Changes>,
}

#[derive(Debug)]
struct Changes {
    len: u64,
    pages: BTreeMap<u64, Vec<u8>>,
}

impl<'a> Scratch<'a> {
    pub(super) fn over(under: &'a dyn Storage) -> io::Result<Self> {
        let changes = Changes { len: under.size()?, pages: BTreeMap::new() };
        Ok(Self { under, changes: RwLock::new(changes) })
    }

    fn len(&self) -> u64 {
        self.changes.read().unwrap_or_else(PoisonError::into_inner).len
    }
}

fn unsupported<T>() -> io::Result<T> {
    Err(io::ErrorKind::Unsupported.into())
}

impl Storage for Scratch<'_> {
    fn size(&self) -> io::Result<u64> {
        Ok(self.len())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let changes = self.changes.read().unwrap_or_else(PoisonError::into_inner);
        let len = changes.len.saturating_sub(offset).min(buf.len() as u64);
        let Some(buf) = buf.get_mut(..len as usize) else { return Ok(0) };
        self.under.read_exact_or_zero(buf, offset)?;
        let end = offset.saturating_add(len);
        for (&page, bytes) in changes.pages.range(offset / PAGE..end.div_ceil(PAGE)) {
            let start = page * PAGE;
            let common = start.max(offset)..(start + PAGE).min(end);
            let from = bytes.get((common.start - start) as usize..(common.end - start) as usize);
            let to = buf.get_mut((common.start - offset) as usize..(common.end - offset) as usize);
            if let (Some(to), Some(from)) = (to, from) {
                to.copy_from_slice(from);
            }
        }
        Ok(len as usize)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64).ok_or(io::ErrorKind::InvalidInput)?;
        let mut changes = self.changes.write().unwrap_or_else(PoisonError::into_inner);
        changes.len = changes.len.max(end);
        for page in offset / PAGE..end.div_ceil(PAGE) {
            let start = page * PAGE;
            let content = match changes.pages.entry(page) {
                Entry::Occupied(entry) => entry.into_mut(),
                Entry::Vacant(entry) => {
                    let mut bytes = vec![0; PAGE as usize];
                    self.under.read_exact_or_zero(&mut bytes, start)?;
                    entry.insert(bytes)
                }
            };
            let common = start.max(offset)..(start + PAGE).min(end);
            let from = buf.get((common.start - offset) as usize..(common.end - offset) as usize);
            let to = content.get_mut((common.start - start) as usize..(common.end - start) as usize);
            if let (Some(to), Some(from)) = (to, from) {
                to.copy_from_slice(from);
            }
        }
        Ok(())
    }

    fn write_zeroes(&self, _offset: u64, _len: u64) -> io::Result<()> {
        unsupported()
    }

    fn punch_hole(&self, _offset: u64, _len: u64) -> io::Result<()> {
        // What unused clusters hold does not matter.
        Ok(())
    }

    fn copy_from(&self, _: &dyn Storage, _: u64, at: u64, _: u64) -> Result<(), CopyError> {
        unsupported().map_err(CopyError::write(at))
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        unsupported()
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let len = self.len();
        Ok((offset < len).then_some(offset..len))
    }

    fn stat(&self) -> io::Result<FileStat> {
        self.under.stat()
    }

    fn lock(&self, _mode: LockMode) -> Result<(), LockError> {
        // Whoever plans holds the file under lock already.
        Ok(())
    }

    fn used_by_others(&self) -> io::Result<Option<LockMode>> {
        self.under.used_by_others()
    }

    fn drop_cache(&self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemFile;

    #[test]
    fn what_is_written_is_read_and_the_file_stays() {
        let file = MemFile::new();
        let mut model: Vec<u8> = (0..20_000u32).map(|n| n as u8).collect();
        file.write_all_at(&model, 0).unwrap();
        let before = model.clone();
        let scratch = Scratch::over(&file).unwrap();
        for (n, (at, len)) in
            [(10, 3), (4090, 10), (0, 4096), (8000, 9000), (19_999, 5), (30_000, 7)].into_iter().enumerate()
        {
            let bytes = vec![0xa0 + n as u8; len];
            scratch.write_all_at(&bytes, at as u64).unwrap();
            model.resize(model.len().max(at + len), 0);
            model[at..at + len].copy_from_slice(&bytes);
        }
        for (at, len) in [(0, 40_000), (4095, 2), (29_990, 100), (50_000, 1), (5, 6)] {
            let mut seen = vec![0; len];
            let n = scratch.read_at(&mut seen, at as u64).unwrap();
            assert_eq!(seen[..n], model[at.min(model.len())..(at + len).min(model.len())]);
        }
        assert_eq!(scratch.size().unwrap(), 30_007);
        let mut seen = vec![0; 30_000];
        let n = file.read_at(&mut seen, 0).unwrap();
        assert!(seen[..n] == before[..]);
    }
}
