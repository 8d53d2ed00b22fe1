//! Header extensions (specification: "Header extensions").

use super::features::{FeatureKind, FeatureName, NAMES};
use super::words::{PutWords, u32_at, u64_at};
use super::{FormatError, Geometry};
use crate::units::HostOffset;

/// The end of the list.
pub(crate) const EXT_END: u32 = 0;
/// The backing file's format, as a string.
pub(crate) const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
/// The names of feature bits.
pub(crate) const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
/// The directory of persistent bitmaps.
pub(crate) const EXT_BITMAPS: u32 = 0x2385_2875;
/// Where the encryption header lies.
pub(crate) const EXT_CRYPTO: u32 = 0x0537_be77;
/// The external data file's name, as a string.
pub(crate) const EXT_DATA_FILE: u32 = 0x4441_5441;
/// Our own: the image was merged into the image whose path is the data (UTF-8; empty if it did not
/// fit). Other programs ignore it and keep it, as they must any extension that they do not know.
pub(crate) const EXT_MERGED_INTO: u32 = 0x714d_7267;
/// Our own mark of a layer that is being merged: the switch that makes it obsolete may have happened.
pub(crate) const EXT_MERGING_INTO: u32 = 0x714d_7270;
/// Our own mark of an active image that a merge has made an empty overlay on the image whose path is the data. As long as
/// it is empty, nobody depends on what it shows.
pub(crate) const EXT_EMPTIED_ONTO: u32 = 0x714d_7265;

/// The most bytes of a backing format's name that QEMU reads.
pub(crate) const MAX_BACKING_FORMAT: usize = 15;
/// The most bytes of a bitmap directory: QEMU's limit.
pub(crate) const MAX_BITMAP_DIRECTORY: u64 = (64 << 20) - 1024;
/// The most bitmaps of an image: QEMU's limit.
pub(crate) const MAX_BITMAPS: u32 = 65_535;

/// Bytes of an extension's magic and length.
pub(super) const EXTENSION_HEAD: usize = 8;
const FEATURE_NAME_LEN: usize = 48;

/// A header extension, known or not, as found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Extension {
    /// What it is: one of the `EXT_` constants, or unknown.
    pub magic: u32,
    /// Where its magic stands in the file, in bytes.
    pub offset: u64,
    /// Its data, without the padding.
    pub data: Vec<u8>,
}

impl Extension {
    /// A new extension, whose offset will be known when it is encoded.
    pub(crate) fn new(magic: u32, data: impl Into<Vec<u8>>) -> Self {
        Self { magic, offset: 0, data: data.into() }
    }

    /// The table of all known feature names, as QEMU writes it.
    pub(crate) fn known_feature_names() -> Self {
        let mut data = Vec::with_capacity(NAMES.len() * FEATURE_NAME_LEN);
        for (kind, bit, name) in NAMES {
            data.extend_from_slice(&[FeatureKind::number(kind), bit]);
            data.extend_from_slice(name.as_bytes());
            data.pad_to(FEATURE_NAME_LEN);
        }
        Self::new(EXT_FEATURE_NAMES, data)
    }

    /// The bytes that it takes on disk, with head and padding.
    pub(crate) fn encoded_len(&self) -> usize {
        EXTENSION_HEAD + self.data.len().next_multiple_of(8)
    }

    /// Appends it as it stands on disk.
    pub(crate) fn encode_into(&self, out: &mut Vec<u8>) {
        out.put_u32(self.magic);
        out.put_u32(self.data.len() as u32);
        out.extend_from_slice(&self.data);
        out.resize(out.len() + (self.data.len().next_multiple_of(8) - self.data.len()), 0);
    }
}

/// What [`decode_list`] found.
pub(super) struct List {
    /// The extensions, up to the damage if there is any.
    pub(super) extensions: Vec<Extension>,
    /// Behind the END mark, or where the list stopped.
    pub(super) end: usize,
    /// Whether an END mark closes the list.
    pub(super) closed: bool,
    /// Why the list could not be read to its end.
    pub(super) damage: Option<FormatError>,
}

/// Reads the extensions that stand in `cluster` between `start` and `end`.
pub(super) fn decode_list(cluster: &[u8], start: usize, end: usize) -> List {
    let mut list = List { extensions: Vec::new(), end: start, closed: false, damage: None };
    while end.saturating_sub(list.end) >= EXTENSION_HEAD {
        let offset = list.end;
        let magic = u32_at(cluster, offset);
        let len = u32_at(cluster, offset + 4) as usize;
        let data_at = offset + EXTENSION_HEAD;
        let room = end - data_at;
        let Some(data) = cluster.get(data_at..).and_then(|rest| rest.get(..len)).filter(|_| len <= room)
        else {
            list.damage = Some(FormatError::malformed(
                format!("length of header extension {magic:#010x}"),
                offset as u64 + 4,
                len,
                format!("at most {room}, the bytes up to the backing name or the end of cluster 0"),
            ));
            break;
        };
        // QEMU looks at the length of the END mark, too.
        if magic == EXT_END {
            list.end = data_at;
            list.closed = true;
            break;
        }
        list.extensions.push(Extension { magic, offset: offset as u64, data: data.to_vec() });
        list.end = (data_at + len.next_multiple_of(8)).min(end);
    }
    let rest = end.saturating_sub(list.end);
    if !list.closed && list.damage.is_none() && rest > 0 {
        list.damage = Some(FormatError::malformed(
            "header extension",
            list.end as u64,
            format!("{rest} bytes up to the backing name or the end of cluster 0"),
            "an END mark, or none at all",
        ));
    }
    list
}

/// The bitmaps extension (specification: "Bitmaps extension").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BitmapsExtension {
    /// How many bitmaps there are.
    pub count: u32,
    /// The length of the directory, in bytes.
    pub(crate) directory_size: u64,
    /// Where the directory lies.
    pub(crate) directory_offset: HostOffset,
}

impl BitmapsExtension {
    /// Decodes and checks the extension.
    ///
    /// # Errors
    /// A wrong length, no or too many bitmaps, reserved bytes that are set, a directory that is too
    /// big or too small, not cluster-aligned, or past 2^63.
    pub(crate) fn decode(extension: &Extension, geometry: &Geometry) -> Result<Self, FormatError> {
        let data = &extension.data;
        let at = extension.offset + EXTENSION_HEAD as u64;
        let bad = |field: &str, offset: u64, found: String, expected: String| {
            Err(FormatError::malformed(format!("bitmaps extension: {field}"), offset, found, expected))
        };
        if data.len() != 24 {
            return bad("length", at - 4, data.len().to_string(), "24".into());
        }
        let this = Self {
            count: u32_at(data, 0),
            directory_size: u64_at(data, 8),
            directory_offset: HostOffset::new(u64_at(data, 16)),
        };
        let reserved = u32_at(data, 4);
        if this.count == 0 || this.count > MAX_BITMAPS {
            return bad("number of bitmaps", at, this.count.to_string(), format!("1 to {MAX_BITMAPS}"));
        }
        if reserved != 0 {
            return bad("reserved bytes", at + 4, format!("{reserved:#x}"), "zero".into());
        }
        // An entry has 24 bytes and a name of one byte at least, padded to 8.
        let least = u64::from(this.count) * 32;
        if !(least..=MAX_BITMAP_DIRECTORY).contains(&this.directory_size) {
            return bad(
                "directory size",
                at + 8,
                this.directory_size.to_string(),
                format!("{least} to {MAX_BITMAP_DIRECTORY}"),
            );
        }
        let offset = this.directory_offset;
        let end = offset.checked_add(this.directory_size);
        if offset == HostOffset::ZERO
            || !offset.is_aligned(geometry.cluster_size())
            || end.is_none_or(|end| end.get() > i64::MAX as u64)
        {
            return bad(
                "directory offset",
                at + 16,
                offset.to_string(),
                "a multiple of the cluster size, behind the header and below 2^63".into(),
            );
        }
        Ok(this)
    }

    /// The extension as it goes into the header.
    pub(crate) fn encode(&self) -> Extension {
        let mut data = Vec::with_capacity(24);
        data.put_u32(self.count);
        data.put_u32(0);
        data.put_u64(self.directory_size);
        data.put_u64(self.directory_offset.get());
        Extension::new(EXT_BITMAPS, data)
    }
}

/// The entries of a feature name table; a last partial entry is ignored.
pub(super) fn decode_feature_names(data: &[u8]) -> Vec<FeatureName> {
    data.chunks_exact(FEATURE_NAME_LEN)
        .filter_map(|entry| {
            let (&[kind, bit], name) = entry.split_first_chunk::<2>()?;
            let name = name.split(|&b| b == 0).next().unwrap_or_default();
            Some(FeatureName { kind, bit, name: String::from_utf8_lossy(name).into_owned() })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(extensions: &[Extension], end: bool) -> Vec<u8> {
        let mut out = Vec::new();
        extensions.iter().for_each(|e| e.encode_into(&mut out));
        if end {
            out.put_u64(0);
        }
        out
    }

    #[test]
    fn lists_are_read_up_to_the_end_mark() {
        let exts = [Extension::new(EXT_BACKING_FORMAT, *b"raw"), Extension::new(0x1234, vec![7; 9])];
        let mut bytes = list(&exts, true);
        bytes.extend_from_slice(&[0xff; 64]);
        let read = decode_list(&bytes, 0, bytes.len());
        assert!(read.closed && read.damage.is_none());
        assert_eq!(read.end, 16 + 24 + 8);
        assert_eq!(read.extensions.iter().map(|e| e.offset).collect::<Vec<_>>(), [0, 16]);
        assert_eq!(list(&read.extensions, true), bytes[..read.end]);
    }

    #[test]
    fn lists_end_where_their_space_ends() {
        let bytes = list(&[Extension::new(1, *b"12345678"), Extension::new(2, *b"x")], false);
        let read = decode_list(&bytes, 0, bytes.len());
        assert_eq!((read.extensions.len(), read.end, read.closed), (2, 32, false));
        let read = decode_list(&bytes, 0, 23);
        assert_eq!((read.extensions.len(), read.end), (1, 16), "seven bytes are no extension");
        assert!(read.damage.is_some(), "QEMU refuses them");
        let read = decode_list(&bytes, 0, 24);
        assert!(read.damage.unwrap().to_string().contains("at most 0"));
        // The data fits and only its padding does not: harmless.
        let read = decode_list(&bytes, 0, 25);
        assert_eq!((read.extensions.len(), read.end), (2, 25));
    }

    #[test]
    fn lengths_beyond_the_space_are_damage() {
        for len in [9u32, 0x8000_0000, u32::MAX] {
            let mut bytes = vec![];
            bytes.put_u32(5);
            bytes.put_u32(len);
            bytes.put_u64(0);
            let read = decode_list(&bytes, 0, bytes.len());
            assert!(read.damage.is_some() && read.extensions.is_empty(), "{len}");
            bytes[..4].fill(0);
            let read = decode_list(&bytes, 0, bytes.len());
            assert!(read.damage.is_some() && !read.closed, "END, {len}");
        }
    }

    #[test]
    fn feature_tables_of_any_length_are_harmless() {
        for len in 0..100 {
            assert_eq!(decode_feature_names(&vec![b'x'; len]).len(), len / 48);
        }
        let names = decode_feature_names(&Extension::known_feature_names().data);
        assert_eq!(names.len(), 8);
        assert_eq!(names[4], FeatureName { kind: 0, bit: 4, name: "extended L2 entries".into() });
    }

    #[test]
    fn bitmaps_extensions_are_checked() {
        let g = Geometry::new(16, 4, false).unwrap();
        let good =
            BitmapsExtension { count: 2, directory_size: 64, directory_offset: HostOffset::new(0x50000) };
        assert_eq!(BitmapsExtension::decode(&good.encode(), &g), Ok(good));
        let reserved = |e: &mut Extension| e.data[7] = 1;
        let long = |e: &mut Extension| e.data.push(0);
        let tweaks: [&dyn Fn(&mut Extension); 2] = [&reserved, &long];
        for tweak in tweaks {
            let mut e = good.encode();
            tweak(&mut e);
            assert!(BitmapsExtension::decode(&e, &g).is_err());
        }
        for bad in [
            BitmapsExtension { count: 0, ..good },
            BitmapsExtension { count: 65_536, directory_size: 65_536 * 32, ..good },
            BitmapsExtension { count: 3, ..good },
            BitmapsExtension { directory_size: 64 << 20, ..good },
            BitmapsExtension { directory_offset: HostOffset::new(0x50200), ..good },
            BitmapsExtension { directory_offset: HostOffset::ZERO, ..good },
            BitmapsExtension {
                directory_offset: HostOffset::new(0x7fff_ffff_ffff_0000),
                directory_size: 1 << 20,
                ..good
            },
        ] {
            assert!(BitmapsExtension::decode(&bad.encode(), &g).is_err(), "{bad:?}");
        }
    }
}
