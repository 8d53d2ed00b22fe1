//! Where bytes lie: files, block devices, memory.
//!
//! Everything above this floor reaches files only through two traits: [`Storage`], one opened file,
//! and [`Host`], the namespace that files are opened, created, renamed and removed in. Production
//! code runs on [`OsHost`]; tests and fuzzers run the same code on [`MemHost`].

mod copy;
mod folder;
mod holders;
mod lock;
mod mem;
mod mem_content;
mod os;
mod os_file;
mod os_folder;
mod overlay;
mod owner;
mod pages;
mod rights;
#[cfg(feature = "testing")]
#[doc(hidden)]
pub mod sim;
mod unlocked;
mod view;

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::Holder;

pub use copy::CopyError;
pub(crate) use copy::first_unreadable;
pub(crate) use copy::read_around;
pub use folder::{Folder, Place};
pub(crate) use mem::MemFile;
pub use mem::MemHost;
pub use os::OsHost;
pub(crate) use overlay::{Flush, PageOverlay, locks_of_its_file};
pub use owner::Owner;
pub(crate) use pages::{PAGE, Page, Pages, SECTOR, end_of, pieces};
pub(crate) use unlocked::{lock, may_be_unlocked};
pub use view::FileView;

/// One opened file, block device or memory buffer, shared by threads. All operations are positional.
pub trait Storage: Send + Sync + fmt::Debug {
    /// The length in bytes (the capacity, for a block device).
    fn size(&self) -> io::Result<u64>;

    /// Reads at `offset`; returns how many bytes were read, fewer than asked for only at the end of
    /// the file. Interruptions are retried.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Writes all of `buf` at `offset`, growing a file when needed. Interruptions are retried.
    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// Writes as [`Storage::write_all_at`], over bytes that something durable refers to. Under a journal
    /// such bytes are redone after a power cut that tears them.
    fn write_live(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(buf, offset)
    }

    /// Makes the range read as zeros, without ever using discard on a block device. A regular file
    /// may give the blocks back (a hole); a range behind its end makes it grow.
    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Gives the blocks of an unused range of a regular file back; does nothing where that is not
    /// possible, and never on a block device. The range must lie inside the file.
    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Copies `len` bytes of `src` at `src_offset` to `dst_offset` of this file, inside the kernel
    /// where it can (sharing blocks where the file system can). Bytes behind the end of `src` are
    /// copied as zeros. The ranges do not overlap when `src` is this same file. The error says which side failed.
    fn copy_from(
        &self,
        src: &dyn Storage,
        src_offset: u64,
        dst_offset: u64,
        len: u64,
    ) -> Result<(), CopyError>;

    /// Sets the length of a regular file; an error for a block device if it is too small, nothing if
    /// it is large enough.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// A barrier: everything written before is durable (content and length) when it returns.
    /// A failed barrier is final: nothing may be written afterwards.
    fn sync(&self) -> io::Result<()>;

    /// The next range at or behind `offset` that may hold data other than zeros, or `None` if the
    /// rest of the file is a hole. A storage that cannot tell answers with all the rest.
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>>;

    /// What the file is: identity, size, times. See [`FileStat`].
    fn stat(&self) -> io::Result<FileStat>;

    /// What identifies the file system that the file lies in, also after the system has started again; `None`
    /// where there is no such thing.
    fn file_system(&self) -> Option<u64> {
        None
    }

    /// Takes QEMU-compatible byte locks and tests for those of others; see [`LockMode`]. The locks
    /// last as long as the file is open. Never waits. A second call changes the mode (to a stronger
    /// one); after a failure what was held before is still held. A second open of the same file by this
    /// process conflicts like that of any other. Where the file system has no locks, nothing is locked;
    /// [`Storage::has_locks`] tells that afterwards.
    fn lock(&self, mode: LockMode) -> Result<(), LockError>;

    /// Whether the file system has locks, as far as a lock was asked for.
    fn has_locks(&self) -> bool {
        true
    }

    /// How others use the file at this moment, as far as their locks tell; takes no lock, and so
    /// promises nothing about the next moment.
    fn used_by_others(&self) -> io::Result<Option<LockMode>>;

    /// Gives a new file, which only its owner may read and write, the owner, group, permissions, access list and security label
    /// of the first of `inputs`, as far as the system permits, and as nobody may read it then who may not read all of
    /// them. Nothing where there are no rights.
    fn take_rights(&self, _inputs: &[&dyn Storage]) {}

    /// Asks the system to forget cached pages, so that the next read comes from the device.
    fn drop_cache(&self) -> io::Result<()>;

    /// Asks the system to begin writing a range to the device now, so that a later barrier has less
    /// to wait for. Only a hint.
    fn start_writing(&self, _offset: u64, _len: u64) {}

    /// The operating system's file, where there is one (for copies inside the kernel).
    fn as_file(&self) -> Option<&File> {
        None
    }

    /// A read-only view of the whole content, for a regular file that is held under lock; see [`FileView`].
    /// The file must not be shortened while the view lives.
    fn view(&self) -> Option<FileView> {
        None
    }

    /// Fills all of `buf` from `offset`; bytes behind the end of the file read as zeros. (Metadata of a
    /// qcow2 image may lie in a cluster that the file ends in.)
    fn read_exact_or_zero(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let n = self.read_at(buf, offset)?;
        buf.get_mut(n..).unwrap_or_default().fill(0);
        Ok(())
    }
}

/// What the system says about a name, where "it leads nowhere" is an answer. Any other error is none: the device, the
/// network or the process' limits have failed, and nobody knows whether there is a file.
///
/// # Errors
/// What is no answer.
pub(crate) fn if_there<T>(said: io::Result<T>) -> io::Result<Option<T>> {
    match said {
        Ok(found) => Ok(Some(found)),
        Err(e) if leads_nowhere(&e) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Whether an error says that a name leads to no file that could be an image.
pub fn leads_nowhere(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let answers = [Errno::NOENT, Errno::NOTDIR, Errno::LOOP, Errno::NAMETOOLONG, Errno::INVAL, Errno::ISDIR];
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidInput)
        || Errno::from_io_error(error).is_some_and(|errno| answers.contains(&errno))
}

/// What a file is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A block device.
    Block,
    /// Anything else: directory, fifo, socket, character device; with a word for it.
    Other(&'static str),
}

/// What has a name in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NameKind {
    /// A directory.
    Folder,
    /// A symbolic link, wherever it leads.
    Link,
    /// A file of any kind.
    File,
}

/// The identity of a file: two names lead to the same file exactly if these are equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId {
    /// The device that holds the file (for a block device: zero).
    pub device: u64,
    /// The inode (for a block device: its device number).
    pub inode: u64,
}

/// What the system says about a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileStat {
    /// What it is.
    pub kind: FileKind,
    /// Its identity.
    pub id: FileId,
    /// Its length in bytes (the capacity, for a block device).
    pub len: u64,
    /// Bytes that it holds on disk.
    pub allocated: u64,
    /// When its content was last changed, in nanoseconds since 1970. Programs can set it.
    pub modified_ns: i128,
    /// When the file was last changed in any way (ctime), in nanoseconds since 1970. Programs cannot set it.
    pub changed_ns: i128,
    /// When it was made, in nanoseconds since 1970, where the file system knows that.
    pub born_ns: Option<i128>,
    /// To whom it belongs.
    pub owner: Owner,
}

/// One run of the system, from its start on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Boot {
    /// A number that no other run has.
    pub id: u64,
    /// When it began, in nanoseconds since 1970.
    pub started_ns: i128,
}

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Only reading.
    Read,
    /// Reading and writing.
    ReadWrite,
}

/// Which of QEMU's permissions a lock stands for (`block/file-posix.c`, bytes 100+n and 200+n).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LockMode {
    /// A reader that allows other readers and no writer (a backing file of an open image).
    Read,
    /// The only user: reads, writes and resizes, and shares nothing but what QEMU's `info` needs.
    Write,
}

/// Why a lock was not taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process holds a conflicting lock.
    #[error("held by another process (lock byte {byte})")]
    Held {
        /// The byte that conflicts.
        byte: u64,
    },
    /// The system refused.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The namespace that files live in.
pub trait Host: Send + Sync + fmt::Debug {
    /// Opens an existing file; symbolic links are followed. Never blocks on a fifo: what is not a
    /// regular file or a block device is refused with [`io::ErrorKind::InvalidInput`].
    fn open(&self, path: &Path, access: Access) -> io::Result<Arc<dyn Storage>>;

    /// Opens a block device for reading and writing that nothing of the system uses: a mounted one is
    /// [`io::ErrorKind::ResourceBusy`], and cannot be mounted meanwhile.
    fn open_unused(&self, path: &Path) -> io::Result<Arc<dyn Storage>> {
        self.open(path, Access::ReadWrite)
    }

    /// Creates a new file for reading and writing; an error if the name exists.
    fn create_new(&self, path: &Path) -> io::Result<Arc<dyn Storage>>;

    /// Opens a folder by a path in which nothing is a symbolic link (a link is an error), to look names up in it whatever
    /// becomes of the path.
    ///
    /// The methods that end in `_in`, and [`Host::sync_folder`], take one name in it, and follow no link. They are written
    /// down here for hosts in which a name always leads to the same file.
    fn folder(&self, path: &Path) -> io::Result<Folder> {
        Ok(Folder::named(self.canonicalize(path)?))
    }

    /// Opens a file in a folder as [`Host::open`] does; a symbolic link is refused with [`io::ErrorKind::InvalidInput`].
    fn open_in(&self, folder: &Folder, name: &OsStr, access: Access) -> io::Result<Arc<dyn Storage>> {
        self.open(&folder.path().join(name), access)
    }

    /// Creates a new file that nobody but its owner may read or write; an error if the name exists.
    fn create_in(&self, folder: &Folder, name: &OsStr) -> io::Result<Arc<dyn Storage>> {
        self.create_new(&folder.path().join(name))
    }

    /// What has a name.
    fn stat_in(&self, folder: &Folder, name: &OsStr) -> io::Result<FileStat> {
        self.stat(&folder.path().join(name))
    }

    /// As [`Host::rename`].
    fn rename_in(&self, folder: &Folder, from: &OsStr, to: &OsStr) -> io::Result<()> {
        self.rename(&folder.path().join(from), &folder.path().join(to))
    }

    /// As [`Host::rename_new`].
    fn rename_new_in(&self, folder: &Folder, from: &OsStr, to: &OsStr) -> io::Result<()> {
        self.rename_new(&folder.path().join(from), &folder.path().join(to))
    }

    /// As [`Host::unlink`].
    fn unlink_in(&self, folder: &Folder, name: &OsStr) -> io::Result<()> {
        self.unlink(&folder.path().join(name))
    }

    /// The names in a folder.
    fn list_in(&self, folder: &Folder) -> io::Result<Vec<OsString>> {
        let paths = self.list(folder.path())?;
        Ok(paths.iter().filter_map(|path| path.file_name()).map(OsStr::to_owned).collect())
    }

    /// As [`Host::sync_dir`].
    fn sync_folder(&self, folder: &Folder) -> io::Result<()> {
        self.sync_dir(folder.path())
    }

    /// Whether files can be created in a folder, as far as that can be told without doing so; the error
    /// says why not.
    fn may_create_in(&self, _folder: &Folder) -> io::Result<()> {
        Ok(())
    }

    /// The user with whose rights files are opened.
    fn user(&self) -> u32 {
        0
    }

    /// What a name leads to; symbolic links are followed.
    fn stat(&self, path: &Path) -> io::Result<FileStat>;

    /// The absolute name without symbolic links.
    fn canonicalize(&self, path: &Path) -> io::Result<PathBuf>;

    /// As [`Host::canonicalize`], for a name that need not lead to anything: only its folder must be there.
    fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        Ok(self.canonicalize(folder.unwrap_or(Path::new(".")))?.join(name))
    }

    /// The names in a directory, as full paths.
    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>>;

    /// What has a name in a directory; symbolic links are not followed.
    fn name_kind(&self, _path: &Path) -> io::Result<NameKind> {
        Ok(NameKind::File)
    }

    /// How many names a file has.
    fn links(&self, _path: &Path) -> io::Result<u64> {
        Ok(1)
    }

    /// Gives a file a new name in one step, replacing what had it.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Gives a file a new name; [`io::ErrorKind::AlreadyExists`] if the name exists. In one step where
    /// the system can.
    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()> {
        match self.stat(to) {
            Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => self.rename(from, to),
            Err(e) => Err(e),
        }
    }

    /// Removes a name.
    fn unlink(&self, path: &Path) -> io::Result<()>;

    /// Makes the names in a directory durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;

    /// Bytes that an unprivileged user may still write to the file system of `path`, where known.
    fn free_space(&self, path: &Path) -> io::Result<Option<u64>>;

    /// Whether files of the file system of `path` can share blocks, so that a copy inside it may take no
    /// room.
    fn shares_blocks(&self, _path: &Path) -> bool {
        false
    }

    /// This run of the system, where that is known: files that were written in another one may have lost what was
    /// not durable.
    fn boot(&self) -> Option<Boot> {
        None
    }

    /// The processes other than this one that have the file open, as far as the caller may see.
    fn holders(&self, id: FileId) -> Vec<Holder>;
}

#[cfg(test)]
mod device_tests;
#[cfg(test)]
mod lock_tests;
#[cfg(test)]
mod tests;
