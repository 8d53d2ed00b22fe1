//! Laying out cluster 0 afresh, as `qemu-img create` does.

use super::Header;
use super::cluster0::Cluster0;
use super::extensions::{
    EXT_BACKING_FORMAT, EXT_BITMAPS, EXT_CRYPTO, EXT_DATA_FILE, EXT_END, EXT_FEATURE_NAMES, EXTENSION_HEAD,
    Extension, MAX_BACKING_FORMAT,
};
use super::limits::MAX_BACKING_NAME;
use super::words::PutWords;

/// QEMU writes the feature name table only where a cluster is larger than this, in bytes.
const FEATURE_NAMES_ABOVE: u64 = 4096;

/// Why cluster 0 cannot be laid out or edited as asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RewriteError {
    /// Header, extensions and backing name do not fit into cluster 0.
    #[error("the header needs {needed} bytes, and cluster 0 has {room}")]
    NoRoom {
        /// The bytes that would be needed.
        needed: usize,
        /// The bytes that there are.
        room: usize,
    },
    /// A backing name or format that no qcow2 header can hold.
    #[error("{what} has {len} bytes, and a qcow2 header holds 1 to {most}")]
    Name {
        /// "the backing file name" or "the backing format".
        what: &'static str,
        /// Its length in bytes.
        len: usize,
        /// The most bytes that it may have.
        most: usize,
    },
    /// The cluster that should be edited is damaged or uses features that are not supported.
    #[error(transparent)]
    Format(#[from] super::FormatError),
}

impl Cluster0 {
    /// Cluster 0 of a new image: the header, and the feature name table where QEMU writes one.
    pub(crate) fn new(header: Header) -> Self {
        let mut this = Self::bare(header);
        if this.header.version >= 3 && this.header.geometry().cluster_size() > FEATURE_NAMES_ABOVE {
            this.set_extension(Extension::known_feature_names());
        }
        this
    }

    /// Sets the backing name and its format together.
    ///
    /// # Errors
    /// A name or format that is empty or too long.
    pub fn set_backing(&mut self, name: &[u8], format: &str) -> Result<(), RewriteError> {
        check_backing(name, format)?;
        self.backing_name = Some(name.to_vec());
        self.set_extension(Extension::new(EXT_BACKING_FORMAT, format));
        Ok(())
    }

    /// Names the external data file, and sets the feature bit (and the raw bit, if `raw`).
    #[cfg(feature = "testing")]
    pub(crate) fn set_data_file(&mut self, name: &[u8], raw: bool) {
        self.header.incompatible |= super::features::DATA_FILE;
        if raw {
            self.header.autoclear |= super::features::DATA_FILE_RAW;
        }
        self.set_extension(Extension::new(EXT_DATA_FILE, name));
    }

    /// Adds an extension at the place where QEMU would write it, instead of those of the same kind.
    pub(crate) fn set_extension(&mut self, extension: Extension) {
        self.remove_extension(extension.magic);
        let before = self.extensions.partition_point(|e| rank(e.magic) <= rank(extension.magic));
        self.extensions.insert(before, extension);
    }

    /// Removes the extensions of a kind.
    pub(crate) fn remove_extension(&mut self, magic: u32) {
        self.extensions.retain(|e| e.magic != magic);
    }

    /// The bytes of cluster 0 up to the end of the backing name: header, extensions in their order,
    /// END, backing name. What follows in the cluster is zero.
    ///
    /// # Errors
    /// [`RewriteError::NoRoom`] if they do not fit into a cluster.
    pub fn encode(&self) -> Result<Vec<u8>, RewriteError> {
        let name = self.backing_name.as_deref().unwrap_or_default();
        let mut header = self.header.clone();
        let list: usize = self.extensions.iter().map(Extension::encoded_len).sum();
        let names_at = header.header_length as usize + list + EXTENSION_HEAD;
        let (needed, room) = (names_at + name.len(), header.geometry().cluster_size() as usize);
        if needed > room {
            return Err(RewriteError::NoRoom { needed, room });
        }
        header.backing_offset = if name.is_empty() { 0 } else { names_at as u64 };
        header.backing_len = name.len() as u32;
        let mut out = header.encode();
        self.extensions.iter().for_each(|e| e.encode_into(&mut out));
        out.put_u32(EXT_END);
        out.put_u32(0);
        out.extend_from_slice(name);
        Ok(out)
    }
}

/// Whether a backing name and format fit into any qcow2 header.
pub(super) fn check_backing(name: &[u8], format: &str) -> Result<(), RewriteError> {
    let check = |what, len, most| {
        if (1..=most).contains(&len) { Ok(()) } else { Err(RewriteError::Name { what, len, most }) }
    };
    check("the backing file name", name.len(), MAX_BACKING_NAME as usize)?;
    check("the backing format", format.len(), MAX_BACKING_FORMAT)
}

/// The place of a kind of extension in QEMU's order.
fn rank(magic: u32) -> u32 {
    match magic {
        EXT_BACKING_FORMAT => 0,
        EXT_DATA_FILE => 1,
        EXT_CRYPTO => 2,
        EXT_FEATURE_NAMES => 3,
        EXT_BITMAPS => 4,
        _ => 5,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Geometry;
    use crate::format::words::u64_at;
    use crate::units::HostOffset;

    fn header(version: u32, cluster_bits: u32) -> Header {
        let mut header = Header::new(version, Geometry::new(cluster_bits, 4, false).unwrap(), 1 << 20);
        header.l1_entries = header.geometry().l1_entries_for(header.size) as u32;
        header.l1_offset = HostOffset::new(3 << cluster_bits);
        header.refcount_table_offset = HostOffset::new(1 << cluster_bits);
        header.refcount_table_clusters = 1;
        header
    }

    #[test]
    fn layout_is_that_of_qemu_img() {
        // Where QEMU 10.0 puts the backing name of an image made with `-b base.raw -F raw`.
        for (version, bits, name_at) in [(3, 16, 0x210), (2, 16, 0x60), (3, 9, 0x88), (3, 12, 0x88)] {
            let mut cluster = Cluster0::new(header(version, bits));
            cluster.set_backing(b"base.raw", "raw").unwrap();
            let bytes = cluster.encode().unwrap();
            assert_eq!(u64_at(&bytes, 8), name_at, "version {version}, {bits} bits");
            let read = Cluster0::parse(&bytes).unwrap();
            assert_eq!(read.backing_name.as_deref(), Some(&b"base.raw"[..]));
            assert_eq!(read.backing_format().as_deref(), Some("raw"));
            assert_eq!(read.encode().unwrap(), bytes);
        }
    }

    #[test]
    fn extensions_stand_in_qemus_order() {
        let mut cluster = Cluster0::new(header(3, 16));
        cluster.set_extension(Extension::new(0x1234_5678, *b"unknown"));
        cluster.set_data_file(b"disk.raw", true);
        cluster.set_extension(Extension::new(0x1111_1111, *b"also unknown"));
        cluster.set_extension(Extension::new(EXT_BACKING_FORMAT, *b"qcow2"));
        let read = Cluster0::parse(&cluster.encode().unwrap()).unwrap();
        let magics: Vec<_> = read.extensions.iter().map(|e| e.magic).collect();
        assert_eq!(magics, [EXT_BACKING_FORMAT, EXT_DATA_FILE, EXT_FEATURE_NAMES, 0x1234_5678, 0x1111_1111]);
        assert_eq!(read.data_file_name(), Some(&b"disk.raw"[..]));
        assert!(read.header.has_data_file() && read.header.data_file_raw());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut cluster = Cluster0::new(header(3, 9));
        cluster.set_backing(&[b'x'; 376], "raw").unwrap();
        assert_eq!(cluster.encode().unwrap().len(), 512);
        cluster.set_backing(&[b'x'; 377], "raw").unwrap();
        assert_eq!(cluster.encode(), Err(RewriteError::NoRoom { needed: 513, room: 512 }));
        assert!(cluster.set_backing(&[b'x'; 1024], "raw").is_err());
        assert!(cluster.set_backing(b"", "raw").is_err());
        assert!(cluster.set_backing(b"x", "sixteen-letters-").is_err());
    }
}
