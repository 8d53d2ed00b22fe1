//! Setting the bits of what a merge will change, before it does.
//!
//! In the present tables bits are set where they lie; where a table says "all zero", a new cluster of
//! zeros is made durable before the table names it. Bits for guest offsets behind the disk's present
//! end have no place there: they go into new tables that nothing refers to yet, with copies of the
//! clusters of bits that both ends share, until [`BitmapGrowth::publish`] switches size and tables.

use std::ops::Range;

use super::grow::BitmapGrowth;
use super::plan::{BitmapPlan, Planned, split};
use super::records;
use super::table::BitmapTable;
use crate::error::{Error, Result};
use crate::format::{Bitmap, BitmapTableEntry, FormatError, encode_bitmap_directory, write_be_u64s};
use crate::image::Qcow2;
use crate::image::alloc::Allocator;
use crate::image::refcounts::{ClusterIndex, Refcounts};
use crate::units::{GuestOffset, GuestRange, HostOffset};

/// Bits of all bitmaps that are held in memory at once, in bytes.
const MEMORY: u64 = 16 << 20;
/// Table entries that are collected before they are brought to disk.
const PENDING: usize = 64 << 10;

/// Sets bits. Made before any other allocator of the image, and finished before the first write of
/// the merge. After an error some bits may be set for nothing, and clusters may be leaked.
#[derive(Debug)]
pub(crate) struct Marker<'a> {
    marked: Vec<Marked>,
    disk: MarkedDisk<'a>,
    directory: Option<Range<ClusterIndex>>,
    /// Behind the last range.
    end: GuestOffset,
}

impl<'a> Marker<'a> {
    /// Begins what `plan` planned; room for its clusters was made before (see [`crate::image::grow`]).
    ///
    /// # Errors
    /// An I/O error, or no room.
    pub(crate) fn start(image: &'a Qcow2, refcounts: &'a Refcounts, plan: BitmapPlan) -> Result<Self> {
        let geometry = *image.geometry();
        let directory_clusters = plan.directory_clusters();
        let recording = plan.bitmaps.iter().filter(|planned| records(&planned.bitmap)).count() as u64;
        let share = (MEMORY / recording.max(1)).max(512);
        let mut growth = BitmapGrowth::new(plan.new_size);
        let mut marked = Vec::with_capacity(plan.bitmaps.len());
        for planned in plan.bitmaps {
            let run = match planned.table_clusters(&geometry, plan.new_size) {
                clusters if planned.moves => Some(growth.reserve(image, refcounts, clusters)?),
                _ => None,
            };
            marked.push(Marked::new(planned, run, image, plan.new_size));
        }
        let directory = match directory_clusters {
            0 => None,
            clusters => Some(growth.reserve(image, refcounts, clusters)?),
        };
        let disk = MarkedDisk {
            image,
            refcounts,
            allocator: Allocator::new(refcounts),
            old_size: plan.old_size,
            new_size: plan.new_size,
            piece: geometry.cluster_size().min(1 << share.ilog2()),
            allocated: Vec::new(),
            pending: Vec::new(),
            growth,
        };
        Ok(Self { marked, disk, directory, end: GuestOffset::ZERO })
    }

    /// Sets the bits of a range; ranges are those that the plan was given, and ascend.
    ///
    /// # Errors
    /// An I/O error, a table entry that breaks the format's rules, or a range out of order.
    pub(crate) fn add(&mut self, range: GuestRange) -> Result<()> {
        if range.start < self.end {
            return Err(Error::Broken { invariant: "a bitmap is told of changes in their order" });
        }
        self.end = range.end();
        for marked in self.marked.iter_mut().filter(|marked| records(&marked.bitmap)) {
            let (live, new) = split(&marked.bitmap, range, self.disk.old_size, self.disk.new_size);
            marked.mark(&mut self.disk, live)?;
            if !new.is_empty() {
                marked.stage(&mut self.disk)?;
                marked.mark(&mut self.disk, new)?;
            }
        }
        Ok(())
    }

    /// Makes all bits durable, and what the disk's growth will switch to.
    ///
    /// # Errors
    /// An I/O error.
    pub(crate) fn finish(mut self) -> Result<BitmapGrowth> {
        if self.marked.is_empty() {
            return Ok(self.disk.growth);
        }
        for marked in &mut self.marked {
            marked.flush(self.disk.image)?;
        }
        self.disk.settle()?;
        for marked in &mut self.marked {
            marked.stage(&mut self.disk)?;
        }
        let image = self.disk.image;
        if let Some(run) = self.directory {
            let bitmaps: Vec<_> = self.marked.into_iter().map(Marked::into_bitmap).collect();
            self.disk.growth.directory = Some(write_directory(image, &run, &bitmaps)?);
        }
        image.barrier()?;
        image.refresh_lengths()?;
        Ok(self.disk.growth)
    }
}

/// Writes the directory into clusters of its own; returns where it lies.
fn write_directory(image: &Qcow2, run: &Range<ClusterIndex>, bitmaps: &[Bitmap]) -> Result<HostOffset> {
    let geometry = image.geometry();
    let at = HostOffset::new(run.start << geometry.cluster_bits());
    let mut bytes = encode_bitmap_directory(bitmaps);
    bytes.resize(((run.end - run.start) << geometry.cluster_bits()) as usize, 0);
    image.write(at, &bytes)?;
    Ok(at)
}

/// A bitmap whose bits are being set.
#[derive(Debug)]
struct Marked {
    bitmap: Bitmap,
    /// The table that takes the bits: the present one, then the new one if there is one.
    table: BitmapTable,
    /// The new table and the clusters reserved for it, until it is written.
    next: Option<(BitmapTable, Range<ClusterIndex>)>,
    /// Whether `table` is the new one.
    staged: bool,
    /// The entry of the table that was last used, and where its bits lie; nowhere if all are one.
    current: Option<(u64, Option<HostOffset>)>,
    piece: Option<Piece>,
}

/// Some bits of a bitmap, in memory.
#[derive(Debug)]
struct Piece {
    host: HostOffset,
    bytes: Vec<u8>,
    changed: bool,
}

impl Marked {
    fn new(planned: Planned, run: Option<Range<ClusterIndex>>, image: &Qcow2, new_size: u64) -> Self {
        let entries = planned.entries_for(image.geometry(), new_size);
        let next = run.map(|run| {
            let at = HostOffset::new(run.start << image.geometry().cluster_bits());
            (BitmapTable::at(at, entries), run)
        });
        let table = BitmapTable::of(&planned.bitmap);
        Self { bitmap: planned.bitmap, table, next, staged: false, current: None, piece: None }
    }

    /// The bitmap as it goes into the new directory.
    fn into_bitmap(self) -> Bitmap {
        // The plan checked that the number of entries is inside the format's limits.
        let table_entries = u32::try_from(self.table.entries()).unwrap_or(u32::MAX);
        Bitmap { table_offset: self.table.place(0), table_entries, ..self.bitmap }
    }

    /// Sets a run of bits.
    fn mark(&mut self, disk: &mut MarkedDisk<'_>, bits: Range<u64>) -> Result<()> {
        let per_entry = disk.image.geometry().cluster_size() * 8;
        let mut bit = bits.start;
        while bit < bits.end {
            let index = bit / per_entry;
            let first = index * per_entry;
            let end = bits.end.min(first + per_entry);
            if let Some(host) = self.cluster(disk, index)? {
                self.set(disk, host, bit - first..end - first)?;
            }
            bit = end;
        }
        Ok(())
    }

    /// Where the bits of a table entry can be set; `None` if all of them are set.
    fn cluster(&mut self, disk: &mut MarkedDisk<'_>, index: u64) -> Result<Option<HostOffset>> {
        if let Some((have, host)) = self.current
            && have == index
        {
            return Ok(host);
        }
        self.flush(disk.image)?;
        let host = match self.table.entry(disk.image, index)? {
            BitmapTableEntry::AllOne => None,
            BitmapTableEntry::Data(host) if !self.staged => Some(host),
            entry => {
                let host = disk.allocate(self.staged)?;
                match entry {
                    BitmapTableEntry::Data(old) => disk.copy_cluster(old, host)?,
                    _ => disk.write_zeros(host)?,
                }
                let place = self.table.place(index);
                if self.staged {
                    disk.image.write(place, &write_be_u64s([BitmapTableEntry::Data(host).encode()]))?;
                } else {
                    disk.name_later(place, host)?;
                }
                Some(host)
            }
        };
        self.current = Some((index, host));
        Ok(host)
    }

    /// Sets bits of a cluster of bits.
    fn set(&mut self, disk: &MarkedDisk<'_>, cluster: HostOffset, bits: Range<u64>) -> Result<()> {
        let per_piece = disk.piece * 8;
        let mut bit = bits.start;
        while bit < bits.end {
            let first = bit - bit % per_piece;
            let end = bits.end.min(first + per_piece);
            let host = cluster + first / 8;
            let piece = match self.piece.take() {
                Some(piece) if piece.host == host => piece,
                other => {
                    let mut bytes = match other {
                        Some(old) => old.flush(disk.image)?,
                        None => vec![0; disk.piece as usize],
                    };
                    disk.image.read_table(host, &mut bytes)?;
                    Piece { host, bytes, changed: false }
                }
            };
            let piece = self.piece.insert(piece);
            piece.changed |= set_bits(&mut piece.bytes, (bit - first) as usize..(end - first) as usize);
            bit = end;
        }
        Ok(())
    }

    fn flush(&mut self, image: &Qcow2) -> Result<()> {
        self.piece.take().map_or(Ok(()), |piece| piece.flush(image).map(drop))
    }

    /// Writes the new table, a copy of the present one with room for the larger disk, and goes on there.
    fn stage(&mut self, disk: &mut MarkedDisk<'_>) -> Result<()> {
        let Some((next, run)) = self.next.take() else { return Ok(()) };
        self.flush(disk.image)?;
        disk.settle()?;
        let image = disk.image;
        // The present table may name clusters that made the file longer.
        image.refresh_lengths()?;
        let cluster = image.geometry().cluster_size();
        let mut bytes = vec![0; cluster as usize];
        for n in 0..run.end - run.start {
            bytes.fill(0);
            let here = (self.bitmap.table_bytes().saturating_sub(n * cluster)).min(cluster) as usize;
            let from = self.bitmap.table_offset + n * cluster;
            image.read_table(from, bytes.get_mut(..here).unwrap_or_default())?;
            image.write(next.place(0) + n * cluster, &bytes)?;
        }
        disk.growth.free(image, self.bitmap.table_offset, self.bitmap.table_bytes());
        self.table = next;
        self.staged = true;
        self.current = None;
        Ok(())
    }
}

impl Piece {
    /// Writes the bits if they changed, and returns the buffer.
    fn flush(self, image: &Qcow2) -> Result<Vec<u8>> {
        if self.changed {
            image.write(self.host, &self.bytes)?;
        }
        Ok(self.bytes)
    }
}

/// What all bitmaps share.
#[derive(Debug)]
struct MarkedDisk<'a> {
    image: &'a Qcow2,
    refcounts: &'a Refcounts,
    allocator: Allocator,
    old_size: u64,
    new_size: u64,
    /// Bytes of a bitmap that are in memory at once: a power of two, at most a cluster.
    piece: u64,
    /// New clusters whose refcounts are not raised yet.
    allocated: Vec<Range<ClusterIndex>>,
    /// Entries of present tables: where they stand, and what they will be.
    pending: Vec<(HostOffset, u64)>,
    growth: BitmapGrowth,
}

impl MarkedDisk<'_> {
    /// Takes a free cluster, for a new table or for a present one.
    fn allocate(&mut self, staged: bool) -> Result<HostOffset> {
        let cluster = self.allocator.take(self.image, self.refcounts, 1)?.start;
        match self.allocated.last_mut() {
            Some(last) if last.end == cluster => last.end += 1,
            _ => self.allocated.push(cluster..cluster + 1),
        }
        if staged {
            self.growth.adopt(self.image, &(cluster..cluster + 1));
        }
        Ok(HostOffset::new(cluster << self.image.geometry().cluster_bits()))
    }

    fn write_zeros(&self, host: HostOffset) -> Result<()> {
        self.image.write(host, &vec![0; self.image.geometry().cluster_size() as usize])
    }

    /// Copies a cluster of bits that is given up when the disk grows.
    fn copy_cluster(&mut self, from: HostOffset, to: HostOffset) -> Result<()> {
        let mut bytes = vec![0; self.image.geometry().cluster_size() as usize];
        self.image.read_table(from, &mut bytes)?;
        self.growth.free(self.image, from, bytes.len() as u64);
        self.image.write(to, &bytes)
    }

    /// Notes an entry of a present table, to be written when the cluster is durable.
    fn name_later(&mut self, place: HostOffset, host: HostOffset) -> Result<()> {
        self.pending.push((place, BitmapTableEntry::Data(host).encode()));
        if self.pending.len() >= PENDING { self.settle() } else { Ok(()) }
    }

    /// Makes new clusters and their refcounts durable, then names them in the present tables.
    fn settle(&mut self) -> Result<()> {
        if self.allocated.is_empty() {
            return Ok(());
        }
        self.refcounts.raise(self.image, &self.allocated)?;
        self.allocated.clear();
        self.image.barrier()?;
        self.pending.sort_unstable();
        for run in self.pending.chunk_by(|a, b| a.0 + 8 == b.0) {
            if let Some((place, _)) = run.first() {
                self.image.write(*place, &write_be_u64s(run.iter().map(|(_, entry)| *entry)))?;
            }
        }
        self.pending.clear();
        Ok(())
    }
}

impl BitmapGrowth {
    /// Takes free clusters side by side for the new tables.
    fn reserve(&mut self, image: &Qcow2, refcounts: &Refcounts, len: u64) -> Result<Range<ClusterIndex>> {
        let run = Allocator::find_run(image, refcounts, len)?.ok_or_else(|| {
            let expected = format!("{len} free clusters side by side");
            Error::format(image.path(), FormatError::malformed("refcount table", 48, "no room", expected))
        })?;
        refcounts.raise(image, std::slice::from_ref(&run))?;
        self.adopt(image, &run);
        Ok(run)
    }
}

/// Sets a run of bits, bit 0 being the least significant of the first byte; whether any changed.
fn set_bits(bytes: &mut [u8], bits: Range<usize>) -> bool {
    let mut changed = false;
    let (first, last) = (bits.start / 8, bits.end.div_ceil(8));
    for (n, byte) in bytes.iter_mut().enumerate().take(last).skip(first) {
        let from = bits.start.max(n * 8) - n * 8;
        let to = bits.end.min(n * 8 + 8) - n * 8;
        let mask = (0xffu8 << from) & (0xffu8 >> (8 - to));
        changed |= *byte | mask != *byte;
        *byte |= mask;
    }
    changed
}
