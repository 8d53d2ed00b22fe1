//! Turns an image into an empty overlay: frees all its clusters, and makes the file smaller.
//!
//! The order, a piece of the L1 table at a time: the entries become zero; barrier; the refcounts of the clusters that they
//! referred to are lowered. When all of that is durable, refcount blocks that count only themselves are dropped, the file
//! is cut behind its last cluster, and holes are punched where clusters are free. A crash in between leaks clusters at
//! most, because no entry refers to a cluster that is already free.

use std::ops::Range;

use crate::error::{Error, FileOp, Result};
use crate::format::{L1Entry, L2Entry, read_be_u64s};
use crate::image::Qcow2;
use crate::image::refcounts::{ClusterIndex, Refcounts};
use crate::storage::FileKind;
use crate::units::{GuestOffset, GuestRange};

/// How many references are collected before their clusters are freed: this bounds the memory.
const PIECE: usize = 1 << 18;

/// Whether the disk of an image may grow to `size` bytes.
pub(crate) fn may_grow(image: &Qcow2, size: u64) -> bool {
    size <= image.virtual_size() || image.header().version >= 3 || image.header().snapshots == 0
}

/// Frees every cluster that the active L1 table of the image refers to, and the room in the file.
///
/// # Errors
/// An I/O error, or tables that are damaged.
pub(crate) fn empty(image: &mut Qcow2) -> Result<()> {
    let mut refcounts = Refcounts::load(image)?;
    free_clusters(image, &refcounts, FreedTable::InUse)?;
    finish(image, &mut refcounts)
}

/// The L1 table whose clusters are freed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FreedTable {
    /// The header on disk names it: its entries become zero before their clusters are freed.
    InUse,
    /// The header on disk names another table by now, and only `image` still has the old header. The entries
    /// need not change, because no reader finds them any more.
    Obsolete,
}

/// Frees the clusters that the L1 table refers to, a piece of the table at a time.
///
/// # Errors
/// As [`empty`].
pub(crate) fn free_clusters(image: &Qcow2, refcounts: &Refcounts, whose: FreedTable) -> Result<()> {
    let size = image.geometry().l2_coverage().saturating_mul(u64::from(image.header().l1_entries));
    let mut at = GuestOffset::ZERO;
    while let Some(start) = image.next_table(at)? {
        let mut freed = Vec::new();
        let mut end = start;
        // One L2 table after the other, until a piece is full.
        while end.get() < size && freed.len() < PIECE {
            let range = GuestRange { start: end, len: image.geometry().l2_coverage() };
            image.for_each_l1(range, |_, entry| references(image, entry, &mut freed))?;
            end = range.end();
        }
        if whose == FreedTable::InUse {
            let (first, last) = (image.geometry().l1_index(start), image.geometry().l1_index(end));
            let zeros = vec![0; (last - first) as usize * 8];
            image.write(image.header().l1_offset + first * 8, &zeros)?;
            image.barrier()?;
        }
        freed.sort_unstable();
        refcounts.lower(image, &freed)?;
        at = end;
    }
    image.barrier()
}

/// Frees the room in the file of an image whose L1 table refers to nothing any more.
///
/// # Errors
/// An I/O error.
pub(crate) fn finish(image: &mut Qcow2, refcounts: &mut Refcounts) -> Result<()> {
    image.unmap();
    if image.owns_data_file() {
        let data = image.data_file();
        let io = |e| Error::io(image.path(), FileOp::EmptyDataFile, None, e);
        let len = data.size().map_err(io)?;
        data.punch_hole(0, len).map_err(io)?;
    }
    trim(image, refcounts)
}

/// Adds the clusters to which an L1 entry leads: its L2 table, and the clusters to which that refers.
fn references(image: &Qcow2, entry: L1Entry, out: &mut Vec<ClusterIndex>) -> Result<()> {
    let L1Entry::Table { host, .. } = entry else { return Ok(()) };
    let geometry = *image.geometry();
    let bits = geometry.cluster_bits();
    out.push(host.get() >> bits);
    let mut table = vec![0; geometry.cluster_size() as usize];
    image.read_table(host, &mut table)?;
    let mut words = read_be_u64s(&table);
    let mut at = host;
    while let Some(first) = words.next() {
        let second = if geometry.extended_l2() { words.next().unwrap_or(0) } else { 0 };
        let version = image.header().version;
        let entry = L2Entry::decode(first, second, &geometry, version, image.has_data_file(), at.get())
            .map_err(|e| Error::format(image.path(), e))?;
        at = at + geometry.l2_entry_size();
        match entry {
            L2Entry::Compressed { host, len } => {
                out.extend(host.get() >> bits..=(host.get() + len.max(1) - 1) >> bits);
            }
            L2Entry::Standard { host, .. }
            | L2Entry::Zero { host: Some(host), .. }
            | L2Entry::Mixed { host: Some(host), .. }
                if !image.has_data_file() =>
            {
                out.push(host.get() >> bits);
            }
            _ => {}
        }
    }
    Ok(())
}

/// Drops refcount blocks at the end of the file that count nothing but themselves, cuts the file behind its last
/// cluster, and punches holes where clusters are free.
fn trim(image: &mut Qcow2, refcounts: &mut Refcounts) -> Result<()> {
    let bits = image.geometry().cluster_bits();
    let per_block = refcounts.per_block();
    let width = refcounts.width();
    let mut block = Vec::new();
    let mut end = 0;
    let mut dropped = false;
    for index in (0..refcounts.table().len() as u64).rev() {
        if !refcounts.read_block(image, index, &mut block)? {
            continue;
        }
        let own =
            refcounts.table().get(index as usize).and_then(|e| e.block()).map(|host| host.get() >> bits);
        let mut last = None;
        let mut others = 0;
        width.for_each(&block, |slot, count| {
            let cluster = index * per_block + slot as u64;
            if count > 0 {
                last = Some(cluster);
                others += u64::from(Some(cluster) != own);
            }
        });
        if others > 0 {
            end = last.map_or(0, |cluster| cluster + 1);
            break;
        }
        refcounts.drop_block(image, index)?;
        dropped = true;
        // A block outside the clusters that it counts is counted by another block. Its refcount may be lowered
        // only when the table no longer names it, durably. Blocks that count themselves need no such order, and
        // share one barrier.
        if let Some(own) = own.filter(|own| own / per_block != index) {
            image.barrier()?;
            refcounts.lower(image, &[own])?;
        }
    }
    if dropped {
        image.barrier()?;
    }
    let io = |e| Error::io(image.path(), FileOp::Shrink, None, e);
    if image.file().stat().map_err(io)?.kind == FileKind::Regular
        && end > 0
        && end << bits < image.file_size()?
    {
        image.file().set_len(end << bits).map_err(io)?;
    }
    image.refresh_lengths()?;
    for_each_free(image, refcounts, end, |run| {
        let start = run.start << bits;
        let len = (run.end << bits).min(image.file_len()).saturating_sub(start);
        if len == 0 {
            return Ok(());
        }
        image
            .file()
            .punch_hole(start, len)
            .map_err(|e| Error::io(image.path(), FileOp::Punch, Some(start), e))
    })?;
    image.barrier()
}

/// Calls `f` with each run of free clusters below `end`.
fn for_each_free(
    image: &Qcow2,
    refcounts: &Refcounts,
    end: ClusterIndex,
    mut f: impl FnMut(Range<ClusterIndex>) -> Result<()>,
) -> Result<()> {
    let mut block = Vec::new();
    for index in 0..end.div_ceil(refcounts.per_block()) {
        let first = index * refcounts.per_block();
        let mut runs: Vec<Range<ClusterIndex>> = Vec::new();
        if !refcounts.read_block(image, index, &mut block)? {
            runs.push(first..first + refcounts.per_block());
        } else {
            refcounts.width().for_each(&block, |slot, count| {
                let cluster = first + slot as u64;
                match runs.last_mut() {
                    _ if count > 0 => {}
                    Some(last) if last.end == cluster => last.end += 1,
                    _ => runs.push(cluster..cluster + 1),
                }
            });
        }
        for run in runs {
            f(run.start..run.end.min(end))?;
        }
    }
    Ok(())
}
