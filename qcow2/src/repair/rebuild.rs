//! Rebuilds the refcount structures from the references.
//!
//! The new table and its blocks are written to unused space and made durable. Then one write inside the
//! header's first sector names them (specification: "Header", bytes 48 to 60). Until that write, nothing that
//! the image uses has changed; after it, the old structures are unused space.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;

use crate::error::Result;
use crate::format::{MAX_REFCOUNT_TABLE_BYTES, RefcountTableEntry, RefcountWidth, write_be_u64s};
use crate::storage::FileKind;
use crate::units::HostOffset;

use super::disk::ImageWriter;
use super::free::FreeRuns;
use super::survey::{Survey, for_each_block, for_each_window};
use crate::check::counts::Counts;

/// Where the header names the refcount table: its offset and its length in clusters.
const TABLE_FIELDS: u64 = 48;

/// New refcount structures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rebuilt {
    /// The refcount blocks.
    pub(super) blocks: u64,
    /// The clusters of the table.
    pub(super) table: u64,
}

/// Where the new structures lie.
struct NewPlace {
    /// The clusters of the table, in a row.
    table: Range<u64>,
    /// The clusters of the blocks, by their position in the table.
    blocks: BTreeMap<u64, u64>,
    /// All of these clusters, sorted.
    own: Vec<u64>,
}

/// Rebuilds the refcount structures. All references must be known.
///
/// # Errors
/// Those of a check, and of writing. The inner error is the reason, in words, why it cannot be done; nothing is
/// written then.
pub(super) fn rebuild(
    survey: &Survey<'_>,
    disk: &ImageWriter<'_>,
) -> Result<std::result::Result<Rebuilt, &'static str>> {
    let subject = survey.subject;
    if !survey.may_write(0, subject.geometry.cluster_size()) {
        return Ok(Err("the header lies where something else lies too"));
    }
    let is_device = survey.file_kind()? == FileKind::Block;
    if survey.past_end && !is_device {
        return Ok(Err("entries point behind the end of the file, where the new ones would lie"));
    }
    let mut used = Vec::new();
    let mut end = survey.references_end;
    // A device cannot grow: the new structures must fit into free clusters before its end.
    let device_clusters = subject.file_len >> subject.geometry.cluster_bits();
    let most = most_needed(survey, device_clusters);
    let mut free = FreeRuns::wanting(if is_device { most.0 + most.1 } else { 0 });
    let old = if is_device { old_structures(survey) } else { Vec::new() };
    for_each_window(subject, &survey.rest, None, &mut |counts| {
        for_each_refcounts(survey, counts, is_device, |block, clusters, refcounts| {
            if let Some(last) = refcounts.iter().rposition(|&n| n > 0) {
                used.push(block);
                end = end.max(clusters.start + last as u64 + 1);
            }
            if is_device {
                let unused =
                    clusters.zip(refcounts).filter(|&(cluster, n)| *n == 0 && cluster < device_clusters);
                unused.filter(|(at, _)| old.binary_search(at).is_err()).for_each(|(at, _)| free.add(at));
            }
            Ok(())
        })
    })?;
    used.sort_unstable();
    used.dedup();
    let place = if is_device {
        place_in(survey, &used, free, device_clusters)
    } else {
        place_behind(survey, &used, end)
    };
    let Some(place) = place else {
        return Ok(Err("there is no room for a new refcount table"));
    };
    write(survey, disk, &place)?;
    disk.barrier()?;
    let at = place.table.start << subject.geometry.cluster_bits();
    let mut fields = at.to_be_bytes().to_vec();
    // The table has at most 8 MiB, so its clusters are far fewer than 2^32.
    fields.extend((place.table_clusters() as u32).to_be_bytes());
    disk.write(TABLE_FIELDS, &fields)?;
    disk.barrier()?;
    // With a damaged entry about, a cluster that looks like an old structure's own may be what that entry
    // meant.
    if !survey.damaged {
        free_old_structures(survey, disk);
    }
    Ok(Ok(Rebuilt { blocks: place.blocks.len() as u64, table: place.table_clusters() }))
}

impl NewPlace {
    fn new(table: Range<u64>, blocks: BTreeMap<u64, u64>) -> Self {
        let mut own: Vec<u64> = table.clone().chain(blocks.values().copied()).collect();
        own.sort_unstable();
        Self { table, blocks, own }
    }

    fn table_clusters(&self) -> u64 {
        self.table.end - self.table.start
    }
}

/// Punches holes where the old structures lay, except where they shared clusters with something else.
fn free_old_structures(survey: &Survey<'_>, disk: &ImageWriter<'_>) {
    let subject = survey.subject;
    let (table, len) = (subject.header.refcount_table_offset.get(), subject.header.refcount_table_bytes());
    if !subject.is_past_end(table, len) && survey.may_write(table, len) {
        let clusters = subject.clusters(table, len);
        disk.punch(clusters.start, clusters.end - clusters.start);
    }
    for block in 0..survey.layout.refcount_table.len() as u64 {
        if let Some(host) = survey.block(block) {
            disk.punch(host.get() >> subject.geometry.cluster_bits(), 1);
        }
    }
}

/// Calls `visit` with each block of a window that has a refcount, and with empty ones too if `visits_empty`;
/// and with the refcounts as they should be. That is the number of references. If there are damaged entries,
/// they may have meant any cluster of the file: so the refcount is at least what a sound old block says, or one
/// without such a block.
fn for_each_refcounts(
    survey: &Survey<'_>,
    counts: &Counts,
    visits_empty: bool,
    mut visit: impl FnMut(u64, Range<u64>, &[u64]) -> Result<()>,
) -> Result<()> {
    let width = RefcountWidth::of(&survey.subject.geometry);
    let file_clusters = survey.subject.file_clusters();
    let lanes = counts.lanes();
    let mut old = Vec::new();
    let mut refcounts = Vec::new();
    for_each_block(survey.subject, counts, |block, clusters| {
        let is_known = survey.damaged && survey.read_block(block, &mut old)?;
        refcounts.clear();
        let mut any = false;
        for cluster in clusters.clone() {
            let first = cluster - (cluster - clusters.start) % lanes;
            let slot = counts.slot(counts.word(first), (cluster - first) as u32);
            let mut refcount = slot.count.min(width.max());
            if survey.damaged && cluster < file_clusters {
                let stored =
                    if is_known { width.get(&old, (cluster - clusters.start) as usize) } else { Some(1) };
                refcount = refcount.max(stored.unwrap_or(0));
            }
            any |= refcount > 0;
            refcounts.push(refcount);
        }
        if any || visits_empty { visit(block, clusters, &refcounts) } else { Ok(()) }
    })
}

/// The most clusters that a table, and that its blocks, can take to count this many clusters.
fn most_needed(survey: &Survey<'_>, clusters: u64) -> (u64, u64) {
    let geometry = survey.subject.geometry;
    let blocks = clusters.div_ceil(geometry.refcounts_per_block());
    (geometry.clusters_for(blocks.saturating_mul(8)), blocks)
}

/// Finds free clusters of a device for the new structures. `used` are the blocks that are needed without them.
fn place_in(survey: &Survey<'_>, used: &[u64], mut free: FreeRuns, clusters: u64) -> Option<NewPlace> {
    let per_block = survey.subject.geometry.refcounts_per_block();
    let (table, _) = most_needed(survey, clusters);
    if clusters.div_ceil(per_block) > MAX_REFCOUNT_TABLE_BYTES / 8 {
        return None;
    }
    let table = free.take_run(table)?;
    // The new structures' own clusters must be counted, too, which may take more blocks.
    let mut open: Vec<u64> = used.to_vec();
    open.extend(table.start / per_block..=(table.end - 1) / per_block);
    let mut blocks = BTreeMap::new();
    while let Some(block) = open.pop() {
        if let Entry::Vacant(vacant) = blocks.entry(block) {
            let at = free.take()?;
            vacant.insert(at);
            open.push(at / per_block);
        }
    }
    Some(NewPlace::new(table, blocks))
}

/// Places the new structures behind the end of the file, or of its last cluster in use: first the table, then
/// the blocks. `used` are the blocks that are needed without them.
fn place_behind(survey: &Survey<'_>, used: &[u64], end: u64) -> Option<NewPlace> {
    let geometry = survey.subject.geometry;
    let per_block = geometry.refcounts_per_block();
    // The old structures stay where they are until the new ones are named.
    let end = end.max(survey.subject.file_clusters());
    let (mut table, mut blocks) = (1, used.len() as u64);
    // The new structures' own clusters must be counted, too: grow until everything fits.
    loop {
        let own = end..end.checked_add(table)?.checked_add(blocks)?;
        let first = own.start / per_block;
        let last = (own.end - 1) / per_block;
        let more = (first..=last).filter(|block| used.binary_search(block).is_err()).count() as u64;
        let entries = last.max(used.last().copied().unwrap_or(0)) + 1;
        if entries > MAX_REFCOUNT_TABLE_BYTES / 8 {
            return None;
        }
        let needed = (geometry.clusters_for(entries * 8), used.len() as u64 + more);
        if needed.0 > table || needed.1 > blocks {
            (table, blocks) = (table.max(needed.0), blocks.max(needed.1));
            continue;
        }
        let all = used.iter().copied().chain(first..=last);
        let mut blocks: BTreeMap<u64, u64> = all.map(|block| (block, 0)).collect();
        for (n, at) in blocks.values_mut().enumerate() {
            *at = own.start + table + n as u64;
        }
        return Some(NewPlace::new(own.start..own.start + table, blocks));
    }
}

/// The clusters of the old refcount structures, sorted. They must not be overwritten before the new ones are
/// named.
fn old_structures(survey: &Survey<'_>) -> Vec<u64> {
    let subject = survey.subject;
    let size = subject.geometry.cluster_size();
    let table = (subject.header.refcount_table_offset.get(), subject.header.refcount_table_bytes());
    let blocks =
        survey.layout.refcount_table.iter().filter(|&&raw| raw != 0).map(|&raw| (raw & !(size - 1), size));
    let inside = blocks.chain([table]).filter(|&(host, len)| !subject.is_past_end(host, len));
    let mut clusters: Vec<u64> = inside.flat_map(|(host, len)| subject.clusters(host, len)).collect();
    clusters.sort_unstable();
    clusters
}

fn write(survey: &Survey<'_>, disk: &ImageWriter<'_>, place: &NewPlace) -> Result<()> {
    let geometry = survey.subject.geometry;
    let bits = geometry.cluster_bits();
    let size = geometry.cluster_size() as usize;
    let mut rest = place.blocks.clone();
    let put = |block: u64, refcounts: &[u64], at: u64| {
        disk.write(at << bits, &encode(survey, place, block, refcounts))
    };
    for_each_window(survey.subject, &survey.rest, None, &mut |counts| {
        for_each_refcounts(survey, counts, false, |block, _, refcounts| {
            let Some(&at) = place.blocks.get(&block) else { return Ok(()) };
            rest.remove(&block);
            put(block, refcounts, at)
        })
    })?;
    // The blocks that count nothing but the new structures.
    for (&block, &at) in &rest {
        put(block, &[], at)?;
    }
    let mut table = vec![0u64; place.table_clusters() as usize * size / 8];
    for (&block, &at) in &place.blocks {
        if let Some(entry) = table.get_mut(block as usize) {
            *entry = RefcountTableEntry::new(HostOffset::new(at << bits)).encode();
        }
    }
    disk.write(place.table.start << bits, &write_be_u64s(table))
}

/// Encodes a block with the given refcounts, and a refcount of one for the new structures' own clusters.
fn encode(survey: &Survey<'_>, place: &NewPlace, block: u64, refcounts: &[u64]) -> Vec<u8> {
    let geometry = survey.subject.geometry;
    let width = RefcountWidth::of(&geometry);
    let first = block * geometry.refcounts_per_block();
    let mut bytes = vec![0; geometry.cluster_size() as usize];
    for (index, &refcount) in refcounts.iter().enumerate() {
        // This cannot fail: the refcounts fit the width, and there are no more than the block holds.
        let _ = width.set(&mut bytes, index, refcount);
    }
    let from = place.own.partition_point(|&cluster| cluster < first);
    let inside =
        place.own.iter().skip(from).take_while(|&&cluster| cluster - first < geometry.refcounts_per_block());
    for cluster in inside {
        let _ = width.set(&mut bytes, (cluster - first) as usize, 1);
    }
    bytes
}
