//! One opened file or block device of the operating system.

use std::fs::{File, Metadata};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::SystemTime;

use rustix::fs::{Advice, FallocateFlags, SeekFrom};
use rustix::io::Errno;

use super::copy::{CopyError, checked_end, copy_in_kernel, copy_plain, least_kernel_copy, out_of_range};
use super::holders::id_of;
use super::os_folder::not_a_file;
use super::view::FileView;
use super::{FileKind, FileStat, LockError, LockMode, Owner, Storage, lock, rights};

/// An opened regular file or block device.
#[derive(Debug)]
pub(crate) struct OsFile {
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

/// File systems whose identity in `statfs(2)` is made from one that is kept on the disk, and not from the device's number:
/// ext2 to ext4, btrfs, bcachefs, ZFS; that of tmpfs lasts as long as its files.
const IDENTIFIED: [u32; 5] = [0xef53, 0x9123_683e, 0xca45_1a4e, 0x2fc1_2fc1, 0x0102_1994];

impl OsFile {
    /// Wraps an opened file; refuses what is not a regular file or a block device.
    pub(crate) fn new(file: File) -> io::Result<Self> {
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

    fn view(&self) -> Option<FileView> {
        let locked = self.locked.lock().unwrap_or_else(PoisonError::into_inner);
        if locked.is_none() || self.kind != FileKind::Regular {
            return None;
        }
        FileView::of(&self.file).ok()
    }
}

pub(super) fn kind_of(meta: &Metadata) -> FileKind {
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

pub(super) fn refuse_other(meta: &Metadata) -> io::Result<FileKind> {
    match kind_of(meta) {
        FileKind::Other(what) => Err(not_a_file(what)),
        kind => Ok(kind),
    }
}

pub(super) fn stat_of(meta: &Metadata, len: u64) -> FileStat {
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

pub(super) fn since_1970(time: SystemTime) -> Option<i128> {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(after) => i128::try_from(after.as_nanos()).ok(),
        Err(before) => i128::try_from(before.duration().as_nanos()).ok().map(|before| -before),
    }
}
