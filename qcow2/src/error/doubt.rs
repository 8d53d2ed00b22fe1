//! Why it is not proved that a file is the one that an image meant.

use std::ffi::OsString;
use std::path::PathBuf;

use super::shown;
use crate::units::GuestOffset;

/// Why nothing proves that the file of a new name is the file that an image was made with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Doubt {
    /// The old name leads to nothing.
    #[error("nothing is left at {} to compare it with", shown(old))]
    Gone {
        /// The old name, as resolved.
        old: PathBuf,
    },
    /// The old name does not lead to a local file.
    #[error("the name that stands in the header, '{}', cannot be followed: {why}", shown(old))]
    NotLocal {
        /// The old name as written.
        old: OsString,
        /// Why not.
        why: String,
    },
    /// The header does not say in which format the old file was read.
    #[error("the header does not say in which format {} was read", shown(old))]
    NoFormat {
        /// The old file.
        old: PathBuf,
    },
    /// The header says another format for the same file.
    #[error("so far the file was read as {old}, and as {new} it is another disk")]
    Format {
        /// The format that the header says.
        old: String,
        /// The format that it would say.
        new: &'static str,
    },
    /// The disks are not of one size.
    #[error("it is a disk of {new} bytes, and {}, which is still there, one of {size} bytes", shown(old))]
    Size {
        /// The old file.
        old: PathBuf,
        /// The size of its disk, in bytes.
        size: u64,
        /// The size of the new one's disk, in bytes.
        new: u64,
    },
    /// The disks hold different bytes.
    #[error("{}, which is still there, holds other bytes, first at guest offset {at}", shown(old))]
    Content {
        /// The old file.
        old: PathBuf,
        /// The first byte that differs.
        at: GuestOffset,
    },
    /// The size does not fit the image above.
    #[error("it is a disk of {size} bytes under one of {above} bytes")]
    Fit {
        /// The size of its disk, in bytes.
        size: u64,
        /// The size of the disk of the image that names it, in bytes.
        above: u64,
    },
    /// One of the two cannot be read.
    #[error("the two cannot be compared: {why}")]
    Unreadable {
        /// What failed.
        why: String,
    },
}

impl Doubt {
    /// A stable word for it.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Gone { .. } => "old-file-gone",
            Self::NotLocal { .. } => "old-name-not-local",
            Self::NoFormat { .. } => "old-format-unknown",
            Self::Format { .. } => "other-format",
            Self::Size { .. } | Self::Fit { .. } => "other-size",
            Self::Content { .. } => "other-content",
            Self::Unreadable { .. } => "unreadable",
        }
    }
}
