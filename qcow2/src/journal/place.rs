//! Where journals lie, and whose they are.

use std::ffi::OsString;
use std::io;
use std::io::ErrorKind;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use super::file::Journal;
use super::record::{Identity, Phase, Purpose, Record, SECTOR};
use crate::error::{Error, FileOp, Refusal, Result};
use crate::storage::{Access, FileKind, Host, Storage};

/// How the names of journals end.
pub const JOURNAL: &str = ".qmerge-journal";
/// How the names of the records of single edits of a header end.
pub(crate) const SWITCH: &str = ".qmerge-switch";
/// The longest name that file systems have, in bytes.
const LONGEST: usize = 255;

/// Looks at what the image at `path` is now.
///
/// # Errors
/// The system's.
pub(crate) fn identity(host: &dyn Host, path: &Path, file: &dyn Storage) -> Result<Identity> {
    let failed = |op| move |e| Error::io(path, op, None, e);
    let stat = file.stat().map_err(failed(FileOp::Stat))?;
    let mut head = [0; SECTOR];
    file.read_exact_or_zero(&mut head, 0).map_err(failed(FileOp::Read))?;
    Ok(Identity {
        path: host.canonicalize(path).map_err(failed(FileOp::Resolve))?,
        id: stat.id,
        is_device: stat.kind == FileKind::Block,
        len: stat.len,
        modified_ns: stat.modified_ns,
        head_crc: crc32fast::hash(&head),
    })
}

/// The name of a file about the image, `.NAME` and an ending, shortened where it would be too long.
fn named(image: &Path, ending: &str) -> OsString {
    let name = image.file_name().unwrap_or_default().as_bytes();
    let mut all = vec![b'.'];
    if 1 + name.len() + ending.len() <= LONGEST {
        all.extend_from_slice(name);
    } else {
        all.extend(name.get(..128).unwrap_or_default());
        all.extend(format!("-{:08x}", crc32fast::hash(name)).bytes());
    }
    all.extend(ending.bytes());
    OsString::from_vec(all)
}

/// The name of such a file among those about images elsewhere, which may have the same name.
fn named_apart(image: &Path, ending: &str) -> OsString {
    let crc = crc32fast::hash(image.as_os_str().as_bytes());
    named(image, &format!("-{crc:08x}{ending}"))
}

/// Where files about the image at `path` lie, beside it and in `dir`, by their names.
///
/// # Errors
/// The system's.
pub(super) fn places(host: &dyn Host, path: &Path, dir: Option<&Path>, ending: &str) -> Result<Vec<PathBuf>> {
    let real = host.canonicalize(path).map_err(|e| Error::io(path, FileOp::Resolve, None, e))?;
    let beside = real.with_file_name(named(&real, ending));
    Ok([Some(beside), dir.map(|dir| dir.join(named_apart(&real, ending)))].into_iter().flatten().collect())
}

/// Where a new journal about the image at `path` goes: into `dir` if given, else beside the image, with
/// symbolic links followed.
///
/// # Errors
/// [`Refusal::JournalPlace`] if the image is a block device or its folder cannot be written, and `dir` was
/// not given, or cannot be written either.
pub(crate) fn place(
    host: &dyn Host,
    path: &Path,
    is_device: bool,
    dir: Option<&Path>,
    ending: &str,
) -> Result<PathBuf> {
    let real = host.canonicalize(path).map_err(|e| Error::io(path, FileOp::Resolve, None, e))?;
    let refused = |why: String| Error::refused(path, Refusal::JournalPlace { why });
    let (folder, name) = match dir {
        Some(dir) => {
            let no_folder = |e: std::io::Error| match e.kind() {
                ErrorKind::NotFound | ErrorKind::NotADirectory | ErrorKind::PermissionDenied => {
                    refused(format!("{}: {e}", dir.display()))
                }
                _ => Error::io(dir, FileOp::Resolve, None, e),
            };
            (host.canonicalize(dir).map_err(no_folder)?, named_apart(&real, ending))
        }
        None if is_device => return Err(refused("it is a block device".to_owned())),
        None => (real.parent().unwrap_or(Path::new("/")).to_owned(), named(&real, ending)),
    };
    host.may_create_in(&folder)
        .map_err(|e| refused(format!("{} cannot be written: {e}", folder.display())))?;
    Ok(folder.join(name))
}

/// The journal about the image in `file`, and its last record, if there is one: in `dir`, or beside it.
///
/// # Errors
/// The system's.
pub(crate) fn find(
    host: &dyn Host,
    path: &Path,
    file: &dyn Storage,
    dir: Option<&Path>,
    access: Access,
    ending: &str,
) -> Result<Option<(Journal, Option<Record>)>> {
    let real = host.canonicalize(path).map_err(|e| Error::io(path, FileOp::Resolve, None, e))?;
    let beside = real.parent().unwrap_or(Path::new("/")).join(named(&real, ending));
    let mut candidates = vec![beside];
    if let Some(dir) = dir {
        // A device may have another name today: what the journals say counts.
        // By its real name, as in `place`: a journal must not be taken for another one than itself.
        let names = match host.canonicalize(dir).and_then(|dir| host.list(&dir)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
            names => names.map_err(|e| Error::io(dir, FileOp::List, None, e))?,
        };
        candidates
            .extend(names.into_iter().filter(|n| n.as_os_str().as_bytes().ends_with(ending.as_bytes())));
    }
    let mut now = None;
    for candidate in candidates {
        // Most images have none: then nothing more is asked.
        match host.stat(&candidate) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            _ => {}
        }
        let Some(found) = Journal::open(host, &candidate, access)? else { continue };
        let now = match &now {
            Some(now) => now,
            None => now.insert(identity(host, path, file)?),
        };
        if found.0.header().targets.first().is_some_and(|target| target.is_same_file(now)) {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// The journal about an image at `path` that is there no more, in `dir` or beside where it was: the last thing
/// that it says is that the image was to be removed.
///
/// # Errors
/// The system's.
pub(crate) fn find_removed(host: &dyn Host, path: &Path, dir: Option<&Path>) -> Result<Option<Journal>> {
    // A folder that is not there holds no journal.
    let Ok(real) = host.resolve(path) else { return Ok(None) };
    let beside = real.with_file_name(named(&real, JOURNAL));
    let elsewhere = dir.map(|dir| dir.join(named_apart(&real, JOURNAL)));
    for candidate in [Some(beside), elsewhere].into_iter().flatten() {
        let Some((journal, Some(last))) = Journal::open(host, &candidate, Access::Read)? else { continue };
        let header = journal.header();
        if header.purpose == Purpose::Empty
            && last.phase == Phase::Removing
            && header.targets.first().is_some_and(|target| target.path == real)
        {
            return Ok(Some(journal));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemHost;

    #[test]
    fn names_are_hidden_and_never_too_long() {
        assert_eq!(named(Path::new("/vm/base.raw"), JOURNAL), ".base.raw.qmerge-journal");
        let long = "b".repeat(255);
        let other = format!("{}c", "b".repeat(254));
        let (a, b) = (named(Path::new(&long), JOURNAL), named(Path::new(&other), JOURNAL));
        assert!(a != b && a.len() <= LONGEST);
    }

    #[test]
    fn a_folder_of_journals_tells_images_of_one_name_apart() {
        let host = MemHost::new();
        host.add("/a/x", b"").unwrap();
        host.add("/b/x", b"").unwrap();
        host.add("/j/keep", b"").unwrap();
        let of = |path: &str| place(&host, Path::new(path), true, Some(Path::new("/j")), JOURNAL).unwrap();
        assert_ne!(of("/a/x"), of("/b/x"));
        assert!(place(&host, Path::new("/a/x"), true, None, JOURNAL).is_err());
    }
}
