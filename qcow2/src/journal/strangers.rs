//! Finds journals that do not count, because their owner may not write the image.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use super::place::{JOURNAL, SWITCH};
use crate::serial;
use crate::storage::{Host, Place};

/// A journal or record that does not count, because its owner may not write the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Stranger {
    /// The file.
    #[serde(serialize_with = "serial::name")]
    pub file: PathBuf,
    /// The user id of its owner.
    pub user: u32,
}

/// The journals and records in `folders` that do not count. Files that cannot be looked at are skipped.
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

/// The journals and records about the image at `path`, beside it, that do not count. Files that cannot be
/// looked at are skipped; nothing but the folder is opened.
pub fn strangers_about(host: &dyn Host, path: &Path) -> Vec<Stranger> {
    let Ok(real) = host.canonicalize(path) else { return Vec::new() };
    match (real.parent(), real.file_name()) {
        (Some(folder), Some(name)) => strangers_in(host, folder, Some(name)),
        _ => Vec::new(),
    }
}

/// The ones in a folder; if a name is given, only those about an image of that name.
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
