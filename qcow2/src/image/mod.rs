//! One opened image, raw or qcow2: what it maps where, and the bytes behind it.
//!
//! Invariants: nothing is opened here that the caller did not hand in; a mapping is decoded and
//! checked before anything is read through it; no table is held in memory, so memory does not grow
//! with the image.

pub(crate) mod alloc;
pub(crate) mod bitmaps;
pub(crate) mod create;
mod directory;
pub(crate) mod edits;
mod extent;
pub(crate) mod grow;
mod inflate;
mod map;
mod preallocated;
mod qcow2;
mod raw;
mod read;
pub(crate) mod refcounts;

use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, FileOp, Result};
use crate::format::is_qcow2;
use crate::storage::Storage;
use crate::units::{GuestOffset, GuestRange};

pub use self::bitmaps::{BitmapInfo, names as bitmap_names};
pub use self::create::{CreateOptions, create, create_raw};
pub use self::directory::{read_bitmaps, read_snapshots};
pub(crate) use self::extent::push;
pub use self::extent::{CompressedPart, Extent, Mapping};
pub use self::inflate::Inflater;
pub use self::qcow2::Qcow2;
pub use self::raw::Raw;
pub use self::read::ClusterCache;

/// The formats that this engine knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageFormat {
    /// The guest's bytes as they are.
    Raw,
    /// qcow2, version 2 or 3.
    Qcow2,
}

impl ImageFormat {
    /// The format's name as QEMU writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }

    /// The format of that name, if it is known.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "raw" => Some(Self::Raw),
            "qcow2" => Some(Self::Qcow2),
            _ => None,
        }
    }

    /// What the first bytes of a file say: qcow2 if its magic stands there, else raw. Only for files
    /// that the user names; what an image names is never guessed.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn detect(path: &Path, file: &dyn Storage) -> Result<Self> {
        let mut magic = [0; 4];
        let n = file.read_at(&mut magic, 0).map_err(|e| Error::io(path, FileOp::Read, Some(0), e))?;
        Ok(if is_qcow2(&magic[..n]) { Self::Qcow2 } else { Self::Raw })
    }
}

/// An opened image.
// A chain holds a handful of these; a box around the larger one would only cost clarity.
#[allow(clippy::large_enum_variant)]
#[derive(Debug)]
pub enum Image {
    /// A raw image.
    Raw(Raw),
    /// A qcow2 image.
    Qcow2(Qcow2),
}

impl Image {
    /// Opens an image of a known format. `data_file` is the external data file that its header names,
    /// which the caller has found and opened.
    ///
    /// # Errors
    /// A file that cannot be read, a header that breaks the format's rules or asks for a feature that
    /// is not supported.
    pub fn open(
        path: &Path,
        file: Arc<dyn Storage>,
        format: ImageFormat,
        data_file: Option<Arc<dyn Storage>>,
    ) -> Result<Self> {
        Ok(match format {
            ImageFormat::Raw => Self::Raw(Raw::open(path, file)?),
            ImageFormat::Qcow2 => Self::Qcow2(Qcow2::open(path, file, data_file)?),
        })
    }

    /// The size of the disk that the guest sees, in bytes.
    pub fn virtual_size(&self) -> u64 {
        match self {
            Self::Raw(raw) => raw.virtual_size(),
            Self::Qcow2(qcow2) => qcow2.virtual_size(),
        }
    }

    /// The format.
    pub fn format(&self) -> ImageFormat {
        match self {
            Self::Raw(_) => ImageFormat::Raw,
            Self::Qcow2(_) => ImageFormat::Qcow2,
        }
    }

    /// The image's path, as it was opened.
    pub fn path(&self) -> &Path {
        match self {
            Self::Raw(raw) => raw.path(),
            Self::Qcow2(qcow2) => qcow2.path(),
        }
    }

    /// The image file.
    pub fn file(&self) -> &Arc<dyn Storage> {
        match self {
            Self::Raw(raw) => raw.file(),
            Self::Qcow2(qcow2) => qcow2.file(),
        }
    }

    /// The file that holds plain guest data: the external data file if there is one, else the image file.
    pub fn data_file(&self) -> &Arc<dyn Storage> {
        match self {
            Self::Raw(raw) => raw.file(),
            Self::Qcow2(qcow2) => qcow2.data_file(),
        }
    }

    /// The qcow2 image, if it is one.
    pub fn as_qcow2(&self) -> Option<&Qcow2> {
        match self {
            Self::Raw(_) => None,
            Self::Qcow2(qcow2) => Some(qcow2),
        }
    }

    /// Appends how the image maps `range` to `out`, sorted and without gaps. What lies behind the
    /// image's end is not reported.
    ///
    /// # Errors
    /// A table that cannot be read, or an entry that breaks the format's rules.
    pub fn map(&self, range: GuestRange, out: &mut Vec<Extent>) -> Result<()> {
        match self {
            Self::Raw(raw) => raw.map(range, out),
            Self::Qcow2(qcow2) => qcow2.map(range, out),
        }
    }

    /// The first offset at or behind `from` where something may be allocated, found without reading
    /// L2 tables; `None` if there is nothing up to the image's end.
    ///
    /// # Errors
    /// A table that cannot be read.
    pub fn next_allocated(&self, from: GuestOffset) -> Result<Option<GuestOffset>> {
        match self {
            Self::Raw(raw) => raw.next_allocated(from),
            Self::Qcow2(qcow2) => qcow2.next_allocated(from),
        }
    }

    /// As [`Image::next_allocated`], also behind the image's end: what would come to light there if the
    /// disk grew.
    ///
    /// # Errors
    /// A table that cannot be read.
    pub(crate) fn next_held(&self, from: GuestOffset) -> Result<Option<GuestOffset>> {
        match self {
            Self::Raw(raw) => raw.next_allocated(from),
            Self::Qcow2(qcow2) => qcow2.next_table(from),
        }
    }
}
