//! How one cluster of a qcow2 base takes what it must hold.
//!
//! A cluster is looked at as units: its 32 subclusters, or itself where there are none. Each unit is
//! unallocated, zero or allocated before and after; from that follow the bytes to move, the host
//! cluster, and the entry. A host cluster that others refer to (an internal snapshot) is never written:
//! the cluster moves to a new one.

use super::needs::Need;
use super::ops::Ops;
use super::origin::Origin;
use crate::chain::view::{Supplied, Supply, View};
use crate::error::Result;
use crate::format::{L2Entry, SubclusterState, Subclusters};
use crate::image::edits::{Batch, ClusterSource};
use crate::image::{CompressedPart, Mapping, Qcow2};
use crate::units::{GuestOffset, GuestRange, HostOffset};

/// What the step needs to know about the base.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Base<'a> {
    /// The base.
    pub(crate) image: &'a Qcow2,
    /// Its position in the chain.
    pub(crate) layer: usize,
    /// The layers below it, if there are any.
    pub(crate) below: Option<View<'a>>,
    /// The size of the disk when the merge is done, in bytes.
    pub(crate) size: u64,
    /// Clusters of the image file from here on read as zeros until they are written.
    pub(crate) blank_from: u64,
}

/// What a merge does, in bytes of the guest's disk and in clusters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Effect {
    /// Bytes that come from the layers.
    pub(crate) copied: u64,
    /// Bytes that become zeros.
    pub(crate) zeroed: u64,
}

/// A cluster on its way from its old entry to its new one.
struct Cluster {
    start: GuestOffset,
    /// The host cluster, and whether the base owns it alone.
    host: Option<HostOffset>,
    owned: bool,
    /// The old content, if it is compressed.
    compressed: Option<CompressedPart>,
    /// The states of the units before.
    before: Subclusters,
}

impl Cluster {
    fn new(start: GuestOffset, entry: L2Entry, units: u32) -> Self {
        let all = u32::MAX >> (32 - units);
        let (host, owned, before) = match entry {
            L2Entry::Unallocated | L2Entry::Compressed { .. } => (None, false, Subclusters::default()),
            L2Entry::Zero { host, copied } => (host, copied, Subclusters { allocated: 0, zero: all }),
            L2Entry::Standard { host, copied } => {
                (Some(host), copied, Subclusters { allocated: all, zero: 0 })
            }
            L2Entry::Mixed { host, copied, subclusters } => (host, copied, subclusters),
        };
        let mut this = Self { start, host, owned, compressed: None, before };
        if let L2Entry::Compressed { host, len } = entry {
            this.compressed = Some(CompressedPart { host, len, skip: 0 });
            this.before = Subclusters { allocated: all, zero: 0 };
        }
        this
    }
}

impl Base<'_> {
    /// Brings the needs of one cluster into a batch: operations for the data, changes for the metadata.
    /// `needs` are sorted, disjoint, and lie inside the cluster at `start`.
    ///
    /// # Errors
    /// A table that cannot be read or is damaged; no free cluster.
    pub(crate) fn take(
        &self,
        start: GuestOffset,
        needs: &[Need],
        batch: &mut Batch,
        ops: &mut Ops,
        source: &mut dyn ClusterSource,
    ) -> Result<Effect> {
        let geometry = *self.image.geometry();
        let entry = batch.entry(self.image, start)?;
        let units = if geometry.extended_l2() { 32 } else { 1 };
        let cluster = Cluster::new(start, entry, units);
        let unit_size = geometry.subcluster_size();

        // First the states: which units are written, which become zeros.
        let mut after = cluster.before;
        let mut written = 0u32;
        let mut effect = Effect::default();
        for n in 0..units {
            let unit = GuestRange { start: start + u64::from(n) * unit_size, len: unit_size };
            let parts: Vec<Need> = needs.iter().filter_map(|need| need.clip(&unit)).collect();
            if parts.is_empty() {
                continue;
            }
            let zeros_only = parts.iter().all(|part| part.origin == Origin::Zeros);
            let bytes = |zeros: bool| -> u64 {
                parts.iter().filter(|p| (p.origin == Origin::Zeros) == zeros).map(|p| p.range.len).sum()
            };
            if zeros_only && self.reads_zero(cluster.before.get(n), unit) {
                continue;
            }
            effect.copied += bytes(false);
            effect.zeroed += bytes(true);
            let bit = 1 << n;
            if zeros_only && self.covers(&parts, unit) && self.zero_unit(unit, bit, &mut after) {
                continue;
            }
            written |= bit;
            after.allocated |= bit;
            after.zero &= !bit;
        }
        if written == 0 && after == cluster.before {
            return Ok(effect);
        }

        // Then the host cluster: kept, new, or none.
        let data_file = self.image.has_data_file();
        let (host, moved) = if after.allocated == 0 && (!data_file || cluster.host.is_none()) {
            (None, false)
        } else if data_file {
            // A data file holds every cluster at its guest offset.
            (Some(HostOffset::new(start.get())), false)
        } else {
            match cluster.host {
                Some(host) if cluster.owned && cluster.compressed.is_none() => (Some(host), false),
                // A unit that only becomes zero leaves a shared host cluster as it is.
                Some(host) if written == 0 && cluster.compressed.is_none() => (Some(host), false),
                _ => (Some(HostOffset::new(batch.allocate(source)? << geometry.cluster_bits())), true),
            }
        };
        if let Some(host) = host {
            for n in 0..units {
                let unit = GuestRange { start: start + u64::from(n) * unit_size, len: unit_size };
                let allocated = after.allocated >> n & 1 == 1;
                if allocated && (written >> n & 1 == 1 || moved) {
                    let keep = !moved && cluster.before.get(n) == SubclusterState::Allocated;
                    let blank = moved && host.get() >> geometry.cluster_bits() >= self.blank_from;
                    self.fill(&cluster, n, unit, needs, host, Fill { keep, blank }, ops)?;
                } else if !allocated && after.zero >> n & 1 == 1 && self.raw_data_file() {
                    // A raw data file shows zeros by itself.
                    ops.push(
                        host + (unit.start - start),
                        unit_size.min(self.rest(unit.start)),
                        Origin::Zeros,
                    );
                }
            }
        }

        let owned = if moved || data_file { true } else { cluster.owned };
        batch.set(self.image, start, new_entry(host, owned, after, units), source)?;
        if data_file {
            return Ok(effect);
        }
        if let Some(part) = cluster.compressed {
            batch.release(self.image, part.host, part.len);
        } else if let Some(old) = cluster.host
            && host != Some(old)
        {
            batch.release(self.image, old, 1);
        }
        Ok(effect)
    }

    /// Whether a unit in this state reads as zeros already.
    fn reads_zero(&self, state: SubclusterState, unit: GuestRange) -> bool {
        match state {
            SubclusterState::Zero => true,
            SubclusterState::Unallocated => !self.shows_below(unit),
            SubclusterState::Allocated => false,
        }
    }

    /// Whether something below the base shows through an unallocated unit.
    fn shows_below(&self, unit: GuestRange) -> bool {
        self.below.is_some_and(|below| unit.start.get() < below.size())
    }

    fn raw_data_file(&self) -> bool {
        self.image.has_data_file() && self.image.header().data_file_raw()
    }

    /// Bytes from `start` to the end of the disk.
    fn rest(&self, start: GuestOffset) -> u64 {
        self.size.saturating_sub(start.get())
    }

    /// Whether the parts hold every byte of the unit that the guest can see.
    fn covers(&self, parts: &[Need], unit: GuestRange) -> bool {
        parts.iter().map(|part| part.range.len).sum::<u64>() >= unit.len.min(self.rest(unit.start))
    }

    /// Makes a unit read as zeros without writing any, where the format has a way to say so.
    fn zero_unit(&self, unit: GuestRange, bit: u32, after: &mut Subclusters) -> bool {
        if self.image.header().version >= 3 {
            after.allocated &= !bit;
            after.zero |= bit;
            return true;
        }
        // Version 2 has no zero clusters, but where nothing lies below, an unallocated one does.
        if self.shows_below(unit) {
            return false;
        }
        after.allocated &= !bit;
        after.zero &= !bit;
        true
    }

    /// Adds the operations that fill one unit of the cluster at `host`.
    #[allow(clippy::too_many_arguments)]
    fn fill(
        &self,
        cluster: &Cluster,
        n: u32,
        unit: GuestRange,
        needs: &[Need],
        host: HostOffset,
        fill: Fill,
        ops: &mut Ops,
    ) -> Result<()> {
        let at = |guest: GuestOffset| host + (guest - cluster.start);
        let mut done = unit.start;
        for need in needs.iter().filter_map(|need| need.clip(&unit)) {
            self.fill_gap(cluster, n, GuestRange::between(done, need.range.start), host, fill, ops)?;
            let guest = need.range.start;
            if need.origin != Origin::Zeros || !fill.blank {
                ops.push(at(guest), need.range.len, need.origin);
            }
            done = need.range.end();
        }
        self.fill_gap(cluster, n, GuestRange::between(done, unit.end()), host, fill, ops)
    }

    /// Adds the operations for a part of a unit that the merge does not change: its old content moves
    /// along.
    fn fill_gap(
        &self,
        cluster: &Cluster,
        n: u32,
        gap: GuestRange,
        host: HostOffset,
        fill: Fill,
        ops: &mut Ops,
    ) -> Result<()> {
        if gap.is_empty() || fill.keep {
            return Ok(());
        }
        let inside = gap.start - cluster.start;
        let to = host + inside;
        if let Some(part) = cluster.compressed {
            let part = CompressedPart { skip: inside, ..part };
            ops.push(to, gap.len, Origin::Compressed { layer: self.layer, part, guest: gap.start });
            return Ok(());
        }
        match (cluster.before.get(n), cluster.host) {
            (SubclusterState::Allocated, Some(old)) => {
                ops.push(to, gap.len, Origin::Plain { layer: self.layer, host: old + inside });
            }
            (SubclusterState::Unallocated, _) if self.shows_below(gap) => {
                self.fill_from_below(to, gap, fill, ops)?
            }
            _ => push_zeros(to, gap.len, fill, ops),
        }
        Ok(())
    }

    fn fill_from_below(&self, to: HostOffset, gap: GuestRange, fill: Fill, ops: &mut Ops) -> Result<()> {
        let Some(below) = self.below else { return Ok(()) };
        let mut supplied: Vec<Supplied> = Vec::new();
        below.resolve(gap, &mut supplied)?;
        let mut done = gap.start;
        for part in supplied {
            let at = to + (part.range.start - gap.start);
            let guest = part.range.start;
            match part.supply {
                Supply::Layer { layer, mapping: Mapping::Data { host } } => {
                    ops.push(at, part.range.len, Origin::Plain { layer, host });
                }
                Supply::Layer { layer, mapping: Mapping::Compressed(part_of) } => {
                    ops.push(at, part.range.len, Origin::Compressed { layer, part: part_of, guest });
                }
                _ => push_zeros(at, part.range.len, fill, ops),
            }
            done = part.range.end();
        }
        push_zeros(to + (done - gap.start), gap.end() - done, fill, ops);
        Ok(())
    }
}

/// How a unit is filled.
#[derive(Clone, Copy)]
struct Fill {
    /// What the merge does not change is there already.
    keep: bool,
    /// The host cluster reads as zeros until it is written.
    blank: bool,
}

fn push_zeros(to: HostOffset, len: u64, fill: Fill, ops: &mut Ops) {
    if !fill.blank {
        ops.push(to, len, Origin::Zeros);
    }
}

/// The entry for a cluster in these states.
fn new_entry(host: Option<HostOffset>, copied: bool, states: Subclusters, units: u32) -> L2Entry {
    let all = u32::MAX >> (32 - units);
    let copied = copied && host.is_some();
    match (states, host) {
        (Subclusters { allocated, .. }, Some(host)) if allocated == all => L2Entry::Standard { host, copied },
        (Subclusters { zero, .. }, host) if zero == all => L2Entry::Zero { host, copied },
        (Subclusters { allocated: 0, zero: 0 }, None) => L2Entry::Unallocated,
        (subclusters, host) => L2Entry::Mixed { host, copied, subclusters },
    }
}
