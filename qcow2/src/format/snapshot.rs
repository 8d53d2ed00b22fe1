//! Internal snapshots: the snapshot table (specification: "Snapshots").

use super::limits::MAX_L1_BYTES;
use super::words::{PutWords, field, u16_at, u32_at, u64_at};
use super::{FormatError, Header};
use crate::units::HostOffset;

/// The most bytes of a snapshot table: QEMU's limit.
pub(crate) const MAX_SNAPSHOT_TABLE: u64 = 64 << 20;
/// The most bytes of an entry's extra data: QEMU's limit.
pub(super) const MAX_SNAPSHOT_EXTRA: u32 = 1024;

/// Bytes of an entry before its extra data.
const FIXED: usize = 40;
/// The most bytes of an entry: both strings have 16-bit lengths.
const MAX_ENTRY: u64 = (FIXED as u64 + MAX_SNAPSHOT_EXTRA as u64 + 2 * 0xffff).next_multiple_of(8);

/// An entry of the snapshot table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Where the entry stands in the file, in bytes.
    pub(crate) offset: u64,
    /// Where the snapshot's L1 table lies.
    pub(crate) l1_offset: HostOffset,
    /// The number of entries of that table.
    pub(crate) l1_entries: u32,
    /// The id, unique in the image, as written.
    pub id: Vec<u8>,
    /// The name as written.
    pub name: Vec<u8>,
    /// When it was taken: seconds since 1970.
    pub date_sec: u32,
    /// And nanoseconds.
    pub date_nsec: u32,
    /// How long the guest had run, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// The size of the saved machine state in bytes; it lies in the L1 table behind the disk's end.
    pub vm_state_size: u64,
    /// The size of the disk when it was taken, in bytes; `None` if an old writer did not say (then it
    /// is the image's).
    pub disk_size: Option<u64>,
    /// How many instructions the guest had executed, where that was counted.
    pub icount: Option<u64>,
    /// The extra data as found, with fields that are not known.
    pub(crate) extra: Vec<u8>,
}

/// The lengths that an entry of the snapshot table states, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SnapshotLengths {
    /// Its extra data, however long.
    pub(crate) extra: u32,
    /// Its id and its name.
    pub(crate) strings: u32,
}

impl SnapshotLengths {
    /// Those of the entry at the start of `bytes`; what is missing reads as zeros.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        let strings = u32::from(u16_at(bytes, 12)) + u32::from(u16_at(bytes, 14));
        Self { extra: u32_at(bytes, 36), strings }
    }

    /// Whether there is more extra data than QEMU reads.
    pub(crate) fn is_too_long(&self) -> bool {
        self.extra > MAX_SNAPSHOT_EXTRA
    }

    /// How far behind the entry's start its strings begin.
    pub(crate) fn strings_at(&self) -> u64 {
        FIXED as u64 + u64::from(self.extra)
    }

    /// The length of the entry with its padding.
    pub(crate) fn entry(&self) -> u64 {
        (self.strings_at() + u64::from(self.strings)).next_multiple_of(8)
    }
}

impl Snapshot {
    /// Decodes an entry with too much extra data as far as QEMU keeps it: the first 1024 bytes of that. `head` is its
    /// beginning, `strings` are the bytes of its id and name.
    ///
    /// # Errors
    /// As [`decode`](Self::decode).
    pub(crate) fn decode_cut(head: &[u8], strings: &[u8], at: u64) -> Result<Self, FormatError> {
        let mut bytes = head.get(..FIXED + MAX_SNAPSHOT_EXTRA as usize).unwrap_or(head).to_vec();
        if let Some(len) = bytes.get_mut(36..40) {
            len.copy_from_slice(&MAX_SNAPSHOT_EXTRA.to_be_bytes());
        }
        bytes.extend_from_slice(strings);
        Self::decode(&bytes, at).map(|(snapshot, _)| snapshot)
    }

    /// Whether a version 3 image must say more about it: it lacks the size of the disk.
    pub(crate) fn lacks_size(&self, header: &Header) -> bool {
        header.version >= 3 && self.disk_size.is_none()
    }

    /// Adds what [`lacks_size`](Self::lacks_size) is about, as QEMU does: the size is the image's.
    pub(crate) fn add_size(&mut self, header: &Header) {
        /// The fields that QEMU writes: the sizes of the machine's state and of the disk, and the instruction count.
        const KNOWN: usize = 24;
        self.disk_size.get_or_insert(header.size);
        self.extra.resize(self.extra.len().max(KNOWN), 0);
    }

    /// Decodes the entry at the start of `bytes`, which stands at `at` in the file; gives also its
    /// length with the padding. The L1 table that it names is left to [`validate`](Self::validate).
    ///
    /// # Errors
    /// An entry that `bytes` does not hold wholly, or more than 1024 bytes of extra data.
    pub(crate) fn decode(bytes: &[u8], at: u64) -> Result<(Self, usize), FormatError> {
        let extra_len = u32_at(bytes, 36);
        if extra_len > MAX_SNAPSHOT_EXTRA {
            return Err(FormatError::malformed(
                "snapshot table entry: extra data length",
                at.saturating_add(36),
                extra_len,
                format!("at most {MAX_SNAPSHOT_EXTRA}"),
            ));
        }
        let (extra_len, id_len, name_len) =
            (extra_len as usize, usize::from(u16_at(bytes, 12)), usize::from(u16_at(bytes, 14)));
        let id_at = FIXED + extra_len;
        let name_at = id_at + id_len;
        let end = name_at + name_len;
        let fixed = field(bytes, 0, FIXED);
        let parts = (
            fixed,
            field(bytes, FIXED, extra_len),
            field(bytes, id_at, id_len),
            field(bytes, name_at, name_len),
        );
        let (Some(_), Some(extra), Some(id), Some(name)) = parts else {
            return Err(FormatError::malformed(
                "snapshot table entry",
                at,
                format!("{} bytes", bytes.len()),
                format!("an entry of {end} bytes"),
            ));
        };
        let u64_of_extra = |at| field(extra, at, 8).map(|bytes| u64_at(bytes, 0));
        let this = Self {
            offset: at,
            l1_offset: HostOffset::new(u64_at(bytes, 0)),
            l1_entries: u32_at(bytes, 8),
            id: id.to_vec(),
            name: name.to_vec(),
            date_sec: u32_at(bytes, 16),
            date_nsec: u32_at(bytes, 20),
            vm_clock_nsec: u64_at(bytes, 24),
            vm_state_size: u64_of_extra(0).unwrap_or_else(|| u64::from(u32_at(bytes, 32))),
            disk_size: u64_of_extra(8),
            icount: u64_of_extra(16).filter(|&count| count != u64::MAX),
            extra: extra.to_vec(),
        };
        Ok((this, end.next_multiple_of(8)))
    }

    /// The entry as it stands on disk, padded; sizes that `extra` has room for are written there.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(FIXED + self.extra.len() + self.id.len() + self.name.len());
        out.put_u64(self.l1_offset.get());
        out.put_u32(self.l1_entries);
        out.put_u16(self.id.len() as u16);
        out.put_u16(self.name.len() as u16);
        out.put_u32(self.date_sec);
        out.put_u32(self.date_nsec);
        out.put_u64(self.vm_clock_nsec);
        out.put_u32(u32::try_from(self.vm_state_size).unwrap_or(0));
        out.put_u32(self.extra.len() as u32);
        let fields = [Some(self.vm_state_size), self.disk_size, Some(self.icount.unwrap_or(u64::MAX))];
        let mut extra = self.extra.clone();
        for (place, value) in extra.chunks_exact_mut(8).zip(fields) {
            if let Some(value) = value {
                place.copy_from_slice(&value.to_be_bytes());
            }
        }
        out.extend_from_slice(&extra);
        out.extend_from_slice(&self.id);
        out.extend_from_slice(&self.name);
        out.pad_to(8);
        out
    }

    /// Checks what the entry says about its L1 table, before that is used.
    ///
    /// # Errors
    /// A table that is too big, not cluster-aligned, at offset zero or past 2^63; in version 3, an
    /// entry without the disk's size.
    pub(crate) fn validate(&self, header: &Header) -> Result<(), FormatError> {
        let bytes = self.l1_bytes();
        if bytes > MAX_L1_BYTES {
            return Err(FormatError::malformed(
                "snapshot table entry: L1 table entries",
                self.offset.saturating_add(8),
                self.l1_entries,
                format!("at most {}", MAX_L1_BYTES / 8),
            ));
        }
        let end = self.l1_offset.checked_add(bytes);
        if !self.l1_offset.is_aligned(header.geometry().cluster_size())
            || end.is_none_or(|end| end.get() > i64::MAX as u64)
            || (self.l1_offset == HostOffset::ZERO && bytes != 0)
        {
            return Err(FormatError::malformed(
                "snapshot table entry: L1 table offset",
                self.offset,
                self.l1_offset,
                "a multiple of the cluster size, behind the header and below 2^63",
            ));
        }
        if self.lacks_size(header) {
            return Err(FormatError::malformed(
                "snapshot table entry: extra data length",
                self.offset.saturating_add(36),
                self.extra.len(),
                "at least 16 in a version 3 image",
            ));
        }
        Ok(())
    }

    /// The length of the snapshot's L1 table, in bytes.
    pub(crate) fn l1_bytes(&self) -> u64 {
        u64::from(self.l1_entries) * 8
    }
}

/// How many bytes from the snapshot table's offset the table of `count` snapshots may take.
pub(crate) fn snapshot_table_bound(count: u32) -> u64 {
    (u64::from(count) * MAX_ENTRY).min(MAX_SNAPSHOT_TABLE)
}

/// Decodes the `count` entries of the table that stands at `at` in the file; gives also the table's
/// length in bytes. `bytes` are those of the file from there, [`snapshot_table_bound`] of them or as
/// many as the file has.
///
/// # Errors
/// A broken entry, or a table that ends behind `bytes`.
pub(crate) fn decode_snapshots(
    bytes: &[u8],
    count: u32,
    at: u64,
) -> Result<(Vec<Snapshot>, u64), FormatError> {
    let mut snapshots = Vec::new();
    let mut used = 0usize;
    for _ in 0..count {
        let offset = at.saturating_add(used as u64);
        let (snapshot, len) = Snapshot::decode(bytes.get(used..).unwrap_or_default(), offset)?;
        used += len;
        if used as u64 > MAX_SNAPSHOT_TABLE {
            return Err(FormatError::malformed(
                "snapshot table",
                at,
                "a table that goes on",
                format!("at most {MAX_SNAPSHOT_TABLE} bytes"),
            ));
        }
        snapshots.push(snapshot);
    }
    Ok((snapshots, used as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Geometry;

    fn snapshot() -> Snapshot {
        let mut extra = vec![0; 32];
        extra[31] = 9;
        Snapshot {
            offset: 0x50000,
            l1_offset: HostOffset::new(0x60000),
            l1_entries: 3,
            id: b"1".to_vec(),
            name: b"before the upgrade".to_vec(),
            date_sec: 1_700_000_000,
            date_nsec: 5,
            vm_clock_nsec: 12_345_678_901,
            vm_state_size: 1 << 33,
            disk_size: Some(1 << 30),
            icount: None,
            extra,
        }
    }

    fn header(version: u32) -> Header {
        Header::new(version, Geometry::new(16, 4, false).unwrap(), 1 << 30)
    }

    #[test]
    fn tables_survive_a_round_trip() {
        let mut all = [snapshot(), snapshot()];
        all[1].icount = Some(77);
        all[1].name.clear();
        let first = all[0].encode();
        all[1].offset += first.len() as u64;
        let bytes = [first, all[1].encode()].concat();
        assert_eq!(bytes.len() % 8, 0);
        let (read, len) = decode_snapshots(&bytes, 2, 0x50000).unwrap();
        assert_eq!(len, bytes.len() as u64);
        let reread: Vec<u8> = read.iter().flat_map(Snapshot::encode).collect();
        assert_eq!(reread, bytes, "unknown extra data is kept");
        assert_eq!(read[1].icount, Some(77));
        assert_eq!((&read[0].name, read[0].vm_state_size), (&all[0].name, 1 << 33));
        assert_eq!(read[1].offset, all[1].offset);
        assert!(decode_snapshots(&bytes, 3, 0x50000).is_err(), "there is no third");
        assert_eq!(decode_snapshots(&bytes, 0, 0x50000).unwrap(), (vec![], 0));
    }

    #[test]
    fn old_entries_have_a_narrow_state_size_and_no_disk_size() {
        let mut old = snapshot();
        old.extra.clear();
        old.vm_state_size = 4096;
        old.disk_size = None;
        let (read, _) = Snapshot::decode(&old.encode(), old.offset).unwrap();
        assert_eq!(read, old);
        assert!(read.validate(&header(2)).is_ok());
        assert!(read.validate(&header(3)).is_err());
    }

    #[test]
    fn entries_cut_anywhere_are_errors() {
        let whole = snapshot();
        let bytes = whole.encode();
        let unpadded = FIXED + 32 + 1 + whole.name.len();
        for len in 0..unpadded {
            assert!(Snapshot::decode(&bytes[..len], 0).is_err(), "{len}");
            assert!(decode_snapshots(&bytes[..len], 1, 0).is_err(), "{len}");
        }
        assert!(Snapshot::decode(&bytes[..unpadded], 0).is_ok());
    }

    #[test]
    fn limits() {
        let mut long = snapshot();
        long.extra = vec![0; 1024];
        assert!(Snapshot::decode(&long.encode(), 0).is_ok());
        long.extra.push(0);
        assert!(Snapshot::decode(&long.encode(), 0).is_err());

        let mut big = snapshot();
        big.extra = vec![0; 1024];
        big.id = vec![b'i'; 0xffff];
        big.name = vec![b'n'; 0xffff];
        let entry = big.encode();
        assert_eq!(entry.len() as u64, MAX_ENTRY);
        let fit = MAX_SNAPSHOT_TABLE / MAX_ENTRY;
        let table = entry.repeat(fit as usize + 1);
        assert!(decode_snapshots(&table, fit as u32, 0).is_ok());
        assert!(decode_snapshots(&table, fit as u32 + 1, 0).is_err());
        assert_eq!(snapshot_table_bound(65_536), MAX_SNAPSHOT_TABLE);
        assert_eq!(snapshot_table_bound(1), MAX_ENTRY);
    }

    #[test]
    fn l1_tables_are_checked_before_use() {
        let good = snapshot();
        assert!(good.validate(&header(3)).is_ok());
        for bad in [
            Snapshot { l1_entries: (4 << 20) + 1, ..good.clone() },
            Snapshot { l1_offset: HostOffset::new(0x60200), ..good.clone() },
            Snapshot { l1_offset: HostOffset::ZERO, ..good.clone() },
            Snapshot { l1_offset: HostOffset::new(1 << 63), ..good.clone() },
            Snapshot {
                l1_offset: HostOffset::new(0x7fff_ffff_ffff_0000),
                l1_entries: 4 << 20,
                ..good.clone()
            },
        ] {
            assert!(bad.validate(&header(3)).is_err(), "{bad:?}");
        }
    }
}
