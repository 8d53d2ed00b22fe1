//! Files in memory, for tests and fuzzing: the same behaviour as the real ones, without a disk.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::error::Holder;

use super::copy::{CopyError, checked_end, copy_plain, out_of_range};
use super::mem_content::{FileContent, PAGE, now};
use super::os_folder::not_a_file;
use super::{Access, Boot, FileId, FileKind, FileStat, Host, LockError, LockMode, NameKind, Owner, Storage};

/// A namespace of files in memory. Clones share it.
///
/// Names are absolute or relative to `/`; there are no links, and a directory exists when a name lies in
/// it (the root always does).
#[derive(Clone, Debug, Default)]
pub struct MemHost {
    files: Arc<RwLock<BTreeMap<PathBuf, Arc<Inode>>>>,
    boot: Arc<MemBoot>,
}

/// A run of a system that has files in memory.
#[derive(Debug)]
struct MemBoot(Boot);

/// One open of a file in memory.
#[derive(Debug)]
pub(crate) struct MemFile {
    inode: Arc<Inode>,
    access: Access,
    /// What tells this open from others in the inode's list of locks.
    open: u64,
}

#[derive(Debug)]
struct Inode {
    id: u64,
    content: RwLock<FileContent>,
    owner: RwLock<Owner>,
    locks: Mutex<BTreeMap<u64, LockMode>>,
}

/// To whom a file belongs unless it is given to somebody: to root, who is the user of this namespace.
const PRIVATE: Owner = Owner { user: 0, group: 0, mode: 0o600 };

static NEXT: AtomicU64 = AtomicU64::new(1);

impl Default for MemBoot {
    fn default() -> Self {
        Self(Boot { id: NEXT.fetch_add(1, Ordering::Relaxed), started_ns: now().into() })
    }
}

impl MemHost {
    /// An empty namespace.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a file with this content there, replacing what had the name.
    pub fn add(&self, path: impl AsRef<Path>, content: &[u8]) -> io::Result<()> {
        let file = MemFile::new();
        file.write_all_at(content, 0)?;
        self.write().insert(absolute(path.as_ref()), Arc::clone(&file.inode));
        Ok(())
    }

    /// The whole content of a file.
    pub fn content(&self, path: impl AsRef<Path>) -> io::Result<Vec<u8>> {
        let file = MemFile::of(self.inode(path.as_ref())?, Access::Read);
        let mut bytes = vec![0; usize::try_from(file.size()?).map_err(|_| out_of_range())?];
        file.read_at(&mut bytes, 0)?;
        Ok(bytes)
    }

    /// Gives a file to somebody.
    ///
    /// # Errors
    /// There is no such file.
    pub fn give(&self, path: impl AsRef<Path>, owner: Owner) -> io::Result<()> {
        *self.inode(path.as_ref())?.owner.write().unwrap_or_else(PoisonError::into_inner) = owner;
        Ok(())
    }

    /// All files: name, inode, content.
    #[cfg(feature = "testing")]
    pub(super) fn contents(&self) -> Vec<(PathBuf, u64, FileContent)> {
        let files = self.read();
        files.iter().map(|(path, inode)| (path.clone(), inode.id, inode.read().clone())).collect()
    }

    /// Sets a file's time of modification, in nanoseconds, as programs can; its time of change is now.
    pub fn set_modified(&self, path: impl AsRef<Path>, modified_ns: i128) -> io::Result<()> {
        let inode = self.inode(path.as_ref())?;
        let mut content = inode.content.write().unwrap_or_else(PoisonError::into_inner);
        (content.changed, content.set) = (now(), Some(modified_ns));
        Ok(())
    }

    /// Makes a file one that was written so many nanoseconds from now.
    pub fn write_later(&self, path: impl AsRef<Path>, later_ns: u64) -> io::Result<()> {
        let inode = self.inode(path.as_ref())?;
        let mut content = inode.content.write().unwrap_or_else(PoisonError::into_inner);
        (content.changed, content.set) = (now().saturating_add(later_ns), None);
        Ok(())
    }

    /// Has every read of a page of a file fail, as on a disk with a bad sector. `offset` lies in the page, which has 4 KiB.
    pub fn spoil(&self, path: impl AsRef<Path>, offset: u64) -> io::Result<()> {
        let inode = self.inode(path.as_ref())?;
        inode.content.write().unwrap_or_else(PoisonError::into_inner).bad.insert(offset / PAGE);
        Ok(())
    }

    /// Puts a file there that has this inode and content.
    #[cfg(feature = "testing")]
    pub(super) fn restore(&self, path: &Path, id: u64, content: FileContent) {
        let (content, owner) = (RwLock::new(content), RwLock::new(PRIVATE));
        let inode = Inode { id, content, owner, locks: Mutex::default() };
        self.write().insert(absolute(path), Arc::new(inode));
    }

    fn read(&self) -> RwLockReadGuard<'_, BTreeMap<PathBuf, Arc<Inode>>> {
        self.files.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, BTreeMap<PathBuf, Arc<Inode>>> {
        self.files.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn inode(&self, path: &Path) -> io::Result<Arc<Inode>> {
        let path = absolute(path);
        if let Some(inode) = self.read().get(&path) {
            return Ok(Arc::clone(inode));
        }
        if self.is_dir(&path) { Err(not_a_file("a directory")) } else { Err(ErrorKind::NotFound.into()) }
    }

    fn is_dir(&self, path: &Path) -> bool {
        path == Path::new("/") || self.read().keys().any(|name| name != path && name.starts_with(path))
    }
}

impl Host for MemHost {
    fn open(&self, path: &Path, access: Access) -> io::Result<Arc<dyn Storage>> {
        Ok(Arc::new(MemFile::of(self.inode(path)?, access)))
    }

    fn create_new(&self, path: &Path) -> io::Result<Arc<dyn Storage>> {
        let path = absolute(path);
        if self.is_dir(&path) {
            return Err(ErrorKind::AlreadyExists.into());
        }
        let mut files = self.write();
        if files.contains_key(&path) {
            return Err(ErrorKind::AlreadyExists.into());
        }
        let file = MemFile::new();
        files.insert(path, Arc::clone(&file.inode));
        Ok(Arc::new(file))
    }

    fn stat(&self, path: &Path) -> io::Result<FileStat> {
        match self.inode(path) {
            Ok(inode) => Ok(inode.stat()),
            Err(e) if e.kind() == ErrorKind::InvalidInput => Ok(FileStat {
                kind: FileKind::Other("a directory"),
                id: FileId { device: u64::MAX, inode: 0 },
                len: 0,
                allocated: 0,
                modified_ns: 0,
                changed_ns: 0,
                born_ns: None,
                owner: PRIVATE,
            }),
            Err(e) => Err(e),
        }
    }

    fn canonicalize(&self, path: &Path) -> io::Result<PathBuf> {
        self.stat(path)?;
        Ok(absolute(path))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        let dir = absolute(dir);
        if !self.is_dir(&dir) {
            return Err(if self.read().contains_key(&dir) {
                ErrorKind::NotADirectory.into()
            } else {
                ErrorKind::NotFound.into()
            });
        }
        let files = self.read();
        let inside = files.keys().filter_map(|name| name.strip_prefix(&dir).ok());
        let mut names: Vec<_> = inside.filter_map(|n| Some(dir.join(n.components().next()?))).collect();
        names.sort();
        names.dedup();
        Ok(names)
    }

    fn name_kind(&self, path: &Path) -> io::Result<NameKind> {
        Ok(if self.is_dir(&absolute(path)) { NameKind::Folder } else { NameKind::File })
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let to = absolute(to);
        if self.is_dir(&to) {
            return Err(ErrorKind::IsADirectory.into());
        }
        let mut files = self.write();
        let inode = files.remove(&absolute(from)).ok_or(ErrorKind::NotFound)?;
        files.insert(to, inode);
        Ok(())
    }

    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()> {
        let to = absolute(to);
        let is_dir = self.is_dir(&to);
        let mut files = self.write();
        if is_dir || files.contains_key(&to) {
            return Err(ErrorKind::AlreadyExists.into());
        }
        let inode = files.remove(&absolute(from)).ok_or(ErrorKind::NotFound)?;
        files.insert(to, inode);
        Ok(())
    }

    fn unlink(&self, path: &Path) -> io::Result<()> {
        self.write().remove(&absolute(path)).map(|_| ()).ok_or_else(|| ErrorKind::NotFound.into())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        if self.is_dir(&absolute(dir)) { Ok(()) } else { Err(ErrorKind::NotFound.into()) }
    }

    fn free_space(&self, _path: &Path) -> io::Result<Option<u64>> {
        Ok(None)
    }

    fn boot(&self) -> Option<Boot> {
        Some(self.boot.0)
    }

    fn holders(&self, _id: FileId) -> Vec<Holder> {
        Vec::new()
    }
}

impl MemFile {
    /// A new empty file that has no name.
    pub(crate) fn new() -> Self {
        let inode = Inode {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            content: RwLock::new(FileContent::new()),
            owner: RwLock::new(PRIVATE),
            locks: Mutex::default(),
        };
        Self::of(Arc::new(inode), Access::ReadWrite)
    }

    fn of(inode: Arc<Inode>, access: Access) -> Self {
        Self { inode, access, open: NEXT.fetch_add(1, Ordering::Relaxed) }
    }

    /// Runs a change of the content, if the file was opened for it.
    fn change<T>(&self, change: impl FnOnce(&mut FileContent) -> T) -> io::Result<T> {
        if self.access == Access::Read {
            return Err(io::Error::new(ErrorKind::PermissionDenied, "the file is open for reading only"));
        }
        let mut content = self.inode.content.write().unwrap_or_else(PoisonError::into_inner);
        (content.changed, content.set) = (now(), None);
        Ok(change(&mut content))
    }
}

impl Default for MemFile {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for MemFile {
    fn drop(&mut self) {
        self.inode.locks().remove(&self.open);
    }
}

impl Inode {
    fn read(&self) -> RwLockReadGuard<'_, FileContent> {
        self.content.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn locks(&self) -> MutexGuard<'_, BTreeMap<u64, LockMode>> {
        self.locks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stat(&self) -> FileStat {
        let content = self.read();
        FileStat {
            kind: FileKind::Regular,
            id: FileId { device: u64::MAX, inode: self.id },
            len: content.len,
            allocated: (content.pages.len() as u64).saturating_mul(PAGE),
            modified_ns: content.set.unwrap_or(content.changed.into()),
            changed_ns: content.changed.into(),
            born_ns: Some(content.born.into()),
            owner: *self.owner.read().unwrap_or_else(PoisonError::into_inner),
        }
    }
}

impl Storage for MemFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.inode.read().len)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let end = checked_end(offset, buf.len() as u64)?;
        let content = self.inode.read();
        let mut bad = content.bad.range(offset / PAGE..end.div_ceil(PAGE));
        // A hole has no sectors.
        if bad.any(|page| content.pages.contains_key(page)) {
            return Err(io::Error::other("a bad sector"));
        }
        Ok(content.read(buf, offset))
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        checked_end(offset, buf.len() as u64)?;
        self.change(|content| {
            if !buf.is_empty() {
                content.write(buf, offset)
            }
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = checked_end(offset, len)?;
        self.change(|content| {
            if len > 0 {
                content.zero(offset, end);
                content.len = content.len.max(end);
            }
        })
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = checked_end(offset, len)?;
        self.change(|content| content.zero(offset, end))
    }

    fn copy_from(
        &self,
        src: &dyn Storage,
        src_offset: u64,
        dst_offset: u64,
        len: u64,
    ) -> Result<(), CopyError> {
        let end =
            checked_end(src_offset, len).map_err(|e| CopyError::Read { offset: src_offset, source: e })?;
        checked_end(dst_offset, len).map_err(CopyError::write(dst_offset))?;
        let mut at = src_offset;
        while at < end {
            let data = src.next_data(at).map_err(|e| CopyError::Read { offset: at, source: e })?;
            let data = data.filter(|d| d.start < end).unwrap_or(end..end);
            let stop = data.end.min(end);
            let to = dst_offset + (at - src_offset);
            self.write_zeroes(to, data.start - at).map_err(CopyError::write(to))?;
            copy_plain(src, data.start, self, dst_offset + (data.start - src_offset), stop - data.start)?;
            at = stop;
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        checked_end(len, 0)?;
        self.change(|content| content.set_len(len))
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        Ok(self.inode.read().next_data(offset))
    }

    fn stat(&self) -> io::Result<FileStat> {
        Ok(self.inode.stat())
    }

    fn lock(&self, mode: LockMode) -> Result<(), LockError> {
        let mut locks = self.inode.locks();
        for (_, &other) in locks.iter().filter(|(open, _)| **open != self.open) {
            match (mode, other) {
                (LockMode::Read, LockMode::Read) => {}
                (LockMode::Read, LockMode::Write) => return Err(LockError::Held { byte: 101 }),
                (LockMode::Write, _) => return Err(LockError::Held { byte: 201 }),
            }
        }
        let held = locks.entry(self.open).or_insert(mode);
        *held = mode.max(*held);
        Ok(())
    }

    fn used_by_others(&self) -> io::Result<Option<LockMode>> {
        let locks = self.inode.locks();
        Ok(locks.iter().filter(|(open, _)| **open != self.open).map(|(_, &mode)| mode).max())
    }

    fn drop_cache(&self) -> io::Result<()> {
        Ok(())
    }
}

/// The name from the root, without `.` and `..`.
fn absolute(path: &Path) -> PathBuf {
    let mut parts: Vec<OsString> = Vec::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => parts.push(name.to_owned()),
            Component::ParentDir => drop(parts.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    Path::new("/").join(parts.iter().collect::<PathBuf>())
}
