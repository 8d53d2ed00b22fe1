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
    /// The time of the last change, of its bytes or of what is said about it, in nanoseconds since 1970: the kernel sets it,
    /// and no program can set it back. 0 for a block device, and where it was not noted.
    #[serde(default)]
    pub changed_ns: u64,
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
        let modified = nanoseconds(meta.mtime(), meta.mtime_nsec());
        let changed = nanoseconds(meta.ctime(), meta.ctime_nsec());
        let (size, modified_ns, changed_ns) = match () {
            () if meta.is_file() => (meta.len(), modified, changed),
            () if std::os::unix::fs::FileTypeExt::is_block_device(&meta.file_type()) => (0, 0, 0),
            () => return Ok(None),
        };
        Ok(Some(Self { device: meta.dev(), inode: meta.ino(), size, modified_ns, changed_ns }))
    }

    /// Whether both are the same file, however it was written in between.
    pub fn is_same_file(&self, other: &Self) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }

    /// Whether there may have been a write since `before`. Any difference is taken for one, the time of the last change
    /// included: a program that writes may set the time of the write back. `None` where that cannot be told: a block device.
    pub fn is_written_since(&self, before: &Self) -> Option<bool> {
        let keeps_time = self.modified_ns != 0 && before.modified_ns != 0;
        let is_changed =
            self.changed_ns != 0 && before.changed_ns != 0 && self.changed_ns != before.changed_ns;
        keeps_time.then(|| is_changed || (self.size, self.modified_ns) != (before.size, before.modified_ns))
    }

    /// When the last write may have been, at the latest, in nanoseconds since 1970.
    pub(crate) fn written_ns(&self) -> u64 {
        self.modified_ns.max(self.changed_ns)
    }
}

fn nanoseconds(seconds: i64, nanoseconds: i64) -> u64 {
    let (seconds, nanoseconds) = (u64::try_from(seconds), u64::try_from(nanoseconds));
    seconds.unwrap_or(0).saturating_mul(1_000_000_000).saturating_add(nanoseconds.unwrap_or(0))
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

    /// As a program does that restores a file's times behind its own write.
    #[test]
    fn a_write_is_seen_though_its_time_was_set_back() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        fs::write(&image, "a").unwrap();
        let before = FileIdentity::of(&image).unwrap().unwrap();
        let time = fs::metadata(&image).unwrap().modified().unwrap();
        // The kernel's clock for files goes in steps.
        std::thread::sleep(std::time::Duration::from_millis(20));
        fs::write(&image, "b").unwrap();
        fs::File::options().write(true).open(&image).unwrap().set_modified(time).unwrap();
        let after = FileIdentity::of(&image).unwrap().unwrap();
        assert_eq!((after.size, after.modified_ns), (before.size, before.modified_ns));
        assert_eq!(after.is_written_since(&before), Some(true));
        assert!(after.written_ns() > before.written_ns());
        // A state that did not note it yet tells what it did.
        assert_eq!(after.is_written_since(&FileIdentity { changed_ns: 0, ..before }), Some(false));
    }

    #[test]
    fn what_is_no_file_here_has_no_identity() {
        for name in ["relative", "/no/such/file", "/", "/dev/null", "nbd://host/x", ""] {
            assert_eq!(FileIdentity::of(Path::new(name)).unwrap(), None, "{name}");
        }
        let device = FileIdentity { device: 1, inode: 2, size: 0, modified_ns: 0, changed_ns: 0 };
        assert_eq!(device.is_written_since(&device), None);
    }

    #[test]
    fn this_boot_has_a_name() {
        assert_eq!(boot(), boot());
        assert!(boot().is_some());
    }
}
