//! How an image divides its address spaces.

use crate::units::GuestOffset;

/// Sizes that follow from a validated header. Every value is small enough that no shift overflows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    cluster_bits: u32,
    refcount_order: u32,
    extended_l2: bool,
}

/// How many subclusters a cluster has in an image with extended L2 entries.
const SUBCLUSTERS: u64 = 32;

impl Geometry {
    /// The geometry of an image; `None` unless 9 <= `cluster_bits` <= 21 (14 and more with extended
    /// L2 entries, so that a subcluster has 512 bytes) and `refcount_order` <= 6.
    pub(crate) fn new(cluster_bits: u32, refcount_order: u32, extended_l2: bool) -> Option<Self> {
        let least = if extended_l2 { 14 } else { 9 };
        ((least..=21).contains(&cluster_bits) && refcount_order <= 6).then_some(Self {
            cluster_bits,
            refcount_order,
            extended_l2,
        })
    }

    /// The base-2 logarithm of the cluster size.
    pub fn cluster_bits(&self) -> u32 {
        self.cluster_bits
    }

    /// The size of a cluster in bytes.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Whether L2 entries have 128 bits and describe 32 subclusters each.
    pub fn extended_l2(&self) -> bool {
        self.extended_l2
    }

    /// The granularity of allocation: a subcluster, or a cluster where there are none, in bytes.
    pub(crate) fn subcluster_size(&self) -> u64 {
        if self.extended_l2 { self.cluster_size() / SUBCLUSTERS } else { self.cluster_size() }
    }

    /// The size of an L2 entry in bytes: 8, or 16 with extended L2 entries.
    pub(crate) fn l2_entry_size(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// The number of entries of an L2 table.
    pub(crate) fn l2_entries(&self) -> u64 {
        self.cluster_size() / self.l2_entry_size()
    }

    /// The guest bytes that an L2 table covers.
    pub(crate) fn l2_coverage(&self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    /// The L1 entry that covers a guest offset.
    pub(crate) fn l1_index(&self, guest: GuestOffset) -> u64 {
        guest.get() / self.l2_coverage()
    }

    /// The entry for a guest offset in its L2 table.
    pub(crate) fn l2_index(&self, guest: GuestOffset) -> u64 {
        (guest.get() >> self.cluster_bits) & (self.l2_entries() - 1)
    }

    /// The offset inside the cluster that holds a guest offset, in bytes.
    pub(crate) fn in_cluster(&self, guest: GuestOffset) -> u64 {
        guest.get() & (self.cluster_size() - 1)
    }

    /// The L1 entries that a disk of `size` bytes needs.
    pub(crate) fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(self.l2_coverage())
    }

    /// The clusters that `bytes` bytes need.
    pub(crate) fn clusters_for(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }

    /// The width of a refcount in bits: 1, 2, 4, 8, 16, 32 or 64.
    pub fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    /// The refcounts that a refcount block (one cluster) holds.
    pub(crate) fn refcounts_per_block(&self) -> u64 {
        (self.cluster_size() * 8) >> self.refcount_order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_of_qemu_img() {
        let g = Geometry::new(16, 4, false).unwrap();
        assert_eq!(g.cluster_size(), 65536);
        assert_eq!(g.l2_entries(), 8192);
        assert_eq!(g.l2_coverage(), 512 << 20);
        assert_eq!(g.refcounts_per_block(), 32768);
        assert_eq!(g.l1_entries_for((512 << 20) + 1), 2);
    }

    #[test]
    fn extended_l2_halves_the_entries() {
        let g = Geometry::new(16, 4, true).unwrap();
        assert_eq!(g.l2_entries(), 4096);
        assert_eq!(g.subcluster_size(), 2048);
        assert_eq!(g.l2_index(GuestOffset::new(256 << 20)), 0);
        assert_eq!(g.l1_index(GuestOffset::new(256 << 20)), 1);
    }

    #[test]
    fn sizes_out_of_range_are_refused() {
        for (bits, order, ext) in
            [(8, 4, false), (22, 4, false), (13, 4, true), (16, 7, false), (64, 4, false)]
        {
            assert_eq!(Geometry::new(bits, order, ext), None, "{bits} {order} {ext}");
        }
    }
}
