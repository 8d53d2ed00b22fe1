//! Clusters that a base takes whole, each from one place of one layer: they get their new clusters in the order in which
//! they lie in the source.
//!
//! What lies together in a layer's file then lies together in base. A guest writes its disk in one order and its clusters
//! are allocated in another, so the clusters of a layer are shuffled. In the order of the guest each would be a copy of its
//! own; in the order of the source they are a few long ones, which the kernel copies, or shares, at once.

use super::Base;
use super::decide::{Cluster, ClusterOutcome};
use crate::error::Result;
use crate::format::L2Entry;
use crate::image::edits::{Batch, ClusterSource};
use crate::transfer::needs::Need;
use crate::transfer::ops::Ops;
use crate::transfer::origin::Origin;
use crate::units::{GuestOffset, HostOffset};

/// A cluster of base that holds nothing yet, and where all of it comes from.
#[derive(Clone, Copy, Debug)]
struct WholeCluster {
    start: GuestOffset,
    layer: usize,
    host: HostOffset,
}

/// The whole clusters of a batch.
#[derive(Debug, Default)]
pub(crate) struct WholeClusters {
    list: Vec<WholeCluster>,
    bytes: u64,
    /// The L2 tables that their entries are in.
    tables: usize,
    last_table: Option<u64>,
}

impl WholeClusters {
    /// Keeps a cluster back if it is taken whole, and says whether it is.
    pub(super) fn keep(
        &mut self,
        base: &Base<'_>,
        cluster: &Cluster,
        needs: &[Need],
        outcome: ClusterOutcome,
    ) -> bool {
        let geometry = base.image.geometry();
        let (ClusterOutcome::Moved(_), [need]) = (outcome, needs) else { return false };
        let Origin::Plain { layer, host } = need.origin else { return false };
        if need.range.len != geometry.cluster_size() || cluster.host.is_some() || cluster.compressed.is_some()
        {
            return false;
        }
        self.list.push(WholeCluster { start: cluster.start, layer, host });
        self.bytes += need.range.len;
        let table = Some(geometry.l1_index(cluster.start));
        self.tables += usize::from(table != self.last_table);
        self.last_table = table;
        true
    }

    /// How many clusters there are.
    pub(crate) fn len(&self) -> usize {
        self.list.len()
    }

    /// The bytes of all of them.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many L2 tables get an entry.
    pub(crate) fn tables(&self) -> usize {
        self.tables
    }

    /// Brings all of them into the batch: new clusters in the order of the source, then the entries in the order of the
    /// guest, whose L2 tables are new as well.
    ///
    /// # Errors
    /// A table that cannot be read; no free cluster.
    pub(crate) fn place(
        &mut self,
        base: &Base<'_>,
        batch: &mut Batch,
        ops: &mut Ops,
        source: &mut dyn ClusterSource,
    ) -> Result<()> {
        let Self { mut list, .. } = std::mem::take(self);
        let geometry = base.image.geometry();
        list.sort_unstable_by_key(|cluster| (cluster.layer, cluster.host));
        for cluster in &mut list {
            let host = HostOffset::new(batch.allocate(source)? << geometry.cluster_bits());
            let origin = Origin::Plain { layer: cluster.layer, host: cluster.host };
            ops.push(host, geometry.cluster_size(), origin);
            cluster.host = host;
        }
        list.sort_unstable_by_key(|cluster| cluster.start);
        for cluster in list {
            let entry = L2Entry::Standard { host: cluster.host, copied: true };
            batch.set(base.image, cluster.start, entry, source)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use crate::image::{CreateOptions, create};
    use crate::merge::{Commit, CommitOptions};
    use crate::storage::MemHost;
    use crate::testing::{Silent, local};
    use crate::transfer::put;
    use crate::units::GuestOffset;

    const CLUSTER: u64 = 64 << 10;
    /// The order in which the guest has written its clusters.
    const WRITTEN: [u64; 6] = [40, 7, 90, 8, 1, 61];

    #[test]
    fn base_has_clusters_in_the_order_in_which_the_guest_wrote_them() {
        let host = MemHost::new();
        let make = |path: &str, backing| {
            create(&host, Path::new(path), &CreateOptions { backing, ..CreateOptions::new(100 * CLUSTER) })
                .unwrap();
        };
        make("/base", None);
        make("/top", Some((b"/base".to_vec(), "qcow2".to_owned())));
        for cluster in WRITTEN {
            let bytes = vec![cluster as u8; CLUSTER as usize];
            put(&host, Path::new("/top"), &local(), &[(GuestOffset::new(cluster * CLUSTER), bytes)]).unwrap();
        }
        let never = AtomicBool::new(false);
        let options = CommitOptions { open: local(), verify: true, ..CommitOptions::default() };
        let commit = Commit::prepare(Arc::new(host.clone()), Path::new("/top"), &options, &never).unwrap();
        commit.execute(&Silent, &never).unwrap();

        let base = host.content("/base").unwrap();
        let order: Vec<u64> = base
            .chunks(CLUSTER as usize)
            .filter(|cluster| cluster.iter().all(|&byte| byte == cluster[0] && byte > 0))
            .map(|cluster| u64::from(cluster[0]))
            .collect();
        assert_eq!(order, WRITTEN);
    }
}
