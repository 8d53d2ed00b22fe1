//! External data files: which of them may be written, emptied or removed with the image that names them.
//!
//! Whoever wrote an image chose the name of its data file, and may have chosen any file of the host. So the
//! engine asks this module before it writes, empties or removes one.

use std::fmt;
use std::path::PathBuf;

use crate::error::{Error, FileOp, Result};
use crate::storage::{FileId, FileKind, Host, Place, Storage};

/// The external data file of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DataFile {
    /// Its path, as resolved.
    pub path: PathBuf,
    /// Its name as written in the image.
    pub written_name: Vec<u8>,
    /// Its identity.
    pub id: FileId,
    /// Why it is kept as it is when the image becomes obsolete; `None` if it may be emptied and removed with
    /// the image.
    pub kept: Option<DataFileKept>,
    /// Whether guest data may be written to it: everybody who may write the image may also write it, or the
    /// caller has allowed its folder by name.
    pub may_write: bool,
}

/// Why a data file stays as it is when the image that names it becomes obsolete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DataFileKept {
    /// It is a block device.
    NotRegular,
    /// It lies in another folder than the image.
    Elsewhere,
    /// The image's owner may not write it.
    OtherOwner,
}

impl fmt::Display for DataFileKept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotRegular => "it is not a regular file",
            Self::Elsewhere => "only the image names it, and it lies in another folder",
            Self::OtherOwner => "only the image names it, and the image's owner may not write it",
        })
    }
}

/// Whether everybody who may write the image may also write the data file that it names. Without this check, a
/// header written by one user could have root write the file of another.
///
/// # Errors
/// The system's.
pub(super) fn may_write(host: &dyn Host, image: &dyn Storage, data: &dyn Storage) -> std::io::Result<bool> {
    Ok(image.stat()?.owner.may_speak_for(&data.stat()?.owner, host.user()))
}

/// Why a data file must not be emptied or removed with the image that names it; `None` if it may be. Both files
/// are given with the paths that led to them.
///
/// # Errors
/// The system's; a path that leads to another file by now.
pub(super) fn kept(
    host: &dyn Host,
    (image_path, image): (&std::path::Path, &dyn Storage),
    (data_path, data): (&std::path::Path, &dyn Storage),
    may_write: bool,
) -> Result<Option<DataFileKept>> {
    let image = Place::of_file(host, image_path, image)?;
    let place = Place::of_file(host, data_path, data)?;
    let kind = place.stat(host).map_err(|e| Error::io(data_path, FileOp::Stat, None, e))?.kind;
    Ok(if kind != FileKind::Regular {
        Some(DataFileKept::NotRegular)
    } else if image.folder().path() != place.folder().path() {
        Some(DataFileKept::Elsewhere)
    } else if !may_write {
        Some(DataFileKept::OtherOwner)
    } else {
        None
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::storage::{Access, MemHost, Owner};

    #[test]
    fn a_data_file_belongs_to_an_image_beside_it_of_the_same_owner() {
        let host = MemHost::new();
        for path in ["/vm/image", "/vm/data", "/etc/conf"] {
            host.add(path, b"").unwrap();
            host.give(path, Owner { user: 1, group: 1, mode: 0o644 }).unwrap();
        }
        let look = |name: &str| {
            let open = |path: &str| host.open(Path::new(path), Access::Read).unwrap();
            let (image, data) = (open("/vm/image"), open(name));
            let may_write = may_write(&host, &*image, &*data).unwrap();
            let image = (Path::new("/vm/image"), &*image);
            (may_write, kept(&host, image, (Path::new(name), &*data), may_write).unwrap())
        };
        assert_eq!(look("/vm/data"), (true, None));
        assert_eq!(look("/etc/conf"), (true, Some(DataFileKept::Elsewhere)));
        host.give("/vm/data", Owner { user: 0, group: 0, mode: 0o644 }).unwrap();
        assert_eq!(look("/vm/data"), (false, Some(DataFileKept::OtherOwner)));
        host.give("/vm/data", Owner { user: 0, group: 0, mode: 0o666 }).unwrap();
        assert_eq!(look("/vm/data"), (true, None));
    }
}
