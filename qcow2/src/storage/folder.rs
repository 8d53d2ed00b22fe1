//! Opened folders, and places in them: a name is looked up in the folder that was opened, wherever the path that
//! once led there leads by now.

use std::ffi::{OsStr, OsString};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Access, FileStat, Host, Owner, Storage};
use crate::error::{Error, FileOp, Refusal, Result};

/// An opened folder; see [`Host::folder`].
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    owner: Owner,
    handle: Option<OwnedFd>,
}

impl Folder {
    /// A folder that is known by its name only, of a host whose names lead to the same files at any time.
    pub(crate) fn named(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), owner: Owner { user: 0, group: 0, mode: 0o700 }, handle: None }
    }

    /// A folder of the operating system that was opened by this path.
    pub(super) fn opened(path: &Path, owner: Owner, handle: OwnedFd) -> Self {
        Self { path: path.to_owned(), owner, handle: Some(handle) }
    }

    /// To whom it belonged when it was opened. Its owner may remove and rename every file in it.
    pub(crate) fn owner(&self) -> Owner {
        self.owner
    }

    /// The path by which it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The operating system's folder.
    pub(super) fn handle(&self) -> io::Result<&OwnedFd> {
        self.handle.as_ref().ok_or_else(|| ErrorKind::Unsupported.into())
    }
}

/// A name in an opened folder.
#[derive(Clone, Debug)]
pub struct Place {
    folder: Arc<Folder>,
    name: OsString,
}

impl Place {
    /// Where the file that `path` leads to lies, symbolic links followed.
    ///
    /// # Errors
    /// The system's; a folder that somebody gives another name meanwhile.
    pub(crate) fn of(host: &dyn Host, path: &Path) -> io::Result<Self> {
        Self::at(host, &host.canonicalize(path)?)
    }

    /// As `Place::of`, for a name that need not lead to anything: only its folder must be there.
    ///
    /// # Errors
    /// As `Place::of`.
    pub(crate) fn of_new(host: &dyn Host, path: &Path) -> io::Result<Self> {
        Self::at(host, &host.resolve(path)?)
    }

    /// The place that `path` itself names: the links of its folder are followed, but none that has its last name.
    ///
    /// # Errors
    /// As `Place::of`.
    pub fn named(host: &dyn Host, path: &Path) -> io::Result<Self> {
        let name = path.file_name().ok_or(ErrorKind::InvalidInput)?.to_owned();
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = host.folder(&host.canonicalize(folder.unwrap_or(Path::new(".")))?)?;
        Ok(Self { folder: Arc::new(folder), name })
    }

    /// The place at a path in which nothing is a symbolic link.
    ///
    /// # Errors
    /// The system's; a path with a symbolic link.
    pub(crate) fn at(host: &dyn Host, real: &Path) -> io::Result<Self> {
        let name = real.file_name().ok_or(ErrorKind::InvalidInput)?.to_owned();
        let folder = real.parent().filter(|folder| !folder.as_os_str().is_empty());
        Ok(Self { folder: Arc::new(host.folder(folder.unwrap_or(Path::new(".")))?), name })
    }

    /// Where the opened file lies that `path` led to.
    ///
    /// # Errors
    /// The system's; [`Refusal::NotAsKnown`] if the name leads to another file by now.
    pub(crate) fn of_file(host: &dyn Host, path: &Path, file: &dyn Storage) -> Result<Self> {
        let place = Self::of(host, path).map_err(|e| Error::io(path, FileOp::Resolve, None, e))?;
        let found = place.stat(host).map_err(|e| Error::io(path, FileOp::Stat, None, e))?;
        let opened = file.stat().map_err(|e| Error::io(path, FileOp::Stat, None, e))?;
        if found.id != opened.id { Err(moved(path)) } else { Ok(place) }
    }

    /// The folder.
    pub(crate) fn folder(&self) -> &Folder {
        &self.folder
    }

    /// The name.
    pub fn name(&self) -> &OsStr {
        &self.name
    }

    /// Another name in the same folder.
    pub fn beside(&self, name: impl Into<OsString>) -> Self {
        Self { folder: Arc::clone(&self.folder), name: name.into() }
    }

    /// The same name in another folder.
    pub fn within(folder: Arc<Folder>, name: impl Into<OsString>) -> Self {
        Self { folder, name: name.into() }
    }

    /// The path, to be shown.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join(&self.name)
    }

    /// What has the name; a symbolic link is not followed.
    ///
    /// # Errors
    /// The system's.
    pub fn stat(&self, host: &dyn Host) -> io::Result<FileStat> {
        host.stat_in(&self.folder, &self.name)
    }

    /// Opens what has the name; a symbolic link is an error.
    ///
    /// # Errors
    /// The system's.
    pub fn open(&self, host: &dyn Host, access: Access) -> io::Result<Arc<dyn Storage>> {
        host.open_in(&self.folder, &self.name, access)
    }

    /// Opens what has the name as [`Place::open`] does, if it is the file that is open already, to be written.
    ///
    /// # Errors
    /// [`Refusal::NotAsKnown`] if the name is another file's by now; the system's.
    pub(crate) fn reopen(&self, host: &dyn Host, file: &dyn Storage) -> Result<Arc<dyn Storage>> {
        let path = self.path();
        let id = |file: &dyn Storage| {
            file.stat().map(|stat| stat.id).map_err(|e| Error::io(&path, FileOp::Stat, None, e))
        };
        let again =
            self.open(host, Access::ReadWrite).map_err(|e| Error::io(&path, FileOp::Open, None, e))?;
        if id(&*again)? != id(file)? {
            return Err(moved(&path));
        }
        Ok(again)
    }

    /// Creates a new file that nobody but its owner may read.
    ///
    /// # Errors
    /// The system's; [`ErrorKind::AlreadyExists`].
    pub fn create(&self, host: &dyn Host) -> io::Result<Arc<dyn Storage>> {
        host.create_in(&self.folder, &self.name)
    }

    /// Gives the file another name in its folder, which takes the place of what has that.
    ///
    /// # Errors
    /// The system's.
    pub fn rename(&self, host: &dyn Host, to: &OsStr) -> io::Result<()> {
        host.rename_in(&self.folder, &self.name, to)
    }

    /// Gives the file another name in its folder, which nothing has.
    ///
    /// # Errors
    /// The system's; [`ErrorKind::AlreadyExists`].
    pub(crate) fn rename_new(&self, host: &dyn Host, to: &OsStr) -> io::Result<()> {
        host.rename_new_in(&self.folder, &self.name, to)
    }

    /// Removes the name.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn unlink(&self, host: &dyn Host) -> io::Result<()> {
        host.unlink_in(&self.folder, &self.name)
    }

    /// Removes the name if it is still that of the opened `file`; false if it is not, or there is none.
    ///
    /// # Errors
    /// The system's.
    pub fn unlink_file(&self, host: &dyn Host, file: &dyn Storage) -> io::Result<bool> {
        match self.stat(host) {
            Ok(stat) if stat.id == file.stat()?.id => self.unlink(host).map(|()| true),
            Ok(_) => Ok(false),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Makes the names in the folder durable.
    ///
    /// # Errors
    /// The system's.
    pub fn sync(&self, host: &dyn Host) -> io::Result<()> {
        host.sync_folder(&self.folder)
    }
}

/// The error for a name that leads to another file than the one that was opened.
fn moved(path: &Path) -> Error {
    let what = "its name leads to another file now".to_owned();
    Error::refused(path, Refusal::NotAsKnown { what })
}
