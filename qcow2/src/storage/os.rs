//! Files and block devices of the operating system.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use rustix::fs::{Access as RightsTo, Advice, AtFlags, CWD, FallocateFlags, OFlags, RenameFlags, SeekFrom};
use rustix::io::Errno;

use crate::error::Holder;

use super::copy::{CopyError, copy_in_kernel, copy_plain, least_kernel_copy, out_of_range};
use super::holders::id_of;
use super::os_folder::not_a_file;
use super::view::View;
use super::{
    Access, Boot, FileId, FileKind, FileStat, Folder, Host, LockError, LockMode, NameKind, Owner, Storage,
    holders, leads_nowhere, lock, os_folder, rights,
};

/// The real file system.
#[derive(Clone, Copy, Debug, Default)]
pub struct OsHost;

/// An opened regular file or block device.
#[derive(Debug)]
pub struct OsFile {
    file: File,
    kind: FileKind,
    locked: Mutex<Option<LockMode>>,
    /// The file system has turned out to have no locks.
    no_locks: AtomicBool,
    no_kernel_copy: AtomicBool,
    least_kernel_copy: u64,
    /// One sync at a time: the system reports a failure to one caller only.
    syncing: Mutex<()>,
    failed_sync: OnceLock<(ErrorKind, String)>,
}

/// Zeros to write where nothing better works, in bytes.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// The alignment of requests that block devices zero by themselves, in bytes. No common device has
/// larger logical blocks; one that has refuses, and gets zeros written.
const DEVICE_BLOCK: u64 = 4096;

/// How many symbolic links are followed, as in the kernel.
const MAX_LINKS: usize = 40;

impl OsHost {
    /// Opens a file like [`Host::open`], as its own type.
    pub fn open_file(&self, path: &Path, access: Access) -> io::Result<OsFile> {
        // Looked at before it is opened: merely opening a device or a fifo can have effects. Looked at
        // again afterwards: the name may lead elsewhere by then, and O_NONBLOCK keeps that harmless.
        refuse_other(&fs::metadata(path)?)?;
        let flags = OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
        let file = OpenOptions::new()
            .read(true)
            .write(access == Access::ReadWrite)
            .custom_flags(flags.bits().cast_signed())
            .open(path)?;
        OsFile::new(file)
    }

    /// Creates a file like [`Host::create_new`], as its own type.
    pub fn create_file(&self, path: &Path) -> io::Result<OsFile> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        made(file, || fs::remove_file(path))
    }
}

impl Host for OsHost {
    fn open(&self, path: &Path, access: Access) -> io::Result<Arc<dyn Storage>> {
        Ok(Arc::new(self.open_file(path, access)?))
    }

    fn create_new(&self, path: &Path) -> io::Result<Arc<dyn Storage>> {
        Ok(Arc::new(self.create_file(path)?))
    }

    fn folder(&self, path: &Path) -> io::Result<Folder> {
        os_folder::open_folder(path)
    }

    fn open_in(&self, folder: &Folder, name: &OsStr, access: Access) -> io::Result<Arc<dyn Storage>> {
        refuse_other(&os_folder::metadata(folder, name)?)?;
        Ok(Arc::new(OsFile::new(os_folder::open(folder, name, access)?)?))
    }

    fn create_in(&self, folder: &Folder, name: &OsStr) -> io::Result<Arc<dyn Storage>> {
        Ok(Arc::new(made(os_folder::create(folder, name)?, || os_folder::unlink(folder, name))?))
    }

    fn stat_in(&self, folder: &Folder, name: &OsStr) -> io::Result<FileStat> {
        let meta = os_folder::metadata(folder, name)?;
        let len = match kind_of(&meta) {
            FileKind::Block => {
                device_len(&meta, || OsFile::new(os_folder::open(folder, name, Access::Read)?))?
            }
            _ => meta.len(),
        };
        Ok(stat_of(&meta, len))
    }

    fn rename_in(&self, folder: &Folder, from: &OsStr, to: &OsStr) -> io::Result<()> {
        os_folder::rename(folder, from, to)
    }

    fn rename_new_in(&self, folder: &Folder, from: &OsStr, to: &OsStr) -> io::Result<()> {
        os_folder::rename_new(folder, from, to)
    }

    fn unlink_in(&self, folder: &Folder, name: &OsStr) -> io::Result<()> {
        os_folder::unlink(folder, name)
    }

    fn list_in(&self, folder: &Folder) -> io::Result<Vec<OsString>> {
        os_folder::list(folder)
    }

    fn sync_folder(&self, folder: &Folder) -> io::Result<()> {
        os_folder::sync(folder)
    }

    fn may_create_in(&self, folder: &Folder) -> io::Result<()> {
        let wanted = RightsTo::WRITE_OK | RightsTo::EXEC_OK;
        Ok(rustix::fs::accessat(folder.handle()?, ".", wanted, AtFlags::EACCESS)?)
    }

    fn user(&self) -> u32 {
        rustix::process::geteuid().as_raw()
    }

    fn stat(&self, path: &Path) -> io::Result<FileStat> {
        let meta = fs::metadata(path)?;
        let len = match kind_of(&meta) {
            FileKind::Block => device_len(&meta, || self.open_file(path, Access::Read))?,
            _ => meta.len(),
        };
        Ok(stat_of(&meta, len))
    }

    fn canonicalize(&self, path: &Path) -> io::Result<PathBuf> {
        fs::canonicalize(path)
    }

    fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        let mut real = path.to_owned();
        for _ in 0..MAX_LINKS {
            let name = real.file_name().ok_or(ErrorKind::InvalidInput)?;
            let folder = real.parent().filter(|folder| !folder.as_os_str().is_empty());
            real = fs::canonicalize(folder.unwrap_or(Path::new(".")))?.join(name);
            match fs::read_link(&real) {
                Ok(target) => real = real.with_file_name(target),
                // It is no link, or it is not there.
                Err(e) if leads_nowhere(&e) => return Ok(real),
                Err(e) => return Err(e),
            }
        }
        Err(ErrorKind::InvalidInput.into())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        let entries = loop {
            match fs::read_dir(dir) {
                // Some file systems let a signal end the call.
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                entries => break entries?,
            }
        };
        let mut names = entries.map(|e| e.map(|e| e.path())).collect::<io::Result<Vec<_>>>()?;
        names.sort();
        Ok(names)
    }

    fn name_kind(&self, path: &Path) -> io::Result<NameKind> {
        let kind = fs::symlink_metadata(path)?.file_type();
        Ok(match () {
            () if kind.is_dir() => NameKind::Folder,
            () if kind.is_symlink() => NameKind::Link,
            () => NameKind::File,
        })
    }

    fn links(&self, path: &Path) -> io::Result<u64> {
        Ok(fs::metadata(path)?.nlink())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()> {
        match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            Ok(()) => Ok(()),
            // A file system that cannot do it in one step.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => match fs::symlink_metadata(to) {
                Ok(_) => Err(ErrorKind::AlreadyExists.into()),
                Err(e) if e.kind() == ErrorKind::NotFound => fs::rename(from, to),
                Err(e) => Err(e),
            },
            Err(e) => Err(e.into()),
        }
    }

    fn unlink(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(dir)?;
        match dir.sync_all() {
            // A file system that has no barrier for directories; it orders names by itself.
            Err(e) if e.kind() == ErrorKind::InvalidInput => Ok(()),
            other => other,
        }
    }

    fn free_space(&self, path: &Path) -> io::Result<Option<u64>> {
        let stat = rustix::fs::statvfs(path)?;
        // A file system that reports no size at all does not know what is free.
        Ok(stat.f_bavail.checked_mul(stat.f_frsize).filter(|_| stat.f_blocks > 0))
    }

    fn shares_blocks(&self, path: &Path) -> bool {
        rustix::fs::statfs(path).is_ok_and(|stat| SHARING.contains(&(stat.f_type as u32)))
    }

    fn boot(&self) -> Option<Boot> {
        boot()
    }

    fn holders(&self, id: FileId) -> Vec<Holder> {
        holders::holders(id)
    }
}

/// File systems that can share blocks between files: btrfs, XFS, bcachefs (`statfs(2)`).
const SHARING: [u32; 3] = [0x9123_683e, 0x5846_5342, 0xca45_1a4e];

/// File systems whose identity in `statfs(2)` is made from one that is kept on the disk, and not from the device's number:
/// ext2 to ext4, btrfs, bcachefs, ZFS; that of tmpfs lasts as long as its files.
const IDENTIFIED: [u32; 5] = [0xef53, 0x9123_683e, 0xca45_1a4e, 0x2fc1_2fc1, 0x0102_1994];

/// Wraps a file that was just created. If it cannot be looked at, it is removed again: an empty file in its place would be in
/// the way of the next attempt.
fn made(file: File, remove: impl FnOnce() -> io::Result<()>) -> io::Result<OsFile> {
    OsFile::new(file).inspect_err(|_| {
        // The first error is the one to tell.
        let _ = remove();
    })
}

impl OsFile {
    /// Wraps an opened file; refuses what is not a regular file or a block device.
    pub fn new(file: File) -> io::Result<Self> {
        let kind = refuse_other(&file.metadata()?)?;
        Ok(Self {
            least_kernel_copy: least_kernel_copy(&file),
            file,
            kind,
            locked: Mutex::new(None),
            no_locks: AtomicBool::new(false),
            no_kernel_copy: AtomicBool::new(false),
            syncing: Mutex::new(()),
            failed_sync: OnceLock::new(),
        })
    }

    /// An error once a sync has failed: the system may have thrown away what was written before, and
    /// marked it as written, so nothing that follows can be trusted.
    fn usable(&self) -> io::Result<()> {
        match self.failed_sync.get() {
            None => Ok(()),
            Some((kind, text)) => {
                Err(io::Error::new(*kind, format!("an earlier sync of this file failed ({text})")))
            }
        }
    }

    fn write_zero_bytes(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        while len > 0 {
            let n = len.min(ZEROS.len() as u64);
            let piece = usize::try_from(n).ok().and_then(|n| ZEROS.get(..n)).unwrap_or_default();
            self.file.write_all_at(piece, offset)?;
            offset += n;
            len -= n;
        }
        Ok(())
    }

    fn zero_regular(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = checked_end(offset, len)?;
        let size = self.size()?;
        let inside = end.min(size).saturating_sub(offset);
        if inside > 0
            && !self.fallocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, inside)?
            && !self.fallocate(FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, offset, inside)?
        {
            self.write_zero_bytes(offset, inside)?;
        }
        if end > size {
            // The file grows by writing its new last byte, not by setting the length: another thread may
            // have made it longer in the meantime, and must not see it cut.
            self.file.write_all_at(&[0], end - 1)?;
        }
        Ok(())
    }

    fn zero_device(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = checked_end(offset, len)?;
        if end > self.size()? {
            // The system would shorten the request in silence.
            return Err(Errno::NOSPC.into());
        }
        let (start, stop) = (offset.next_multiple_of(DEVICE_BLOCK).min(end), end - end % DEVICE_BLOCK);
        let done = start < stop
            && self.fallocate(FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, start, stop - start)?;
        if !done {
            return self.write_zero_bytes(offset, len);
        }
        self.write_zero_bytes(offset, start - offset)?;
        self.write_zero_bytes(stop, end - stop)
    }

    /// Calls `fallocate`; false if the file or its file system cannot do what the flags ask for, or has
    /// no room left to note it (splitting an extent takes some).
    fn fallocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<bool> {
        loop {
            match rustix::fs::fallocate(&self.file, flags, offset, len) {
                Ok(()) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::NODEV | Errno::PERM) => {
                    return Ok(false);
                }
                Err(Errno::NOSPC | Errno::DQUOT) => return Ok(false),
                Err(e) => return Err(e.into()),
            }
        }
    }
}

impl Drop for OsFile {
    fn drop(&mut self) {
        if let Some(mode) = self.locked.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            lock::release(&self.file, mode);
        }
    }
}

impl Storage for OsFile {
    fn size(&self) -> io::Result<u64> {
        match self.kind {
            FileKind::Block => Ok(rustix::fs::seek(&self.file, SeekFrom::End(0))?),
            _ => Ok(self.file.metadata()?.len()),
        }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..).filter(|r| !r.is_empty()) {
            let at = offset.checked_add(done as u64).ok_or_else(out_of_range)?;
            match self.file.read_at(rest, at) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(done)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.usable()?;
        checked_end(offset, buf.len() as u64)?;
        self.file.write_all_at(buf, offset)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.usable()?;
        match self.kind {
            _ if len == 0 => Ok(()),
            FileKind::Block => self.zero_device(offset, len),
            _ => self.zero_regular(offset, len),
        }
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        self.usable()?;
        if len == 0 || self.kind == FileKind::Block {
            return Ok(());
        }
        self.fallocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)?;
        Ok(())
    }

    fn copy_from(
        &self,
        src: &dyn Storage,
        src_offset: u64,
        dst_offset: u64,
        len: u64,
    ) -> Result<(), CopyError> {
        let is_writable = self.usable().and_then(|()| checked_end(dst_offset, len));
        is_writable.map_err(CopyError::write(dst_offset))?;
        checked_end(src_offset, len).map_err(|e| CopyError::Read { offset: src_offset, source: e })?;
        let done = match src.as_file() {
            Some(file) if self.kind == FileKind::Regular && len >= self.least_kernel_copy => {
                copy_in_kernel(file, src_offset, &self.file, dst_offset, len, &self.no_kernel_copy)
            }
            _ => 0,
        };
        copy_plain(src, src_offset + done, self, dst_offset + done, len - done)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.usable()?;
        match self.kind {
            FileKind::Block if len <= self.size()? => Ok(()),
            FileKind::Block => Err(Errno::NOSPC.into()),
            _ => self.file.set_len(len),
        }
    }

    fn sync(&self) -> io::Result<()> {
        let _one = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        self.usable()?;
        // fdatasync makes the length durable too, as far as reading the data back needs it.
        self.file.sync_data().inspect_err(|e| {
            // Only the first failure gets here, so that the cell is always empty.
            let _ = self.failed_sync.set((e.kind(), e.to_string()));
        })
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let size = self.size()?;
        if offset >= size {
            return Ok(None);
        }
        let start = match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(start) if start < size => start,
            Ok(_) | Err(Errno::NXIO) => return Ok(None),
            Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(Some(offset..size)),
            Err(e) => return Err(e.into()),
        };
        let end = match rustix::fs::seek(&self.file, SeekFrom::Hole(start)) {
            Ok(end) if end > start => end.min(size),
            // The range may have been punched between the two calls; "may hold data" stays true.
            Ok(_) | Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => size,
            Err(e) => return Err(e.into()),
        };
        Ok(Some(start..end))
    }

    fn stat(&self) -> io::Result<FileStat> {
        let len = self.size()?;
        Ok(stat_of(&self.file.metadata()?, len))
    }

    fn file_system(&self) -> Option<u64> {
        let kind = rustix::fs::fstatfs(&self.file).ok()?.f_type as u32;
        let id = rustix::fs::fstatvfs(&self.file).ok()?.f_fsid;
        (self.kind == FileKind::Regular && id != 0 && IDENTIFIED.contains(&kind)).then_some(id)
    }

    fn lock(&self, mode: LockMode) -> Result<(), LockError> {
        let mut locked = self.locked.lock().unwrap_or_else(PoisonError::into_inner);
        if *locked < Some(mode) {
            match lock::acquire(&self.file, *locked, mode) {
                Ok(()) => *locked = Some(mode),
                Err(LockError::Io(e)) if lock::has_none(&e) => self.no_locks.store(true, Ordering::Relaxed),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn has_locks(&self) -> bool {
        !self.no_locks.load(Ordering::Relaxed)
    }

    fn used_by_others(&self) -> io::Result<Option<LockMode>> {
        lock::foreign_mode(&self.file).or_else(|e| {
            if !lock::has_none(&e) {
                return Err(e);
            }
            self.no_locks.store(true, Ordering::Relaxed);
            Ok(None)
        })
    }

    fn drop_cache(&self) -> io::Result<()> {
        // Pages that are not written yet would stay.
        self.sync()?;
        Ok(rustix::fs::fadvise(&self.file, 0, None, Advice::DontNeed)?)
    }

    fn take_rights(&self, inputs: &[&dyn Storage]) {
        // One that is no file of the system has no rights to compare with: then the new file stays private.
        let files: Option<Vec<&File>> = inputs.iter().map(|input| input.as_file()).collect();
        if let Some(files) = files {
            rights::take(&self.file, &files);
        }
    }

    fn start_writing(&self, offset: u64, len: u64) {
        // Linux begins to write the dirty pages of the range and returns; it is only a hint.
        if let Some(len) = std::num::NonZeroU64::new(len) {
            let _ = rustix::fs::fadvise(&self.file, offset, Some(len), Advice::DontNeed);
        }
    }

    fn as_file(&self) -> Option<&File> {
        Some(&self.file)
    }

    fn view(&self) -> Option<View> {
        let locked = self.locked.lock().unwrap_or_else(PoisonError::into_inner);
        if locked.is_none() || self.kind != FileKind::Regular {
            return None;
        }
        View::of(&self.file).ok()
    }
}

fn kind_of(meta: &Metadata) -> FileKind {
    let kind = meta.file_type();
    if kind.is_file() {
        FileKind::Regular
    } else if kind.is_symlink() {
        FileKind::Other("a symbolic link")
    } else if kind.is_block_device() {
        FileKind::Block
    } else if kind.is_dir() {
        FileKind::Other("a directory")
    } else if kind.is_fifo() {
        FileKind::Other("a fifo")
    } else if kind.is_socket() {
        FileKind::Other("a socket")
    } else if kind.is_char_device() {
        FileKind::Other("a character device")
    } else {
        FileKind::Other("a special file")
    }
}

fn refuse_other(meta: &Metadata) -> io::Result<FileKind> {
    match kind_of(meta) {
        FileKind::Other(what) => Err(not_a_file(what)),
        kind => Ok(kind),
    }
}

fn stat_of(meta: &Metadata, len: u64) -> FileStat {
    FileStat {
        kind: kind_of(meta),
        id: id_of(meta),
        len,
        allocated: meta.blocks().saturating_mul(512),
        modified_ns: nanoseconds(meta.mtime(), meta.mtime_nsec()),
        changed_ns: nanoseconds(meta.ctime(), meta.ctime_nsec()),
        born_ns: meta.created().ok().and_then(since_1970),
        owner: Owner { user: meta.uid(), group: meta.gid(), mode: meta.mode() & 0o7777 },
    }
}

fn nanoseconds(seconds: i64, more: i64) -> i128 {
    i128::from(seconds) * 1_000_000_000 + i128::from(more)
}

fn since_1970(time: SystemTime) -> Option<i128> {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(after) => i128::try_from(after.as_nanos()).ok(),
        Err(before) => i128::try_from(before.duration().as_nanos()).ok().map(|before| -before),
    }
}

/// This run of the system: the kernel's number for it, and when it began by the clock as it goes now.
fn boot() -> Option<Boot> {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let hex: String = id.chars().filter(char::is_ascii_hexdigit).take(16).collect();
    let uptime = fs::read_to_string("/proc/uptime").ok()?;
    let seconds: f64 = uptime.split_whitespace().next()?.parse().ok()?;
    let began = SystemTime::now().checked_sub(Duration::try_from_secs_f64(seconds).ok()?)?;
    Some(Boot { id: u64::from_str_radix(&hex, 16).ok()?, started_ns: since_1970(began)? })
}

/// The capacity of a block device. The kernel's own table comes first: it needs no right
/// to read the device.
fn device_len(meta: &Metadata, open: impl FnOnce() -> io::Result<OsFile>) -> io::Result<u64> {
    let (major, minor) = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
    let sectors = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/size"));
    match sectors.ok().and_then(|text| text.trim().parse::<u64>().ok()) {
        Some(sectors) => Ok(sectors.saturating_mul(512)),
        None => open()?.size(),
    }
}

fn checked_end(offset: u64, len: u64) -> io::Result<u64> {
    offset.checked_add(len).filter(|&end| i64::try_from(end).is_ok()).ok_or_else(out_of_range)
}
