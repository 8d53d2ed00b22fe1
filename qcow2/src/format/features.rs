//! Feature bits of version 3 headers (specification: "Header", "Feature name table").

/// Incompatible bit 0: refcounts may be wrong (lazy refcounts, and the image was not closed).
pub(crate) const DIRTY: u64 = 1 << 0;
/// Incompatible bit 1: metadata is known to be damaged; the image must not be written.
pub(crate) const CORRUPT: u64 = 1 << 1;
/// Incompatible bit 2: guest data lies in an external data file.
pub(crate) const DATA_FILE: u64 = 1 << 2;
/// Incompatible bit 3: the compression type is not zlib.
pub(crate) const COMPRESSION_TYPE: u64 = 1 << 3;
/// Incompatible bit 4: L2 entries have 128 bits and describe subclusters.
pub(crate) const EXTENDED_L2: u64 = 1 << 4;
/// All incompatible bits that this engine understands.
pub(crate) const KNOWN_INCOMPATIBLE: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION_TYPE | EXTENDED_L2;

/// Compatible bit 0: refcounts may be written late, under the dirty bit.
pub(crate) const LAZY_REFCOUNTS: u64 = 1 << 0;

/// Autoclear bit 0: the bitmaps extension agrees with the image's data.
pub(crate) const BITMAPS: u64 = 1 << 0;
/// Autoclear bit 1: the external data file is a valid raw image by itself.
pub(crate) const DATA_FILE_RAW: u64 = 1 << 1;
/// All autoclear bits that this engine understands; others are cleared by whoever writes.
pub(crate) const KNOWN_AUTOCLEAR: u64 = BITMAPS | DATA_FILE_RAW;
/// A bit of our own, in an image that is being emptied. Whoever else opens the image for writing clears it, as the
/// specification asks of those who do not know it: as long as it is there, nobody else has written to the image.
pub(crate) const SEALED: u64 = 1 << 63;

/// Which of the three feature fields a bit belongs to, as numbered in the feature name table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum FeatureKind {
    /// An unknown bit forbids opening the image.
    Incompatible,
    /// An unknown bit means nothing to a reader or writer.
    Compatible,
    /// An unknown bit is cleared by a writer.
    Autoclear,
}

impl FeatureKind {
    /// The number that stands for it in the feature name table.
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::Incompatible => 0,
            Self::Compatible => 1,
            Self::Autoclear => 2,
        }
    }
}

/// An entry of the feature name table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FeatureName {
    /// The feature field: 0 incompatible, 1 compatible, 2 autoclear; other numbers are harmless.
    pub kind: u8,
    /// The bit.
    pub bit: u8,
    /// Its name, without the padding.
    pub name: String,
}

/// The names of all known bits, in the order in which QEMU writes its table.
pub(crate) const NAMES: [(FeatureKind, u8, &str); 8] = [
    (FeatureKind::Incompatible, 0, "dirty bit"),
    (FeatureKind::Incompatible, 1, "corrupt bit"),
    (FeatureKind::Incompatible, 2, "external data file"),
    (FeatureKind::Incompatible, 3, "compression type"),
    (FeatureKind::Incompatible, 4, "extended L2 entries"),
    (FeatureKind::Compatible, 0, "lazy refcounts"),
    (FeatureKind::Autoclear, 0, "bitmaps"),
    (FeatureKind::Autoclear, 1, "raw external data"),
];

/// The names of the bits set in `bits`, from the image's own `table` where it has them, then from
/// the known ones, else "bit N".
pub(crate) fn describe(kind: FeatureKind, bits: u64, table: &[FeatureName]) -> Vec<String> {
    (0..64u8)
        .filter(|bit| bits >> bit & 1 == 1)
        .map(|bit| {
            let own = table.iter().find(|f| f.kind == kind.number() && f.bit == bit && !f.name.is_empty());
            let known = NAMES.iter().find(|(k, b, _)| *k == kind && *b == bit);
            match (own, known) {
                (Some(own), _) => own.name.clone(),
                (None, Some((_, _, name))) => (*name).to_owned(),
                (None, None) => format!("bit {bit}"),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_images_own_names_come_first() {
        let table = [FeatureName { kind: 0, bit: 63, name: "shiny".into() }];
        let names = describe(FeatureKind::Incompatible, DIRTY | 1 << 62 | 1 << 63, &table);
        assert_eq!(names, ["dirty bit", "bit 62", "shiny"]);
        assert_eq!(describe(FeatureKind::Autoclear, BITMAPS | 1 << 63, &table), ["bitmaps", "bit 63"]);
    }
}
