//! New files that are not in their place yet, and those that a client left which was killed before it put them there.

use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags, flock};
use tempfile::NamedTempFile;

/// What the names of such files begin with; a few letters follow.
const PREFIX: &str = ".qmerge-new-";
/// How often a new file may be taken away by a client that sweeps, in the moment before it is locked.
const TRIES: u32 = 16;

/// A new file in this folder. It is locked as long as it is open, so that no other client takes it for litter.
pub(super) fn new_file(folder: &Path) -> io::Result<NamedTempFile> {
    for _ in 0..TRIES {
        let new = tempfile::Builder::new().prefix(PREFIX).tempfile_in(folder)?;
        // Where locks are not supported, nobody can sweep either.
        let _ = flock(new.as_file(), FlockOperation::NonBlockingLockExclusive);
        if new.as_file().metadata()?.nlink() > 0 {
            return Ok(new);
        }
    }
    Err(io::Error::other("other clients remove every new file"))
}

/// Removes the files that a client has left in this folder which was killed before they were in their place: those of this
/// user that have such a name, are plain files, and are locked by nobody. Returns what was removed.
///
/// It is a convenience, and reports no errors: such a file does no harm.
pub fn sweep(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let names = entries.filter(|entry| entry.file_name().as_bytes().starts_with(PREFIX.as_bytes()));
    names.map(|entry| entry.path()).filter(|path| take_away(path).unwrap_or(false)).collect()
}

fn take_away(path: &Path) -> io::Result<bool> {
    let user = rustix::process::geteuid().as_raw();
    let named = fs::symlink_metadata(path)?;
    if !named.is_file() || named.uid() != user || named.nlink() != 1 {
        return Ok(false);
    }
    // Not through a link, and not into a pipe, that somebody puts there meanwhile.
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits();
    let file = File::options().read(true).custom_flags(flags.cast_signed()).open(path)?;
    let opened = file.metadata()?;
    let same = |other: &fs::Metadata| (other.dev(), other.ino()) == (opened.dev(), opened.ino());
    if !same(&named) || flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        return Ok(false);
    }
    // Its maker may have put it into its place before it was locked here.
    if !fs::symlink_metadata(path).is_ok_and(|now| same(&now)) {
        return Ok(false);
    }
    fs::remove_file(path).map(|()| true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn only_plain_files_that_nobody_holds_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at(".qmerge-new-dead01"), "half a st").unwrap();
        fs::write(at("theirs"), "x").unwrap();
        symlink(at("theirs"), at(".qmerge-new-link01")).unwrap();
        fs::create_dir(at(".qmerge-new-folder")).unwrap();
        fs::write(at("keep"), "x").unwrap();
        fs::hard_link(at("keep"), at(".qmerge-new-linked")).unwrap();
        fs::write(at(".qmerge-newer"), "x").unwrap();
        let held = new_file(folder.path()).unwrap();
        assert_eq!(sweep(folder.path()), [at(".qmerge-new-dead01")]);
        let held_path = held.path().to_owned();
        let mut left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().path()).collect();
        left.sort();
        let mut expected: Vec<_> = [
            ".qmerge-new-folder",
            ".qmerge-new-link01",
            ".qmerge-new-linked",
            ".qmerge-newer",
            "keep",
            "theirs",
        ]
        .map(at)
        .into();
        expected.push(held_path);
        expected.sort();
        assert_eq!(left, expected);
        drop(held);
        assert!(sweep(&at("nothing")).is_empty());
    }
}
