//! What a header must fulfil before its image is used: the specification's rules, and the limits of
//! QEMU where it leaves them open.

use super::features::{self, FeatureKind, FeatureName};
use super::header::at;
use super::{Compression, FormatError, Header};
use crate::units::HostOffset;

/// The most bytes of an L1 table: QEMU's limit.
pub(crate) const MAX_L1_BYTES: u64 = 32 << 20;
/// The most bytes of a refcount table: QEMU's limit.
pub(crate) const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// The most internal snapshots: QEMU's limit.
pub(crate) const MAX_SNAPSHOTS: u32 = 65_536;
/// The most bytes of a backing file name (specification: "backing_file_size").
pub(crate) const MAX_BACKING_NAME: u32 = 1023;

impl Header {
    /// Checks everything that the header alone must fulfil before the image is used; `names` is the
    /// image's feature name table, for naming a feature that is not supported.
    ///
    /// # Errors
    /// The first violation; features that are not supported come before broken rules, since they may
    /// change the meaning of everything else.
    pub(crate) fn validate(&self, names: &[FeatureName]) -> Result<(), FormatError> {
        self.validate_features(names)?;
        self.validate_backing_name()?;
        self.validate_l1()?;
        self.validate_refcount_table()?;
        self.validate_snapshots()
    }

    fn validate_features(&self, names: &[FeatureName]) -> Result<(), FormatError> {
        let unknown = self.incompatible & !features::KNOWN_INCOMPATIBLE;
        if unknown != 0 {
            return Err(FormatError::unsupported(
                "incompatible features",
                at::INCOMPATIBLE as u64,
                features::describe(FeatureKind::Incompatible, unknown, names).join(", "),
                "only features that are known",
            ));
        }
        match self.crypt_method {
            0 => {}
            1 | 2 => {
                let name = if self.crypt_method == 1 { "AES encryption" } else { "LUKS encryption" };
                return Err(FormatError::unsupported(
                    "encryption method",
                    at::CRYPT_METHOD as u64,
                    name,
                    "an image that is not encrypted",
                ));
            }
            other => {
                return Err(FormatError::malformed(
                    "encryption method",
                    at::CRYPT_METHOD as u64,
                    other,
                    "0, 1 or 2",
                ));
            }
        }
        let typed = self.incompatible & features::COMPRESSION_TYPE != 0;
        if typed != (self.compression != Compression::Zlib) {
            return Err(FormatError::malformed(
                "compression type",
                at::COMPRESSION as u64,
                format!(
                    "{} with the compression type bit {}",
                    self.compression.name(),
                    if typed { "set" } else { "clear" }
                ),
                "the bit set exactly when the type is not zlib",
            ));
        }
        if self.data_file_raw() && !self.has_data_file() {
            return Err(FormatError::malformed(
                "autoclear features",
                at::AUTOCLEAR as u64,
                "the raw external data bit without a data file",
                "a data file",
            ));
        }
        if self.data_file_raw() && self.backing_offset != 0 && self.backing_len != 0 {
            return Err(FormatError::malformed(
                "autoclear features",
                at::AUTOCLEAR as u64,
                "the raw external data bit with a backing file",
                "no backing file",
            ));
        }
        Ok(())
    }

    fn validate_backing_name(&self) -> Result<(), FormatError> {
        if self.backing_offset == 0 {
            return Ok(());
        }
        let cluster = self.geometry().cluster_size();
        let room = cluster.checked_sub(self.backing_offset);
        let Some(room) = room.filter(|_| self.backing_offset >= u64::from(self.header_length)) else {
            return Err(FormatError::malformed(
                "backing file offset",
                at::BACKING_OFFSET as u64,
                format!("{:#x}", self.backing_offset),
                format!("{:#x} to {cluster:#x}, behind the header and in cluster 0", self.header_length),
            ));
        };
        let most = room.min(u64::from(MAX_BACKING_NAME));
        if u64::from(self.backing_len) > most {
            return Err(FormatError::malformed(
                "backing file name length",
                at::BACKING_LEN as u64,
                self.backing_len,
                format!("at most {most}"),
            ));
        }
        Ok(())
    }

    fn validate_l1(&self) -> Result<(), FormatError> {
        let bytes = u64::from(self.l1_entries) * 8;
        let needed = self.geometry().l1_entries_for(self.size);
        if bytes > MAX_L1_BYTES {
            return Err(FormatError::malformed(
                "L1 table entries",
                at::L1_ENTRIES as u64,
                self.l1_entries,
                format!("at most {}", MAX_L1_BYTES / 8),
            ));
        }
        if u64::from(self.l1_entries) < needed {
            return Err(FormatError::malformed(
                "L1 table entries",
                at::L1_ENTRIES as u64,
                self.l1_entries,
                format!("at least {needed} for a disk of {} bytes", self.size),
            ));
        }
        self.validate_table("L1 table offset", at::L1_OFFSET, self.l1_offset, bytes)
    }

    fn validate_refcount_table(&self) -> Result<(), FormatError> {
        let clusters = u64::from(self.refcount_table_clusters);
        let most = MAX_REFCOUNT_TABLE_BYTES / self.geometry().cluster_size();
        if clusters == 0 || clusters > most {
            return Err(FormatError::malformed(
                "refcount table clusters",
                at::REFCOUNT_TABLE_CLUSTERS as u64,
                clusters,
                format!("1 to {most}"),
            ));
        }
        let bytes = clusters << self.geometry().cluster_bits();
        self.validate_table(
            "refcount table offset",
            at::REFCOUNT_TABLE_OFFSET,
            self.refcount_table_offset,
            bytes,
        )
    }

    fn validate_snapshots(&self) -> Result<(), FormatError> {
        if self.snapshots > MAX_SNAPSHOTS {
            return Err(FormatError::malformed(
                "number of snapshots",
                at::SNAPSHOTS as u64,
                self.snapshots,
                format!("at most {MAX_SNAPSHOTS}"),
            ));
        }
        // A table entry has 40 bytes at least.
        let bytes = u64::from(self.snapshots) * 40;
        self.validate_table("snapshot table offset", at::SNAPSHOTS_OFFSET, self.snapshots_offset, bytes)
    }

    /// A table of `bytes` bytes must start at a cluster, not at the header, and end below 2^63.
    fn validate_table(
        &self,
        field: &str,
        at: usize,
        offset: HostOffset,
        bytes: u64,
    ) -> Result<(), FormatError> {
        let bad = |expected: &str| Err(FormatError::malformed(field, at as u64, offset, expected));
        if !offset.is_aligned(self.geometry().cluster_size()) {
            return bad("a multiple of the cluster size");
        }
        if offset.checked_add(bytes).is_none_or(|end| end.get() > i64::MAX as u64) {
            return bad("a table that ends below 2^63");
        }
        if offset == HostOffset::ZERO && bytes != 0 {
            return bad("a table behind the header");
        }
        Ok(())
    }
}
