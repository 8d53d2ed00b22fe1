//! Changes the mapping of an image. A batch collects changes and writes them in such an order that a crash can
//! leak clusters, but do no other harm.
//!
//! 1. [`Batch::stage`]: writes raised refcounts and whole new L2 tables, to which nothing refers yet (the
//!    caller has written the data); barrier.
//! 2. [`Batch::publish`]: writes entries of live L2 tables and of the L1 table; barrier.
//! 3. [`Batch::settle`]: lowers the refcounts of freed clusters; barrier; then punches holes where these
//!    clusters lie.
//!
//! Each step relies on the barrier before it. An entry must not point to a cluster whose refcount says that it
//! is free, because the next writer would allocate it again. So refcounts are raised before entries appear, and
//! lowered only when no entry on disk points to the cluster any more.

use std::collections::BTreeMap;
use std::ops::Range;

use super::Qcow2;
use super::refcounts::{ClusterIndex, Refcounts};
use crate::error::{Error, FileOp, Result};
use crate::format::{L1Entry, L2Entry, read_be_u64s, write_be_u64s};
use crate::units::{GuestOffset, GuestRange, HostOffset};

/// Where new clusters come from: the allocator of an image, or a counter while only a plan is made.
pub(crate) trait ClusterSource {
    /// A free cluster.
    ///
    /// # Errors
    /// No cluster is free, or the refcounts cannot be read.
    fn take(&mut self) -> Result<ClusterIndex>;
}

/// An L2 table that a batch looks at or changes.
#[derive(Debug)]
struct BatchTable {
    l1_index: u64,
    place: TablePlace,
    bytes: Vec<u8>,
    /// The range of bytes with all changes.
    dirty: Option<Range<usize>>,
}

/// Where an L2 table lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TablePlace {
    /// There is none yet.
    Absent,
    /// In the file, owned by the active L1 table alone.
    Live(HostOffset),
    /// In the file, shared with a snapshot: it must not be changed in place.
    Shared(HostOffset),
    /// Not written yet, for a new cluster; with the shared table that it replaces, if any.
    Fresh { host: HostOffset, replaces: Option<HostOffset> },
}

/// The metadata side of a batch.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    current: Option<BatchTable>,
    /// The changed tables, by their L1 index.
    changed: BTreeMap<u64, BatchTable>,
    /// The bytes of the changed tables.
    table_bytes: usize,
    allocated: Vec<Range<ClusterIndex>>,
    freed: Vec<ClusterIndex>,
}

impl Batch {
    /// The L2 entry of a cluster, with the changes of the batch.
    ///
    /// # Errors
    /// A table that cannot be read, or an entry that breaks the format's rules.
    pub(crate) fn entry(&mut self, image: &Qcow2, cluster: GuestOffset) -> Result<L2Entry> {
        let geometry = *image.geometry();
        let index = geometry.l2_index(cluster);
        let table = self.table(image, cluster)?;
        let (first, second) = table.words(index, &geometry);
        let at = match table.place {
            TablePlace::Absent => 0,
            TablePlace::Live(host) | TablePlace::Shared(host) | TablePlace::Fresh { host, .. } => host.get(),
        };
        L2Entry::decode(first, second, &geometry, image.header().version, image.has_data_file(), at)
            .map_err(|e| Error::Mapping { path: image.path().to_owned(), guest: cluster, source: e })
    }

    /// Changes the L2 entry of a cluster; a table that is missing or shared gets a new cluster.
    ///
    /// # Errors
    /// As [`Batch::entry`], and when no cluster is free.
    pub(crate) fn set(
        &mut self,
        image: &Qcow2,
        cluster: GuestOffset,
        entry: L2Entry,
        source: &mut dyn ClusterSource,
    ) -> Result<()> {
        let geometry = *image.geometry();
        let replaces = match self.table(image, cluster)?.place {
            TablePlace::Live(_) | TablePlace::Fresh { .. } => None,
            TablePlace::Absent => Some(None),
            TablePlace::Shared(host) => Some(Some(host)),
        };
        if let Some(replaces) = replaces {
            // A snapshot reads a shared table, too. So the batch changes a copy, which one L1 entry makes
            // visible.
            let host = HostOffset::new(self.allocate(source)? << geometry.cluster_bits());
            self.table(image, cluster)?.place = TablePlace::Fresh { host, replaces };
            if let Some(old) = replaces {
                // This lowers the refcount by one; the snapshot's reference to the old table remains.
                self.freed.push(old.get() >> geometry.cluster_bits());
            }
        }
        let index = geometry.l2_index(cluster);
        self.table(image, cluster)?.set(index, entry.encode(&geometry), geometry.extended_l2());
        Ok(())
    }

    /// Takes a free cluster.
    ///
    /// # Errors
    /// As [`ClusterSource::take`].
    pub(crate) fn allocate(&mut self, source: &mut dyn ClusterSource) -> Result<ClusterIndex> {
        let cluster = source.take()?;
        match self.allocated.last_mut() {
            Some(last) if last.end == cluster => last.end += 1,
            _ => self.allocated.push(cluster..cluster + 1),
        }
        Ok(cluster)
    }

    /// Notes that an entry for the `len` bytes at `host` goes away: [`Batch::settle`] lowers the refcounts of
    /// the host clusters that they touch. A compressed cluster may touch several.
    pub(crate) fn free(&mut self, image: &Qcow2, host: HostOffset, len: u64) {
        let bits = image.geometry().cluster_bits();
        self.freed.extend(host.get() >> bits..=(host.get() + len.max(1) - 1) >> bits);
    }

    /// How many clusters the batch has allocated, for data and L2 tables.
    pub(crate) fn allocated(&self) -> u64 {
        self.allocated.iter().map(|run| run.end - run.start).sum()
    }

    /// The memory that the batch takes, in bytes.
    pub(crate) fn memory(&self) -> usize {
        self.table_bytes + self.freed.len() * 8
    }

    /// Whether there is nothing to write.
    pub(crate) fn is_empty(&self) -> bool {
        let clean = self.current.as_ref().is_none_or(|t| t.dirty.is_none());
        clean && self.changed.is_empty() && self.allocated.is_empty() && self.freed.is_empty()
    }

    /// Drops all changes but the current table. This bounds the memory of a plan, which writes nothing.
    pub(crate) fn forget(&mut self) {
        self.changed.clear();
        self.table_bytes = 0;
        self.allocated.clear();
        self.freed.clear();
    }

    fn table(&mut self, image: &Qcow2, cluster: GuestOffset) -> Result<&mut BatchTable> {
        let l1_index = image.geometry().l1_index(cluster);
        let table = match self.current.take() {
            Some(table) if table.l1_index == l1_index => table,
            other => {
                if let Some(done) = other.filter(|t| t.dirty.is_some()) {
                    self.table_bytes += done.bytes.len();
                    self.changed.insert(done.l1_index, done);
                }
                match self.changed.remove(&l1_index) {
                    Some(table) => {
                        self.table_bytes -= table.bytes.len();
                        table
                    }
                    None => BatchTable::load(image, l1_index)?,
                }
            }
        };
        Ok(self.current.insert(table))
    }

    /// Writes what nothing on disk refers to yet.
    ///
    /// # Errors
    /// An I/O error, or refcounts that are not what they should be.
    pub(crate) fn stage(&mut self, image: &Qcow2, refcounts: &Refcounts) -> Result<()> {
        let last = self.current.take().filter(|t| t.dirty.is_some());
        self.changed.extend(last.map(|table| (table.l1_index, table)));
        self.allocated.sort_unstable_by_key(|run| run.start);
        refcounts.raise(image, &self.allocated)?;
        if let Some(last) = self.allocated.last() {
            image.extend_to(last.end << image.geometry().cluster_bits())?;
        }
        for table in self.changed.values() {
            if let TablePlace::Fresh { host, .. } = table.place {
                image.write_new(host, &table.bytes)?;
            }
        }
        Ok(())
    }

    /// Makes the changes visible. Everything that they refer to must be durable.
    ///
    /// # Errors
    /// An I/O error.
    pub(crate) fn publish(&self, image: &Qcow2) -> Result<()> {
        for table in self.changed.values() {
            if let (TablePlace::Live(host), Some(dirty)) = (table.place, table.dirty.clone()) {
                let at = host + dirty.start as u64;
                image.write(at, table.bytes.get(dirty).unwrap_or_default())?;
            }
        }
        let fresh = self.changed.values().filter_map(|table| match table.place {
            TablePlace::Fresh { host, .. } => {
                // The new table's refcount is one, so the entry has the COPIED flag.
                Some((table.l1_index, L1Entry::Table { host, copied: true }.encode()))
            }
            _ => None,
        });
        // Write neighbouring L1 entries together.
        let mut run: (u64, Vec<u64>) = (0, Vec::new());
        for (index, entry) in fresh {
            if run.0 + run.1.len() as u64 != index {
                write_l1(image, &run)?;
                run = (index, Vec::new());
            }
            run.1.push(entry);
        }
        write_l1(image, &run)
    }

    /// Frees the clusters that nothing refers to any more. The changed entries must be durable.
    ///
    /// # Errors
    /// An I/O error, or refcounts that are not what they should be.
    pub(crate) fn settle(mut self, image: &Qcow2, refcounts: &Refcounts) -> Result<()> {
        if self.freed.is_empty() {
            return Ok(());
        }
        self.freed.sort_unstable();
        let freed = refcounts.lower(image, &self.freed)?;
        // Until the refcounts are durable, a power cut may bring the cluster back into use; a hole would lose
        // its data.
        image.barrier()?;
        let bits = image.geometry().cluster_bits();
        let len = image.file_size()?;
        for run in freed {
            let (start, end) = (run.start << bits, (run.end << bits).min(len));
            if start < end {
                let io = |e| Error::io(image.path(), FileOp::Punch, Some(start), e);
                image.file().punch_hole(start, end - start).map_err(io)?;
            }
        }
        Ok(())
    }
}

fn write_l1(image: &Qcow2, (index, entries): &(u64, Vec<u64>)) -> Result<()> {
    if entries.is_empty() {
        return Ok(());
    }
    image.write(image.header().l1_offset + index * 8, &write_be_u64s(entries.iter().copied()))
}

impl BatchTable {
    fn load(image: &Qcow2, l1_index: u64) -> Result<Self> {
        let geometry = *image.geometry();
        let mut bytes = vec![0; geometry.cluster_size() as usize];
        let start = GuestOffset::new(l1_index * geometry.l2_coverage());
        let mut place = TablePlace::Absent;
        image.for_each_l1(GuestRange { start, len: 1 }, |_, entry| {
            if let L1Entry::Table { host, copied } = entry {
                image.read_table(host, &mut bytes)?;
                place = if copied { TablePlace::Live(host) } else { TablePlace::Shared(host) };
            }
            Ok(())
        })?;
        Ok(Self { l1_index, place, bytes, dirty: None })
    }

    fn words(&self, index: u64, geometry: &crate::format::Geometry) -> (u64, u64) {
        let size = geometry.l2_entry_size() as usize;
        let from = index as usize * size;
        let mut words = read_be_u64s(self.bytes.get(from..from + size).unwrap_or_default());
        (words.next().unwrap_or(0), words.next().unwrap_or(0))
    }

    fn set(&mut self, index: u64, (first, second): (u64, u64), extended: bool) {
        let size = if extended { 16 } else { 8 };
        let from = index as usize * size;
        let new = write_be_u64s([first, second].into_iter().take(size / 8));
        if let Some(slot) = self.bytes.get_mut(from..from + size) {
            slot.copy_from_slice(&new);
        }
        let dirty = self.dirty.take().unwrap_or(from..from);
        self.dirty = Some(dirty.start.min(from)..dirty.end.max(from + size));
    }
}
