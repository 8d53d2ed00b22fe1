//! Changes one cluster of a qcow2 base so that it holds what it must.
//!
//! This takes two steps. [`decide`](decide::decide) finds the outcome for the cluster, from its entry and its
//! needs alone; it does nothing. `emit` turns the outcome into operations on the data and changes of the
//! metadata. `whole` does the same for clusters that come whole from one place, for all of a batch at once.

mod decide;
mod emit;
mod whole;

use self::decide::{Cluster, Terms, decide};
pub(crate) use self::whole::WholeClusters;
use super::needs::Need;
use super::ops::Ops;
use crate::chain::view::View;
use crate::error::Result;
use crate::image::Qcow2;
use crate::image::edits::{Batch, ClusterSource};
use crate::units::GuestOffset;

/// The base, with what both steps need to know about it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Base<'a> {
    /// The base.
    pub(crate) image: &'a Qcow2,
    /// Its position in the chain.
    pub(crate) layer: usize,
    /// The layers below it, if there are any.
    pub(crate) below: Option<View<'a>>,
    /// The size of the disk below it, in bytes: the larger of before the merge and after it.
    pub(crate) below_size: u64,
    /// The size of the disk when the merge is done, in bytes.
    pub(crate) size: u64,
    /// Clusters of the image file from here on read as zeros until they are written.
    pub(crate) blank_from: u64,
}

/// How much of the guest's disk a merge changes, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Effect {
    /// Bytes that come from the layers.
    pub(crate) copied: u64,
    /// Bytes that become zeros.
    pub(crate) zeroed: u64,
}

impl Base<'_> {
    /// Adds what the cluster at `start` needs to a batch: data operations to `ops`, changes of the metadata to
    /// `batch`. `needs` must be sorted, disjoint, and inside the cluster. A cluster that comes whole from one place
    /// is kept in `whole`, until that is placed.
    ///
    /// # Errors
    /// A table that cannot be read or is damaged; no free cluster.
    pub(crate) fn take(
        &self,
        start: GuestOffset,
        needs: &[Need],
        whole: &mut WholeClusters,
        batch: &mut Batch,
        ops: &mut Ops,
        source: &mut dyn ClusterSource,
    ) -> Result<Effect> {
        let terms = self.terms();
        let cluster = Cluster::new(start, batch.entry(self.image, start)?, terms.units);
        let (outcome, effect) = decide(&cluster, needs, &terms);
        if !whole.keep(self, &cluster, needs, outcome) {
            self.emit(&cluster, needs, outcome, batch, ops, source)?;
        }
        Ok(effect)
    }

    fn terms(&self) -> Terms {
        let geometry = self.image.geometry();
        Terms {
            units: if geometry.extended_l2() { 32 } else { 1 },
            unit_size: geometry.subcluster_size(),
            has_zero_clusters: self.image.header().version >= 3,
            has_data_file: self.image.has_data_file(),
            below: self.below_size,
            size: self.size,
        }
    }
}
