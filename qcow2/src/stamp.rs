//! The stamp of a file, by which it is recognised later.
//!
//! The system tells several things about a file, and each of them can mislead. An inode number is unique only
//! in its file system. A device number may change when the system restarts. A time of modification can be set
//! to anything, as `cp -p` does. So a [`Stamp`] holds all of them, and the time of the last change (ctime),
//! which no program can set back. `Stamp::judge` weighs them in one place.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{Error, FileOp, Result};
use crate::storage::{Access, Boot, FileId, FileKind, FileStat, Host, Storage, if_there};

/// How much of the beginning of a file its checksum covers, in bytes: one sector.
const HEAD: usize = 512;

/// How long after its last sign of life killed work may still have written, in nanoseconds. Before each write
/// there is a new sign if the last one is older than a fifth of this.
const SLACK_NS: i128 = 1_000_000_000;

/// The same, if the system has restarted since. The signs of life need not have reached the disk then, so the
/// last certain one is the one behind the last barrier.
const SLACK_AFTER_RESTART_NS: i128 = 30_000_000_000;

/// How much the start time of one run of the system may differ between two looks, in nanoseconds, though nobody
/// has set the clock: it is known to a hundredth of a second.
const CLOCK_JITTER_NS: i128 = 500_000_000;

/// What identified a file when somebody looked, and its state then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Its absolute path, without symbolic links; or the name by which a caller wants it opened and reported.
    pub path: PathBuf,
    /// Device and inode. The device may get another number when the system starts again.
    pub id: FileId,
    /// Whether it is a block device.
    pub is_device: bool,
    /// An identity of its file system that survives a restart of the system, if there is one.
    pub file_system: Option<u64>,
    /// When it was made, in nanoseconds since 1970, where the file system knows that.
    pub born_ns: Option<i128>,
    /// Its length and its times.
    pub times: Times,
    /// The CRC-32 of its first sector; 0 where the file may be looked at, and not be read.
    pub head_crc: u32,
}

/// Length and times of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// Its length in bytes.
    pub len: u64,
    /// When its content was last changed, in nanoseconds since 1970. Programs can set it.
    pub modified_ns: i128,
    /// When the file was last changed in any way, in nanoseconds since 1970. Programs cannot set it.
    pub changed_ns: i128,
}

/// Until when a work wrote to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WorkTimes {
    /// Length and times of the file when the work last noted them, behind a barrier.
    pub known: Times,
    /// The last sign of life of the work, in nanoseconds since 1970; `None` if it ended in good order, with
    /// the file as in `known`.
    pub alive_ns: Option<i128>,
    /// The run of the system in which the work wrote, where that is known.
    pub boot: Option<Boot>,
    /// The run of the system now.
    pub now: Option<Boot>,
}

/// What has happened to a file since work on it was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileFate {
    /// It is as the work left it.
    Untouched,
    /// It is as the work left it, under another name.
    Moved,
    /// Somebody has written to it since.
    Newer,
    /// It is older than the work's last knowledge: it was restored from a copy.
    Older,
    /// It is another file of the same name: a copy, or a replacement.
    Copied,
    /// It is another file.
    Other,
    /// It may be as the work left it, but the system's answers do not prove that.
    Unsure,
}

/// Whether two stamps are of one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SameFile {
    /// They are.
    Yes,
    /// They are not.
    No,
    /// The inode numbers are equal, but it is unknown whether the file systems are.
    Unsure,
}

/// The first difference that shows that a file has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub(crate) enum Difference {
    /// It is another file.
    OtherFile,
    /// It has another length, in bytes.
    Length {
        /// Its length then.
        then: u64,
        /// Its length now.
        now: u64,
    },
    /// The time of its last write, or its first sector, is another one.
    Written,
    /// Only the time of its last change is another one: of its name, its rights, or of a write whose time was set back.
    Changed,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OtherFile => f.write_str("its name leads to another file now"),
            Self::Length { then, now } => write!(f, "it was {then} bytes long, and is {now} bytes long now"),
            Self::Written => f.write_str("it was written to since"),
            Self::Changed => f.write_str("it was changed since"),
        }
    }
}

impl Times {
    /// Those of a file.
    pub(crate) fn of(stat: &FileStat) -> Self {
        Self { len: stat.len, modified_ns: stat.modified_ns, changed_ns: stat.changed_ns }
    }
}

impl WorkTimes {
    /// Whether the system has started again since the work was stopped; `None` if that is not known.
    fn is_other_boot(&self) -> Option<bool> {
        Some(self.boot?.id != self.now?.id)
    }

    /// Whether somebody has set the clock back since the work was stopped: then later writes may have earlier
    /// times. Within one run of the system, the run's start seems to move back then; another run must have
    /// begun after the last sign of life.
    pub(crate) fn clock_was_set_back(&self) -> bool {
        let (Some(then), Some(now)) = (self.boot, self.now) else { return false };
        let last = self.alive_ns.unwrap_or(self.known.changed_ns).max(self.known.changed_ns);
        match then.id == now.id {
            true => now.started_ns.saturating_add(CLOCK_JITTER_NS) < then.started_ns,
            false => now.started_ns.saturating_add(CLOCK_JITTER_NS) < last,
        }
    }

    /// The last moment at which the work may have written, in nanoseconds since 1970.
    fn until_ns(&self) -> i128 {
        let Some(alive) = self.alive_ns else { return self.known.modified_ns };
        let last = alive.max(self.known.changed_ns);
        match (self.is_other_boot(), self.now) {
            (Some(false), _) => last.saturating_add(SLACK_NS),
            (Some(true), Some(now)) => {
                last.saturating_add(SLACK_AFTER_RESTART_NS).min(now.started_ns).max(last)
            }
            _ => last.saturating_add(SLACK_AFTER_RESTART_NS),
        }
    }
}

impl Stamp {
    /// Looks at the file at `path`, which is open as `file`.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn of(host: &dyn Host, path: &Path, file: &dyn Storage) -> Result<Self> {
        let failed = |op: FileOp| move |e| Error::io(path, op, None, e);
        let stat = file.stat().map_err(failed(FileOp::Stat))?;
        let mut head = [0; HEAD];
        file.read_exact_or_zero(&mut head, 0).map_err(failed(FileOp::Read))?;
        Ok(Self {
            path: host.canonicalize(path).map_err(failed(FileOp::Resolve))?,
            id: stat.id,
            is_device: stat.kind == FileKind::Block,
            file_system: file.file_system(),
            born_ns: stat.born_ns,
            times: Times::of(&stat),
            head_crc: crc32fast::hash(&head),
        })
    }

    /// Takes the stamp of the file to which a name leads, with links followed. `None` if there is none, or if
    /// it is neither a regular file nor a block device.
    ///
    /// # Errors
    /// The system's: then it is unknown whether there is a file.
    pub fn now(host: &dyn Host, path: &Path) -> Result<Option<Self>> {
        let failed = |op: FileOp| move |e| Error::io(path, op, None, e);
        let stat = if_there(host.stat(path)).map_err(failed(FileOp::Stat))?;
        let Some(stat) = stat.filter(|stat| matches!(stat.kind, FileKind::Regular | FileKind::Block)) else {
            return Ok(None);
        };
        match if_there(host.open(path, Access::Read)) {
            Ok(Some(file)) => Self::of(host, path, &*file).map(Some),
            Ok(None) => Ok(None),
            // The user who controls QEMU may not be allowed to read its images. Length and times tell most
            // without that.
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Ok(Some(Self {
                path: host.canonicalize(path).map_err(failed(FileOp::Resolve))?,
                id: stat.id,
                is_device: stat.kind == FileKind::Block,
                file_system: None,
                born_ns: stat.born_ns,
                times: Times::of(&stat),
                head_crc: 0,
            })),
            Err(e) => Err(failed(FileOp::Open)(e)),
        }
    }

    /// Whether `now` is of the same file: by inode, time of birth and file system; a device by its path or number.
    pub(crate) fn same_file(&self, now: &Self) -> SameFile {
        if self.is_device || now.is_device {
            let same = self.is_device == now.is_device && (self.id == now.id || self.path == now.path);
            return if same { SameFile::Yes } else { SameFile::No };
        }
        let born = self.born_ns.zip(now.born_ns).map(|(then, now)| then == now);
        let file_system = self.file_system.zip(now.file_system).map(|(then, now)| then == now);
        match (self.id.inode == now.id.inode, born, file_system) {
            (false, ..) | (_, Some(false), _) | (.., Some(false)) => SameFile::No,
            (.., Some(true)) | (_, Some(true), None) => SameFile::Yes,
            (_, None, None) if self.id.device == now.id.device => SameFile::Yes,
            (_, None, None) => SameFile::Unsure,
        }
    }

    /// Whether `now` is for certain the same file.
    pub fn is_same_file(&self, now: &Self) -> bool {
        self.same_file(now) == SameFile::Yes
    }

    /// Whether `now` is the same file, where the system may have started again in between. File systems get other numbers
    /// then, so an equal inode number counts if nothing else tells; within one run of the system it does not.
    pub fn is_same_file_after(&self, now: &Self, is_same_boot: bool) -> bool {
        match self.same_file(now) {
            SameFile::Yes => true,
            SameFile::No => false,
            SameFile::Unsure => !is_same_boot,
        }
    }

    /// Whether somebody may have written between this look and `now`. Any difference counts as a write, the time of the
    /// last change included: a program that writes may set the time of the write back. `None` for a device, which keeps no
    /// times that tell.
    pub fn is_written(&self, now: &Self) -> Option<bool> {
        let is_file = !self.is_device && !now.is_device;
        is_file.then(|| self.times != now.times || self.has_other_head(now))
    }

    /// Whether the first sector was read both times, and is another one.
    fn has_other_head(&self, now: &Self) -> bool {
        self.head_crc != 0 && now.head_crc != 0 && self.head_crc != now.head_crc
    }

    /// When the last write may have been, at the latest, in nanoseconds since 1970.
    pub fn last_written_ns(&self) -> i128 {
        self.times.modified_ns.max(self.times.changed_ns)
    }

    /// What tells that `now` is not the same file as it was; `None` if nothing does. Of a device only that it is another
    /// one is told.
    pub(crate) fn difference(&self, now: &Self) -> Option<Difference> {
        let (then, times) = (self.times, now.times);
        match () {
            () if !self.is_same_file(now) => Some(Difference::OtherFile),
            () if self.is_device => None,
            () if then.len != times.len => Some(Difference::Length { then: then.len, now: times.len }),
            () if then.modified_ns != times.modified_ns || self.has_other_head(now) => {
                Some(Difference::Written)
            }
            () if then.changed_ns != times.changed_ns => Some(Difference::Changed),
            () => None,
        }
    }

    /// Whether `now` is the same file with the same content, and nobody has touched it in between.
    pub(crate) fn is_unchanged(&self, now: &Self) -> bool {
        self.is_same_file(now) && (self.times, self.head_crc) == (now.times, now.head_crc)
    }

    /// Whether `now` is the same file under the same name, and nobody has written to it since. A power cut may have
    /// taken the times of the last change: then both are earlier.
    pub(crate) fn is_unwritten(&self, now: &Self) -> bool {
        let (then, times) = (self.times, now.times);
        let is_earlier = times.modified_ns <= then.modified_ns && times.changed_ns < then.changed_ns;
        self.is_same_file(now)
            && self.path == now.path
            && (then.len, self.head_crc) == (times.len, now.head_crc)
            && (then == times || is_earlier)
    }

    /// What has become of the file since `work` on it was stopped; `now` is what stands where the file is looked for.
    /// A device has no times that tell, so it is never [`FileFate::Untouched`].
    pub(crate) fn judge(&self, work: &WorkTimes, now: &Self) -> FileFate {
        let same = self.same_file(now);
        let (known, times) = (work.known, now.times);
        if same == SameFile::No {
            return match self.path.file_name() == now.path.file_name() {
                false => FileFate::Other,
                true if times.modified_ns > work.until_ns() => FileFate::Newer,
                true => FileFate::Copied,
            };
        }
        let is_other_boot = work.is_other_boot();
        if self.is_device {
            // The times are those of its name in /dev, which is made when the system starts.
            let is_newer = is_other_boot == Some(false) && times.modified_ns > work.until_ns();
            return if is_newer { FileFate::Newer } else { FileFate::Unsure };
        }
        let as_known = times == known;
        if !as_known && work.clock_was_set_back() {
            return FileFate::Unsure;
        }
        if times.changed_ns < known.changed_ns {
            // A power cut takes times that were not written yet. Else the file system itself was put back.
            return if is_other_boot == Some(false) { FileFate::Older } else { FileFate::Unsure };
        }
        if times.modified_ns < known.modified_ns {
            return FileFate::Older;
        }
        if !as_known && times.modified_ns > work.until_ns() {
            return FileFate::Newer;
        }
        // A write sets both times at once. Where they differ, somebody has set one, or changed the file's name
        // or rights.
        let is_ours = as_known || times.modified_ns == times.changed_ns;
        match (is_ours && same == SameFile::Yes, self.path == now.path) {
            (false, _) => FileFate::Unsure,
            (true, true) => FileFate::Untouched,
            (true, false) => FileFate::Moved,
        }
    }
}

#[cfg(test)]
#[path = "stamp_tests.rs"]
mod tests;
