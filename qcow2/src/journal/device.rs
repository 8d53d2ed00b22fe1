//! A file under a journal: a storage that writes nothing over what is in use before the journal holds it.
//!
//! Blocks of [`BLOCK`] bytes are kept in memory until the next barrier if they are written
//! - by [`Storage::write_live`]: metadata that something durable refers to, or
//! - only in part: the rest of the block may be anybody's, and a disk that loses its power in the middle of a
//!   block may lose all of it.
//!
//! Whole blocks of data go straight to the file. A barrier first makes a record of the blocks in memory
//! durable, then writes them in place, then syncs the file. So one barrier stays one barrier for the
//! callers, and what is written between two of them may still become durable in any order. When memory is
//! full, there is a barrier more, which changes nothing for them either.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::file::Journal;
use super::record::{BLOCK, Block, SECTOR, sector_crcs};
use crate::storage::{CopyError, FileStat, FileView, LockError, LockMode, Storage};

/// A file that is written under a journal. See the module.
#[derive(Debug)]
pub(crate) struct Journaled {
    file: Arc<dyn Storage>,
    journal: Arc<Journal>,
    target: u8,
    kept: Mutex<HeldBlocks>,
    /// How many blocks are kept; nobody asks for the lock while there are none.
    count: AtomicUsize,
}

/// What is in memory.
#[derive(Debug, Default)]
struct HeldBlocks {
    blocks: BTreeMap<u64, Changed>,
    /// Behind the last byte of the blocks: the file may be shorter until they are written.
    end: u64,
    /// Why nothing can be written any more.
    failed: Option<(io::ErrorKind, String)>,
}

/// A block in memory, and which of its sectors are to be written: the others are left alone, so that nothing can tear
/// them. (The dirty bit is such a sector's.)
#[derive(Clone, Debug)]
struct Changed {
    block: Block,
    /// A bit for each sector, the first one lowest.
    sectors: u8,
}

/// All sectors of a block.
const WHOLE: u8 = u8::MAX;

impl Journaled {
    /// Puts `file`, which is target `target` of the journal, under it.
    pub(crate) fn new(file: Arc<dyn Storage>, journal: Arc<Journal>, target: u8) -> Self {
        Self { file, journal, target, kept: Mutex::default(), count: AtomicUsize::new(0) }
    }

    /// As [`Journaled::new`], with blocks of a record that a power cut may have kept from the file: they are
    /// what is read, and written by the next barrier. The file then has `len` bytes at least.
    pub(crate) fn replaying(
        file: Arc<dyn Storage>,
        journal: Arc<Journal>,
        target: u8,
        blocks: Vec<Block>,
        len: u64,
    ) -> Self {
        let this = Self::new(file, journal, target);
        this.count.store(blocks.len(), Relaxed);
        let mut kept = this.lock();
        kept.end = if blocks.is_empty() { 0 } else { len };
        let whole = |block: Block| (block.number, Changed { block, sectors: WHOLE });
        kept.blocks = blocks.into_iter().map(whole).collect();
        drop(kept);
        this
    }

    /// The file itself, past the journal.
    pub(crate) fn inner(&self) -> &Arc<dyn Storage> {
        &self.file
    }

    fn lock(&self) -> MutexGuard<'_, HeldBlocks> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_kept(&self) -> bool {
        self.count.load(Relaxed) > 0
    }

    /// Notes how many blocks are kept, and makes room when there are too many.
    fn settle(&self, kept: &mut HeldBlocks) -> io::Result<()> {
        self.count.store(kept.blocks.len(), Relaxed);
        if kept.blocks.is_empty() {
            kept.end = 0;
        }
        if kept.blocks.len() >= self.journal.max_blocks() { self.barrier(kept) } else { Ok(()) }
    }

    /// The record, then the blocks in place, then the file.
    fn barrier(&self, kept: &mut HeldBlocks) -> io::Result<()> {
        kept.usable()?;
        if kept.blocks.is_empty() {
            return self.file.sync();
        }
        let size = self.file.size()?;
        let len = size.max(kept.end);
        let mut turn = self.journal.turn();
        let blocks: Vec<Block> = kept.blocks.values().map(|changed| changed.block.clone()).collect();
        self.journal.append(&mut turn, self.target, len, false, blocks)?;
        // The barrier of the journal may have taken long.
        self.journal.beat_now();
        let changed = kept.blocks.values().map(|changed| (&changed.block, changed.sectors));
        let written = write_in_place(&*self.file, changed, len)
            .and_then(|()| match size < len && self.file.size()? < len {
                // The last sectors are zeros, which nothing was written for.
                true => self.file.set_len(len),
                false => Ok(()),
            })
            .and_then(|()| self.file.sync());
        if let Err(e) = written {
            kept.failed = Some((e.kind(), e.to_string()));
            self.journal.fail();
            return Err(e);
        }
        kept.blocks.clear();
        kept.end = 0;
        self.count.store(0, Relaxed);
        Ok(())
    }

    /// Has `change` edit the bytes of a range in the blocks that it touches.
    fn keep(
        &self,
        kept: &mut HeldBlocks,
        range: Range<u64>,
        mut change: impl FnMut(&mut [u8], u64) -> io::Result<()>,
    ) -> io::Result<()> {
        kept.usable()?;
        let mut at = range.start;
        while at < range.end {
            let number = at / BLOCK;
            let end = range.end.min((number + 1).saturating_mul(BLOCK));
            let block = match kept.blocks.entry(number) {
                Entry::Occupied(there) => there.into_mut(),
                Entry::Vacant(free) => {
                    let mut bytes = vec![0; BLOCK as usize];
                    self.file.read_exact_or_zero(&mut bytes, number * BLOCK)?;
                    let before = sector_crcs(&bytes);
                    let block = Block { number, before, bytes: bytes.into() };
                    free.insert(Changed { block, sectors: 0 })
                }
            };
            let inside = (at % BLOCK) as usize..(at % BLOCK + (end - at)) as usize;
            if let Some(bytes) = block.block.bytes.get_mut(inside.clone()) {
                let old = bytes.to_vec();
                change(bytes, at)?;
                block.sectors |= changed_sectors(&old, bytes, inside.start);
            }
            kept.end = kept.end.max(end);
            self.settle(kept)?;
            at = end;
        }
        Ok(())
    }

    /// Writes a range: what fills whole blocks by `whole`, the rest through memory by `part`.
    fn split(
        &self,
        range: Range<u64>,
        whole: impl FnOnce(Range<u64>) -> io::Result<()>,
        mut part: impl FnMut(&mut [u8], u64) -> io::Result<()>,
    ) -> io::Result<()> {
        self.journal.beat();
        let (head, tail) = whole_blocks(&range);
        if head >= tail {
            return self.keep(&mut self.lock(), range, part);
        }
        if range.start < head || tail < range.end {
            let mut kept = self.lock();
            self.keep(&mut kept, range.start..head, &mut part)?;
            self.keep(&mut kept, tail..range.end, part)?;
        }
        self.forget(head..tail)?;
        whole(head..tail)
    }

    /// Drops what is kept of whole blocks that are written anew.
    fn forget(&self, range: Range<u64>) -> io::Result<()> {
        if self.has_kept() {
            let mut kept = self.lock();
            let numbers: Vec<u64> =
                kept.blocks.range(range.start / BLOCK..range.end.div_ceil(BLOCK)).map(|(n, _)| *n).collect();
            for number in numbers {
                kept.blocks.remove(&number);
            }
            self.settle(&mut kept)?;
        }
        Ok(())
    }
}

impl HeldBlocks {
    fn usable(&self) -> io::Result<()> {
        match &self.failed {
            None => Ok(()),
            Some((kind, text)) => {
                Err(io::Error::new(*kind, format!("an earlier write to this file failed ({text})")))
            }
        }
    }
}

/// The sectors of a block in which bytes differ that lie at `from` in it.
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

/// Writes sectors of blocks where they belong, neighbours in one piece, and nothing behind `len`.
fn write_in_place<'a>(
    file: &dyn Storage,
    blocks: impl Iterator<Item = (&'a Block, u8)>,
    len: u64,
) -> io::Result<()> {
    let mut run: (u64, Vec<u8>) = (0, Vec::new());
    let write = |(start, bytes): &(u64, Vec<u8>)| {
        let end = usize::try_from(len.saturating_sub(*start)).unwrap_or(usize::MAX).min(bytes.len());
        match bytes.get(..end) {
            Some(bytes) if !bytes.is_empty() => file.write_all_at(bytes, *start),
            _ => Ok(()),
        }
    };
    for (block, sectors) in blocks {
        let chosen = block.bytes.chunks(SECTOR).zip(0..).filter(|(_, n)| sectors >> n & 1 == 1);
        for (bytes, n) in chosen {
            let at = block.number * BLOCK + n * SECTOR as u64;
            if run.0 + run.1.len() as u64 != at || run.1.is_empty() {
                write(&run)?;
                run = (at, Vec::new());
            }
            run.1.extend_from_slice(bytes);
        }
    }
    write(&run)
}

/// The whole blocks of a range; nothing if the first offset is not below the second.
fn whole_blocks(range: &Range<u64>) -> (u64, u64) {
    (range.start.next_multiple_of(BLOCK), range.end - range.end % BLOCK)
}

fn end_of(offset: u64, len: u64) -> io::Result<u64> {
    let too_far =
        || io::Error::new(io::ErrorKind::InvalidInput, "the range reaches past the largest offset of a file");
    offset.checked_add(len).filter(|&end| i64::try_from(end).is_ok()).ok_or_else(too_far)
}

impl Storage for Journaled {
    fn size(&self) -> io::Result<u64> {
        let size = self.file.size()?;
        Ok(if self.has_kept() { size.max(self.lock().end) } else { size })
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        if !self.has_kept() {
            return self.file.read_at(buf, offset);
        }
        let kept = self.lock();
        let end = end_of(offset, buf.len() as u64)?;
        let mut n = self.file.read_at(buf, offset)?;
        if offset + (n as u64) < end && kept.end > offset + n as u64 {
            let there = (kept.end.min(end) - offset) as usize;
            if let Some(gap) = buf.get_mut(n..there) {
                gap.fill(0);
                n = there;
            }
        }
        let end = offset + n as u64;
        for block in kept.blocks.range(offset / BLOCK..end.div_ceil(BLOCK)).map(|(_, changed)| &changed.block)
        {
            let start = block.number * BLOCK;
            let (from, to) = (offset.max(start), end.min(start + BLOCK));
            let target = buf.get_mut((from - offset) as usize..(to - offset) as usize);
            let source = block.bytes.get((from - start) as usize..(to - start) as usize);
            if let (Some(target), Some(source)) = (target, source) {
                target.copy_from_slice(source);
            }
        }
        Ok(n)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let range = offset..end_of(offset, buf.len() as u64)?;
        let piece = |range: Range<u64>| {
            buf.get((range.start - offset) as usize..(range.end - offset) as usize).unwrap_or_default()
        };
        self.split(
            range,
            |whole| self.file.write_all_at(piece(whole.clone()), whole.start),
            |bytes, at| {
                let end = at + bytes.len() as u64;
                bytes.copy_from_slice(piece(at..end));
                Ok(())
            },
        )
    }

    fn write_live(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let range = offset..end_of(offset, buf.len() as u64)?;
        self.keep(&mut self.lock(), range, |bytes, at| {
            let from = (at - offset) as usize;
            bytes.copy_from_slice(buf.get(from..from + bytes.len()).unwrap_or_default());
            Ok(())
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.split(
            offset..end_of(offset, len)?,
            |whole| self.file.write_zeroes(whole.start, whole.end - whole.start),
            |bytes, _| {
                bytes.fill(0);
                Ok(())
            },
        )
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        // What is given back may hold anything, so blocks at its ends are left alone.
        let (start, end) = (offset.next_multiple_of(BLOCK), end_of(offset, len)?);
        let end = if end >= self.file.size()? { end } else { end - end % BLOCK };
        if start >= end {
            return Ok(());
        }
        self.file.punch_hole(start, end - start)
    }

    fn copy_from(
        &self,
        src: &dyn Storage,
        src_offset: u64,
        dst_offset: u64,
        len: u64,
    ) -> Result<(), CopyError> {
        end_of(src_offset, len).map_err(|source| CopyError::Read { offset: src_offset, source })?;
        let range = dst_offset..end_of(dst_offset, len).map_err(CopyError::write(dst_offset))?;
        let (head, tail) = whole_blocks(&range);
        let parts = if head < tail { [range.start..head, tail..range.end] } else { [range, 0..0] };
        // What is kept is read before it is locked: the source may be this file itself.
        for part in parts.into_iter().filter(|part| !part.is_empty()) {
            let mut bytes = vec![0; (part.end - part.start) as usize];
            let from = src_offset + (part.start - dst_offset);
            let read = src.read_exact_or_zero(&mut bytes, from);
            read.map_err(CopyError::read(src, from, bytes.len() as u64))?;
            self.write_all_at(&bytes, part.start).map_err(CopyError::write(part.start))?;
        }
        if head < tail {
            self.journal.beat();
            self.forget(head..tail).map_err(CopyError::write(head))?;
            self.file.copy_from(src, src_offset + (head - dst_offset), head, tail - head)?;
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if self.has_kept() {
            let mut kept = self.lock();
            if len < kept.end {
                // What lies behind the new end must not come back.
                let behind = kept.blocks.split_off(&len.div_ceil(BLOCK));
                drop(behind);
                if let Some(last) = kept.blocks.get_mut(&(len / BLOCK)) {
                    last.block.bytes.get_mut((len % BLOCK) as usize..).unwrap_or_default().fill(0);
                }
                kept.end = len;
            }
            self.settle(&mut kept)?;
        }
        self.file.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.barrier(&mut self.lock())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let found = self.file.next_data(offset)?;
        if !self.has_kept() {
            return Ok(found);
        }
        let kept = self.lock();
        let first = kept.blocks.range(offset / BLOCK..).next().map(|(number, _)| {
            let start = number * BLOCK;
            offset.max(start)..(start + BLOCK).min(kept.end.max(offset))
        });
        Ok(match (found, first.filter(|first| !first.is_empty())) {
            (Some(found), Some(first)) if first.start < found.start => Some(first),
            (None, Some(first)) => Some(first),
            (found, _) => found,
        })
    }

    fn stat(&self) -> io::Result<FileStat> {
        let mut stat = self.file.stat()?;
        stat.len = self.size()?;
        Ok(stat)
    }

    fn file_system(&self) -> Option<u64> {
        self.file.file_system()
    }

    fn lock(&self, mode: LockMode) -> Result<(), LockError> {
        self.file.lock(mode)
    }

    fn has_locks(&self) -> bool {
        self.file.has_locks()
    }

    fn used_by_others(&self) -> io::Result<Option<LockMode>> {
        self.file.used_by_others()
    }

    fn drop_cache(&self) -> io::Result<()> {
        self.sync()?;
        self.file.drop_cache()
    }

    fn start_writing(&self, offset: u64, len: u64) {
        self.file.start_writing(offset, len);
    }

    /// Nobody reads what was written since the last barrier through this, nor through a view: what moves is
    /// durable already, or comes from another file.
    fn as_file(&self) -> Option<&File> {
        self.file.as_file()
    }

    fn view(&self) -> Option<FileView> {
        self.file.view()
    }
}
