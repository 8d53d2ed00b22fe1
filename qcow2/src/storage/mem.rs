//! Files in memory, for tests and fuzzing: the same behaviour as the real ones, without a disk.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::error::Holder;

use super::copy::{CopyError, copy_plain, out_of_range};
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
pub struct MemFile {
    inode: Arc<Inode>,
    access: Access,
    /// What tells this open from others in the inode's list of locks.
    open: u64,
}

#[derive(Debug)]
struct Inode {
    id: u64,
    content: RwLock<Content>,
    owner: RwLock<Owner>,
    locks: Mutex<BTreeMap<u64, LockMode>>,
}

/// The bytes of a file. Pages that are not there read as zeros, so that length costs nothing; clones share
/// pages until one of them writes.
#[derive(Clone, Debug, Default)]
pub(super) struct Content {
    pub(super) len: u64,
    pub(super) pages: BTreeMap<u64, Arc<Page>>,
    /// When it was last changed, by a clock that goes on with each change of any file.
    pub(super) changed: u64,
    /// The time of modification that was set, if that is not when it was last changed.
    pub(super) set: Option<i128>,
    /// When it was made.
    pub(super) born: u64,
}

/// To whom a file belongs unless it is given to somebody: to root, who is the user of this namespace.
const PRIVATE: Owner = Owner { user: 0, group: 0, mode: 0o600 };

const PAGE: u64 = 4096;
pub(super) type Page = [u8; PAGE as usize];

static NEXT: AtomicU64 = AtomicU64::new(1);

/// The clock of all files in memory, in nanoseconds: none is changed at the time of another.
static CLOCK: AtomicU64 = AtomicU64::new(1);

/// The time, which goes on.
fn now() -> u64 {
    CLOCK.fetch_add(1, Ordering::Relaxed)
}

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
    pub(super) fn contents(&self) -> Vec<(PathBuf, u64, Content)> {
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

    /// Puts a file there that has this inode and content.
    pub(super) fn restore(&self, path: &Path, id: u64, content: Content) {
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
    pub fn new() -> Self {
        let inode = Inode {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            content: RwLock::new(Content::new()),
            owner: RwLock::new(PRIVATE),
            locks: Mutex::default(),
        };
        Self::of(Arc::new(inode), Access::ReadWrite)
    }

    fn of(inode: Arc<Inode>, access: Access) -> Self {
        Self { inode, access, open: NEXT.fetch_add(1, Ordering::Relaxed) }
    }

    /// Runs a change of the content, if the file was opened for it.
    fn change<T>(&self, change: impl FnOnce(&mut Content) -> T) -> io::Result<T> {
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
    fn read(&self) -> RwLockReadGuard<'_, Content> {
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

impl Content {
    /// An empty file that is made now.
    fn new() -> Self {
        let born = now();
        Self { born, changed: born, ..Self::default() }
    }

    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> usize {
        let there = usize::try_from(self.len.saturating_sub(offset)).unwrap_or(usize::MAX);
        let n = buf.len().min(there);
        let mut at = offset;
        let mut rest = buf.get_mut(..n).unwrap_or_default();
        while !rest.is_empty() {
            let (number, inside) = (at / PAGE, (at % PAGE) as usize);
            let (piece, behind) = rest.split_at_mut(rest.len().min(PAGE as usize - inside));
            match self.pages.get(&number).and_then(|p| p.get(inside..inside + piece.len())) {
                Some(bytes) => piece.copy_from_slice(bytes),
                None => piece.fill(0),
            }
            at += piece.len() as u64;
            rest = behind;
        }
        n
    }

    pub(super) fn write(&mut self, mut buf: &[u8], mut offset: u64) {
        self.len = self.len.max(offset + buf.len() as u64);
        while !buf.is_empty() {
            let (number, inside) = (offset / PAGE, (offset % PAGE) as usize);
            let (piece, behind) = buf.split_at(buf.len().min(PAGE as usize - inside));
            let page = self.pages.entry(number).or_insert_with(|| Arc::new([0; PAGE as usize]));
            if let Some(bytes) = Arc::make_mut(page).get_mut(inside..inside + piece.len()) {
                bytes.copy_from_slice(piece);
            }
            offset += piece.len() as u64;
            buf = behind;
        }
    }

    /// Makes a range read as zeros: whole pages go, the pages at its ends are filled in part.
    fn zero(&mut self, offset: u64, end: u64) {
        let fill = |page: Option<&mut Arc<Page>>, range: Range<u64>| {
            if let Some(bytes) =
                page.and_then(|p| Arc::make_mut(p).get_mut(range.start as usize..range.end as usize))
            {
                bytes.fill(0);
            }
        };
        let (first, last) = (offset.next_multiple_of(PAGE), end - end % PAGE);
        if first > last {
            // The range lies inside one page.
            fill(self.pages.get_mut(&(offset / PAGE)), offset % PAGE..end % PAGE);
            return;
        }
        if offset < first {
            fill(self.pages.get_mut(&(offset / PAGE)), offset % PAGE..PAGE);
        }
        if last < end {
            fill(self.pages.get_mut(&(last / PAGE)), 0..end % PAGE);
        }
        let mut behind = self.pages.split_off(&(first / PAGE));
        let mut kept = behind.split_off(&(last / PAGE));
        self.pages.append(&mut kept);
    }

    pub(super) fn set_len(&mut self, len: u64) {
        // What lies behind the new end must not come back when the file grows again.
        self.zero(len, self.len.max(len).next_multiple_of(PAGE));
        self.len = len;
    }

    fn next_data(&self, offset: u64) -> Option<Range<u64>> {
        let mut numbers = self.pages.range(offset / PAGE..).map(|(number, _)| *number);
        let first = numbers.next().filter(|number| number * PAGE < self.len)?;
        let behind = numbers.zip(first + 1..).take_while(|(number, next)| number == next).count() as u64;
        let range = offset.max(first * PAGE)..self.len.min((first + 1 + behind) * PAGE);
        (!range.is_empty()).then_some(range)
    }
}

impl Storage for MemFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.inode.read().len)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        checked_end(offset, buf.len() as u64)?;
        Ok(self.inode.read().read(buf, offset))
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

fn checked_end(offset: u64, len: u64) -> io::Result<u64> {
    offset.checked_add(len).filter(|&end| i64::try_from(end).is_ok()).ok_or_else(out_of_range)
}
