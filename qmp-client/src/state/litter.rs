//! Makes new files under temporary names, and removes those of clients that were killed before they gave them
//! their names.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qcow2::storage::{Access, FileKind, Host, OsHost, Place, Storage};
use rustix::fs::{FlockOperation, flock};

use super::folder;
use crate::block::ids::unique;

/// How the temporary names begin; a few letters follow.
const PREFIX: &str = ".qmerge-new-";
/// How often to try again if a sweeping client removes the new file before it is locked, or if the name is
/// taken.
const TRIES: u32 = 16;

/// A new file under a temporary name. It is locked as long as it is open, so that no other client takes it for
/// litter. It is removed when dropped, unless it got its name.
pub(super) struct NewFile {
    place: Place,
    file: Arc<dyn Storage>,
    is_put: bool,
}

impl NewFile {
    /// A new file in the folder of another one.
    pub(super) fn beside(other: &Place) -> io::Result<Self> {
        for _ in 0..TRIES {
            let place = other.beside(format!("{PREFIX}{}", unique()));
            let file = match place.create(&OsHost) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
                created => created?,
            };
            let new = Self { place, file, is_put: false };
            // Without locks nobody sweeps, so no lock is needed.
            let _ = lock(&*new.file);
            if system_file(&*new.file)?.metadata()?.nlink() > 0 {
                return Ok(new);
            }
        }
        Err(io::Error::other("other clients remove every new file"))
    }

    /// Writes it, durably.
    pub(super) fn write_all(&self, text: &[u8]) -> io::Result<()> {
        self.file.write_all_at(text, 0)?;
        self.file.sync()
    }

    /// Gives it a name in its folder. A file with that name is replaced.
    pub(super) fn put(mut self, name: &OsStr) -> io::Result<()> {
        self.place.rename(&OsHost, name)?;
        self.is_put = true;
        Ok(())
    }

    #[cfg(test)]
    fn path(&self) -> PathBuf {
        self.place.path()
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.is_put {
            // If that fails, the file does no harm, and the next client sweeps it.
            let _ = self.place.unlink_file(&OsHost, &*self.file);
        }
    }
}

/// Removes the temporary files of killed clients in this folder: regular files of this user with such a name
/// that nobody has locked. Returns what was removed.
///
/// Errors are ignored, because such a file does no harm.
pub fn sweep(folder: &Path) -> Vec<PathBuf> {
    let Ok(opened) = folder::open(folder) else { return Vec::new() };
    let names = folder::names(&opened, PREFIX, "").unwrap_or_default();
    let places = names.into_iter().map(|name| Place::within(Arc::clone(&opened), name));
    places.filter(|place| take_away(place).unwrap_or(false)).map(|place| folder.join(place.name())).collect()
}

fn take_away(place: &Place) -> io::Result<bool> {
    let named = place.stat(&OsHost)?;
    if named.kind != FileKind::Regular || named.owner.user != OsHost.user() {
        return Ok(false);
    }
    // Follow no link, and do not block on a pipe, that somebody puts there meanwhile.
    let file = place.open(&OsHost, Access::Read)?;
    let has_one_name = system_file(&*file)?.metadata()?.nlink() == 1;
    if !has_one_name || file.stat()?.id != named.id || lock(&*file).is_err() {
        return Ok(false);
    }
    // Its maker may have given it its final name before it was locked here: then this name is gone.
    place.unlink_file(&OsHost, &*file)
}

fn lock(file: &dyn Storage) -> io::Result<()> {
    Ok(flock(system_file(file)?, FlockOperation::NonBlockingLockExclusive)?)
}

fn system_file(file: &dyn Storage) -> io::Result<&File> {
    file.as_file().ok_or_else(|| ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
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
        let held = NewFile::beside(&folder::place(&at("state")).unwrap().unwrap()).unwrap();
        assert_eq!(sweep(folder.path()), [at(".qmerge-new-dead01")]);
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
        expected.push(at(held.path().file_name().unwrap().to_str().unwrap()));
        expected.sort();
        assert_eq!(left, expected);
        drop(held);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), expected.len() - 1, "it removes itself");
        assert!(sweep(&at("nothing")).is_empty());
    }
}
