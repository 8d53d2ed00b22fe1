//! Folders of the operating system by descriptor: no path is looked up twice, and no link is followed.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path};

use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, RenameFlags, ResolveFlags};
use rustix::io::Errno;

use super::folder::Folder;
use super::{Access, Owner};

/// How every file is opened: a fifo does not block, nothing becomes the terminal, no program that is started gets it.
pub(super) const SAFELY: OFlags =
    OFlags::NONBLOCK.union(OFlags::CLOEXEC).union(OFlags::NOCTTY).union(OFlags::NOFOLLOW);

const FOLDER: OFlags = OFlags::DIRECTORY.union(OFlags::CLOEXEC).union(OFlags::NOFOLLOW);

/// Opens a folder by a path in which nothing is a symbolic link.
pub(super) fn open_folder(path: &Path) -> io::Result<Folder> {
    let handle = match open_either(path, OFlags::RDONLY) {
        // Names may be looked up in a folder that may not be listed.
        Err(Errno::ACCESS) => open_either(path, OFlags::PATH)?,
        opened => opened?,
    };
    let stat = rustix::fs::fstat(&handle)?;
    let owner = Owner { user: stat.st_uid, group: stat.st_gid, mode: stat.st_mode & 0o7777 };
    Ok(Folder::opened(path, owner, handle))
}

fn open_either(path: &Path, how: OFlags) -> rustix::io::Result<OwnedFd> {
    match open_at_once(path, how) {
        // Linux before 5.6, or a filter of system calls that does not know it.
        Err(Errno::NOSYS | Errno::PERM) => open_stepwise(path, how),
        opened => opened,
    }
}

fn open_at_once(path: &Path, how: OFlags) -> rustix::io::Result<OwnedFd> {
    loop {
        match rustix::fs::openat2(CWD, path, FOLDER | how, Mode::empty(), ResolveFlags::NO_SYMLINKS) {
            // Something was renamed meanwhile; or a signal came.
            Err(Errno::AGAIN | Errno::INTR) => {}
            opened => return opened,
        }
    }
}

/// The same, one folder after the other.
fn open_stepwise(path: &Path, how: OFlags) -> rustix::io::Result<OwnedFd> {
    let start = if path.is_absolute() { "/" } else { "." };
    let mut at = rustix::fs::openat(CWD, start, FOLDER | OFlags::PATH, Mode::empty())?;
    for component in path.components() {
        let name = match component {
            Component::Normal(name) => name,
            Component::ParentDir => OsStr::new(".."),
            _ => continue,
        };
        // A folder on the way need not be readable.
        at = rustix::fs::openat(&at, name, FOLDER | OFlags::PATH, Mode::empty())?;
    }
    rustix::fs::openat(&at, ".", FOLDER | how, Mode::empty())
}

/// Opens a file in a folder; a link, or a name of more than one part, is an error.
pub(super) fn open(folder: &Folder, name: &OsStr, access: Access) -> io::Result<File> {
    let how = if access == Access::ReadWrite { OFlags::RDWR } else { OFlags::RDONLY };
    let opened = rustix::fs::openat(folder.handle()?, single(name)?, SAFELY | how, Mode::empty());
    opened.map(File::from).map_err(link_or)
}

/// Creates a file that nobody but its owner may read.
pub(super) fn create(folder: &Folder, name: &OsStr) -> io::Result<File> {
    let flags = SAFELY | OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
    let mode = Mode::RUSR | Mode::WUSR;
    Ok(rustix::fs::openat(folder.handle()?, single(name)?, flags, mode)?.into())
}

/// What has a name in a folder, without opening it: merely opening a device can have effects.
pub(super) fn metadata(folder: &Folder, name: &OsStr) -> io::Result<Metadata> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = rustix::fs::openat(folder.handle()?, single(name)?, flags, Mode::empty())?;
    File::from(found).metadata()
}

pub(super) fn rename(folder: &Folder, from: &OsStr, to: &OsStr) -> io::Result<()> {
    let dir = folder.handle()?;
    Ok(rustix::fs::renameat(dir, single(from)?, dir, single(to)?)?)
}

pub(super) fn rename_new(folder: &Folder, from: &OsStr, to: &OsStr) -> io::Result<()> {
    let dir = folder.handle()?;
    match rustix::fs::renameat_with(dir, single(from)?, dir, single(to)?, RenameFlags::NOREPLACE) {
        // A file system that cannot do it in one step: a second link is refused as a rename ought to be.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            match rustix::fs::linkat(dir, from, dir, to, AtFlags::empty()) {
                Ok(()) => Ok(rustix::fs::unlinkat(dir, from, AtFlags::empty())?),
                Err(Errno::PERM | Errno::NOSYS | Errno::OPNOTSUPP) => match metadata(folder, to) {
                    Ok(_) => Err(ErrorKind::AlreadyExists.into()),
                    Err(e) if e.kind() == ErrorKind::NotFound => rename(folder, from, to),
                    Err(e) => Err(e),
                },
                Err(e) => Err(e.into()),
            }
        }
        done => Ok(done?),
    }
}

pub(super) fn unlink(folder: &Folder, name: &OsStr) -> io::Result<()> {
    Ok(rustix::fs::unlinkat(folder.handle()?, single(name)?, AtFlags::empty())?)
}

pub(super) fn sync(folder: &Folder) -> io::Result<()> {
    match rustix::fs::fsync(folder.handle()?) {
        // A file system that has no barrier for directories; it orders names by itself.
        Err(Errno::INVAL) => Ok(()),
        // It could be opened for looking names up only.
        Err(Errno::BADF) => Err(ErrorKind::PermissionDenied.into()),
        done => Ok(done?),
    }
}

/// The names in a folder, sorted.
pub(super) fn list(folder: &Folder) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    // A descriptor of its own, as the folder's may serve for looking names up only.
    let dir = rustix::fs::openat(folder.handle()?, ".", FOLDER | OFlags::RDONLY, Mode::empty())?;
    for entry in Dir::new(dir)? {
        let name = entry?.file_name().to_bytes().to_vec();
        if name != b"." && name != b".." {
            names.push(OsString::from_vec(name));
        }
    }
    names.sort();
    Ok(names)
}

/// A name that has one part, so that nothing is looked up but it.
fn single(name: &OsStr) -> io::Result<&OsStr> {
    let mut parts = Path::new(name).components();
    match (parts.next(), parts.next()) {
        (Some(Component::Normal(part)), None) if part == name => Ok(name),
        _ => Err(ErrorKind::InvalidInput.into()),
    }
}

/// The error for a symbolic link, where one is not followed.
fn link_or(error: Errno) -> io::Error {
    match error {
        Errno::LOOP => not_a_file("a symbolic link"),
        error => error.into(),
    }
}

/// The error for opening what is not a regular file or a block device.
pub(super) fn not_a_file(what: &str) -> io::Error {
    let text = format!("{what}, not a regular file or a block device");
    io::Error::new(ErrorKind::InvalidInput, text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_link_on_the_way_is_refused_both_ways() {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        fs::create_dir_all(root.join("real/deep")).unwrap();
        symlink("real", root.join("link")).unwrap();
        symlink("deep", root.join("real/last")).unwrap();
        for open in [open_at_once, open_stepwise] {
            for how in [OFlags::RDONLY, OFlags::PATH] {
                let opened = open(&root.join("real/deep"), how).unwrap();
                let named = rustix::fs::stat(root.join("real/deep")).unwrap();
                assert_eq!(rustix::fs::fstat(&opened).unwrap().st_ino, named.st_ino);
                for link in ["link/deep", "real/last", "link", "gone"] {
                    assert!(open(&root.join(link), how).is_err(), "{link}");
                }
            }
        }
    }
}
