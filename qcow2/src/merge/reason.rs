//! Why a file stays, and why nothing is merged: values, which programs can tell apart.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::chain::DataFileKept;
use crate::error::shown;

/// Why a merged layer keeps its data, or why a file that nobody needs any more is not removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeptReason {
    /// An image outside the chain uses it.
    Used,
    /// An image outside the chain reads through it.
    ReadThrough,
    /// It is no qcow2 image.
    NotQcow2,
    /// Its file, or its data file, has another name, by a hard link.
    Linked,
    /// It cannot be written.
    NotWritable,
    /// Its internal snapshots share its data file.
    SnapshotsInDataFile,
    /// Its internal snapshots do not say how large their disk was, so its disk must keep its size.
    SnapshotsWithoutSize,
    /// Its tables cannot become as large as the active disk.
    TablesTooSmall,
    /// A layer above it is kept, and whoever uses that reads through this one.
    BelowKept,
    /// Its name leads to another file now.
    OtherFile,
    /// Its name leads to no file.
    NoFile,
    /// It is no regular file.
    NotRegular,
    /// It is a data file that only its image names.
    DataFile(DataFileKept),
    /// The owner of the journal that lists it may not remove it.
    MayNotRemove,
    /// The owner of the journal that lists it may not write it.
    MayNotWrite,
    /// It lies outside the allowed folders.
    OutsideAllowed,
    /// Somebody has written to base since the merge was stopped.
    BaseWritten,
    /// It was written to since the merge was stopped.
    Written,
    /// It bears no mark of the merge.
    NoMark,
}

impl fmt::Display for KeptReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Used => "another image uses it",
            Self::ReadThrough => "another image reads through it",
            Self::NotQcow2 => "it is no qcow2 image",
            Self::Linked => "its file has another name, by a hard link",
            Self::NotWritable => "it cannot be written",
            Self::SnapshotsInDataFile => "its internal snapshots share its data file",
            Self::SnapshotsWithoutSize => {
                "it must grow, and in version 2 its internal snapshots do not say how large their disk was"
            }
            Self::TablesTooSmall => "its tables cannot become as large as the active disk",
            Self::BelowKept => "a layer above it is kept",
            Self::OtherFile => "its name leads to another file now",
            Self::NoFile => "its name leads to no file now",
            Self::NotRegular => "it is not a regular file",
            Self::DataFile(why) => return why.fmt(f),
            Self::MayNotRemove => "the owner of the journal that lists it may not remove it",
            Self::MayNotWrite => "the owner of the journal that lists it may not write it",
            Self::OutsideAllowed => "it lies outside the allowed folders",
            Self::BaseWritten => "somebody has written to base since the merge was stopped",
            Self::Written => "it was written to since the merge was stopped",
            Self::NoMark => "it bears no mark of the merge",
        })
    }
}

/// Why there is nothing to merge.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NothingReason {
    /// The layer was merged before.
    MergedBefore {
        /// The layer.
        layer: PathBuf,
        /// Into this image, where its name is known.
        base: Option<PathBuf>,
    },
    /// The active image is an empty overlay on base.
    EmptyOverlay {
        /// The active image.
        active: PathBuf,
        /// Base.
        base: PathBuf,
    },
}

impl NothingReason {
    /// The layer at `path` was merged into `base`, whose name is empty where it is not known.
    pub(super) fn merged(path: &Path, base: &Path) -> Self {
        let base = Some(base.to_owned()).filter(|base| !base.as_os_str().is_empty());
        Self::MergedBefore { layer: path.to_owned(), base }
    }
}

impl fmt::Display for NothingReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MergedBefore { layer, base } => {
                let into = base.as_ref().map_or_else(|| "its base".to_owned(), shown);
                write!(f, "{} was already merged into {into}", shown(layer))
            }
            Self::EmptyOverlay { active, base } => {
                write!(f, "{} is an empty overlay on {}", shown(active), shown(base))
            }
        }
    }
}
