//! Takes stamps of files, and converts them for state files. Only [`Stamp`] itself judges them.

use std::fs;
use std::io;
use std::path::Path;

use qcow2::stamp::{Stamp, Times};
use qcow2::storage::{FileId, OsHost};
use rustix::io::Errno;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A stamp as a state file has it.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct StoredStamp {
    path: String,
    device: u64,
    inode: u64,
    is_device: bool,
    file_system: Option<u64>,
    born_ns: Option<i64>,
    size: u64,
    modified_ns: i64,
    changed_ns: i64,
    head_crc: u32,
}

/// Takes the stamp of the file at this absolute path, with links followed. `None` if there is none, if it is
/// neither a file nor a block device, or if the path is relative: it is relative to QEMU's folder, not to ours.
///
/// # Errors
/// The system's: then it is unknown whether there is a file.
pub(crate) fn stamp_of(path: &Path) -> io::Result<Option<Stamp>> {
    if !path.is_absolute() {
        return Ok(None);
    }
    let stamp = Stamp::now(&OsHost, path).map_err(|error| match error {
        qcow2::Error::Io { source, .. } => source,
        other => io::Error::other(other),
    })?;
    // Keep the name that QEMU has for the file, for messages.
    Ok(stamp.map(|stamp| Stamp { path: path.to_owned(), ..stamp }))
}

/// Writes a stamp into a state file.
pub(super) fn serialize<S: Serializer>(stamp: &Option<Stamp>, to: S) -> Result<S::Ok, S::Error> {
    let stored = stamp.as_ref().map(|stamp| StoredStamp {
        path: stamp.path.to_string_lossy().into_owned(),
        device: stamp.id.device,
        inode: stamp.id.inode,
        is_device: stamp.is_device,
        file_system: stamp.file_system,
        born_ns: stamp.born_ns.map(nanoseconds),
        size: stamp.times.len,
        modified_ns: nanoseconds(stamp.times.modified_ns),
        changed_ns: nanoseconds(stamp.times.changed_ns),
        head_crc: stamp.head_crc,
    });
    stored.serialize(to)
}

/// Reads it again.
pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Stamp>, D::Error> {
    let stored = Option::<StoredStamp>::deserialize(from)?;
    Ok(stored.map(|stored| Stamp {
        path: stored.path.into(),
        id: FileId { device: stored.device, inode: stored.inode },
        is_device: stored.is_device,
        file_system: stored.file_system,
        born_ns: stored.born_ns.map(i128::from),
        times: Times {
            len: stored.size,
            modified_ns: stored.modified_ns.into(),
            changed_ns: stored.changed_ns.into(),
        },
        head_crc: stored.head_crc,
    }))
}

/// A time after the year 2262 does not fit, and becomes another one. Then the file looks as if somebody had
/// written to it.
fn nanoseconds(time: i128) -> i64 {
    i64::try_from(time).unwrap_or(if time < 0 { i64::MIN } else { i64::MAX })
}

/// Turns "it leads nowhere" from an error into an answer.
///
/// # Errors
/// All other errors: the device, the network or a limit of the process has failed.
pub(super) fn if_there<T>(said: io::Result<T>) -> io::Result<Option<T>> {
    let answers = [Errno::NOENT, Errno::NOTDIR, Errno::LOOP, Errno::NAMETOOLONG, Errno::INVAL];
    match said {
        Ok(found) => Ok(Some(found)),
        Err(e) if Errno::from_io_error(&e).is_some_and(|errno| answers.contains(&errno)) => Ok(None),
        // No file can have a name with a zero byte.
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
    fn a_file_has_one_stamp_by_any_name_and_a_write_shows() {
        let folder = tempfile::tempdir().unwrap();
        let (one, other) = (folder.path().join("one"), folder.path().join("other"));
        fs::write(&one, "a").unwrap();
        std::os::unix::fs::symlink(&one, &other).unwrap();
        let before = stamp_of(&one).unwrap().unwrap();
        assert_eq!(stamp_of(&other).unwrap().unwrap(), Stamp { path: other, ..before.clone() });
        fs::write(&one, "ab").unwrap();
        let after = stamp_of(&one).unwrap().unwrap();
        assert!(before.is_same_file(&after));
        assert_eq!(before.is_written(&after), Some(true));
        fs::remove_file(&one).unwrap();
        fs::write(folder.path().join("third"), "").unwrap();
        fs::write(&one, "ab").unwrap();
        let third = stamp_of(&folder.path().join("third")).unwrap().unwrap();
        assert!(!after.is_same_file(&third) || after.is_written(&third) == Some(true));
    }

    /// As a program does that restores a file's times behind its own write.
    #[test]
    fn a_write_shows_though_its_time_was_set_back() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        fs::write(&image, vec![7; 1024]).unwrap();
        let before = stamp_of(&image).unwrap().unwrap();
        let time = fs::metadata(&image).unwrap().modified().unwrap();
        // The kernel's clock for files goes in steps.
        std::thread::sleep(std::time::Duration::from_millis(20));
        fs::write(&image, [vec![7; 1023], vec![8]].concat()).unwrap();
        fs::File::options().write(true).open(&image).unwrap().set_modified(time).unwrap();
        let after = stamp_of(&image).unwrap().unwrap();
        assert_eq!((after.times.len, after.times.modified_ns), (before.times.len, before.times.modified_ns));
        assert_eq!(before.is_written(&after), Some(true));
        assert!(after.last_written_ns() > before.last_written_ns());
    }

    #[test]
    fn what_is_no_file_here_has_no_stamp() {
        for name in ["relative", "/no/such/file", "/", "/dev/null", "nbd://host/x", ""] {
            assert_eq!(stamp_of(Path::new(name)).unwrap(), None, "{name}");
        }
    }

    #[test]
    fn a_stamp_reads_as_it_was_written() {
        #[derive(Serialize, Deserialize, PartialEq, Debug)]
        struct Holder(#[serde(with = "super")] Option<Stamp>);
        let file = tempfile::NamedTempFile::new().unwrap();
        let stamp = stamp_of(file.path()).unwrap().unwrap();
        let device = Stamp { is_device: true, born_ns: None, file_system: None, ..stamp.clone() };
        for holder in [Some(stamp), Some(device), None].map(Holder) {
            let text = serde_json::to_string(&holder).unwrap();
            assert_eq!(serde_json::from_str::<Holder>(&text).unwrap(), holder, "{text}");
        }
    }

    #[test]
    fn this_boot_has_a_name() {
        assert_eq!(boot(), boot());
        assert!(boot().is_some());
    }
}
