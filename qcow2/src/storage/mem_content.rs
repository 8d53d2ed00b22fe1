//! The bytes of a file in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The bytes of a page.
pub(super) const PAGE: u64 = 4096;
/// A part of a file that is there as a whole.
pub(super) type MemoryPage = [u8; PAGE as usize];

/// The clock of all files in memory, in nanoseconds: none is changed at the time of another.
static CLOCK: AtomicU64 = AtomicU64::new(1);

/// The time, which goes on.
pub(super) fn now() -> u64 {
    CLOCK.fetch_add(1, Ordering::Relaxed)
}

/// The bytes of a file. Pages that are not there read as zeros, so that length costs nothing; clones share
/// pages until one of them writes.
#[derive(Clone, Debug, Default)]
pub(super) struct FileContent {
    pub(super) len: u64,
    pub(super) pages: BTreeMap<u64, Arc<MemoryPage>>,
    /// When it was last changed, by a clock that goes on with each change of any file.
    pub(super) changed: u64,
    /// The time of modification that was set, if that is not when it was last changed.
    pub(super) set: Option<i128>,
    /// When it was made.
    pub(super) born: u64,
    /// Pages that cannot be read.
    pub(super) bad: BTreeSet<u64>,
}

impl FileContent {
    /// An empty file that is made now.
    pub(super) fn new() -> Self {
        let born = now();
        Self { born, changed: born, ..Self::default() }
    }

    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> usize {
        let there = usize::try_from(self.len.saturating_sub(offset)).unwrap_or(usize::MAX);
        let n = buf.len().min(there);
        let mut at = offset;
        let mut rest = buf.get_mut(..n).unwrap_or_default();
        while !rest.is_empty() {
            let (number, inside) = (at / PAGE, (at % PAGE) as usize);
            let (piece, behind) = rest.split_at_mut(rest.len().min(PAGE as usize - inside));
            match self.pages.get(&number).and_then(|p| p.get(inside..inside + piece.len())) {
                Some(bytes) => piece.copy_from_slice(bytes),
                None => piece.fill(0),
            }
            at += piece.len() as u64;
            rest = behind;
        }
        n
    }

    pub(super) fn write(&mut self, mut buf: &[u8], mut offset: u64) {
        self.len = self.len.max(offset + buf.len() as u64);
        while !buf.is_empty() {
            let (number, inside) = (offset / PAGE, (offset % PAGE) as usize);
            let (piece, behind) = buf.split_at(buf.len().min(PAGE as usize - inside));
            let page = self.pages.entry(number).or_insert_with(|| Arc::new([0; PAGE as usize]));
            if let Some(bytes) = Arc::make_mut(page).get_mut(inside..inside + piece.len()) {
                bytes.copy_from_slice(piece);
            }
            offset += piece.len() as u64;
            buf = behind;
        }
    }

    /// Makes a range read as zeros: whole pages go, the pages at its ends are filled in part.
    pub(super) fn zero(&mut self, offset: u64, end: u64) {
        let fill = |page: Option<&mut Arc<MemoryPage>>, range: Range<u64>| {
            if let Some(bytes) =
                page.and_then(|p| Arc::make_mut(p).get_mut(range.start as usize..range.end as usize))
            {
                bytes.fill(0);
            }
        };
        let (first, last) = (offset.next_multiple_of(PAGE), end - end % PAGE);
        if first > last {
            // The range lies inside one page.
            fill(self.pages.get_mut(&(offset / PAGE)), offset % PAGE..end % PAGE);
            return;
        }
        if offset < first {
            fill(self.pages.get_mut(&(offset / PAGE)), offset % PAGE..PAGE);
        }
        if last < end {
            fill(self.pages.get_mut(&(last / PAGE)), 0..end % PAGE);
        }
        let mut behind = self.pages.split_off(&(first / PAGE));
        let mut kept = behind.split_off(&(last / PAGE));
        self.pages.append(&mut kept);
    }

    pub(super) fn set_len(&mut self, len: u64) {
        // What lies behind the new end must not come back when the file grows again.
        self.zero(len, self.len.max(len).next_multiple_of(PAGE));
        self.len = len;
    }

    pub(super) fn next_data(&self, offset: u64) -> Option<Range<u64>> {
        let mut numbers = self.pages.range(offset / PAGE..).map(|(number, _)| *number);
        let first = numbers.next().filter(|number| number * PAGE < self.len)?;
        let behind = numbers.zip(first + 1..).take_while(|(number, next)| number == next).count() as u64;
        let range = offset.max(first * PAGE)..self.len.min((first + 1 + behind) * PAGE);
        (!range.is_empty()).then_some(range)
    }
}
