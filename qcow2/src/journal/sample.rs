//! Encodes and decodes samples of what an image holds when a merge into it is done.

use super::bytes::{ByteReader, ByteWriter};

/// A range of the guest's disk, and the checksum of what base shows there when the merge is done. Once layers
/// are empty, only base holds their data. Then samples tell whether the file is still that base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sample {
    /// Where the range begins on the guest's disk, in bytes.
    pub offset: u64,
    /// Its length in bytes; at most [`Sample::MOST`].
    pub len: u32,
    /// The CRC-32 of its bytes.
    pub crc: u32,
    /// Whether base held these bytes already when the work began. If not, base holds them behind the last
    /// barrier before the chain is changed.
    pub was_held: bool,
}

impl Sample {
    /// The longest range, in bytes.
    pub(crate) const MOST: u32 = 4096;

    pub(super) fn encode(&self, out: &mut ByteWriter) {
        out.u64(self.offset);
        out.u32(self.len);
        out.u32(self.crc);
        out.u8(self.was_held.into());
    }

    pub(super) fn decode(from: &mut ByteReader<'_>) -> Option<Self> {
        let (offset, len, crc, was_held) = (from.u64()?, from.u32()?, from.u32()?, from.flag()?);
        let fits = len <= Self::MOST && offset.checked_add(len.into()).is_some();
        fits.then_some(Self { offset, len, crc, was_held })
    }
}
