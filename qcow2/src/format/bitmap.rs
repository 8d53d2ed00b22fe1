//! Persistent bitmaps: directory and tables (specification: "Bitmaps").

use super::words::{PutWords, field, u16_at, u32_at, u64_at};
use super::{BitmapsExtension, FormatError, Geometry};
use crate::units::HostOffset;

/// The bitmap was not saved when the image was last closed: its content means nothing.
pub(crate) const BITMAP_IN_USE: u32 = 1 << 0;
/// The bitmap records every write: whoever writes must set its bits.
pub(crate) const BITMAP_AUTO: u32 = 1 << 1;
/// The bitmap may be used although its extra data is not understood.
pub(crate) const BITMAP_EXTRA_COMPATIBLE: u32 = 1 << 2;
/// The most bytes of a bitmap's name.
pub(crate) const MAX_BITMAP_NAME: usize = 1023;
/// The most bytes of a bitmap's data: QEMU's limit.
pub(crate) const MAX_BITMAP_BYTES: u64 = 512 << 20;
/// The most entries of a bitmap table: QEMU's limit.
pub(crate) const MAX_BITMAP_TABLE_ENTRIES: u32 = 0x800_0000;

const FIXED: usize = 24;
const DIRTY_TRACKING: u8 = 1;
const TABLE_OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// An entry of the bitmap directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Where the entry stands in the file, in bytes.
    pub(crate) offset: u64,
    /// Where the bitmap's table lies.
    pub(crate) table_offset: HostOffset,
    /// The number of entries of the table; each stands for one cluster of bitmap data.
    pub(crate) table_entries: u32,
    /// `BITMAP_` flags.
    pub(crate) flags: u32,
    /// The kind of bitmap: 1 is a dirty tracking bitmap, the only kind.
    pub(crate) kind: u8,
    /// The base-2 logarithm of the guest bytes for which a bit stands.
    pub(crate) granularity_bits: u8,
    /// The name as written.
    pub name: Vec<u8>,
    /// Extra data as found; no kind is known.
    pub(crate) extra: Vec<u8>,
}

impl Bitmap {
    /// Decodes the entry at the start of `bytes`, which stands at `at` in the file; gives also its
    /// length with the padding. Only the entry's own shape is checked, see [`validate`](Self::validate).
    ///
    /// # Errors
    /// An entry that `bytes` does not hold wholly.
    pub(crate) fn decode(bytes: &[u8], at: u64) -> Result<(Self, usize), FormatError> {
        let (name_len, extra_len) = (usize::from(u16_at(bytes, 18)), u32_at(bytes, 20) as usize);
        let name_at = FIXED.saturating_add(extra_len);
        let whole = field(bytes, 0, FIXED).is_some();
        let parts = (field(bytes, FIXED, extra_len), field(bytes, name_at, name_len));
        let (true, (Some(extra), Some(name))) = (whole, parts) else {
            return Err(FormatError::malformed(
                "bitmap directory entry",
                at,
                format!("{} bytes left in the directory", bytes.len()),
                format!("an entry of {} bytes", name_at.saturating_add(name_len)),
            ));
        };
        let this = Self {
            offset: at,
            table_offset: HostOffset::new(u64_at(bytes, 0)),
            table_entries: u32_at(bytes, 8),
            flags: u32_at(bytes, 12),
            kind: bytes.get(16).copied().unwrap_or_default(),
            granularity_bits: bytes.get(17).copied().unwrap_or_default(),
            name: name.to_vec(),
            extra: extra.to_vec(),
        };
        Ok((this, (name_at + name_len).next_multiple_of(8)))
    }

    /// The entry as it stands on disk, padded.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(FIXED + self.extra.len() + self.name.len());
        out.put_u64(self.table_offset.get());
        out.put_u32(self.table_entries);
        out.put_u32(self.flags);
        out.push(self.kind);
        out.push(self.granularity_bits);
        out.put_u16(self.name.len() as u16);
        out.put_u32(self.extra.len() as u32);
        out.extend_from_slice(&self.extra);
        out.extend_from_slice(&self.name);
        out.pad_to(8);
        out
    }

    /// Checks the entry for a disk of `disk_size` bytes, before its table is used.
    ///
    /// # Errors
    /// Broken limits; kinds, flags and extra data that are not known; a saved bitmap whose table is
    /// too short for the disk.
    pub(crate) fn validate(&self, geometry: &Geometry, disk_size: u64) -> Result<(), FormatError> {
        let bad = |field: &str, at: u64, found: String, expected: String| {
            let field = format!("bitmap '{}': {field}", self.display_name());
            Err(FormatError::malformed(field, self.offset.saturating_add(at), found, expected))
        };
        if self.kind != DIRTY_TRACKING {
            let field = format!("bitmap '{}': type", self.display_name());
            return Err(FormatError::unsupported(field, self.offset.saturating_add(16), self.kind, "1"));
        }
        if !self.extra.is_empty() && self.flags & BITMAP_EXTRA_COMPATIBLE == 0 {
            let field = format!("bitmap '{}': extra data", self.display_name());
            let found = format!("{} bytes", self.extra.len());
            return Err(FormatError::unsupported(field, self.offset.saturating_add(20), found, "none"));
        }
        if self.flags & !(BITMAP_IN_USE | BITMAP_AUTO | BITMAP_EXTRA_COMPATIBLE) != 0 {
            return bad("flags", 12, format!("{:#x}", self.flags), "reserved bits that are zero".into());
        }
        if !(1..=MAX_BITMAP_NAME).contains(&self.name.len()) {
            return bad("name length", 18, self.name.len().to_string(), format!("1 to {MAX_BITMAP_NAME}"));
        }
        if !(9..=31).contains(&self.granularity_bits) {
            return bad("granularity bits", 17, self.granularity_bits.to_string(), "9 to 31".into());
        }
        let entries = u64::from(self.table_entries);
        let most = u64::from(MAX_BITMAP_TABLE_ENTRIES).min(MAX_BITMAP_BYTES / geometry.cluster_size());
        if entries == 0 || entries > most {
            return bad("table entries", 8, entries.to_string(), format!("1 to {most}"));
        }
        let needed = self.table_entries_for(geometry, disk_size);
        if !self.is_in_use() && entries < needed {
            return bad(
                "table entries",
                8,
                entries.to_string(),
                format!("at least {needed} for a disk of {disk_size} bytes"),
            );
        }
        let end = self.table_offset.checked_add(self.table_bytes());
        if self.table_offset == HostOffset::ZERO
            || !self.table_offset.is_aligned(geometry.cluster_size())
            || end.is_none_or(|end| end.get() > i64::MAX as u64)
        {
            return bad(
                "table offset",
                0,
                self.table_offset.to_string(),
                "a multiple of the cluster size, behind the header and below 2^63".into(),
            );
        }
        Ok(())
    }

    /// Whether the bitmap was not saved: its content means nothing.
    pub fn is_in_use(&self) -> bool {
        self.flags & BITMAP_IN_USE != 0
    }

    /// Whether the bitmap records every write.
    pub fn is_auto(&self) -> bool {
        self.flags & BITMAP_AUTO != 0
    }

    /// The name for messages.
    pub fn display_name(&self) -> String {
        String::from_utf8_lossy(&self.name).into_owned()
    }

    /// The length of the bitmap's table, in bytes.
    pub(crate) fn table_bytes(&self) -> u64 {
        u64::from(self.table_entries) * 8
    }

    /// The guest bytes for which one bit stands. Granularities above 31 bits are taken as 31;
    /// `validate` refuses them.
    pub fn granularity(&self) -> u64 {
        1 << self.granularity_bits.min(31)
    }

    /// The guest bytes for which one entry of the table (one cluster of bits) stands.
    pub(crate) fn table_entry_coverage(&self, geometry: &Geometry) -> u64 {
        geometry.cluster_size() * 8 * self.granularity()
    }

    /// The entries that the table needs for a disk of `disk_size` bytes.
    pub(crate) fn table_entries_for(&self, geometry: &Geometry, disk_size: u64) -> u64 {
        disk_size.div_ceil(self.table_entry_coverage(geometry))
    }
}

/// Decodes the bitmap directory that `extension` names; `bytes` are those of the directory, as many as
/// the extension says.
///
/// # Errors
/// A broken entry, or a directory that does not hold exactly the stated number of bitmaps.
pub(crate) fn decode_bitmap_directory(
    bytes: &[u8],
    extension: &BitmapsExtension,
) -> Result<Vec<Bitmap>, FormatError> {
    let start = extension.directory_offset.get();
    let mut bitmaps = Vec::new();
    let mut rest = bytes;
    for _ in 0..extension.count {
        let at = start.saturating_add((bytes.len() - rest.len()) as u64);
        let (bitmap, len) = Bitmap::decode(rest, at)?;
        let Some(after) = rest.get(len..) else {
            return Err(FormatError::malformed(
                "bitmap directory entry",
                at,
                format!("{} bytes left in the directory", rest.len()),
                format!("an entry of {len} bytes with its padding"),
            ));
        };
        rest = after;
        bitmaps.push(bitmap);
    }
    if !rest.is_empty() {
        return Err(FormatError::malformed(
            "bitmap directory",
            start,
            format!("{} bytes behind the last of {} bitmaps", rest.len(), extension.count),
            "a directory that holds exactly its bitmaps",
        ));
    }
    Ok(bitmaps)
}

/// The bitmap directory as it stands on disk.
pub(crate) fn encode_bitmap_directory(bitmaps: &[Bitmap]) -> Vec<u8> {
    bitmaps.iter().flat_map(Bitmap::encode).collect()
}

/// An entry of a bitmap table: one cluster of bits. Bit 0 of a byte is its least significant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BitmapTableEntry {
    /// All bits are zero.
    AllZero,
    /// All bits are one.
    AllOne,
    /// The bits lie in a cluster.
    Data(HostOffset),
}

impl BitmapTableEntry {
    /// Decodes an entry that lies at host offset `at`.
    ///
    /// # Errors
    /// Reserved bits that are set, or an offset that is not cluster-aligned.
    pub(crate) fn decode(raw: u64, geometry: &Geometry, at: u64) -> Result<Self, FormatError> {
        let bad = |expected: &str| {
            Err(FormatError::malformed("bitmap table entry", at, format!("{raw:#018x}"), expected))
        };
        match (raw & TABLE_OFFSET_MASK, raw & !TABLE_OFFSET_MASK) {
            (0, 0) => Ok(Self::AllZero),
            (0, 1) => Ok(Self::AllOne),
            (offset, 0) if HostOffset::new(offset).is_aligned(geometry.cluster_size()) => {
                Ok(Self::Data(HostOffset::new(offset)))
            }
            (_, 0) => bad("a multiple of the cluster size"),
            _ => bad("reserved bits that are zero"),
        }
    }

    /// The entry as it stands on disk.
    pub(crate) fn encode(self) -> u64 {
        match self {
            Self::AllZero => 0,
            Self::AllOne => 1,
            Self::Data(host) => host.get(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry() -> Geometry {
        Geometry::new(16, 4, false).unwrap()
    }

    fn bitmap(name: &str) -> Bitmap {
        Bitmap {
            offset: 0x50000,
            table_offset: HostOffset::new(0x60000),
            table_entries: 1,
            flags: BITMAP_AUTO,
            kind: 1,
            granularity_bits: 16,
            name: name.as_bytes().to_vec(),
            extra: Vec::new(),
        }
    }

    fn extension(count: u32, bytes: &[u8]) -> BitmapsExtension {
        BitmapsExtension {
            count,
            directory_size: bytes.len() as u64,
            directory_offset: HostOffset::new(0x50000),
        }
    }

    #[test]
    fn directories_survive_a_round_trip() {
        let mut bitmaps = vec![bitmap("daily"), bitmap("with extra data"), bitmap("8 bytes!")];
        bitmaps[1].extra = vec![1, 2, 3];
        let mut at = 0x50000;
        for bitmap in &mut bitmaps {
            bitmap.offset = at;
            at += bitmap.encode().len() as u64;
        }
        let bytes = encode_bitmap_directory(&bitmaps);
        assert_eq!(decode_bitmap_directory(&bytes, &extension(3, &bytes)), Ok(bitmaps));
        assert!(decode_bitmap_directory(&bytes, &extension(2, &bytes)).is_err());
        assert!(decode_bitmap_directory(&bytes, &extension(4, &bytes)).is_err());
        for len in 0..bytes.len() {
            assert!(decode_bitmap_directory(&bytes[..len], &extension(3, &bytes)).is_err(), "{len}");
        }
    }

    #[test]
    fn lengths_beyond_the_directory_are_errors() {
        for (at, value) in [(18, 0xff), (20, 0xff), (21, 0xff), (23, 0xff)] {
            let mut bytes = bitmap("x").encode();
            bytes[at] = value;
            assert!(Bitmap::decode(&bytes, 0).is_err(), "{at}");
        }
    }

    #[test]
    fn entries_are_checked_before_use() {
        let size = 1 << 40;
        let good = Bitmap { table_entries: 32, ..bitmap("good") };
        let g = geometry();
        assert_eq!(good.table_entries_for(&g, size), 32);
        assert!(good.validate(&g, size).is_ok());
        assert!(good.validate(&g, size + 1).is_err(), "too short for the disk");
        assert!(Bitmap { flags: BITMAP_IN_USE, ..good.clone() }.validate(&g, size + 1).is_ok());
        for bad in [
            Bitmap { kind: 0, ..good.clone() },
            Bitmap { flags: 8, ..good.clone() },
            Bitmap { granularity_bits: 8, ..good.clone() },
            Bitmap { granularity_bits: 32, ..good.clone() },
            Bitmap { granularity_bits: 255, ..good.clone() },
            Bitmap { name: vec![], ..good.clone() },
            Bitmap { name: vec![b'n'; 1024], ..good.clone() },
            Bitmap { extra: vec![0], ..good.clone() },
            Bitmap { table_entries: 0, ..good.clone() },
            Bitmap { table_entries: 8193, ..good.clone() },
            Bitmap { table_entries: u32::MAX, ..good.clone() },
            Bitmap { table_offset: HostOffset::ZERO, ..good.clone() },
            Bitmap { table_offset: HostOffset::new(0x60008), ..good.clone() },
            Bitmap { table_offset: HostOffset::new(1 << 63), ..good.clone() },
        ] {
            assert!(bad.validate(&g, size).is_err(), "{bad:?}");
        }
        assert!(
            Bitmap { extra: vec![0], flags: BITMAP_EXTRA_COMPATIBLE, ..good.clone() }
                .validate(&g, size)
                .is_ok()
        );
        assert!(Bitmap { table_entries: 8192, ..good }.validate(&g, size).is_ok());
    }

    #[test]
    fn table_entries_are_checked() {
        let g = geometry();
        for raw in [0, 1, 0x70000, 0x00ff_ffff_ffff_0000] {
            assert_eq!(BitmapTableEntry::decode(raw, &g, 0).unwrap().encode(), raw);
        }
        for raw in [2, 0x100, 0x70001, 0x70200, 1 << 56, 1 << 63] {
            assert!(BitmapTableEntry::decode(raw, &g, 0).is_err(), "{raw:#x}");
        }
    }
}
