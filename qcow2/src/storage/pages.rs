//! Pages of a file that are held in memory over what lies in it, until whoever holds them has them written.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;
use std::ops::Range;

use super::Storage;

/// The size of a page in bytes, and how it is aligned.
pub(crate) const PAGE: u64 = 4096;
/// The unit in which pages are written, in bytes: what a disk writes whole or not at all, or tears.
pub(crate) const SECTOR: usize = 512;

/// Pages that are held, each with a note of its holder about what was there before.
#[derive(Debug)]
pub(crate) struct Pages<N> {
    held: BTreeMap<u64, Page<N>>,
    /// Behind the last byte that was written: the file may be shorter.
    end: u64,
    note: fn(&[u8]) -> N,
}

/// A page in memory.
#[derive(Clone, Debug)]
pub(crate) struct Page<N> {
    /// Its content; [`PAGE`] bytes.
    pub(crate) bytes: Box<[u8]>,
    /// The note about its content when it was read from the file.
    pub(crate) note: N,
    /// A bit for each sector that is to be written, the first one lowest. The others are left alone, so that nothing
    /// can tear them.
    pub(crate) sectors: u8,
}

impl<N> Page<N> {
    /// A page all of which is to be written.
    pub(crate) fn whole(bytes: Box<[u8]>, note: N) -> Self {
        Self { bytes, note, sectors: u8::MAX }
    }
}

impl<N> Pages<N> {
    /// No pages yet; `note` is asked about each page that is read.
    pub(crate) fn new(note: fn(&[u8]) -> N) -> Self {
        Self { held: BTreeMap::new(), end: 0, note }
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.held.len()
    }

    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// All pages with their numbers, in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, &Page<N>)> {
        self.held.iter().map(|(number, page)| (*number, page))
    }

    /// The length of a file of `size` bytes when the pages are written.
    pub(crate) fn size_over(&self, size: u64) -> u64 {
        size.max(self.end)
    }

    /// Holds a page; the file has `end` bytes at least then.
    pub(crate) fn insert(&mut self, number: u64, page: Page<N>, end: u64) {
        self.held.insert(number, page);
        self.end = self.end.max(end);
    }

    /// Has `change` edit bytes that lie in one page, which is read from the file if it is not held. The sectors that are
    /// others afterwards are to be written.
    ///
    /// # Errors
    /// The file cannot be read.
    pub(crate) fn edit(
        &mut self,
        file: &dyn Storage,
        range: Range<u64>,
        change: impl FnOnce(&mut [u8]),
    ) -> io::Result<()> {
        let page = match self.held.entry(range.start / PAGE) {
            Entry::Occupied(there) => there.into_mut(),
            Entry::Vacant(free) => {
                let mut bytes = vec![0; PAGE as usize];
                file.read_exact_or_zero(&mut bytes, range.start / PAGE * PAGE)?;
                let note = (self.note)(&bytes);
                free.insert(Page { bytes: bytes.into(), note, sectors: 0 })
            }
        };
        let inside = inside(&range);
        if let Some(bytes) = page.bytes.get_mut(inside.clone()) {
            let old = bytes.to_vec();
            change(bytes);
            page.sectors |= changed_sectors(&old, bytes, inside.start);
        }
        self.end = self.end.max(range.end);
        Ok(())
    }

    /// Has all sectors be written that bytes of one held page lie in, whether they were changed or not.
    pub(crate) fn mark(&mut self, range: &Range<u64>) {
        if let Some(page) = self.held.get_mut(&(range.start / PAGE)) {
            let inside = inside(range);
            let sectors = inside.start / SECTOR..inside.end.div_ceil(SECTOR);
            page.sectors |= sectors.fold(0, |all, sector| all | 1 << sector);
        }
    }

    /// Reads as [`Storage::read_at`]: what is held counts, and the file as it is for the rest.
    ///
    /// # Errors
    /// The file's.
    pub(crate) fn read(&self, file: &dyn Storage, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let end = end_of(offset, buf.len() as u64)?;
        let mut n = file.read_at(buf, offset)?;
        if offset + (n as u64) < end && self.end > offset + n as u64 {
            let there = (self.end.min(end) - offset) as usize;
            if let Some(gap) = buf.get_mut(n..there) {
                gap.fill(0);
                n = there;
            }
        }
        let end = offset + n as u64;
        for (number, page) in self.held.range(offset / PAGE..end.div_ceil(PAGE)) {
            let start = number * PAGE;
            let (from, to) = (offset.max(start), end.min(start + PAGE));
            let target = buf.get_mut((from - offset) as usize..(to - offset) as usize);
            let source = page.bytes.get((from - start) as usize..(to - start) as usize);
            if let (Some(target), Some(source)) = (target, source) {
                target.copy_from_slice(source);
            }
        }
        Ok(n)
    }

    /// Answers as [`Storage::next_data`], where the file says `found`.
    pub(crate) fn next_data(&self, offset: u64, found: Option<Range<u64>>) -> Option<Range<u64>> {
        let first = self.held.range(offset / PAGE..).next().map(|(number, _)| {
            let start = number * PAGE;
            offset.max(start)..(start + PAGE).min(self.end.max(offset))
        });
        match (found, first.filter(|first| !first.is_empty())) {
            (Some(found), Some(first)) if first.start < found.start => Some(first),
            (None, Some(first)) => Some(first),
            (found, _) => found,
        }
    }

    /// Drops the pages of a range of whole pages, which is written without them.
    pub(crate) fn forget(&mut self, range: Range<u64>) {
        let numbers: Vec<u64> =
            self.held.range(range.start / PAGE..range.end.div_ceil(PAGE)).map(|(n, _)| *n).collect();
        for number in numbers {
            self.held.remove(&number);
        }
        if self.held.is_empty() {
            self.end = 0;
        }
    }

    /// Drops what lies at `len` and behind: it must not come back if the file grows again.
    pub(crate) fn cut(&mut self, len: u64) {
        drop(self.held.split_off(&len.div_ceil(PAGE)));
        // Also behind what was written: there the page holds what the file held.
        if let Some(last) = self.held.get_mut(&(len / PAGE)) {
            last.bytes.get_mut((len % PAGE) as usize..).unwrap_or_default().fill(0);
        }
        self.end = if self.held.is_empty() { 0 } else { self.end.min(len) };
    }

    /// Drops everything.
    pub(crate) fn clear(&mut self) {
        self.held.clear();
        self.end = 0;
    }

    /// Calls `f` with what is to be written: runs of sectors, neighbours in one piece, and nothing at `len` or behind.
    ///
    /// # Errors
    /// Those of `f`.
    pub(crate) fn for_each_run(
        &self,
        len: u64,
        mut f: impl FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut run: (u64, Vec<u8>) = (0, Vec::new());
        let mut end_run = |(start, bytes): &(u64, Vec<u8>)| {
            let end = usize::try_from(len.saturating_sub(*start)).unwrap_or(usize::MAX).min(bytes.len());
            match bytes.get(..end) {
                Some(bytes) if !bytes.is_empty() => f(*start, bytes),
                _ => Ok(()),
            }
        };
        for (number, page) in &self.held {
            let chosen = page.bytes.chunks(SECTOR).zip(0..).filter(|(_, n)| page.sectors >> n & 1 == 1);
            for (bytes, n) in chosen {
                let at = number * PAGE + n * SECTOR as u64;
                if run.0 + run.1.len() as u64 != at || run.1.is_empty() {
                    end_run(&run)?;
                    run = (at, Vec::new());
                }
                run.1.extend_from_slice(bytes);
            }
        }
        end_run(&run)
    }
}

/// The parts of a range that lie in one page each.
pub(crate) fn pieces(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        let start = at;
        at = range.end.min((start / PAGE + 1).saturating_mul(PAGE));
        (start < range.end).then_some(start..at)
    })
}

/// Where a range behind `offset` ends.
///
/// # Errors
/// No file reaches that far.
pub(crate) fn end_of(offset: u64, len: u64) -> io::Result<u64> {
    let too_far =
        || io::Error::new(io::ErrorKind::InvalidInput, "the range reaches past the largest offset of a file");
    offset.checked_add(len).filter(|&end| i64::try_from(end).is_ok()).ok_or_else(too_far)
}

/// Where a range of one page lies in it.
fn inside(range: &Range<u64>) -> Range<usize> {
    let from = (range.start % PAGE) as usize;
    from..from + (range.end - range.start) as usize
}

/// The sectors of a page in which bytes differ that lie at `from` in it.
fn changed_sectors(old: &[u8], new: &[u8], from: usize) -> u8 {
    let mut sectors = 0;
    let mut at = from;
    let (mut old, mut new) = (old, new);
    while !new.is_empty() {
        let len = (SECTOR - at % SECTOR).min(new.len());
        let ((a, old_rest), (b, new_rest)) = (old.split_at(len), new.split_at(len));
        if a != b {
            sectors |= 1 << (at / SECTOR);
        }
        (old, new) = (old_rest, new_rest);
        at += len;
    }
    sectors
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemFile;

    fn write(pages: &mut Pages<u8>, file: &MemFile, at: u64, bytes: &[u8]) {
        for piece in pieces(at..at + bytes.len() as u64) {
            let part = &bytes[(piece.start - at) as usize..(piece.end - at) as usize];
            pages.edit(file, piece, |page| page.copy_from_slice(part)).unwrap();
        }
    }

    fn runs(pages: &Pages<u8>, len: u64) -> Vec<(u64, usize)> {
        let mut runs = Vec::new();
        pages
            .for_each_run(len, |at, bytes| {
                runs.push((at, bytes.len()));
                Ok(())
            })
            .unwrap();
        runs
    }

    #[test]
    fn only_changed_and_marked_sectors_are_written_neighbours_in_one_piece() {
        let file = MemFile::new();
        file.write_all_at(&[7; 3 * PAGE as usize], 0).unwrap();
        let mut pages = Pages::new(|bytes| bytes[0]);
        write(&mut pages, &file, 0, &[7; 600]);
        assert_eq!((pages.len(), runs(&pages, 1 << 20)), (1, vec![]));
        write(&mut pages, &file, 4000, &[8; 600]);
        assert_eq!(runs(&pages, 1 << 20), [(3584, 1024)]);
        pages.mark(&(10..513));
        assert_eq!(runs(&pages, 1 << 20), [(0, 1024), (3584, 1024)]);
        assert_eq!(runs(&pages, 4100), [(0, 1024), (3584, 516)]);
        assert!(pages.iter().all(|(_, page)| page.note == 7));
        pages.forget(0..PAGE);
        assert_eq!(runs(&pages, 1 << 20), [(4096, 512)]);
    }

    #[test]
    fn what_is_behind_a_cut_does_not_come_back() {
        let file = MemFile::new();
        let mut pages = Pages::new(|_| 0);
        write(&mut pages, &file, 0, &[1; 10_000]);
        assert_eq!((pages.size_over(0), pages.next_data(0, None)), (10_000, Some(0..PAGE)));
        pages.cut(5000);
        let mut seen = [9; 6000];
        assert_eq!(pages.read(&file, &mut seen, 0).unwrap(), 5000);
        write(&mut pages, &file, 5999, &[2]);
        assert_eq!(pages.read(&file, &mut seen, 0).unwrap(), 6000);
        assert!(seen[..5000] == [1; 5000] && seen[5000..5999] == [0; 999] && seen[5999] == 2);
        pages.cut(0);
        assert_eq!((pages.is_empty(), pages.size_over(3)), (true, 3));
        assert!(end_of(u64::MAX, 1).is_err() && pages.read(&file, &mut seen, i64::MAX as u64).is_err());
    }
}
