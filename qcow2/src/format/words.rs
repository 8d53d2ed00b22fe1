//! Big-endian integers in byte slices, without a way to panic.

use byteorder::{BigEndian, ByteOrder};

/// The `u16` at `at`; zero if it does not lie wholly in `bytes`.
pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    field(bytes, at, 2).map_or(0, BigEndian::read_u16)
}

/// The `u32` at `at`; zero if it does not lie wholly in `bytes`.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    field(bytes, at, 4).map_or(0, BigEndian::read_u32)
}

/// The `u64` at `at`; zero if it does not lie wholly in `bytes`.
pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    field(bytes, at, 8).map_or(0, BigEndian::read_u64)
}

/// The `len` bytes from `at`, if `bytes` holds them all.
pub(super) fn field(bytes: &[u8], at: usize, len: usize) -> Option<&[u8]> {
    bytes.get(at..at.checked_add(len)?)
}

/// Appends integers in big-endian order.
pub(super) trait PutWords {
    fn put_u16(&mut self, value: u16);
    fn put_u32(&mut self, value: u32);
    fn put_u64(&mut self, value: u64);
    /// Appends zeros up to a multiple of `align` bytes.
    fn pad_to(&mut self, align: usize);
}

impl PutWords for Vec<u8> {
    fn put_u16(&mut self, value: u16) {
        self.extend_from_slice(&value.to_be_bytes());
    }

    fn put_u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_be_bytes());
    }

    fn put_u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_be_bytes());
    }

    fn pad_to(&mut self, align: usize) {
        self.resize(self.len().next_multiple_of(align), 0);
    }
}

/// The big-endian `u64` words of a table (L1, L2, refcount or bitmap table), in order; a last partial
/// word is left out.
pub(crate) fn read_be_u64s(bytes: &[u8]) -> impl ExactSizeIterator<Item = u64> + '_ {
    bytes.chunks_exact(8).map(BigEndian::read_u64)
}

/// The words as they stand on disk.
pub(crate) fn write_be_u64s(words: impl IntoIterator<Item = u64>) -> Vec<u8> {
    words.into_iter().flat_map(u64::to_be_bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_outside_read_as_zero() {
        let bytes = [1, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!(u16_at(&bytes, 6), 0x0708);
        assert_eq!(u32_at(&bytes, 4), 0x0506_0708);
        assert_eq!(u64_at(&bytes, 0), 0x0102_0304_0506_0708);
        assert_eq!(u32_at(&bytes, 5), 0);
        assert_eq!(u64_at(&bytes, usize::MAX), 0);
    }

    #[test]
    fn tables_survive_a_round_trip() {
        let words = [0, 1, u64::MAX, 1 << 63];
        let mut bytes = write_be_u64s(words);
        assert_eq!(bytes[8..16], [0, 0, 0, 0, 0, 0, 0, 1]);
        bytes.push(7);
        assert_eq!(read_be_u64s(&bytes).collect::<Vec<_>>(), words);
    }
}
