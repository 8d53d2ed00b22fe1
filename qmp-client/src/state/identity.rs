//! Which file a name meant, and whether it has been written since.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// Which file a name meant at one moment, and how it was then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FileIdentity {
    /// The number of the file system, or of the device that holds it. It may change when the host is started
    /// again.
    pub device: u64,
    /// The number of the file in it.
    pub inode: u64,
    /// The length in bytes; 0 for a block device.
    pub size: u64,
    /// The time of the last write in nanoseconds since 1970; 0 for a block device, which keeps none.
    pub modified_ns: u64,
}

impl FileIdentity {
    /// That of the file at this absolute path, links followed. `None` if there is none, if it is neither a file
    /// nor a block device, or the path is relative: it is QEMU's, whose folder is another.
    ///
    /// # Errors
    /// The system's: nobody knows then whether there is a file.
    pub fn of(path: &Path) -> io::Result<Option<Self>> {
        if !path.is_absolute() {
            return Ok(None);
        }
        let Some(meta) = if_there(fs::metadata(path))? else { return Ok(None) };
        let seconds = u64::try_from(meta.mtime()).unwrap_or(0);
        let nanoseconds = u64::try_from(meta.mtime_nsec()).unwrap_or(0);
        let modified_ns = seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds);
        let (size, modified_ns) = match () {
            () if meta.is_file() => (meta.len(), modified_ns),
            () if std::os::unix::fs::FileTypeExt::is_block_device(&meta.file_type()) => (0, 0),
            () => return Ok(None),
        };
        Ok(Some(Self { device: meta.dev(), inode: meta.ino(), size, modified_ns }))
    }

    /// Whether both are the same file, however it was written in between.
    pub fn is_same_file(&self, other: &Self) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }

    /// Whether a write since `before` can be seen. `None` where that cannot be told: a block device.
    pub fn is_written_since(&self, before: &Self) -> Option<bool> {
        let keeps_time = self.modified_ns != 0 && before.modified_ns != 0;
        keeps_time.then(|| (self.size, self.modified_ns) != (before.size, before.modified_ns))
    }
}

/// What the system says about a name, where "it leads nowhere" is an answer.
///
/// # Errors
/// What is no answer: the device, the network or the process' limits have failed.
pub(super) fn if_there<T>(said: io::Result<T>) -> io::Result<Option<T>> {
    let answers = [Errno::NOENT, Errno::NOTDIR, Errno::LOOP, Errno::NAMETOOLONG, Errno::INVAL];
    match said {
        Ok(found) => Ok(Some(found)),
        Err(e) if Errno::from_io_error(&e).is_some_and(|errno| answers.contains(&errno)) => Ok(None),
        // A name with a zero byte never comes to the system.
        Err(e) if e.kind() == io::ErrorKind::InvalidInput => Ok(None),
        Err(e) => Err(e),
    }
}

/// The name of this run of the host's kernel.
pub(crate) fn boot() -> Option<String> {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned()).filter(|id| !id.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_known_by_any_name_and_a_write_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let (one, other) = (folder.path().join("one"), folder.path().join("other"));
        fs::write(&one, "a").unwrap();
        std::os::unix::fs::symlink(&one, &other).unwrap();
        let before = FileIdentity::of(&one).unwrap().unwrap();
        assert_eq!(FileIdentity::of(&other).unwrap(), Some(before));
        fs::write(&one, "ab").unwrap();
        let after = FileIdentity::of(&one).unwrap().unwrap();
        assert!(after.is_same_file(&before));
        assert_eq!(after.is_written_since(&before), Some(true));
        fs::remove_file(&one).unwrap();
        fs::write(folder.path().join("third"), "").unwrap();
        fs::write(&one, "ab").unwrap();
        assert!(FileIdentity::of(&folder.path().join("third")).unwrap().unwrap() != after);
    }

    #[test]
    fn what_is_no_file_here_has_no_identity() {
        for name in ["relative", "/no/such/file", "/", "/dev/null", "nbd://host/x", ""] {
            assert_eq!(FileIdentity::of(Path::new(name)).unwrap(), None, "{name}");
        }
        let device = FileIdentity { device: 1, inode: 2, size: 0, modified_ns: 0 };
        assert_eq!(device.is_written_since(&device), None);
    }

    #[test]
    fn this_boot_has_a_name() {
        assert_eq!(boot(), boot());
        assert!(boot().is_some());
    }
}
