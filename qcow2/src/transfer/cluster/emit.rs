//! Turns the outcome for a cluster into operations on its data, and changes of its entry and its host clusters.

use super::Base;
use super::decide::{Cluster, ClusterOutcome, Terms, Units};
use crate::chain::view::{Supplied, Supply};
use crate::error::Result;
use crate::format::{L2Entry, SubclusterState, Subclusters};
use crate::image::edits::{Batch, ClusterSource};
use crate::image::{CompressedPart, Mapping};
use crate::transfer::needs::Need;
use crate::transfer::ops::Ops;
use crate::transfer::origin::Origin;
use crate::units::{GuestOffset, GuestRange, HostOffset};

impl Base<'_> {
    /// Adds the outcome for a cluster to a batch. A new host cluster is allocated before a new L2 table.
    ///
    /// # Errors
    /// A table below that cannot be read or is damaged; no free cluster.
    pub(super) fn emit(
        &self,
        cluster: &Cluster,
        needs: &[Need],
        outcome: ClusterOutcome,
        batch: &mut Batch,
        ops: &mut Ops,
        source: &mut dyn ClusterSource,
    ) -> Result<()> {
        let bits = self.image.geometry().cluster_bits();
        let fill = |host, is_new, is_blank| Fill {
            base: self,
            terms: self.terms(),
            cluster,
            needs,
            host,
            is_new,
            is_blank,
        };
        let entry = match outcome {
            ClusterOutcome::Unchanged => return Ok(()),
            ClusterOutcome::NoData(states) => new_entry(None, false, states, cluster.units),
            ClusterOutcome::InPlace { host, owned, units } => {
                fill(host, false, false).units(units, ops)?;
                new_entry(Some(host), owned, units.states, cluster.units)
            }
            ClusterOutcome::Moved(units) => {
                let index = batch.allocate(source)?;
                let host = HostOffset::new(index << bits);
                fill(host, true, index >= self.blank_from).units(units, ops)?;
                new_entry(Some(host), true, units.states, cluster.units)
            }
        };
        batch.set(self.image, cluster.start, entry, source)?;
        // The old entry is gone, and with it one reference to the old host cluster.
        if !matches!(outcome, ClusterOutcome::InPlace { .. }) {
            if let Some(part) = cluster.compressed {
                batch.free(self.image, part.host, part.len);
            } else if let Some(old) = cluster.host {
                batch.free(self.image, old, 1);
            }
        }
        Ok(())
    }

    fn has_raw_data_file(&self) -> bool {
        self.image.has_data_file() && self.image.header().data_file_raw()
    }
}

/// Fills a host cluster.
struct Fill<'a> {
    base: &'a Base<'a>,
    terms: Terms,
    cluster: &'a Cluster,
    needs: &'a [Need],
    host: HostOffset,
    /// The host cluster is new: it holds nothing of the cluster yet.
    is_new: bool,
    /// The host cluster reads as zeros until it is written.
    is_blank: bool,
}

impl Fill<'_> {
    /// Adds the operations for all units.
    fn units(&self, units: Units, ops: &mut Ops) -> Result<()> {
        for n in 0..self.cluster.units {
            let unit = self.terms.unit(self.cluster, n);
            match units.states.get(n) {
                SubclusterState::Allocated if self.is_new || units.written >> n & 1 == 1 => {
                    self.unit(n, unit, ops)?;
                }
                SubclusterState::Zero if self.base.has_raw_data_file() => {
                    // A raw data file must show the zeros even to a reader who does not look at the image.
                    ops.push(self.at(unit.start), unit.len.min(self.terms.rest(unit.start)), Origin::Zeros);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The host offset of a guest offset in the cluster.
    fn at(&self, guest: GuestOffset) -> HostOffset {
        self.host + (guest - self.cluster.start)
    }

    fn unit(&self, n: u32, unit: GuestRange, ops: &mut Ops) -> Result<()> {
        let mut done = unit.start;
        for need in self.needs.iter().filter_map(|need| need.clip(&unit)) {
            self.gap(n, GuestRange::between(done, need.range.start), ops)?;
            match need.origin {
                Origin::Zeros => self.zeros(need.range, ops),
                origin => ops.push(self.at(need.range.start), need.range.len, origin),
            }
            done = need.range.end();
        }
        self.gap(n, GuestRange::between(done, unit.end()), ops)
    }

    /// Adds the operations for a part of a unit that the merge does not change. Its old content is copied,
    /// unless it is at the right place already.
    fn gap(&self, n: u32, gap: GuestRange, ops: &mut Ops) -> Result<()> {
        let before = self.cluster.states.get(n);
        if gap.is_empty() || (!self.is_new && before == SubclusterState::Allocated) {
            return Ok(());
        }
        let (layer, inside) = (self.base.layer, gap.start - self.cluster.start);
        if let Some(part) = self.cluster.compressed {
            let part = CompressedPart { skip: inside, ..part };
            ops.push(self.at(gap.start), gap.len, Origin::Compressed { layer, part, guest: gap.start });
            return Ok(());
        }
        match (before, self.cluster.host) {
            (SubclusterState::Allocated, Some(old)) => {
                ops.push(self.at(gap.start), gap.len, Origin::Plain { layer, host: old + inside });
            }
            (SubclusterState::Unallocated, _) if self.terms.shows_below(gap) => {
                self.lower_layers(gap, ops)?
            }
            _ => self.zeros(gap, ops),
        }
        Ok(())
    }

    fn lower_layers(&self, gap: GuestRange, ops: &mut Ops) -> Result<()> {
        let Some(below) = self.base.below else { return Ok(()) };
        let mut supplied: Vec<Supplied> = Vec::new();
        below.resolve(gap, &mut supplied)?;
        let mut done = gap.start;
        for part in supplied {
            let guest = part.range.start;
            match part.supply {
                Supply::Layer { layer, mapping: Mapping::Data { host } } => {
                    ops.push(self.at(guest), part.range.len, Origin::Plain { layer, host });
                }
                Supply::Layer { layer, mapping: Mapping::Compressed(compressed) } => {
                    let origin = Origin::Compressed { layer, part: compressed, guest };
                    ops.push(self.at(guest), part.range.len, origin);
                }
                _ => self.zeros(part.range, ops),
            }
            done = part.range.end();
        }
        self.zeros(GuestRange::between(done, gap.end()), ops);
        Ok(())
    }

    /// Adds a write of zeros, unless the host cluster reads as zeros anyway.
    fn zeros(&self, range: GuestRange, ops: &mut Ops) {
        if !self.is_blank {
            ops.push(self.at(range.start), range.len, Origin::Zeros);
        }
    }
}

/// Encodes the states of a cluster's units in the simplest entry.
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
