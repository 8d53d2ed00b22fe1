//! Files beside images that do not count: they belong to somebody who may not write the image.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;

use super::place::{JOURNAL, SWITCH};
use crate::storage::{Host, Place};

/// A file about an image that does not count, as it belongs to somebody who may not write the image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stranger {
    /// The file.
    pub file: PathBuf,
    /// The number of the user to whom it belongs.
    pub user: u32,
}

/// The journals and records in `folders` that do not count. What cannot be looked at is passed over.
pub(crate) fn strangers(host: &dyn Host, folders: &[PathBuf]) -> Vec<Stranger> {
    let mut found: Vec<Stranger> = Vec::new();
    for folder in folders {
        let Ok(folder) = host.canonicalize(folder).and_then(|folder| host.folder(&folder)) else { continue };
        let folder = Arc::new(folder);
        for name in host.list_in(&folder).unwrap_or_default() {
            let bytes = name.as_bytes().strip_prefix(b".").unwrap_or_default();
            let endings = [JOURNAL, SWITCH].map(|ending| bytes.strip_suffix(ending.as_bytes()));
            let Some(image) = endings.into_iter().flatten().next().filter(|image| !image.is_empty()) else {
                continue;
            };
            let image = Place::within(Arc::clone(&folder), OsStr::from_bytes(image));
            let file = image.beside(&name);
            if let (Ok(image), Ok(stat)) = (image.stat(host), file.stat(host))
                && !stat.owner.may_speak_for(&image.owner, host.user())
                && found.iter().all(|stranger| stranger.file != file.path())
            {
                found.push(Stranger { file: file.path(), user: stat.owner.user });
            }
        }
    }
    found
}
