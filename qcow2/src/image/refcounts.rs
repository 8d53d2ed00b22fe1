//! Reads, raises and lowers the refcounts of an image that is being written.
//!
//! Only the refcount table (at most 8 MiB) is held in memory. Changes come as sorted lists, so that each block
//! is read and written once per list.

use std::ops::Range;

use super::Qcow2;
use crate::error::{Error, Result};
use crate::format::{FormatError, Geometry, RefcountTableEntry, RefcountWidth, read_be_u64s};
use crate::units::HostOffset;

/// A cluster of the image file, counted from its start.
pub(crate) type ClusterIndex = u64;

/// The refcounts of one image.
#[derive(Debug)]
pub(crate) struct Refcounts {
    geometry: Geometry,
    width: RefcountWidth,
    /// Where the table lies, and how many clusters it has.
    table_at: HostOffset,
    table_clusters: u64,
    table: Vec<RefcountTableEntry>,
}

impl Refcounts {
    /// Reads the refcount table of an image.
    ///
    /// # Errors
    /// A table that cannot be read, or an entry that breaks the format's rules.
    pub(crate) fn load(image: &Qcow2) -> Result<Self> {
        let header = image.header();
        let geometry = *image.geometry();
        let table_clusters = u64::from(header.refcount_table_clusters);
        let table_at = header.refcount_table_offset;
        image.check_table("refcount table offset", 48, table_at)?;
        let mut bytes = vec![0; (table_clusters * geometry.cluster_size()) as usize];
        image.read_table(table_at, &mut bytes)?;
        let table = read_be_u64s(&bytes)
            .enumerate()
            .map(|(n, raw)| {
                let at = table_at + n as u64 * 8;
                let entry = RefcountTableEntry::decode(raw, &geometry, at.get())
                    .map_err(|e| Error::format(image.path(), e))?;
                if let Some(block) = entry.block() {
                    image.check_table("refcount table entry", at.get(), block)?;
                }
                Ok(entry)
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self { geometry, width: RefcountWidth::of(&geometry), table_at, table_clusters, table })
    }

    /// The refcounts that one block holds.
    pub(crate) fn per_block(&self) -> u64 {
        self.geometry.refcounts_per_block()
    }

    /// The width of a refcount.
    pub(crate) fn width(&self) -> RefcountWidth {
        self.width
    }

    /// The table's entries.
    pub(crate) fn table(&self) -> &[RefcountTableEntry] {
        &self.table
    }

    /// Where the table lies.
    pub(crate) fn table_at(&self) -> HostOffset {
        self.table_at
    }

    /// The clusters that the table itself takes.
    pub(crate) fn table_clusters(&self) -> Range<ClusterIndex> {
        let first = self.table_at.get() >> self.geometry.cluster_bits();
        first..first + self.table_clusters
    }

    /// Takes over a new table, which the caller has written.
    pub(crate) fn replace_table(&mut self, at: HostOffset, clusters: u64, table: Vec<RefcountTableEntry>) {
        self.table_at = at;
        self.table_clusters = clusters;
        self.table = table;
    }

    /// Takes a block out of the table. It must count nothing but, perhaps, itself.
    ///
    /// # Errors
    /// An I/O error.
    pub(crate) fn drop_block(&mut self, image: &Qcow2, index: u64) -> Result<()> {
        if let Some(entry) = self.table.get_mut(index as usize) {
            *entry = RefcountTableEntry::ABSENT;
        }
        image.write(self.table_at + index * 8, &[0; 8])
    }

    /// Reads block `index` of the table into `buf`; false if there is no such block.
    pub(crate) fn read_block(&self, image: &Qcow2, index: u64, buf: &mut Vec<u8>) -> Result<bool> {
        let Some(host) = self.block_at(index) else { return Ok(false) };
        buf.resize(self.geometry.cluster_size() as usize, 0);
        image.read_table(host, buf)?;
        Ok(true)
    }

    fn block_at(&self, index: u64) -> Option<HostOffset> {
        self.table.get(usize::try_from(index).ok()?)?.block()
    }

    /// The first cluster behind the last one that is in use.
    ///
    /// # Errors
    /// A refcount block that cannot be read.
    pub(crate) fn end(&self, image: &Qcow2) -> Result<ClusterIndex> {
        let mut block = Vec::new();
        for index in (0..self.table.len() as u64).rev() {
            if !self.read_block(image, index, &mut block)? {
                continue;
            }
            let mut last = None;
            self.width
                .for_each(&block, |slot, count| last = if count > 0 { Some(slot as u64) } else { last });
            if let Some(last) = last {
                return Ok(index * self.per_block() + last + 1);
            }
        }
        Ok(0)
    }

    /// Raises the refcounts of free clusters from zero to one. `runs` must be sorted.
    ///
    /// # Errors
    /// A cluster that is not free, or has no refcount block: the image is damaged.
    pub(crate) fn raise(&self, image: &Qcow2, runs: &[Range<ClusterIndex>]) -> Result<()> {
        self.change(image, runs.iter().cloned(), |cluster, old| {
            if old == 0 {
                Ok(1)
            } else {
                Err(self.damaged(image, cluster, old, "0, for a cluster to be allocated"))
            }
        })
    }

    /// Lowers the refcount of each cluster in `clusters` by one; a cluster that is listed several times is
    /// lowered that often. The list must be sorted. Returns the runs of clusters that became free.
    ///
    /// # Errors
    /// A refcount that is zero already: the image is damaged.
    pub(crate) fn lower(&self, image: &Qcow2, clusters: &[ClusterIndex]) -> Result<Vec<Range<ClusterIndex>>> {
        let mut freed: Vec<Range<ClusterIndex>> = Vec::new();
        let runs = clusters.iter().map(|&c| c..c + 1);
        self.change(image, runs, |cluster, old| {
            let new = old.checked_sub(1).ok_or_else(|| self.damaged(image, cluster, 0, "at least 1"))?;
            if new == 0 {
                match freed.last_mut() {
                    Some(last) if last.end == cluster => last.end += 1,
                    _ => freed.push(cluster..cluster + 1),
                }
            }
            Ok(new)
        })?;
        Ok(freed)
    }

    /// Applies `new(cluster, old)` to sorted runs of clusters, reading and writing each block once.
    fn change(
        &self,
        image: &Qcow2,
        runs: impl Iterator<Item = Range<ClusterIndex>>,
        mut new: impl FnMut(ClusterIndex, u64) -> Result<u64>,
    ) -> Result<()> {
        let per_block = self.per_block();
        let mut open: Option<OpenBlock> = None;
        let mut spare = Vec::new();
        for run in runs {
            for cluster in run {
                let index = cluster / per_block;
                let slot = (cluster % per_block) as usize;
                if open.as_ref().is_none_or(|block| block.index != index) {
                    if let Some(done) = open.take() {
                        spare = done.flush(self, image)?;
                    }
                    let mut bytes = std::mem::take(&mut spare);
                    if !self.read_block(image, index, &mut bytes)? {
                        return Err(self.damaged(image, cluster, 0, "a refcount block for the cluster"));
                    }
                    open = Some(OpenBlock { index, bytes, dirty: slot..slot });
                }
                let Some(block) = open.as_mut() else { continue };
                let old = self.width.get(&block.bytes, slot).unwrap_or(0);
                let value = new(cluster, old)?;
                if !self.width.set(&mut block.bytes, slot, value) {
                    return Err(self.damaged(image, cluster, old, "room for a larger refcount"));
                }
                block.dirty = block.dirty.start.min(slot)..block.dirty.end.max(slot + 1);
            }
        }
        open.map_or(Ok(()), |block| block.flush(self, image).map(drop))
    }

    fn damaged(&self, image: &Qcow2, cluster: ClusterIndex, found: u64, expected: &str) -> Error {
        let host = cluster << self.geometry.cluster_bits();
        let field = format!("refcount of cluster {cluster} (host offset {host:#x})");
        let block = self.block_at(cluster / self.per_block()).map_or(0, HostOffset::get);
        Error::format(image.path(), FormatError::malformed(field, block, found, expected))
    }
}

/// A refcount block that is being changed.
struct OpenBlock {
    index: u64,
    bytes: Vec<u8>,
    /// The slots that changed.
    dirty: Range<usize>,
}

impl OpenBlock {
    /// Writes what changed, and returns the buffer for the next block.
    fn flush(self, refcounts: &Refcounts, image: &Qcow2) -> Result<Vec<u8>> {
        let bits = refcounts.geometry.refcount_bits() as usize;
        let bytes = self.dirty.start * bits / 8..(self.dirty.end * bits).div_ceil(8);
        if let (Some(host), Some(changed)) = (refcounts.block_at(self.index), self.bytes.get(bytes.clone())) {
            let at = host + bytes.start as u64;
            image.write(at, changed)?;
        }
        Ok(self.bytes)
    }
}
