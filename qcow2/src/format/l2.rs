//! L2 table entries, standard, compressed and extended (specification: "Cluster mapping",
//! "Extended L2 Entries"). This is the only place that knows their bits.

use super::{FormatError, Geometry};
use crate::units::HostOffset;

const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const RESERVED: u64 = 0x3f00_0000_0000_01fe;
const ZERO: u64 = 1;
const COMPRESSED: u64 = 1 << 62;
const COPIED: u64 = 1 << 63;

/// What an L2 entry says about its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum L2Entry {
    /// The cluster is not in this image: what lies below shows.
    Unallocated,
    /// The cluster reads as zeros.
    Zero {
        /// A host cluster that is kept for it (its content means nothing).
        host: Option<HostOffset>,
        /// Whether the refcount of that host cluster is exactly one.
        copied: bool,
    },
    /// The cluster's data lies at a host offset.
    Standard {
        /// Where the data lies (in the data file, if the image has one; there it may be zero).
        host: HostOffset,
        /// Whether the refcount of the host cluster is exactly one.
        copied: bool,
    },
    /// The cluster's data lies compressed at any byte of the file.
    Compressed {
        /// The first byte.
        host: HostOffset,
        /// The most bytes that it takes; the stream may end earlier, and the file too.
        len: u64,
    },
    /// A mixture: each subcluster is allocated, zero, or not in this image.
    Mixed {
        /// The host cluster, if there is one.
        host: Option<HostOffset>,
        /// Whether the refcount of the host cluster is exactly one.
        copied: bool,
        /// The state of each subcluster.
        subclusters: Subclusters,
    },
}

/// The states of a cluster's 32 subclusters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Subclusters {
    /// Bit n: the data of subcluster n lies in the host cluster.
    pub allocated: u32,
    /// Bit n: subcluster n reads as zeros.
    pub zero: u32,
}

/// The state of one subcluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SubclusterState {
    /// Not in this image.
    Unallocated,
    /// Reads as zeros.
    Zero,
    /// Its data lies in the host cluster.
    Allocated,
}

impl Subclusters {
    /// The state of subcluster `n` (0 to 31).
    pub(crate) fn get(&self, n: u32) -> SubclusterState {
        match (self.allocated >> n & 1, self.zero >> n & 1) {
            (1, _) => SubclusterState::Allocated,
            (_, 1) => SubclusterState::Zero,
            _ => SubclusterState::Unallocated,
        }
    }
}

impl L2Entry {
    /// Decodes an entry that lies at host offset `at`; `second` is the bitmap of an extended entry
    /// (zero otherwise). `version` is the header's; `data_file` says whether data lies in an external
    /// data file, where host offset zero is a valid place.
    ///
    /// # Errors
    /// Reserved bits, unaligned offsets, a zero flag in version 2, and the combinations that the
    /// specification forbids.
    pub(crate) fn decode(
        first: u64,
        second: u64,
        geometry: &Geometry,
        version: u32,
        data_file: bool,
        at: u64,
    ) -> Result<Self, FormatError> {
        let bad =
            |found: String, expected: &str| Err(FormatError::malformed("L2 entry", at, found, expected));
        // Compressed comes first: bit 0 belongs to its offset.
        if first & COMPRESSED != 0 {
            if first & COPIED != 0 {
                return bad(format!("{first:#018x}"), "a compressed cluster without the COPIED flag");
            }
            if second != 0 {
                return bad(
                    format!("subcluster bitmap {second:#018x}"),
                    "no bitmap beside a compressed cluster",
                );
            }
            if data_file {
                return bad(format!("{first:#018x}"), "no compressed cluster in an image with a data file");
            }
            let entry = Self::decode_compressed(first, geometry);
            if let Self::Compressed { host, .. } = entry
                && host.get() > OFFSET_MASK | 0x1ff
            {
                return bad(format!("{first:#018x}"), "an offset of 56 bits");
            }
            return Ok(entry);
        }
        let extended = geometry.extended_l2();
        if first & RESERVED != 0 || (extended && first & ZERO != 0) {
            return bad(format!("{first:#018x}"), "reserved bits that are zero");
        }
        let zero = first & ZERO != 0;
        if zero && version < 3 {
            return bad(format!("{first:#018x}"), "no zero flag in a version 2 image");
        }
        let copied = first & COPIED != 0;
        let offset = HostOffset::new(first & OFFSET_MASK);
        if !offset.is_aligned(geometry.cluster_size()) {
            return bad(format!("host offset {offset}"), "a multiple of the cluster size");
        }
        if offset == HostOffset::ZERO && copied && !data_file {
            return bad(format!("{first:#018x}"), "a host offset with the COPIED flag");
        }
        // A zero cluster at offset 0 keeps nothing, in a data file too; only data there needs the flag.
        let host = (offset != HostOffset::ZERO || (data_file && copied && !zero)).then_some(offset);
        if !extended {
            return Ok(match host {
                host if zero => Self::Zero { host, copied },
                Some(host) => Self::Standard { host, copied },
                None => Self::Unallocated,
            });
        }
        let subclusters = Subclusters { allocated: second as u32, zero: (second >> 32) as u32 };
        if subclusters.allocated & subclusters.zero != 0 {
            return bad(
                format!("subcluster bitmap {second:#018x}"),
                "no subcluster that is both allocated and zero",
            );
        }
        if subclusters.allocated != 0 && host.is_none() {
            return bad(
                format!("subcluster bitmap {second:#018x}"),
                "a host offset for allocated subclusters",
            );
        }
        Ok(match (subclusters, host) {
            (Subclusters { allocated: u32::MAX, .. }, Some(host)) => Self::Standard { host, copied },
            (Subclusters { zero: u32::MAX, .. }, host) => Self::Zero { host, copied },
            (Subclusters { allocated: 0, zero: 0 }, None) => Self::Unallocated,
            _ => Self::Mixed { host, copied, subclusters },
        })
    }

    /// The first word of an entry without its host offset, if that is the only thing wrong with it: it is not aligned,
    /// and no data lies there. What the guest reads follows from the flags alone. `None` for any other entry.
    pub(crate) fn without_stray_host(
        first: u64,
        second: u64,
        geometry: &Geometry,
        version: u32,
    ) -> Option<u64> {
        if first & (COMPRESSED | RESERVED) != 0 {
            return None;
        }
        let flag = first & ZERO;
        let holds_nothing =
            if geometry.extended_l2() { flag == 0 && second as u32 == 0 } else { flag != 0 && version >= 3 };
        let is_stray = !HostOffset::new(first & OFFSET_MASK).is_aligned(geometry.cluster_size());
        (holds_nothing && is_stray).then_some(flag)
    }

    /// What an entry that [`decode`](Self::decode) refuses still refers to, as QEMU reads it: reserved
    /// bits, forbidden flags and the bitmap are ignored, and the offset may be unaligned. For checks:
    /// the clusters of a damaged entry are in use.
    pub(crate) fn salvage(first: u64, geometry: &Geometry, data_file: bool) -> Self {
        if first & COMPRESSED != 0 {
            return Self::decode_compressed(first, geometry);
        }
        let copied = first & COPIED != 0;
        let host = HostOffset::new(first & OFFSET_MASK);
        if host == HostOffset::ZERO && !(data_file && copied) {
            return Self::Unallocated;
        }
        Self::Standard { host, copied }
    }

    /// Whether an entry has the COPIED flag and nothing else. It is not valid, and QEMU reads it as unallocated.
    pub(crate) fn is_bare_flag(first: u64) -> bool {
        first == COPIED
    }

    /// The host offset and the COPIED flag of an entry that holds nothing but these and an aligned
    /// offset other than zero: a standard cluster, valid in every version. A quick test for
    /// whoever reads many entries; those of a contiguous run differ by the cluster size.
    #[inline]
    pub(crate) fn plain(first: u64, geometry: &Geometry) -> Option<(HostOffset, bool)> {
        let aligned = OFFSET_MASK & !(geometry.cluster_size() - 1);
        let host = first & aligned;
        (first & !(aligned | COPIED) == 0 && host != 0)
            .then_some((HostOffset::new(host), first & COPIED != 0))
    }

    fn decode_compressed(first: u64, geometry: &Geometry) -> Self {
        let offset_bits = 62 - (geometry.cluster_bits() - 8);
        // With small clusters the field is wider than the 56 bits that an offset may have.
        let offset = first & ((1 << offset_bits) - 1);
        let sectors = (first & (COMPRESSED - 1)) >> offset_bits;
        Self::Compressed { host: HostOffset::new(offset), len: (sectors + 1) * 512 - (offset & 511) }
    }

    /// The two words of the entry as they stand on disk; the second is meaningful only with extended
    /// L2 entries. A `Compressed` entry is encoded with the number of sectors that its length needs.
    pub(crate) fn encode(self, geometry: &Geometry) -> (u64, u64) {
        let flag = |copied: bool| if copied { COPIED } else { 0 };
        let extended = geometry.extended_l2();
        match self {
            Self::Unallocated => (0, 0),
            Self::Zero { host, copied } => {
                let offset = host.map_or(0, HostOffset::get) | flag(copied);
                if extended { (offset, u64::from(u32::MAX) << 32) } else { (offset | ZERO, 0) }
            }
            Self::Standard { host, copied } => {
                (host.get() | flag(copied), if extended { u64::from(u32::MAX) } else { 0 })
            }
            Self::Compressed { host, len } => {
                let offset_bits = 62 - (geometry.cluster_bits() - 8);
                let sectors = ((host.get() & 511) + len).div_ceil(512).saturating_sub(1);
                (COMPRESSED | host.get() | sectors << offset_bits, 0)
            }
            Self::Mixed { host, copied, subclusters } => (
                host.map_or(0, HostOffset::get) | flag(copied),
                u64::from(subclusters.allocated) | u64::from(subclusters.zero) << 32,
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(first: u64, second: u64, g: &Geometry) -> Result<L2Entry, FormatError> {
        L2Entry::decode(first, second, g, 3, false, 0)
    }

    #[test]
    fn standard_entries_survive_a_round_trip() {
        let g = Geometry::new(16, 4, false).unwrap();
        for raw in [0, 1, 0x50000, 0x50001, COPIED | 0x50000, COPIED | 0x50001] {
            assert_eq!(decode(raw, 0, &g).unwrap().encode(&g), (raw, 0), "{raw:#x}");
        }
    }

    #[test]
    fn extended_entries_survive_a_round_trip() {
        let g = Geometry::new(16, 4, true).unwrap();
        for (first, second) in [
            (0, 0),
            (0x50000, 0),
            (COPIED | 0x50000, 0xffff_ffff),
            (COPIED | 0x50000, 0xffff_0000_0000_ffff),
            (0, 0xffff_ffff_0000_0000),
            (0, 1 << 40),
        ] {
            assert_eq!(
                decode(first, second, &g).unwrap().encode(&g),
                (first, second),
                "{first:#x} {second:#x}"
            );
        }
    }

    #[test]
    fn compressed_is_tested_before_the_zero_flag() {
        let g = Geometry::new(16, 4, false).unwrap();
        let entry = decode(COMPRESSED | 0x5_0001, 0, &g).unwrap();
        assert_eq!(entry, L2Entry::Compressed { host: HostOffset::new(0x5_0001), len: 511 });
        assert_eq!(entry.encode(&g).0, COMPRESSED | 0x5_0001);
    }

    #[test]
    fn compressed_lengths_at_every_cluster_size() {
        for bits in 9..=21 {
            let g = Geometry::new(bits, 4, false).unwrap();
            let entry = L2Entry::Compressed { host: HostOffset::new(0x12345), len: g.cluster_size() - 1 };
            let (first, _) = entry.encode(&g);
            let L2Entry::Compressed { host, len } = decode(first, 0, &g).unwrap() else { panic!("{bits}") };
            assert_eq!(host.get(), 0x12345, "{bits}");
            assert!(len >= g.cluster_size() - 1 && len < g.cluster_size() + 1024, "{bits}: {len}");
        }
    }

    #[test]
    fn compressed_offsets_have_56_bits() {
        let g = Geometry::new(9, 4, false).unwrap();
        assert!(decode(COMPRESSED | 1 << 55, 0, &g).is_ok());
        for bit in 56..61 {
            assert!(decode(COMPRESSED | 1 << bit | 0x50000, 0, &g).is_err(), "{bit}");
            let host = HostOffset::new(1 << bit);
            let salvaged = L2Entry::salvage(COMPRESSED | 1 << bit, &g, false);
            assert_eq!(salvaged, L2Entry::Compressed { host, len: 512 }, "{bit}");
        }
    }

    #[test]
    fn forbidden_combinations_are_errors() {
        let g = Geometry::new(16, 4, false).unwrap();
        let e = Geometry::new(16, 4, true).unwrap();
        for (raw, second, geometry) in [
            (2, 0, &g),                             // reserved bit
            (1 << 61, 0, &g),                       // reserved bit
            (COPIED | 0x50200, 0, &g),              // unaligned
            (COPIED, 0, &g),                        // offset 0 without a data file
            (COPIED | COMPRESSED | 0x50000, 0, &g), // COPIED on compressed
            (0x50000, 1 | 1 << 32, &e),             // allocated and zero
            (0, 1, &e),                             // allocated without host
            (COMPRESSED | 0x50000, 1, &e),          // bitmap beside compressed
            (0x50001, 0, &e),                       // bit 0 is reserved
        ] {
            assert!(decode(raw, second, geometry).is_err(), "{raw:#x} {second:#x}");
        }
        assert!(L2Entry::decode(1, 0, &g, 2, false, 0).is_err(), "zero flag in version 2");
    }

    #[test]
    fn refused_entries_are_salvaged() {
        let g = Geometry::new(16, 4, false).unwrap();
        let standard = |host, copied| L2Entry::Standard { host: HostOffset::new(host), copied };
        for (raw, expected) in [
            (2 | 0x50000, standard(0x50000, false)),
            (COPIED | 1 << 61 | 0x50200, standard(0x50200, true)),
            (COPIED, L2Entry::Unallocated),
            (COPIED | COMPRESSED | 0x50000, L2Entry::Compressed { host: HostOffset::new(0x50000), len: 512 }),
        ] {
            assert!(decode(raw, 0, &g).is_err(), "{raw:#x}");
            assert_eq!(L2Entry::salvage(raw, &g, false), expected, "{raw:#x}");
        }
        assert_eq!(L2Entry::salvage(COPIED | 2, &g, true), standard(0, true));
    }

    #[test]
    fn plain_entries_are_what_decode_calls_standard() {
        for bits in [9, 16, 21] {
            let g = Geometry::new(bits, 4, false).unwrap();
            for n in 0..64 {
                for raw in [1u64 << n, COPIED | 1 << n, 3 << n, COPIED | 0x7e_0000_0000 | 1 << n] {
                    let expected = match L2Entry::decode(raw, 0, &g, 2, false, 0) {
                        Ok(L2Entry::Standard { host, copied }) => Some((host, copied)),
                        _ => None,
                    };
                    assert_eq!(L2Entry::plain(raw, &g), expected, "{bits} {raw:#x}");
                }
            }
        }
    }

    #[test]
    fn offset_zero_is_valid_in_a_data_file() {
        let g = Geometry::new(16, 4, false).unwrap();
        let entry = L2Entry::decode(COPIED, 0, &g, 3, true, 0).unwrap();
        assert_eq!(entry, L2Entry::Standard { host: HostOffset::ZERO, copied: true });
        let entry = L2Entry::decode(COPIED | ZERO, 0, &g, 3, true, 0).unwrap();
        assert!(matches!(entry, L2Entry::Zero { host: None, .. }), "{entry:?}");
    }
}
