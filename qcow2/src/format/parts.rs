//! Parts of the header that are written by themselves, as ranges of its bytes.

use std::ops::Range;

use super::header::at;

/// The size of the guest's disk.
pub(crate) const SIZE: Range<usize> = at::SIZE..at::CRYPT_METHOD;
/// The L1 table: how many entries it has, and where it lies.
pub(crate) const L1: Range<usize> = at::L1_ENTRIES..at::REFCOUNT_TABLE_OFFSET;
/// Where the L1 table lies.
pub(crate) const L1_OFFSET: Range<usize> = at::L1_OFFSET..at::REFCOUNT_TABLE_OFFSET;
/// The refcount table: where it lies, and how many clusters it has.
pub(crate) const REFCOUNT_TABLE: Range<usize> = at::REFCOUNT_TABLE_OFFSET..at::SNAPSHOTS;
/// All feature bits.
pub(crate) const FEATURES: Range<usize> = at::INCOMPATIBLE..at::REFCOUNT_ORDER;
/// The incompatible and the compatible feature bits.
pub(crate) const LASTING_FEATURES: Range<usize> = at::INCOMPATIBLE..at::AUTOCLEAR;
/// The incompatible feature bits.
pub(crate) const INCOMPATIBLE: Range<usize> = at::INCOMPATIBLE..at::COMPATIBLE;
/// The autoclear feature bits.
pub(crate) const AUTOCLEAR: Range<usize> = at::AUTOCLEAR..at::REFCOUNT_ORDER;
/// From the size to the autoclear feature bits: one write for both.
pub(crate) const SIZE_TO_AUTOCLEAR: Range<usize> = at::SIZE..at::REFCOUNT_ORDER;
/// The byte that holds the incompatible feature bits dirty (1) and corrupt (2).
pub(crate) const DIRTY_AND_CORRUPT: usize = at::COMPATIBLE - 1;
