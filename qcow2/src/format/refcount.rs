//! Refcounts: the table, and the packed counters of a block (specification: "Refcount table").

use byteorder::{BigEndian, ByteOrder};

use super::{FormatError, Geometry};
use crate::units::HostOffset;

/// An entry of the refcount table: where a refcount block lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RefcountTableEntry(Option<HostOffset>);

impl RefcountTableEntry {
    /// No block: the refcounts that it would hold are all zero.
    pub(crate) const ABSENT: Self = Self(None);

    /// An entry that names the block at `block`; offset zero means none.
    pub(crate) fn new(block: HostOffset) -> Self {
        Self((block != HostOffset::ZERO).then_some(block))
    }

    /// Decodes an entry that lies at host offset `at`.
    ///
    /// # Errors
    /// Reserved bits that are set, an offset that is not cluster-aligned, or one past 2^63.
    pub(crate) fn decode(raw: u64, geometry: &Geometry, at: u64) -> Result<Self, FormatError> {
        let bad = |expected: &str| {
            Err(FormatError::malformed("refcount table entry", at, format!("{raw:#018x}"), expected))
        };
        if raw & 0x1ff != 0 {
            return bad("reserved bits that are zero");
        }
        let block = HostOffset::new(raw);
        if !block.is_aligned(geometry.cluster_size()) {
            return bad("a multiple of the cluster size");
        }
        if raw > i64::MAX as u64 - geometry.cluster_size() {
            return bad("an offset below 2^63");
        }
        Ok(Self::new(block))
    }

    /// The entry as it stands on disk.
    pub(crate) fn encode(self) -> u64 {
        self.0.map_or(0, HostOffset::get)
    }

    /// Where the block lies, if there is one.
    pub(crate) fn block(self) -> Option<HostOffset> {
        self.0
    }
}

/// The largest refcount that `2^order` bits hold; `order` is at most 6.
pub(crate) fn max_refcount(order: u32) -> u64 {
    u64::MAX >> (64 - (1u32 << order.min(6)))
}

/// Access to the packed refcounts of a block. Counters narrower than a byte start at its least
/// significant bit; wider ones are big-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RefcountWidth {
    order: u32,
}

impl RefcountWidth {
    /// Counters of `2^order` bits; `None` if `order` is above 6.
    #[cfg(test)]
    pub(crate) fn new(order: u32) -> Option<Self> {
        (order <= 6).then_some(Self { order })
    }

    /// The counters of an image.
    pub(crate) fn of(geometry: &Geometry) -> Self {
        Self { order: geometry.refcount_bits().trailing_zeros() }
    }

    /// The largest refcount that fits.
    pub(crate) fn max(self) -> u64 {
        max_refcount(self.order)
    }

    /// How many counters `block` holds.
    pub(crate) fn count(self, block: &[u8]) -> usize {
        if self.order < 3 { block.len() << (3 - self.order) } else { block.len() >> (self.order - 3) }
    }

    /// Counter `index` of `block`, or `None` behind its end.
    #[inline]
    pub(crate) fn get(self, block: &[u8], index: usize) -> Option<u64> {
        if self.order == 4 {
            // By far the most common width.
            let at = index.checked_mul(2)?;
            return Some(u64::from(BigEndian::read_u16(block.get(at..at.checked_add(2)?)?)));
        }
        if self.order < 3 {
            let byte = block.get(index >> (3 - self.order))?;
            let shift = (index << self.order) & 7;
            return Some(u64::from(byte >> shift) & self.max());
        }
        let size = 1usize << (self.order - 3);
        let at = index.checked_mul(size)?;
        Some(BigEndian::read_uint(block.get(at..at.checked_add(size)?)?, size))
    }

    /// Sets counter `index` of `block`; false, with nothing changed, if there is no such counter or
    /// `value` does not fit.
    #[must_use]
    pub(crate) fn set(self, block: &mut [u8], index: usize, value: u64) -> bool {
        self.try_set(block, index, value).is_some()
    }

    fn try_set(self, block: &mut [u8], index: usize, value: u64) -> Option<()> {
        if value > self.max() {
            return None;
        }
        if self.order < 3 {
            let byte = block.get_mut(index >> (3 - self.order))?;
            let shift = (index << self.order) & 7;
            // Both fit in a byte: the widest counter here has four bits.
            let mask = (self.max() as u8) << shift;
            *byte = *byte & !mask | (value as u8) << shift;
        } else {
            let size = 1usize << (self.order - 3);
            let at = index.checked_mul(size)?;
            BigEndian::write_uint(block.get_mut(at..at.checked_add(size)?)?, value, size);
        }
        Some(())
    }

    /// Sets the counters of `range` to `value`; false, with nothing changed, if the range leaves the
    /// block or `value` does not fit.
    #[must_use]
    pub(crate) fn fill(self, block: &mut [u8], range: std::ops::Range<usize>, value: u64) -> bool {
        if range.end > self.count(block) || range.start > range.end || value > self.max() {
            return false;
        }
        range.into_iter().all(|index| self.set(block, index, value))
    }

    /// Calls `visit` with the index and value of every counter of `block`, in order. The width is
    /// decided once, outside the loop: this is how to go through many blocks.
    pub(crate) fn for_each(self, block: &[u8], mut visit: impl FnMut(usize, u64)) {
        match self.order {
            0..3 => {
                let per_byte = 8usize >> self.order;
                for (n, &byte) in block.iter().enumerate() {
                    for i in 0..per_byte {
                        visit(n * per_byte + i, u64::from(byte >> (i << self.order)) & self.max());
                    }
                }
            }
            3 => block.iter().enumerate().for_each(|(i, &byte)| visit(i, u64::from(byte))),
            4 => {
                let words = block.chunks_exact(2).map(BigEndian::read_u16);
                words.enumerate().for_each(|(i, word)| visit(i, u64::from(word)));
            }
            5 => {
                let words = block.chunks_exact(4).map(BigEndian::read_u32);
                words.enumerate().for_each(|(i, word)| visit(i, u64::from(word)));
            }
            _ => {
                let words = block.chunks_exact(8).map(BigEndian::read_u64);
                words.enumerate().for_each(|(i, word)| visit(i, word));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_survives_a_round_trip() {
        for order in 0..=6 {
            let width = RefcountWidth::new(order).unwrap();
            let mut block = vec![0; 512];
            let count = width.count(&block);
            assert_eq!(count, 4096 >> order);
            let value = |i: usize| (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) & width.max();
            for i in 0..count {
                assert!(width.set(&mut block, i, value(i)));
            }
            for i in 0..count {
                assert_eq!(width.get(&block, i), Some(value(i)), "order {order} index {i}");
            }
            let mut seen = 0;
            width.for_each(&block, |i, v| {
                assert_eq!((i, v), (seen, value(seen)), "order {order}");
                seen += 1;
            });
            assert_eq!(seen, count);
            assert_eq!(width.get(&block, count), None);
            assert!(!width.set(&mut block, count, 0));
            assert_eq!(width.get(&block, usize::MAX), None);
        }
        assert_eq!(RefcountWidth::new(7), None);
    }

    #[test]
    fn narrow_counters_start_at_the_least_significant_bit() {
        let mut block = vec![0; 2];
        assert!(RefcountWidth::new(0).unwrap().set(&mut block, 0, 1));
        assert!(RefcountWidth::new(0).unwrap().set(&mut block, 9, 1));
        assert_eq!(block, [1, 2]);
        assert!(RefcountWidth::new(2).unwrap().set(&mut block, 1, 0xf));
        assert_eq!(block, [0xf1, 2]);
        assert!(RefcountWidth::new(4).unwrap().set(&mut block, 0, 0x1234));
        assert_eq!(block, [0x12, 0x34]);
    }

    #[test]
    fn values_that_do_not_fit_change_nothing() {
        for order in 0..6 {
            let width = RefcountWidth::new(order).unwrap();
            let mut block = vec![0xa5; 64];
            assert!(!width.set(&mut block, 1, width.max() + 1));
            assert!(!width.fill(&mut block, 0..2, width.max() + 1));
            assert_eq!(block, [0xa5; 64]);
            assert!(width.set(&mut block, 1, width.max()));
        }
        assert_eq!(max_refcount(0), 1);
        assert_eq!(max_refcount(4), 0xffff);
        assert_eq!(max_refcount(6), u64::MAX);
    }

    #[test]
    fn a_fill_touches_its_range_only() {
        for order in 0..=6 {
            let width = RefcountWidth::new(order).unwrap();
            let mut block = vec![0; 64];
            let count = width.count(&block);
            assert!(width.fill(&mut block, 3..count - 1, 1));
            for i in 0..count {
                assert_eq!(width.get(&block, i), Some(u64::from((3..count - 1).contains(&i))));
            }
            assert!(!width.fill(&mut block, 0..count + 1, 0));
            assert_eq!(width.get(&block, 3), Some(1));
        }
    }

    #[test]
    fn table_entries_are_checked() {
        let g = Geometry::new(16, 4, false).unwrap();
        let entry = RefcountTableEntry::decode(0x20000, &g, 0).unwrap();
        assert_eq!(entry.block(), Some(HostOffset::new(0x20000)));
        assert_eq!(entry.encode(), 0x20000);
        assert_eq!(RefcountTableEntry::decode(0, &g, 0).unwrap(), RefcountTableEntry::ABSENT);
        for raw in [1, 0x100, 0x20200, 1 << 63, (1 << 63) - (1 << 16) + (1 << 63)] {
            assert!(RefcountTableEntry::decode(raw, &g, 0).is_err(), "{raw:#x}");
        }
    }
}
