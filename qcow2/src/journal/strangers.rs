//! Files beside images that do not count: they belong to somebody who may not write the image.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use super::place::{JOURNAL, SWITCH};
use crate::serial;
use crate::storage::{Host, Place};

/// A file about an image that does not count, as it belongs to somebody who may not write the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Stranger {
    /// The file.
    #[serde(serialize_with = "serial::name")]
    pub file: PathBuf,
    /// The number of the user to whom it belongs.
    pub user: u32,
}

/// The journals and records in `folders` that do not count. What cannot be looked at is passed over.
pub(crate) fn strangers(host: &dyn Host, folders: &[PathBuf]) -> Vec<Stranger> {
    let mut found: Vec<Stranger> = Vec::new();
    for folder in folders {
        for stranger in strangers_in(host, folder, None) {
            if found.iter().all(|known| known.file != stranger.file) {
                found.push(stranger);
            }
        }
    }
    found
}

/// The journals and records beside the image at `path` that are about it and do not count. What cannot be looked at is
/// passed over; nothing is opened but the folder.
pub fn strangers_about(host: &dyn Host, path: &Path) -> Vec<Stranger> {
    let Ok(real) = host.canonicalize(path) else { return Vec::new() };
    match (real.parent(), real.file_name()) {
        (Some(folder), Some(name)) => strangers_in(host, folder, Some(name)),
        _ => Vec::new(),
    }
}

/// Those in a folder; only those about an image of this name, if one is given.
fn strangers_in(host: &dyn Host, folder: &Path, about: Option<&OsStr>) -> Vec<Stranger> {
    let mut found = Vec::new();
    let opened = host.canonicalize(folder).and_then(|folder| host.folder(&folder));
    let Ok(folder) = opened.map(Arc::new) else { return found };
    for name in host.list_in(&folder).unwrap_or_default() {
        let bytes = name.as_bytes().strip_prefix(b".").unwrap_or_default();
        let endings = [JOURNAL, SWITCH].map(|ending| bytes.strip_suffix(ending.as_bytes()));
        let image = endings.into_iter().flatten().next().map(OsStr::from_bytes);
        let Some(image) = image.filter(|image| !image.is_empty() && about.is_none_or(|name| name == *image))
        else {
            continue;
        };
        let image = Place::within(Arc::clone(&folder), image);
        let file = image.beside(&name);
        if let (Ok(image), Ok(stat)) = (image.stat(host), file.stat(host))
            && !stat.owner.may_speak_for(&image.owner, host.user())
        {
            found.push(Stranger { file: file.path(), user: stat.owner.user });
        }
    }
    found
}
