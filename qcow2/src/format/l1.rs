//! L1 table entries (specification: "Cluster mapping").

use super::{FormatError, Geometry};
use crate::units::HostOffset;

const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;

/// An entry of the L1 table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum L1Entry {
    /// No L2 table: all its clusters are unallocated.
    Unallocated,
    /// An L2 table.
    Table {
        /// Where it lies.
        host: HostOffset,
        /// Whether its refcount is exactly one (only in the active L1 table).
        copied: bool,
    },
}

impl L1Entry {
    /// Decodes an entry that lies at host offset `at`.
    ///
    /// # Errors
    /// Reserved bits that are set, or a table offset that is not cluster-aligned.
    pub(crate) fn decode(raw: u64, geometry: &Geometry, at: u64) -> Result<Self, FormatError> {
        if raw & !(OFFSET_MASK | COPIED) != 0 {
            return Err(FormatError::malformed(
                "L1 entry",
                at,
                format!("{raw:#018x}"),
                "reserved bits that are zero",
            ));
        }
        let host = HostOffset::new(raw & OFFSET_MASK);
        if host == HostOffset::ZERO {
            return if raw == 0 {
                Ok(Self::Unallocated)
            } else {
                Err(FormatError::malformed(
                    "L1 entry",
                    at,
                    format!("{raw:#018x}"),
                    "an L2 table offset with the COPIED flag",
                ))
            };
        }
        if !host.is_aligned(geometry.cluster_size()) {
            return Err(FormatError::malformed(
                "L2 table offset in L1 entry",
                at,
                host,
                "a multiple of the cluster size",
            ));
        }
        Ok(Self::Table { host, copied: raw & COPIED != 0 })
    }

    /// The table that an entry refers to even if [`decode`](Self::decode) refuses it: reserved bits are
    /// ignored, and the offset may be unaligned. For checks.
    pub(crate) fn salvage(raw: u64) -> Option<HostOffset> {
        let host = raw & OFFSET_MASK;
        (host != 0).then_some(HostOffset::new(host))
    }

    /// The entry as it stands on disk.
    pub(crate) fn encode(self) -> u64 {
        match self {
            Self::Unallocated => 0,
            Self::Table { host, copied } => host.get() | if copied { COPIED } else { 0 },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_survive_a_round_trip() {
        let g = Geometry::new(16, 4, false).unwrap();
        for raw in [0, 0x30000, COPIED | 0x30000] {
            assert_eq!(L1Entry::decode(raw, &g, 0).unwrap().encode(), raw);
        }
    }

    #[test]
    fn reserved_bits_and_unaligned_offsets_are_errors() {
        let g = Geometry::new(16, 4, false).unwrap();
        for raw in [1, 1 << 56, COPIED, COPIED | 0x30200] {
            assert!(L1Entry::decode(raw, &g, 0).is_err(), "{raw:#x}");
        }
        assert_eq!(L1Entry::salvage(COPIED | 1 << 56 | 0x30200), Some(HostOffset::new(0x30200)));
        assert_eq!(L1Entry::salvage(COPIED | 1), None);
    }
}
