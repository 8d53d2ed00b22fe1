//! The header (specification: "Header").

use super::features;
use super::words::{PutWords, u32_at, u64_at};
use super::{FormatError, Geometry};
use crate::units::HostOffset;

/// The first four bytes of every qcow2 image: "QFI" and 0xfb.
pub(crate) const MAGIC: u32 = 0x5146_49fb;
/// The length of a version 2 header, in bytes.
pub(crate) const V2_HEADER_LENGTH: u32 = 72;
/// The least length of a version 3 header, in bytes.
pub(crate) const V3_HEADER_LENGTH: u32 = 104;
/// The length of the version 3 header that QEMU writes, in bytes: with the compression type.
pub(crate) const FULL_HEADER_LENGTH: u32 = 112;
/// Offsets of the fields, in bytes.
pub(super) mod at {
    pub(in super::super) const BACKING_OFFSET: usize = 8;
    pub(in super::super) const BACKING_LEN: usize = 16;
    pub(in super::super) const CLUSTER_BITS: usize = 20;
    pub(in super::super) const SIZE: usize = 24;
    pub(in super::super) const CRYPT_METHOD: usize = 32;
    pub(in super::super) const L1_ENTRIES: usize = 36;
    pub(in super::super) const L1_OFFSET: usize = 40;
    pub(in super::super) const REFCOUNT_TABLE_OFFSET: usize = 48;
    pub(in super::super) const REFCOUNT_TABLE_CLUSTERS: usize = 56;
    pub(in super::super) const SNAPSHOTS: usize = 60;
    pub(in super::super) const SNAPSHOTS_OFFSET: usize = 64;
    pub(in super::super) const INCOMPATIBLE: usize = 72;
    pub(in super::super) const COMPATIBLE: usize = 80;
    pub(in super::super) const AUTOCLEAR: usize = 88;
    pub(in super::super) const REFCOUNT_ORDER: usize = 96;
    pub(in super::super) const HEADER_LENGTH: usize = 100;
    pub(in super::super) const COMPRESSION: usize = 104;
}

/// How compressed clusters are packed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Compression {
    /// Raw deflate.
    #[default]
    Zlib,
    /// One zstd frame per cluster.
    Zstd,
}

impl Compression {
    /// The name that QEMU gives it: "zlib" or "zstd".
    pub fn name(self) -> &'static str {
        match self {
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        }
    }
}

/// The fixed part of cluster 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Where the backing name lies, in bytes; zero if there is none.
    pub(crate) backing_offset: u64,
    /// The length of the backing name, in bytes.
    pub(crate) backing_len: u32,
    /// The size of the guest's disk, in bytes.
    pub(crate) size: u64,
    /// 0 none, 1 AES, 2 LUKS.
    pub crypt_method: u32,
    /// The number of entries of the active L1 table.
    pub(crate) l1_entries: u32,
    /// Where the active L1 table lies.
    pub l1_offset: HostOffset,
    /// Where the refcount table lies.
    pub(crate) refcount_table_offset: HostOffset,
    /// The length of the refcount table, in clusters.
    pub(crate) refcount_table_clusters: u32,
    /// The number of internal snapshots.
    pub snapshots: u32,
    /// Where the snapshot table lies.
    pub(crate) snapshots_offset: HostOffset,
    /// Incompatible feature bits; zero in version 2. See [`features`].
    pub(crate) incompatible: u64,
    /// Compatible feature bits; zero in version 2.
    pub(crate) compatible: u64,
    /// Autoclear feature bits; zero in version 2.
    pub(crate) autoclear: u64,
    /// The length of the header, in bytes: where the extensions start.
    pub(crate) header_length: u32,
    /// How compressed clusters are packed.
    pub compression: Compression,
    /// What follows the compression type up to the header's length (padding, and fields that a later
    /// version may define), kept as found.
    pub(crate) tail: Vec<u8>,
    geometry: Geometry,
}

/// Whether a file that starts with `bytes` claims to be a qcow2 image.
pub(crate) fn is_qcow2(bytes: &[u8]) -> bool {
    u32_at(bytes, 0) == MAGIC
}

impl Header {
    /// The size of the disk that the guest sees, in bytes: QEMU shows whole sectors of 512, and none for what is left.
    pub fn virtual_size(&self) -> u64 {
        self.size & !511
    }

    /// A header of version 2 or 3 for a disk of `size` bytes, without tables or features other than
    /// the extended L2 entries that `geometry` asks for.
    pub(crate) fn new(version: u32, geometry: Geometry, size: u64) -> Self {
        let v3 = version >= 3;
        Self {
            version,
            backing_offset: 0,
            backing_len: 0,
            size,
            crypt_method: 0,
            l1_entries: 0,
            l1_offset: HostOffset::ZERO,
            refcount_table_offset: HostOffset::ZERO,
            refcount_table_clusters: 0,
            snapshots: 0,
            snapshots_offset: HostOffset::ZERO,
            incompatible: if geometry.extended_l2() { features::EXTENDED_L2 } else { 0 },
            compatible: 0,
            autoclear: 0,
            header_length: if v3 { FULL_HEADER_LENGTH } else { V2_HEADER_LENGTH },
            compression: Compression::Zlib,
            tail: if v3 { vec![0; 7] } else { Vec::new() },
            geometry,
        }
    }

    /// Decodes the header at the start of `bytes`, the image's first bytes, with the checks that
    /// reading on depends on; [`validate`](Self::validate) makes the rest. Tools that look at damaged
    /// or foreign images stop here.
    ///
    /// # Errors
    /// Wrong magic, a version other than 2 and 3, a file shorter than its header, and impossible
    /// cluster sizes, refcount widths, header lengths and compression types.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        if !is_qcow2(bytes) {
            return Err(FormatError::malformed(
                "magic",
                0,
                format!("{:02x?}", bytes.get(..4).unwrap_or(bytes)),
                "51 46 49 fb, a qcow2 image",
            ));
        }
        let version = u32_at(bytes, 4);
        let least = match version {
            3 => V3_HEADER_LENGTH,
            _ => V2_HEADER_LENGTH,
        };
        if bytes.len() < least as usize {
            return Err(FormatError::malformed(
                "header",
                0,
                format!("a file of {} bytes", bytes.len()),
                format!("at least {least} bytes"),
            ));
        }
        if !(2..=3).contains(&version) {
            return Err(FormatError::unsupported("version", 4, version, "2 or 3"));
        }
        let v3 = version == 3;
        let v3_u64 = |at| if v3 { u64_at(bytes, at) } else { 0 };
        let incompatible = v3_u64(at::INCOMPATIBLE);
        let cluster_bits = u32_at(bytes, at::CLUSTER_BITS);
        if !(9..=21).contains(&cluster_bits) {
            return Err(FormatError::malformed(
                "cluster bits",
                at::CLUSTER_BITS as u64,
                cluster_bits,
                "9 to 21",
            ));
        }
        let header_length = if v3 { u32_at(bytes, at::HEADER_LENGTH) } else { V2_HEADER_LENGTH };
        if header_length < least || header_length > 1 << cluster_bits || header_length % 8 != 0 {
            return Err(FormatError::malformed(
                "header length",
                at::HEADER_LENGTH as u64,
                header_length,
                format!("a multiple of 8 from {least} to the cluster size of {}", 1u32 << cluster_bits),
            ));
        }
        let refcount_order = if v3 { u32_at(bytes, at::REFCOUNT_ORDER) } else { 4 };
        if refcount_order > 6 {
            return Err(FormatError::malformed(
                "refcount order",
                at::REFCOUNT_ORDER as u64,
                refcount_order,
                "0 to 6",
            ));
        }
        let extended_l2 = incompatible & features::EXTENDED_L2 != 0;
        let geometry = Geometry::new(cluster_bits, refcount_order, extended_l2).ok_or_else(|| {
            FormatError::malformed(
                "cluster bits",
                at::CLUSTER_BITS as u64,
                cluster_bits,
                "14 or more with extended L2 entries",
            )
        })?;
        // A file may end anywhere inside cluster 0: what is missing reads as zeros.
        let mut rest = bytes.get(at::COMPRESSION..).unwrap_or(&[]).to_vec();
        rest.resize((header_length as usize).saturating_sub(at::COMPRESSION), 0);
        let compression = match rest.first() {
            None | Some(0) => Compression::Zlib,
            Some(1) => Compression::Zstd,
            Some(other) => {
                return Err(FormatError::unsupported(
                    "compression type",
                    at::COMPRESSION as u64,
                    other,
                    "0 (zlib) or 1 (zstd)",
                ));
            }
        };
        Ok(Self {
            version,
            backing_offset: u64_at(bytes, at::BACKING_OFFSET),
            backing_len: u32_at(bytes, at::BACKING_LEN),
            size: u64_at(bytes, at::SIZE),
            crypt_method: u32_at(bytes, at::CRYPT_METHOD),
            l1_entries: u32_at(bytes, at::L1_ENTRIES),
            l1_offset: HostOffset::new(u64_at(bytes, at::L1_OFFSET)),
            refcount_table_offset: HostOffset::new(u64_at(bytes, at::REFCOUNT_TABLE_OFFSET)),
            refcount_table_clusters: u32_at(bytes, at::REFCOUNT_TABLE_CLUSTERS),
            snapshots: u32_at(bytes, at::SNAPSHOTS),
            snapshots_offset: HostOffset::new(u64_at(bytes, at::SNAPSHOTS_OFFSET)),
            incompatible,
            compatible: v3_u64(at::COMPATIBLE),
            autoclear: v3_u64(at::AUTOCLEAR),
            header_length,
            compression,
            tail: rest.split_off(rest.len().min(1)),
            geometry,
        })
    }

    /// The header as it stands on disk, `header_length` bytes.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(FULL_HEADER_LENGTH as usize);
        out.put_u32(MAGIC);
        out.put_u32(self.version);
        out.put_u64(self.backing_offset);
        out.put_u32(self.backing_len);
        out.put_u32(self.geometry.cluster_bits());
        out.put_u64(self.size);
        out.put_u32(self.crypt_method);
        out.put_u32(self.l1_entries);
        out.put_u64(self.l1_offset.get());
        out.put_u64(self.refcount_table_offset.get());
        out.put_u32(self.refcount_table_clusters);
        out.put_u32(self.snapshots);
        out.put_u64(self.snapshots_offset.get());
        if self.version >= 3 {
            out.put_u64(self.incompatible);
            out.put_u64(self.compatible);
            out.put_u64(self.autoclear);
            out.put_u32(self.geometry.refcount_bits().trailing_zeros());
            out.put_u32(self.header_length);
            out.push(match self.compression {
                Compression::Zlib => 0,
                Compression::Zstd => 1,
            });
            out.extend_from_slice(&self.tail);
        }
        out.resize(self.header_length as usize, 0);
        out
    }

    /// Cluster size, refcount width and kind of L2 entries.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The length of the active L1 table, in bytes.
    pub fn l1_bytes(&self) -> u64 {
        u64::from(self.l1_entries) * 8
    }

    /// The length of the refcount table, in bytes.
    pub(crate) fn refcount_table_bytes(&self) -> u64 {
        u64::from(self.refcount_table_clusters) << self.geometry.cluster_bits()
    }

    /// Whether refcounts may be wrong, because the image was not closed cleanly.
    pub(crate) fn is_dirty(&self) -> bool {
        self.incompatible & features::DIRTY != 0
    }

    /// Whether the image is marked as damaged.
    pub fn is_corrupt(&self) -> bool {
        self.incompatible & features::CORRUPT != 0
    }

    /// Whether guest data lies in an external data file.
    pub fn has_data_file(&self) -> bool {
        self.incompatible & features::DATA_FILE != 0
    }

    /// Whether the external data file is a raw image by itself.
    pub fn data_file_raw(&self) -> bool {
        self.autoclear & features::DATA_FILE_RAW != 0
    }

    /// Whether L2 entries have 128 bits and describe subclusters.
    pub fn extended_l2(&self) -> bool {
        self.geometry.extended_l2()
    }

    /// Whether refcounts may be written late, under the dirty bit.
    pub fn lazy_refcounts(&self) -> bool {
        self.compatible & features::LAZY_REFCOUNTS != 0
    }

    /// Whether the bitmaps extension agrees with the data.
    pub(crate) fn bitmaps_consistent(&self) -> bool {
        self.autoclear & features::BITMAPS != 0
    }

    /// Whether the image is being emptied by us, and nobody else has opened it for writing since.
    pub fn is_sealed(&self) -> bool {
        self.autoclear & features::SEALED != 0
    }

    /// The autoclear bits that a writer must clear, because it does not know what they promise.
    pub(crate) fn unknown_autoclear(&self) -> u64 {
        self.autoclear & !features::KNOWN_AUTOCLEAR
    }
}
