//! Making room in the metadata before a merge: refcount blocks for all clusters that will be
//! allocated, a larger refcount table, a larger L1 table.
//!
//! Everything new is written whole where nothing refers to it, made durable, and then published: a new
//! table by one write inside one sector of the header (specification: "Header", bytes 36 to 60), new
//! blocks in the present table in the order in which they count each other. What a table's old place
//! took is freed behind a barrier of its own. A crash at any point leaves the old or the new state, and
//! at most leaked clusters.

use std::ops::Range;

use super::Qcow2;
use super::alloc::Allocator;
use super::refcounts::{ClusterIndex, Refcounts};
use crate::error::{Error, Result};
use crate::format::{
    FormatError, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES, RefcountTableEntry, parts, write_be_u64s,
};
use crate::units::HostOffset;

/// New refcount blocks and, where the table has no room for them, a new table; all of it lies in the
/// area that the new blocks cover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct RefcountGrowth {
    /// Position of the first new block in the table.
    first: u64,
    /// How many new blocks.
    blocks: u64,
    /// Clusters of the new table; zero if the old one has room.
    table: u64,
}

impl RefcountGrowth {
    /// The first cluster of the new area.
    fn start(&self, per_block: u64) -> ClusterIndex {
        self.first * per_block
    }

    /// The clusters that the new metadata itself takes.
    fn own(&self, per_block: u64) -> Range<ClusterIndex> {
        let start = self.start(per_block);
        start..start + self.blocks + self.table
    }
}

/// How many clusters the L1 table for a disk of `size` bytes takes, or `None` if the present table
/// has room.
///
/// # Errors
/// A table larger than the format allows.
pub(crate) fn l1_growth(image: &Qcow2, size: u64) -> Result<Option<u64>> {
    let geometry = image.geometry();
    let entries = geometry.l1_entries_for(size);
    if entries <= u64::from(image.header().l1_entries) {
        return Ok(None);
    }
    if entries > MAX_L1_BYTES / 8 {
        let found = format!("{entries} entries for a disk of {size} bytes");
        let e = FormatError::unsupported("L1 table", 36, found, "a table of at most 32 MiB");
        return Err(Error::format(image.path(), e));
    }
    Ok(Some(geometry.clusters_for(entries * 8)))
}

/// Where the image file will end when `clusters` more clusters are allocated, `run` of them side by
/// side: the first cluster behind all that will be in use, and behind the file as it is.
///
/// # Errors
/// A refcount block that cannot be read; a refcount table that would be too large.
pub(crate) fn end_after(image: &Qcow2, clusters: u64, run: u64) -> Result<ClusterIndex> {
    let refcounts = Refcounts::load(image)?;
    let (free, taken) = Allocator::last_taken(image, &refcounts, clusters)?;
    // What is free may lie inside the image: its end stays where it is.
    let mut end = taken.max(refcounts.end(image)?);
    if run > 0 {
        end = end.max(Allocator::find_run(image, &refcounts, run)?.map_or(0, |run| run.end));
    }
    if free < clusters || (run > 0 && Allocator::find_run(image, &refcounts, run)?.is_none()) {
        let missing = (clusters - free).max(run);
        let growth = plan(image, &refcounts, missing)?;
        end = end.max(growth.own(refcounts.per_block()).end + missing);
    }
    Ok(end)
}

/// Makes sure that `clusters` clusters can be allocated, and `run` of them side by side.
///
/// # Errors
/// An I/O error; an image that would need a larger refcount table than the format allows.
pub(crate) fn make_room(
    image: &Qcow2,
    refcounts: &mut Refcounts,
    clusters: u64,
    run: u64,
) -> Result<Option<TableSwitch>> {
    let (free, _) = Allocator::last_taken(image, refcounts, clusters)?;
    let has_run = run == 0 || Allocator::find_run(image, refcounts, run)?.is_some();
    let missing = (clusters - free).max(if has_run { 0 } else { run });
    if missing == 0 {
        return Ok(None);
    }
    let growth = plan(image, refcounts, missing)?;
    let (table, at) = write_blocks(image, refcounts, growth)?;
    image.barrier()?;
    if growth.table == 0 {
        publish_blocks(image, refcounts.per_block(), growth, at, &table)?;
        let clusters = refcounts.table_clusters();
        refcounts.replace_table(at, clusters.end - clusters.start, table);
        return Ok(None);
    }
    Ok(Some(TableSwitch { at, clusters: growth.table, table }))
}

/// Puts the new blocks into the present table. They count each other, and their entries may lie in
/// several sectors, so each is put there only when the one that counts it is durable there: the first,
/// which counts itself, then those that it counts, and so on.
fn publish_blocks(
    image: &Qcow2,
    per_block: u64,
    growth: RefcountGrowth,
    at: HostOffset,
    table: &[RefcountTableEntry],
) -> Result<()> {
    let mut done = 0;
    while done < growth.blocks {
        let next = (done * per_block).max(1).min(growth.blocks);
        let (from, to) = (growth.first + done, growth.first + next);
        let new = table.get(from as usize..to as usize).unwrap_or_default();
        image.write(at + from * 8, &write_be_u64s(new.iter().map(|e| e.encode())))?;
        image.barrier()?;
        done = next;
    }
    Ok(())
}

/// A new refcount table that is durable, but not yet named by the header.
#[derive(Debug)]
pub(crate) struct TableSwitch {
    at: HostOffset,
    clusters: u64,
    table: Vec<RefcountTableEntry>,
}

impl TableSwitch {
    /// Names the new table in the header, and frees the old one.
    ///
    /// # Errors
    /// An I/O error.
    pub(crate) fn publish(self, image: &mut Qcow2, refcounts: &mut Refcounts) -> Result<()> {
        let old: Vec<_> = refcounts.table_clusters().collect();
        image.switch_header(parts::REFCOUNT_TABLE, |header| {
            header.refcount_table_offset = self.at;
            // The limit of 8 MiB keeps the count far below 2^32.
            header.refcount_table_clusters = self.clusters as u32;
        })?;
        image.barrier()?;
        refcounts.replace_table(self.at, self.clusters, self.table);
        refcounts.lower(image, &old)?;
        image.barrier()
    }
}

fn plan(image: &Qcow2, refcounts: &Refcounts, missing: u64) -> Result<RefcountGrowth> {
    let geometry = image.geometry();
    let per_block = refcounts.per_block();
    let table = refcounts.table();
    let first = table.iter().rposition(|e| e.block().is_some()).map_or(0, |n| n as u64 + 1);
    let mut growth = RefcountGrowth { first, blocks: 1, table: 0 };
    // The new blocks and the new table take clusters of the new area themselves: grow until it fits.
    loop {
        let entries = growth.first + growth.blocks;
        growth.table = if entries > table.len() as u64 { geometry.clusters_for(entries * 8) } else { 0 };
        let own = growth.blocks + growth.table;
        let room = growth.blocks.saturating_mul(per_block);
        if growth.table * geometry.cluster_size() > MAX_REFCOUNT_TABLE_BYTES {
            let found = format!("{missing} more clusters");
            let e = FormatError::unsupported("refcount table", 48, found, "a table of at most 8 MiB");
            return Err(Error::format(image.path(), e));
        }
        if room >= own + missing {
            return Ok(growth);
        }
        growth.blocks += (own + missing - room).div_ceil(per_block);
    }
}

/// Writes the new blocks and the new table, if there is one; returns the table as it will be, and
/// where it lies.
fn write_blocks(
    image: &Qcow2,
    refcounts: &Refcounts,
    growth: RefcountGrowth,
) -> Result<(Vec<RefcountTableEntry>, HostOffset)> {
    let geometry = image.geometry();
    let bits = geometry.cluster_bits();
    let per_block = refcounts.per_block();
    let own = growth.own(per_block);
    let mut table = refcounts.table().to_vec();
    let entries = (growth.first + growth.blocks) as usize;
    if growth.table > 0 {
        table.resize((growth.table * geometry.cluster_size() / 8) as usize, RefcountTableEntry::ABSENT);
    }
    let new = table.get_mut(growth.first as usize..entries).unwrap_or_default();
    for (n, entry) in new.iter_mut().enumerate() {
        let host = HostOffset::new((own.start + n as u64) << bits);
        *entry = RefcountTableEntry::new(host);
        let covered = growth.start(per_block) + n as u64 * per_block;
        let mut block = vec![0; geometry.cluster_size() as usize];
        let from = own.start.clamp(covered, covered + per_block) - covered;
        let to = own.end.clamp(covered, covered + per_block) - covered;
        // One fits into a counter of any width, and the range was clamped to the block.
        let _ = refcounts.width().fill(&mut block, from as usize..to as usize, 1);
        image.write_new(host, &block)?;
    }
    if growth.table == 0 {
        return Ok((table, refcounts.table_at()));
    }
    let at = HostOffset::new((own.start + growth.blocks) << bits);
    image.write_new(at, &write_be_u64s(table.iter().map(|e| e.encode())))?;
    Ok((table, at))
}

/// Gives the image an L1 table for a disk of `size` bytes, where the present one is too small. Room
/// for it was made before; the disk's size itself does not change yet.
///
/// # Errors
/// An I/O error; a table larger than the format allows.
pub(crate) fn grow_l1(image: &mut Qcow2, refcounts: &Refcounts, size: u64) -> Result<()> {
    let Some(clusters) = l1_growth(image, size)? else { return Ok(()) };
    let geometry = *image.geometry();
    let entries = geometry.l1_entries_for(size);
    let run = Allocator::find_run(image, refcounts, clusters)?.ok_or_else(|| {
        let e = FormatError::malformed(
            "refcount table",
            48,
            "no room",
            format!("{clusters} free clusters side by side"),
        );
        Error::format(image.path(), e)
    })?;
    let old_bytes = image.header().l1_bytes();
    let old_at = image.header().l1_offset;
    let mut table = vec![0; (clusters * geometry.cluster_size()) as usize];
    image.read_table(old_at, table.get_mut(..old_bytes as usize).unwrap_or_default())?;
    let at = HostOffset::new(run.start << geometry.cluster_bits());
    image.write_new(at, &table)?;
    refcounts.raise(image, &[run])?;
    image.barrier()?;
    image.switch_header(parts::L1, |header| {
        header.l1_entries = entries as u32;
        header.l1_offset = at;
    })?;
    image.barrier()?;
    let first = old_at.get() >> geometry.cluster_bits();
    let old: Vec<_> = (first..first + geometry.clusters_for(old_bytes)).collect();
    refcounts.lower(image, &old)?;
    image.barrier()
}
