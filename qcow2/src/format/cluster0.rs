//! Cluster 0 as a whole: header, extensions and backing name.

use std::borrow::Cow;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::extensions::{
    BitmapsExtension, EXT_BACKING_FORMAT, EXT_BITMAPS, EXT_CRYPTO, EXT_DATA_FILE, EXT_EMPTIED_ONTO,
    EXT_FEATURE_NAMES, EXT_MERGED_INTO, EXT_MERGING_INTO, Extension, MAX_BACKING_FORMAT,
    decode_feature_names, decode_list,
};
use super::features::{self, FeatureKind, FeatureName};
use super::words::u64_at;
use super::{FormatError, Header};
use crate::units::HostOffset;

/// Everything that cluster 0 says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cluster0 {
    /// The header.
    pub header: Header,
    /// The extensions in file order, unknown ones too.
    pub(crate) extensions: Vec<Extension>,
    /// Behind the mark that ends the extensions, or where the list stopped without one, in bytes.
    pub(crate) extensions_end: u64,
    /// The backing file's name as written, or `None` if there is none.
    pub backing_name: Option<Vec<u8>>,
    /// Whether an END mark closes the extensions; else the backing name or the cluster's end does.
    pub(super) extensions_closed: bool,
    damage: Option<FormatError>,
}

impl Cluster0 {
    /// Decodes and validates cluster 0: what every program does that uses the image. `bytes` is the
    /// first cluster of the file, or more; what a short file lacks reads as zeros.
    ///
    /// # Errors
    /// The first violation, or the first feature that is not supported.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let this = Self::decode(bytes)?;
        this.validate()?;
        Ok(this)
    }

    /// Decodes cluster 0 as far as it can be: for tools that look at damaged and foreign images. What
    /// cannot be read is left out, and [`validate`](Self::validate) reports it.
    ///
    /// # Errors
    /// Those of [`Header::decode`].
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let header = Header::decode(bytes)?;
        let cluster = pad(bytes, header.geometry().cluster_size() as usize);
        let end = extension_space_end(&header, cluster.len());
        let list = decode_list(&cluster, header.header_length as usize, end);
        let name = usize::try_from(header.backing_offset).ok().filter(|&offset| offset != 0);
        let backing_name = name
            .and_then(|offset| cluster.get(offset..)?.get(..header.backing_len as usize))
            .filter(|name| !name.is_empty())
            .map(<[u8]>::to_vec);
        Ok(Self {
            header,
            extensions: list.extensions,
            extensions_end: list.end as u64,
            backing_name,
            extensions_closed: list.closed,
            damage: list.damage,
        })
    }

    /// The header alone, without extensions and backing name.
    pub(super) fn bare(mut header: Header) -> Self {
        header.backing_offset = 0;
        header.backing_len = 0;
        let extensions_end = u64::from(header.header_length);
        Self {
            header,
            extensions: Vec::new(),
            extensions_end,
            backing_name: None,
            extensions_closed: true,
            damage: None,
        }
    }

    /// Checks everything that cluster 0 alone must fulfil before the image is used.
    ///
    /// # Errors
    /// The first violation, or the first feature that is not supported.
    pub fn validate(&self) -> Result<(), FormatError> {
        self.header.validate(&self.feature_names())?;
        if let Some(damage) = &self.damage {
            return Err(damage.clone());
        }
        for magic in [
            EXT_BACKING_FORMAT,
            EXT_BITMAPS,
            EXT_CRYPTO,
            EXT_DATA_FILE,
            EXT_MERGED_INTO,
            EXT_MERGING_INTO,
            EXT_EMPTIED_ONTO,
        ] {
            if let Some(second) = self.extensions.iter().filter(|e| e.magic == magic).nth(1) {
                return Err(FormatError::malformed(
                    "header extension",
                    second.offset,
                    format!("a second {magic:#010x}"),
                    "one of its kind",
                ));
            }
        }
        if let Some(format) = self.extension(EXT_BACKING_FORMAT)
            && format.data.len() > MAX_BACKING_FORMAT
        {
            return Err(FormatError::malformed(
                "length of the backing format",
                format.offset + 4,
                format.data.len(),
                format!("at most {MAX_BACKING_FORMAT}"),
            ));
        }
        if let Some(crypto) = self.extension(EXT_CRYPTO) {
            // The header's own check has refused encrypted images by name.
            return Err(FormatError::malformed(
                "encryption header extension",
                crypto.offset,
                "an extension for LUKS",
                "none in an image that is not encrypted",
            ));
        }
        // QEMU looks at the length even where the header says that the bitmaps mean nothing.
        if let Some(bitmaps) = self.extension(EXT_BITMAPS)
            && bitmaps.data.len() != 24
        {
            return Err(FormatError::malformed(
                "bitmaps extension: length",
                bitmaps.offset + 4,
                bitmaps.data.len(),
                "24",
            ));
        }
        self.bitmaps().map(|_| ())
    }

    /// The extension of a kind, if the image has it.
    pub(crate) fn extension(&self, magic: u32) -> Option<&Extension> {
        self.extensions.iter().find(|e| e.magic == magic)
    }

    /// The backing file's format, or `None` if the image does not say it. Bytes that are not UTF-8
    /// are replaced: they name no known format.
    pub fn backing_format(&self) -> Option<String> {
        let format = self.extension(EXT_BACKING_FORMAT)?;
        (!format.data.is_empty()).then(|| String::from_utf8_lossy(&format.data).into_owned())
    }

    /// The external data file's name as written.
    pub fn data_file_name(&self) -> Option<&[u8]> {
        self.extension(EXT_DATA_FILE).map(|e| e.data.as_slice()).filter(|name| !name.is_empty())
    }

    /// The features that the image has, each by the image's own name for it, by the known one, or as "bit N". Dirty and
    /// corrupt are states, and not among them.
    pub fn features(&self) -> Vec<String> {
        let (header, names) = (&self.header, self.feature_names());
        let incompatible = header.incompatible & !(features::DIRTY | features::CORRUPT);
        [
            (FeatureKind::Incompatible, incompatible),
            (FeatureKind::Compatible, header.compatible),
            (FeatureKind::Autoclear, header.autoclear),
        ]
        .into_iter()
        .flat_map(|(kind, bits)| features::describe(kind, bits, &names))
        .collect()
    }

    /// Whether the image has persistent bitmaps.
    pub fn has_bitmaps(&self) -> bool {
        self.extension(EXT_BITMAPS).is_some()
    }

    /// The image's own names of feature bits.
    pub(crate) fn feature_names(&self) -> Vec<FeatureName> {
        self.extension(EXT_FEATURE_NAMES).map(|e| decode_feature_names(&e.data)).unwrap_or_default()
    }

    /// The persistent bitmaps; `None` if there are none, or if the header says that they do not agree
    /// with the data (then they mean nothing, and their clusters are leaked).
    ///
    /// # Errors
    /// An extension that breaks the rules.
    pub(crate) fn bitmaps(&self) -> Result<Option<BitmapsExtension>, FormatError> {
        if !self.header.bitmaps_consistent() {
            return Ok(None);
        }
        let geometry = self.header.geometry();
        self.extension(EXT_BITMAPS).map(|e| BitmapsExtension::decode(e, &geometry)).transpose()
    }

    /// Where the encryption header lies and its length in bytes, if the image has one.
    pub(crate) fn crypto(&self) -> Option<(HostOffset, u64)> {
        let data = &self.extension(EXT_CRYPTO)?.data;
        (data.len() == 16).then(|| (HostOffset::new(u64_at(data, 0)), u64_at(data, 8)))
    }

    /// Our own mark: the path of the image into which this one was merged (empty if the path did not
    /// fit into the header), or `None` if it was not merged.
    pub fn merged_into(&self) -> Option<PathBuf> {
        self.marked_with(EXT_MERGED_INTO)
    }

    /// Whether the mark of a merged image says that it held nothing then: what it holds now, somebody has written since.
    pub(crate) fn was_empty_when_merged(&self) -> bool {
        self.extension(EXT_MERGED_INTO).is_some_and(|e| e.data.last() == Some(&0))
    }

    /// Whether the image was merged and kept its data, which nobody needs.
    pub(crate) fn keeps_merged_data(&self) -> bool {
        self.merged_into().is_some() && !self.was_empty_when_merged()
    }

    /// Our own mark of a merge under way: the path of the image into which this one is being merged, as
    /// in [`merged_into`](Self::merged_into). If the image is still a layer of its chain, the merge was
    /// stopped before it changed the chain; if not, behind that, and the image is obsolete.
    pub fn merging_into(&self) -> Option<PathBuf> {
        self.marked_with(EXT_MERGING_INTO)
    }

    /// Our own mark of an active image that a merge has made an empty overlay: the path of its base, as in
    /// [`merged_into`](Self::merged_into). A guest may have written to it since.
    pub(crate) fn emptied_onto(&self) -> Option<PathBuf> {
        self.marked_with(EXT_EMPTIED_ONTO)
    }

    /// The path in one of our marks.
    fn marked_with(&self, magic: u32) -> Option<PathBuf> {
        let path = |data: &[u8]| OsStr::from_bytes(data.strip_suffix(b"\0").unwrap_or(data)).into();
        self.extension(magic).map(|e| path(&e.data))
    }
}

/// `bytes` as a whole cluster: cut, or padded with zeros.
pub(super) fn pad(bytes: &[u8], cluster: usize) -> Cow<'_, [u8]> {
    match bytes.get(..cluster) {
        Some(whole) => Cow::Borrowed(whole),
        None => {
            let mut padded = bytes.to_vec();
            padded.resize(cluster, 0);
            Cow::Owned(padded)
        }
    }
}

/// Where the extensions must end: at the backing name or at the cluster's end.
pub(super) fn extension_space_end(header: &Header, cluster: usize) -> usize {
    match usize::try_from(header.backing_offset) {
        Ok(0) | Err(_) => cluster,
        Ok(offset) => offset.min(cluster),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Geometry;
    use crate::format::features;
    use byteorder::{BigEndian, ByteOrder};

    /// Cluster 0 of an image of 1 MiB with 64 KiB clusters, a backing file, and a name for bit 63.
    fn image(version: u32) -> Vec<u8> {
        let mut header = Header::new(version, Geometry::new(16, 4, false).unwrap(), 1 << 20);
        header.l1_entries = 1;
        header.l1_offset = HostOffset::new(0x30000);
        header.refcount_table_offset = HostOffset::new(0x10000);
        header.refcount_table_clusters = 1;
        let mut cluster = Cluster0::new(header);
        cluster.set_backing(b"base.raw", "raw").unwrap();
        if version >= 3 {
            let mut names = Extension::known_feature_names();
            names.data.extend_from_slice(&[0, 63]);
            names.data.extend_from_slice(b"shiny");
            names.data.resize(9 * 48, 0);
            cluster.set_extension(names);
        }
        let mut bytes = cluster.encode().unwrap();
        bytes.resize(0x10000, 0);
        bytes
    }

    fn u32s(at: usize, value: u32) -> impl Fn(&mut Vec<u8>) {
        move |bytes| BigEndian::write_u32(&mut bytes[at..at + 4], value)
    }

    fn u64s(at: usize, value: u64) -> impl Fn(&mut Vec<u8>) {
        move |bytes| BigEndian::write_u64(&mut bytes[at..at + 8], value)
    }

    /// Applies `change` to a version 3 image; the error that parsing gives.
    fn refused(change: impl Fn(&mut Vec<u8>)) -> FormatError {
        let mut bytes = image(3);
        change(&mut bytes);
        Cluster0::parse(&bytes).expect_err("the image must be refused")
    }

    #[test]
    fn good_images_parse() {
        for version in [2, 3] {
            let cluster = Cluster0::parse(&image(version)).unwrap();
            assert_eq!(cluster.header.version, version);
            assert_eq!(cluster.header.size, 1 << 20);
            assert_eq!(cluster.header.geometry().refcount_bits(), 16);
            assert_eq!(cluster.backing_name.as_deref(), Some(&b"base.raw"[..]));
            assert_eq!(cluster.extensions_end, cluster.header.backing_offset);
        }
    }

    #[test]
    fn limits_of_the_header() {
        type Change = Box<dyn Fn(&mut Vec<u8>)>;
        let cases: Vec<(&str, Change)> = vec![
            ("magic", Box::new(u32s(0, 0x5146_4900))),
            ("version", Box::new(u32s(4, 1))),
            ("version", Box::new(u32s(4, 4))),
            ("cluster bits", Box::new(u32s(20, 8))),
            ("cluster bits", Box::new(u32s(20, 22))),
            ("cluster bits", Box::new(u32s(20, 40))),
            ("cluster bits", Box::new(u32s(20, u32::MAX))),
            ("header length", Box::new(u32s(100, 96))),
            ("header length", Box::new(u32s(100, 108))),
            ("header length", Box::new(u32s(100, 0x10008))),
            ("header length", Box::new(u32s(100, 0x7fff_fff8))),
            ("refcount order", Box::new(u32s(96, 7))),
            ("backing file offset", Box::new(u64s(8, 0x10001))),
            ("backing file offset", Box::new(u64s(8, 1 << 63))),
            ("backing file offset", Box::new(u64s(8, 64))),
            ("backing file name length", Box::new(u32s(16, 1024))),
            ("backing file name length", Box::new(u32s(16, u32::MAX))),
            ("backing file name length", Box::new(u64s(8, 0xfffc))),
            ("L1 table entries", Box::new(u32s(36, 0))),
            ("L1 table entries", Box::new(u32s(36, (4 << 20) + 1))),
            ("L1 table entries", Box::new(u64s(24, (512 << 20) + 1))),
            ("L1 table entries", Box::new(u64s(24, u64::MAX))),
            ("L1 table offset", Box::new(u64s(40, 0x30200))),
            ("L1 table offset", Box::new(u64s(40, 0x7fff_ffff_ffff_0000 + 0x10000))),
            ("L1 table offset", Box::new(u64s(40, 0xffff_ffff_ffff_0000))),
            ("L1 table offset", Box::new(u64s(40, 0))),
            ("refcount table clusters", Box::new(u32s(56, 0))),
            ("refcount table clusters", Box::new(u32s(56, 129))),
            ("refcount table offset", Box::new(u64s(48, 0x10200))),
            ("refcount table offset", Box::new(u64s(48, 0x7fff_ffff_ffff_0000))),
            ("refcount table offset", Box::new(u64s(48, 0))),
            ("number of snapshots", Box::new(u32s(60, 65_537))),
            ("snapshot table offset", Box::new(u64s(64, 0x1200))),
            ("snapshot table offset", Box::new(u64s(64, 1 << 63))),
            ("snapshot table offset", Box::new(u32s(60, 1))),
            ("incompatible features", Box::new(u64s(72, 1 << 5))),
            ("encryption method", Box::new(u32s(32, 1))),
            ("encryption method", Box::new(u32s(32, 2))),
            ("encryption method", Box::new(u32s(32, 3))),
            ("compression type", Box::new(u64s(72, features::COMPRESSION_TYPE))),
            ("compression type", Box::new(|b: &mut Vec<u8>| b[104] = 1)),
            ("compression type", Box::new(|b: &mut Vec<u8>| b[104] = 2)),
            ("autoclear features", Box::new(u64s(88, features::DATA_FILE_RAW))),
        ];
        for (n, (field, change)) in cases.iter().enumerate() {
            let error = refused(change);
            assert_eq!(error.field(), *field, "case {n}: {error}");
        }
    }

    #[test]
    fn limits_hold_up_to_their_last_value() {
        type Change<'a> = &'a dyn Fn(&mut Vec<u8>);
        let changes: [Change<'_>; 7] = [
            &u32s(36, 4 << 20),
            &u32s(56, 128),
            &u64s(24, 512 << 20),
            &u64s(40, 0x7fff_ffff_fffe_0000),
            &|b| {
                u32s(60, 65_536)(b);
                u64s(64, 0x50000)(b);
            },
            &|b| {
                u64s(72, features::COMPRESSION_TYPE)(b);
                b[104] = 1;
            },
            &u64s(72, features::DIRTY | features::CORRUPT | features::EXTENDED_L2),
        ];
        for (n, change) in changes.iter().enumerate() {
            let mut bytes = image(3);
            change(&mut bytes);
            assert!(Cluster0::parse(&bytes).is_ok(), "case {n}");
        }
    }

    #[test]
    fn version_2_has_no_feature_fields() {
        let mut bytes = image(2);
        // What stands at the places of the version 3 fields is an extension here.
        assert_eq!(bytes[72..76], [0xe2, 0x79, 0x2a, 0xca]);
        u32s(100, 0xffff_ffff)(&mut bytes);
        let cluster = Cluster0::parse(&bytes).unwrap();
        assert_eq!(cluster.header.incompatible, 0);
        assert_eq!(cluster.header.header_length, 72);
        assert_eq!(cluster.header.geometry().refcount_bits(), 16);
        assert_eq!(cluster.backing_format().as_deref(), Some("raw"));
    }

    #[test]
    fn unknown_features_are_refused_by_name() {
        let error = refused(u64s(72, 1 << 63 | 1 << 40));
        assert!(error.is_unsupported());
        assert!(error.to_string().contains("bit 40, shiny"), "{error}");
    }

    #[test]
    fn encryption_is_refused_by_name() {
        for (method, name) in [(1, "AES encryption"), (2, "LUKS encryption")] {
            let error = refused(u32s(32, method));
            assert!(error.is_unsupported() && error.to_string().contains(name), "{error}");
        }
    }

    #[test]
    fn unknown_compatible_and_autoclear_bits_are_harmless() {
        let mut bytes = image(3);
        u64s(80, u64::MAX)(&mut bytes);
        u64s(88, 1 << 63)(&mut bytes);
        let cluster = Cluster0::parse(&bytes).unwrap();
        assert_eq!(cluster.header.unknown_autoclear(), 1 << 63);
        assert!(cluster.header.lazy_refcounts());
        assert_eq!(cluster.header.encode(), bytes[..112]);
    }

    #[test]
    fn longer_headers_are_kept_verbatim() {
        let mut header = Cluster0::parse(&image(3)).unwrap().header;
        header.header_length = 128;
        header.tail = (1..=23).collect();
        let mut cluster = Cluster0::new(header.clone());
        cluster.set_extension(Extension::new(0x0102_0304, *b"kept"));
        let bytes = cluster.encode().unwrap();
        assert_eq!(bytes[105..128], header.tail);
        let read = Cluster0::parse(&bytes).unwrap();
        assert_eq!((read.header.header_length, &read.header.tail), (128, &header.tail));
        assert_eq!(read.encode().unwrap(), bytes);
    }

    #[test]
    fn short_files_are_refused_or_padded() {
        let bytes = image(3);
        for len in 0..104 {
            assert!(Cluster0::parse(&bytes[..len]).is_err(), "{len}");
        }
        let used = Cluster0::parse(&bytes).unwrap();
        let end = used.header.backing_offset as usize + 8;
        assert_eq!(Cluster0::parse(&bytes[..end]).unwrap(), used);
    }

    #[test]
    fn damaged_extensions_can_be_looked_at() {
        let mut bytes = image(3);
        u32s(116, u32::MAX)(&mut bytes);
        assert!(Cluster0::parse(&bytes).unwrap_err().field().contains("0xe2792aca"));
        let cluster = Cluster0::decode(&bytes).unwrap();
        assert!(cluster.extensions.is_empty());
        assert_eq!(cluster.backing_name.as_deref(), Some(&b"base.raw"[..]));
    }

    #[test]
    fn contradicting_extensions_are_refused() {
        for extra in [Extension::new(EXT_BACKING_FORMAT, *b"qcow2"), Extension::new(EXT_CRYPTO, [0; 16])] {
            let mut cluster = Cluster0::parse(&image(3)).unwrap();
            cluster.extensions.push(extra.clone());
            assert!(Cluster0::parse(&cluster.encode().unwrap()).is_err(), "{extra:?}");
        }
        let mut cluster = Cluster0::parse(&image(3)).unwrap();
        cluster.set_extension(Extension::new(EXT_BACKING_FORMAT, *b"a-format-too-long"));
        let error = Cluster0::parse(&cluster.encode().unwrap()).unwrap_err();
        assert_eq!(error.field(), "length of the backing format");
    }

    #[test]
    fn a_raw_data_file_forbids_a_backing_file() {
        let mut cluster = Cluster0::parse(&image(3)).unwrap();
        cluster.set_data_file(b"disk.raw", true);
        assert!(Cluster0::parse(&cluster.encode().unwrap()).is_err());
        cluster.backing_name = None;
        assert!(Cluster0::parse(&cluster.encode().unwrap()).is_ok());
    }

    #[test]
    fn bitmaps_without_their_bit_mean_nothing() {
        let mut cluster = Cluster0::parse(&image(3)).unwrap();
        cluster.set_extension(Extension::new(EXT_BITMAPS, [0; 24]));
        assert_eq!(Cluster0::parse(&cluster.encode().unwrap()).unwrap().bitmaps(), Ok(None));
        cluster.header.autoclear |= features::BITMAPS;
        assert!(Cluster0::parse(&cluster.encode().unwrap()).is_err());
    }

    #[test]
    fn our_mark_is_read_back() {
        let mut cluster = Cluster0::parse(&image(3)).unwrap();
        assert_eq!(cluster.merged_into(), None);
        cluster.set_extension(Extension::new(EXT_MERGED_INTO, *b"/srv/base.raw"));
        let read = Cluster0::parse(&cluster.encode().unwrap()).unwrap();
        assert_eq!(read.merged_into().as_deref(), Some("/srv/base.raw".as_ref()));
    }
}
