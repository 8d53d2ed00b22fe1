//! Newtypes for the two address spaces of an image, and ranges in them.
//!
//! *Guest* offsets are what the virtual machine sees; *host* offsets are positions in a file. Mixing
//! them up is the classic bug of a disk image engine, so they are types of their own. Images are
//! validated before use (every offset below 2^63), so sums saturate instead of wrapping: a sum that
//! saturates lies past the end of every file and is caught there.

use std::fmt;
use std::ops::{Add, Sub};

macro_rules! offset_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u64);

        impl $name {
            /// The offset zero.
            pub const ZERO: Self = Self(0);

            /// Wraps a byte offset.
            pub const fn new(bytes: u64) -> Self {
                Self(bytes)
            }

            /// The offset in bytes.
            pub const fn get(self) -> u64 {
                self.0
            }

            /// The sum, or `None` if it does not fit in 64 bits.
            pub fn checked_add(self, bytes: u64) -> Option<Self> {
                self.0.checked_add(bytes).map(Self)
            }

            /// The offset rounded down to a multiple of `align`, which must be a power of two.
            pub const fn align_down(self, align: u64) -> Self {
                Self(self.0 & !(align - 1))
            }

            /// The offset rounded up to a multiple of `align`, which must be a power of two.
            pub const fn align_up(self, align: u64) -> Self {
                Self(self.0.saturating_add(align - 1) & !(align - 1))
            }

            /// Whether the offset is a multiple of `align`, which must be a power of two.
            pub const fn is_aligned(self, align: u64) -> bool {
                self.0 & (align - 1) == 0
            }
        }

        impl Add<u64> for $name {
            type Output = Self;
            fn add(self, bytes: u64) -> Self {
                Self(self.0.saturating_add(bytes))
            }
        }

        impl Sub for $name {
            type Output = u64;
            /// The distance in bytes; zero if `other` lies behind.
            fn sub(self, other: Self) -> u64 {
                self.0.saturating_sub(other.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

offset_type! {
    /// An offset in the disk that the guest sees, in bytes.
    GuestOffset
}
offset_type! {
    /// An offset in an image file or its data file, in bytes.
    HostOffset
}

/// A range of the guest's disk: `start` and a length in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct GuestRange {
    /// The first byte.
    pub start: GuestOffset,
    /// The length in bytes.
    pub len: u64,
}

impl GuestRange {
    /// The range from `start` up to but not including `end`; empty if `end` lies before `start`.
    pub fn between(start: GuestOffset, end: GuestOffset) -> Self {
        Self { start, len: end - start }
    }

    /// The first offset behind the range.
    pub fn end(&self) -> GuestOffset {
        self.start + self.len
    }

    /// Whether the range holds no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The part that both ranges hold, or `None`.
    pub fn intersect(&self, other: &Self) -> Option<Self> {
        let both = Self::between(self.start.max(other.start), self.end().min(other.end()));
        (!both.is_empty()).then_some(both)
    }
}

impl fmt::Display for GuestRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alignment_rounds_both_ways() {
        let o = GuestOffset::new(0x1234);
        assert_eq!(o.align_down(0x1000).get(), 0x1000);
        assert_eq!(o.align_up(0x1000).get(), 0x2000);
        assert!(GuestOffset::new(0x2000).is_aligned(0x1000));
    }

    #[test]
    fn sums_saturate_and_differences_stop_at_zero() {
        assert_eq!((HostOffset::new(u64::MAX) + 5).get(), u64::MAX);
        assert_eq!(HostOffset::new(3) - HostOffset::new(5), 0);
    }

    #[test]
    fn ranges_intersect() {
        let a = GuestRange { start: GuestOffset::new(10), len: 10 };
        let b = GuestRange { start: GuestOffset::new(15), len: 10 };
        assert_eq!(a.intersect(&b), Some(GuestRange { start: GuestOffset::new(15), len: 5 }));
        let c = GuestRange { start: GuestOffset::new(20), len: 1 };
        assert_eq!(a.intersect(&c), None);
    }
}
