//! A file under a journal: a storage that overwrites bytes in use only when the journal holds the new ones.
//!
//! Blocks of [`BLOCK`] bytes are kept in memory until the next barrier if they are written
//! - by [`Storage::write_live`], which is for metadata that something durable refers to, or
//! - only in part: the rest of the block may hold other data, and a disk that loses power while it writes a
//!   block may lose all of it.
//!
//! Whole blocks of data go straight to the file. A barrier first makes a record of the blocks in memory
//! durable, then writes them in place, then syncs the file. So callers still see one barrier, and writes
//! between two barriers may still become durable in any order. When memory is full, the journal adds a barrier
//! of its own. Callers do not notice: more order than they asked for breaks nothing.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::file::Journal;
use super::record::{self, BLOCK, Block, SECTORS, sector_crcs};
use crate::storage::{
    CopyError, FileStat, FileView, PAGE, Page, Pages, SECTOR, Storage, end_of, locks_of_its_file, pieces,
};

// A block of a record is a page in memory, and a record's checksums are those of the sectors in which pages are
// written.
const _: () = assert!(BLOCK == PAGE && record::SECTOR == SECTOR);

/// A file that is written under a journal. See the module.
#[derive(Debug)]
pub(crate) struct Journaled {
    file: Arc<dyn Storage>,
    journal: Arc<Journal>,
    target: u8,
    kept: Mutex<HeldBlocks>,
    /// How many blocks are kept. Readers take the lock only if there are any.
    count: AtomicUsize,
}

/// The blocks in memory.
#[derive(Debug)]
struct HeldBlocks {
    /// The blocks, each with the former checksums of its sectors. Only sectors that change are written, so that
    /// a change elsewhere in the block cannot tear the sector with the dirty bit.
    blocks: Pages<[u32; SECTORS]>,
    /// Why nothing can be written any more.
    failed: Option<(io::ErrorKind, String)>,
}

impl Journaled {
    /// Puts `file`, which is target `target` of the journal, under it.
    pub(crate) fn new(file: Arc<dyn Storage>, journal: Arc<Journal>, target: u8) -> Self {
        let kept = HeldBlocks { blocks: Pages::new(sector_crcs), failed: None };
        Self { file, journal, target, kept: Mutex::new(kept), count: AtomicUsize::new(0) }
    }

    /// As [`Journaled::new`], with blocks of a record that a power cut may have torn in the file. Readers see
    /// these blocks instead, and the next barrier writes the sectors in which the file differs. The others are left
    /// alone: another power cut could tear them, and no record would explain that. The file has at least `len` bytes then.
    pub(crate) fn replaying(
        file: Arc<dyn Storage>,
        journal: Arc<Journal>,
        target: u8,
        blocks: Vec<Block>,
        len: u64,
    ) -> Self {
        let this = Self::new(file, journal, target);
        let mut kept = this.lock();
        for Block { number, before, bytes } in blocks {
            let mut page = Page::whole(bytes, before);
            if let Ok(sectors) = differing(&*this.file, number, &page.bytes) {
                page.sectors = sectors;
            }
            kept.blocks.insert(number, page, len);
        }
        this.count.store(kept.blocks.len(), Relaxed);
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
        if kept.blocks.len() >= self.journal.max_blocks() { self.barrier(kept) } else { Ok(()) }
    }

    /// Makes the record durable, writes the blocks in place, and syncs the file. The order matters: a power cut
    /// may tear a block while it is written in place, and then the record must be there to mend it.
    fn barrier(&self, kept: &mut HeldBlocks) -> io::Result<()> {
        kept.usable()?;
        if kept.blocks.is_empty() {
            return self.file.sync();
        }
        let size = self.file.size()?;
        let len = kept.blocks.size_over(size);
        let mut turn = self.journal.turn();
        let blocks = kept.blocks.iter().map(|(number, page)| Block {
            number,
            before: page.note,
            bytes: page.bytes.clone(),
        });
        self.journal.append(&mut turn, self.target, len, false, blocks.collect())?;
        // The journal's barrier may have taken long. A new sign of life comes before the writes in place, so
        // that their times do not look like somebody else's writes.
        self.journal.beat_now();
        let written = kept
            .blocks
            .for_each_run(len, |at, bytes| self.file.write_all_at(bytes, at))
            .and_then(|()| match size < len && self.file.size()? < len {
                // The last sectors are zeros, and so were not written.
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
        self.count.store(0, Relaxed);
        Ok(())
    }

    /// Lets `change` edit the bytes of a range in the kept blocks.
    fn keep(
        &self,
        kept: &mut HeldBlocks,
        range: Range<u64>,
        mut change: impl FnMut(&mut [u8], u64),
    ) -> io::Result<()> {
        kept.usable()?;
        for piece in pieces(range) {
            let at = piece.start;
            kept.blocks.edit(&*self.file, piece, |bytes| change(bytes, at))?;
            self.settle(kept)?;
        }
        Ok(())
    }

    /// Writes a range: whole blocks straight to the file with `whole`, the rest into memory with `part`.
    fn split(
        &self,
        range: Range<u64>,
        whole: impl FnOnce(Range<u64>) -> io::Result<()>,
        mut part: impl FnMut(&mut [u8], u64),
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

    /// Drops kept blocks that are about to be overwritten as a whole.
    fn forget(&self, range: Range<u64>) -> io::Result<()> {
        if self.has_kept() {
            let mut kept = self.lock();
            kept.blocks.forget(range);
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

/// In which sectors of a block the file differs: a bit for each, the first one lowest.
fn differing(file: &dyn Storage, number: u64, bytes: &[u8]) -> io::Result<u8> {
    let mut now = vec![0; BLOCK as usize];
    file.read_exact_or_zero(&mut now, number * BLOCK)?;
    let sectors = now.chunks(SECTOR).zip(bytes.chunks(SECTOR)).zip(0..);
    Ok(sectors.filter(|((now, new), _)| now != new).fold(0, |all, (_, n)| all | 1 << n))
}

/// The bounds of the whole blocks in a range. There are none unless the first offset is below the second.
fn whole_blocks(range: &Range<u64>) -> (u64, u64) {
    (range.start.next_multiple_of(BLOCK), range.end - range.end % BLOCK)
}

impl Storage for Journaled {
    fn size(&self) -> io::Result<u64> {
        let size = self.file.size()?;
        Ok(if self.has_kept() { self.lock().blocks.size_over(size) } else { size })
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        if !self.has_kept() {
            return self.file.read_at(buf, offset);
        }
        self.lock().blocks.read(&*self.file, buf, offset)
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
            },
        )
    }

    fn write_live(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let range = offset..end_of(offset, buf.len() as u64)?;
        self.keep(&mut self.lock(), range, |bytes, at| {
            let from = (at - offset) as usize;
            bytes.copy_from_slice(buf.get(from..from + bytes.len()).unwrap_or_default());
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.split(
            offset..end_of(offset, len)?,
            |whole| self.file.write_zeroes(whole.start, whole.end - whole.start),
            |bytes, _| bytes.fill(0),
        )
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        // The content of a hole is undefined. A block that the range covers only in part holds other data, too,
        // so it stays.
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
        // Read before the lock is taken: the source may be this very file.
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
            kept.blocks.cut(len);
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
        Ok(self.lock().blocks.next_data(offset, found))
    }

    fn stat(&self) -> io::Result<FileStat> {
        let mut stat = self.file.stat()?;
        stat.len = self.size()?;
        Ok(stat)
    }

    locks_of_its_file!();

    fn drop_cache(&self) -> io::Result<()> {
        self.sync()?;
        self.file.drop_cache()
    }

    fn start_writing(&self, offset: u64, len: u64) {
        self.file.start_writing(offset, len);
    }

    /// The file shows nothing of the blocks in memory. That is right here: callers only move bytes that are
    /// durable, or that come from another file.
    fn as_file(&self) -> Option<&File> {
        self.file.as_file()
    }

    fn view(&self) -> Option<FileView> {
        self.file.view()
    }
}
