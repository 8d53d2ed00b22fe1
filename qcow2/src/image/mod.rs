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
mod foreign;
pub(crate) mod grow;
mod inflate;
mod lost;
mod map;
#[cfg(test)]
mod map_tests;
mod preallocated;
mod qcow2;
mod raw;
mod read;
pub(crate) mod refcounts;
pub(crate) mod rewrite;
mod snapshot;

use std::path::Path;
use std::sync::Arc;

use serde::{Serialize, Serializer};

use crate::error::{Error, FileOp, Result};
use crate::format::{CONTAINER_HEAD, CONTAINER_TAIL, FULL_HEADER_LENGTH, is_qcow2};
use crate::storage::Storage;
use crate::units::{GuestOffset, GuestRange};

pub use crate::format::{Bitmap, Cluster0, Compression, Container, Geometry, Header, Snapshot};

pub use self::bitmaps::BitmapInfo;
pub(crate) use self::bitmaps::names as bitmap_names;
pub use self::create::{CreateOptions, create, create_raw};
pub(crate) use self::directory::{read_bitmaps, read_snapshots};
pub(crate) use self::extent::push;
pub use self::extent::{CompressedPart, Extent, Mapping};
pub use self::foreign::Foreign;
pub(crate) use self::inflate::Inflater;
pub(crate) use self::lost::Lost;
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
    /// Another format: its bytes are never read as a disk, and never written.
    Foreign(Container),
}

impl Serialize for ImageFormat {
    fn serialize<S: Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        to.serialize_str(self.name())
    }
}

/// Whether an image is encrypted: a LUKS container, or a qcow2 image whose header names an encryption.
///
/// # Errors
/// A file that cannot be read.
pub fn is_encrypted(path: &Path, file: &dyn Storage) -> Result<bool> {
    match ImageFormat::detect(path, file)? {
        ImageFormat::Foreign(container) => Ok(container == Container::Luks),
        ImageFormat::Raw => Ok(false),
        ImageFormat::Qcow2 => {
            let mut head = [0; FULL_HEADER_LENGTH as usize];
            file.read_exact_or_zero(&mut head, 0).map_err(|e| Error::io(path, FileOp::Read, Some(0), e))?;
            Ok(Header::decode(&head).is_ok_and(|header| header.crypt_method != 0))
        }
    }
}

impl ImageFormat {
    /// The format's name as QEMU writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Foreign(container) => container.name(),
        }
    }

    /// The format of that name, if it is known.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "raw" => Some(Self::Raw),
            "qcow2" => Some(Self::Qcow2),
            _ => Container::from_name(name).map(Self::Foreign),
        }
    }

    /// What a file's own bytes say: qcow2 or another format if its magic stands there, else raw. Only for files
    /// that the user names; what an image names is never guessed.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn detect(path: &Path, file: &dyn Storage) -> Result<Self> {
        let read = |len: usize, offset| {
            let mut bytes = vec![0; len];
            let n = file
                .read_at(&mut bytes, offset)
                .map_err(|e| Error::io(path, FileOp::Read, Some(offset), e))?;
            bytes.truncate(n);
            Ok::<_, Error>(bytes)
        };
        let head = read(CONTAINER_HEAD, 0)?;
        let size = file.size().map_err(|e| Error::io(path, FileOp::Size, None, e))?;
        // A qcow2 image is known by its beginning: its last sector may be a bad one.
        let tail = match size.checked_sub(CONTAINER_TAIL as u64).filter(|_| !is_qcow2(&head)) {
            Some(at) => read(CONTAINER_TAIL, at)?,
            None => Vec::new(),
        };
        Ok(match Container::of(&head, &tail) {
            Some(Container::Qcow) => Self::Foreign(Container::Qcow),
            _ if is_qcow2(&head) => Self::Qcow2,
            Some(container) => Self::Foreign(container),
            None => Self::Raw,
        })
    }

    /// Whether what a file looks like (`found`) is no objection to this format, which somebody has stated for it: a
    /// raw disk may begin with many things, and a format that is not read here need not begin with a magic.
    pub fn agrees_with(self, found: Self) -> bool {
        match (self, found) {
            (Self::Raw, Self::Foreign(container)) => container.may_be_raw(),
            (Self::Foreign(Container::Vpc), Self::Foreign(Container::VpcFixed)) => true,
            (Self::Foreign(_), Self::Raw) => true,
            _ => self == found,
        }
    }

    /// As [`ImageFormat::detect`], for a file that is to be read.
    ///
    /// # Errors
    /// [`Error::Foreign`] for a format that is not read here; the file cannot be read.
    pub(crate) fn detect_readable(path: &Path, file: &dyn Storage) -> Result<Self> {
        match Self::detect(path, file)? {
            Self::Foreign(container) => Err(Error::Foreign { path: path.to_owned(), container }),
            format => Ok(format),
        }
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
    /// An image of another format, at the bottom of a chain whose upper layers alone are of interest.
    Foreign(Foreign),
}

impl Image {
    /// Opens an image of a known format. `data_file` is the external data file that its header names,
    /// which the caller has found and opened.
    ///
    /// # Errors
    /// A file that cannot be read, a header that breaks the format's rules or asks for a feature that
    /// is not supported. A file of another format is not looked at.
    pub fn open(
        path: &Path,
        file: Arc<dyn Storage>,
        format: ImageFormat,
        data_file: Option<Arc<dyn Storage>>,
    ) -> Result<Self> {
        Ok(match format {
            ImageFormat::Raw => Self::Raw(Raw::open(path, file)?),
            ImageFormat::Qcow2 => Self::Qcow2(Qcow2::open(path, file, data_file)?),
            ImageFormat::Foreign(container) => Self::Foreign(Foreign::new(path, file, container)),
        })
    }

    /// The size of the disk that the guest sees, in bytes; `Foreign::SIZE` where it is not known.
    pub fn virtual_size(&self) -> u64 {
        match self {
            Self::Raw(raw) => raw.virtual_size(),
            Self::Qcow2(qcow2) => qcow2.virtual_size(),
            Self::Foreign(_) => Foreign::SIZE,
        }
    }

    /// The format.
    pub fn format(&self) -> ImageFormat {
        match self {
            Self::Raw(_) => ImageFormat::Raw,
            Self::Qcow2(_) => ImageFormat::Qcow2,
            Self::Foreign(foreign) => ImageFormat::Foreign(foreign.container()),
        }
    }

    /// The image's path, as it was opened.
    pub fn path(&self) -> &Path {
        match self {
            Self::Raw(raw) => raw.path(),
            Self::Qcow2(qcow2) => qcow2.path(),
            Self::Foreign(foreign) => foreign.path(),
        }
    }

    /// The image file.
    pub fn file(&self) -> &Arc<dyn Storage> {
        match self {
            Self::Raw(raw) => raw.file(),
            Self::Qcow2(qcow2) => qcow2.file(),
            Self::Foreign(foreign) => foreign.file(),
        }
    }

    /// The file that holds plain guest data: the external data file if there is one, else the image file.
    pub(crate) fn data_file(&self) -> &Arc<dyn Storage> {
        match self {
            Self::Raw(raw) => raw.file(),
            Self::Qcow2(qcow2) => qcow2.data_file(),
            Self::Foreign(foreign) => foreign.file(),
        }
    }

    /// The qcow2 image, if it is one.
    pub fn as_qcow2(&self) -> Option<&Qcow2> {
        match self {
            Self::Raw(_) | Self::Foreign(_) => None,
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
            Self::Foreign(foreign) => Err(foreign.refuse()),
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
            Self::Foreign(foreign) => Err(foreign.refuse()),
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
            Self::Foreign(foreign) => Err(foreign.refuse()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::parts;
    use crate::storage::{Access, Host, MemHost};

    #[test]
    fn headers_tell_of_encryption() {
        let host = MemHost::new();
        let is_encrypted = |name: &str, bytes: &[u8]| {
            host.add(name, bytes).unwrap();
            is_encrypted(Path::new(name), &*host.open(Path::new(name), Access::Read).unwrap()).unwrap()
        };
        create(&host, Path::new("new"), &CreateOptions::new(1 << 20)).unwrap();
        let mut bytes = host.content("new").unwrap();
        assert!(!is_encrypted("plain", &bytes));
        bytes[parts::SIZE.end + 3] = 2;
        assert!(is_encrypted("qcow2", &bytes));
        assert!(is_encrypted("luks", b"LUKS\xba\xbe\0\x01rest of the header"));
        assert!(!is_encrypted("raw", b"some bytes"));
    }
}
