//! The names of the operating system: files and block devices by path, and in opened folders.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustix::fs::{Access as RightsTo, AtFlags, CWD, OFlags, RenameFlags};
use rustix::io::Errno;

use super::os_file::{OsFile, kind_of, refuse_other, since_1970, stat_of};
use super::{
    Access, Boot, FileId, FileKind, FileStat, Folder, Host, NameKind, Storage, holders, leads_nowhere,
    os_folder,
};
use crate::error::Holder;

/// The real file system.
#[derive(Clone, Copy, Debug, Default)]
pub struct OsHost;

/// How many symbolic links are followed, as in the kernel.
const MAX_LINKS: usize = 40;

impl OsHost {
    /// Opens a file like [`Host::open`], as its own type.
    pub(crate) fn open_file(&self, path: &Path, access: Access) -> io::Result<OsFile> {
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
    pub(crate) fn create_file(&self, path: &Path) -> io::Result<OsFile> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        made(file, || fs::remove_file(path))
    }
}

impl Host for OsHost {
    fn open(&self, path: &Path, access: Access) -> io::Result<Arc<dyn Storage>> {
        Ok(Arc::new(self.open_file(path, access)?))
    }

    fn open_unused(&self, path: &Path) -> io::Result<Arc<dyn Storage>> {
        refuse_other(&fs::metadata(path)?)?;
        // For a block device, O_EXCL asks the system for it alone.
        let flags = OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::EXCL;
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(flags.bits().cast_signed());
        Ok(Arc::new(OsFile::new(options.open(path)?)?))
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
        let stat = match rustix::fs::statvfs(path) {
            Err(Errno::NOSYS | Errno::OPNOTSUPP) => return Ok(None),
            stat => stat?,
        };
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

/// Wraps a file that was just created. If it cannot be looked at, it is removed again: an empty file in its place would be in
/// the way of the next attempt.
fn made(file: File, remove: impl FnOnce() -> io::Result<()>) -> io::Result<OsFile> {
    OsFile::new(file).inspect_err(|_| {
        // The first error is the one to tell.
        let _ = remove();
    })
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
