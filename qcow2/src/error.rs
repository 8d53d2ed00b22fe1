//! What can go wrong, with the file, the offset, what was found and what was expected.

mod op;
mod shown;

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

pub use self::op::FileOp;
pub use self::shown::{is_harmful, shown};

use crate::format::{Container, FormatError};
use crate::units::{GuestOffset, GuestRange};

/// The result of every fallible operation of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A failed operation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused an operation on a file.
    #[error("{}: cannot {op}{}: {source}", shown(path), at(*offset))]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        op: FileOp,
        /// The host offset, where there is one.
        offset: Option<u64>,
        /// The system's answer.
        source: io::Error,
    },
    /// Guest data cannot be read from where it lies.
    #[error("{}: cannot read{}{} at offset {offset:#x}: {source}", shown(path), of_data_file(*in_data_file), guest_at(*guest))]
    Unreadable {
        /// The layer that holds the data.
        path: PathBuf,
        /// Whether it lies in the layer's external data file.
        in_data_file: bool,
        /// Where the guest would see it, where that is known.
        guest: Option<GuestRange>,
        /// The host offset: the first page that cannot be read.
        offset: u64,
        /// The system's answer.
        source: io::Error,
    },
    /// Bytes of an image break a rule of the format, or use a feature that is not supported.
    #[error("{}: {source}", shown(path))]
    Format {
        /// The image.
        path: PathBuf,
        /// Field, offset, what was found and what was expected.
        source: FormatError,
    },
    /// A file is of a format that is known and not read, and its bytes are needed.
    #[error("{}: it is {}, which is not read here", shown(path), container.description())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it is.
        container: Container,
    },
    /// Guest data cannot be produced: a mapping or a compressed cluster is damaged.
    #[error("{}: guest offset {guest}: {source}", shown(path))]
    Mapping {
        /// The layer that holds the damage.
        path: PathBuf,
        /// Where the guest would see it.
        guest: GuestOffset,
        /// Field, offset, what was found and what was expected.
        source: FormatError,
    },
    /// A file named by an image does not exist or cannot be opened.
    #[error(
        "{}: its {role} '{}' ({}) cannot be opened: {source}",
        shown(image),
        shown(name),
        shown(resolved)
    )]
    MissingLayer {
        /// The image that names it.
        image: PathBuf,
        /// "backing file" or "data file".
        role: &'static str,
        /// The name as written in the image.
        name: String,
        /// The name as resolved.
        resolved: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A safety rule forbids the operation; nothing was changed.
    #[error("{}: {reason}", shown(path))]
    Refused {
        /// The image concerned.
        path: PathBuf,
        /// The rule.
        reason: Refusal,
    },
    /// Another process holds the image.
    #[error("{}: the image is in use{}", shown(path), held_by(holders))]
    InUse {
        /// The image.
        path: PathBuf,
        /// The processes that have it open, as far as the caller may see them.
        holders: Vec<Holder>,
    },
    /// Not enough room for the result.
    #[error("{}: not enough space: {needed} bytes are needed, {available} are free", shown(path))]
    NoSpace {
        /// The file that would grow.
        path: PathBuf,
        /// Bytes that the operation needs.
        needed: u64,
        /// Bytes that there are.
        available: u64,
    },
    /// The caller asked to stop; nothing is lost, and the same operation goes on.
    #[error("stopped on request")]
    Cancelled,
    /// The arguments do not fit the chain: an unknown layer, a reversed range.
    #[error("{0}")]
    Usage(String),
    /// What was written does not read back as it should.
    #[error("{}: verification failed at guest offset {guest}: {what}", shown(path))]
    Verify {
        /// The image that was written.
        path: PathBuf,
        /// The first differing byte.
        guest: GuestOffset,
        /// What differs.
        what: String,
    },
}

/// A process that has an image open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its process id.
    pub pid: u32,
    /// Its command name.
    pub name: String,
    /// Its command line.
    pub command_line: Vec<String>,
}

/// Why a safety rule refuses; each says what the rule protects.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Images outside the chain read through base or a merged layer.
    #[error("it is also used by {}, which the merge would corrupt", list(users))]
    SharedBase {
        /// The images that use it.
        users: Vec<PathBuf>,
    },
    /// Images whose backing names lead nowhere may have used base or a merged layer before something was moved.
    #[error(
        "the backing name of {} leads nowhere now, and ends in its name: before a move, it may have been used there",
        list(users)
    )]
    PossiblyShared {
        /// The images.
        users: Vec<PathBuf>,
    },
    /// An image names a backing file without its format; formats are never guessed.
    #[error("its backing file '{}' has no format, and formats are never guessed", shown(name))]
    MissingFormat {
        /// The backing name as written.
        name: String,
    },
    /// The backing format that an image states is contradicted by the file.
    #[error(
        "its backing file '{}' is declared as {declared}, but the file's own bytes {}",
        shown(name),
        found.map_or_else(|| format!("do not begin as {declared} does"), |found| format!("say {found}"))
    )]
    FormatMismatch {
        /// The backing name as written.
        name: String,
        /// The declared format.
        declared: &'static str,
        /// What the magic says; `None` if there is none.
        found: Option<&'static str>,
    },
    /// A backing name that is not a local file: a network protocol or an unknown driver.
    #[error("its {role} '{}' is not a local file ({why})", shown(name))]
    NotLocal {
        /// "backing file" or "data file".
        role: &'static str,
        /// The name as written.
        name: String,
        /// What was found.
        why: String,
    },
    /// The caller's policy lets no image name other files.
    #[error("it names {role} '{}', and the policy does not allow images to name files", shown(name))]
    NamesDenied {
        /// "backing file" or "data file".
        role: &'static str,
        /// The name as written.
        name: String,
    },
    /// An image names a fifo, a socket, a character device, a directory or a file of the kernel.
    #[error("its {role} '{}' is {what}, not a regular file or a block device", shown(name))]
    NotAFile {
        /// "backing file" or "data file".
        role: &'static str,
        /// The name as written.
        name: String,
        /// What it is.
        what: String,
    },
    /// A file outside the folders that the caller allowed.
    #[error("{} lies outside the allowed folders", shown(file))]
    OutsideAllowed {
        /// The file.
        file: PathBuf,
    },
    /// The chain comes back to a file that it already holds.
    #[error("the backing chain is a loop: it comes back to {}", shown(file))]
    Loop {
        /// The file seen twice.
        file: PathBuf,
    },
    /// The chain is longer than the limit.
    #[error("the backing chain is longer than {limit} layers")]
    TooDeep {
        /// The limit.
        limit: usize,
    },
    /// Internal snapshots in a merged layer would change their content.
    #[error("it holds {count} internal snapshot(s), whose content would change")]
    Snapshots {
        /// How many.
        count: usize,
    },
    /// Persistent bitmaps of merged layers would be lost.
    #[error("its persistent bitmap(s) {} would be lost", names.iter().map(shown).collect::<Vec<_>>().join(", "))]
    Bitmaps {
        /// Their names.
        names: Vec<String>,
    },
    /// The dirty bit is set: refcounts cannot be trusted.
    #[error("the image is marked dirty: it was not closed cleanly, and its refcounts cannot be trusted")]
    Dirty,
    /// The corrupt bit is set.
    #[error("the image is marked corrupt")]
    CorruptBit,
    /// The consistency check found corruption.
    #[error("the image is inconsistent: {corruptions} error(s), the first: {first}")]
    Inconsistent {
        /// How many.
        corruptions: u64,
        /// The first finding.
        first: String,
    },
    /// The new backing name does not fit into cluster 0.
    #[error("its header has no room for the backing name '{}'", shown(name))]
    HeaderRoom {
        /// The name.
        name: OsString,
    },
    /// The file is not writable, or lies on a read-only file system.
    #[error("it cannot be written: {why}")]
    NotWritable {
        /// The system's answer.
        why: String,
        /// What kind of answer it is.
        kind: io::ErrorKind,
    },
    /// Its file system has no locks, so that nobody can tell whether somebody else uses the file.
    #[error("its file system has no locks, so it cannot be told whether another process uses it")]
    NoLocks,
    /// A file is not the one that the caller knows, or was changed since.
    #[error("it is not as it was recorded: {what}")]
    NotAsKnown {
        /// What is different.
        what: String,
    },
    /// No journal can be made beside an image that is to be written.
    #[error("there is no place for a journal of the work: {why}")]
    JournalPlace {
        /// What is in the way.
        why: String,
    },
    /// Where a file about the image is to be made there is one already, of somebody who may not write the image.
    #[error(
        "{} is in the way of the journal; it belongs to the user {user}, who may not write the image, so what it says is \
         not believed, and it was not touched",
        shown(file)
    )]
    Stranger {
        /// The file.
        file: PathBuf,
        /// The number of the user to whom it belongs.
        user: u32,
    },
    /// An image names a data file that its owner may not write.
    #[error(
        "it names {} as its data file, which its owner may not write: whoever wrote the image may have named any file",
        file.display()
    )]
    DataFileOwner {
        /// The data file.
        file: PathBuf,
    },
    /// The file is a journal that another version of this program has written.
    #[error(
        "it is the journal of a merge that another version of qmerge has begun (format {version}, this one \
         knows format {expected}): that version can go on with the merge, or give it up"
    )]
    JournalVersion {
        /// The version of its format.
        version: u32,
        /// The version that is known.
        expected: u32,
    },
    /// What a power cut has torn in an image might be made whole from a journal, but that the journal is about this
    /// image is not certain.
    #[error(
        "its header is torn, and {} was written for another file of its name: whether it fits this one is \
         not certain, so that nothing was changed",
        journal.display()
    )]
    JournalOfAnother {
        /// The journal.
        journal: PathBuf,
    },
    /// A merge into the image is pending, and somebody has written to the image since it was stopped.
    #[error(
        "a merge into it was stopped at {percent} %, and somebody has opened it for writing since: what the \
         merge noted does not fit it any more"
    )]
    WrittenSince {
        /// How far the merge was.
        percent: u64,
    },
    /// A pending merge cannot be given up: the chain has been changed already.
    #[error("the merge of {} into it has begun to change the chain, and can only be finished", shown(top))]
    MergeDone {
        /// The uppermost layer that was merged.
        top: PathBuf,
        /// The active image of the merge.
        active: PathBuf,
        /// Whether it removes layers that are not needed any more.
        removes: bool,
    },
    /// A backup of metadata cannot be used.
    #[error("the backup is damaged or not whole at offset {offset:#x}: {what}")]
    BackupDamaged {
        /// Where in the backup.
        offset: u64,
        /// What is wrong.
        what: String,
    },
    /// A backup of metadata may have been written by somebody who may not write the image.
    #[error(
        "the backup {} belongs to the user {user}, or may be written by others, who may not write the image",
        file.display()
    )]
    BackupOwner {
        /// The backup.
        file: PathBuf,
        /// The number of the user to whom it belongs.
        user: u32,
    },
    /// A backup of metadata is about another file.
    #[error("the backup is about another file: {}", shown(image))]
    OtherImage {
        /// The file that it is about, by its name at that time.
        image: PathBuf,
    },
    /// An image is not as a repair has left it, so a backup of its metadata does not fit it.
    #[error(
        "it was written by others since the repair: at offset {offset:#x}, {what}{}",
        breaks_off.map(|at| format!("; or the backup was cut off: it breaks off at offset {at:#x}")).unwrap_or_default()
    )]
    WrittenSinceRepair {
        /// Where in the image.
        offset: u64,
        /// What is there.
        what: String,
        /// Where the backup ends too early, if it does.
        breaks_off: Option<u64>,
    },
    /// Anything that needs words of its own.
    #[error("{0}")]
    Other(String),
}

/// The class of an error: what a caller decides by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The operating system failed.
    Io,
    /// An image breaks the format's rules, is dirty, corrupt or inconsistent.
    Damaged,
    /// A feature that this engine does not support.
    Unsupported,
    /// A safety rule.
    Refused,
    /// Another process holds the image.
    InUse,
    /// No room.
    NoSpace,
    /// Stopped on request.
    Cancelled,
    /// Bad arguments.
    Usage,
}

impl Error {
    /// The class of the error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Io { source, .. } | Self::Unreadable { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                    ErrorKind::NoSpace
                }
                _ => ErrorKind::Io,
            },
            Self::Format { source, .. } | Self::Mapping { source, .. } => {
                if source.is_unsupported() {
                    ErrorKind::Unsupported
                } else {
                    ErrorKind::Damaged
                }
            }
            Self::Refused { reason, .. } => match reason {
                Refusal::Dirty | Refusal::CorruptBit | Refusal::Inconsistent { .. } => ErrorKind::Damaged,
                _ => ErrorKind::Refused,
            },
            Self::Foreign { .. } => ErrorKind::Unsupported,
            Self::MissingLayer { .. } => ErrorKind::Io,
            Self::InUse { .. } => ErrorKind::InUse,
            Self::NoSpace { .. } => ErrorKind::NoSpace,
            Self::Cancelled => ErrorKind::Cancelled,
            Self::Usage(_) => ErrorKind::Usage,
            Self::Verify { .. } => ErrorKind::Damaged,
        }
    }

    /// An I/O error on `path`, at a host offset where there is one.
    pub fn io(path: &Path, op: FileOp, offset: Option<u64>, source: io::Error) -> Self {
        Self::Io { path: path.to_owned(), op, offset, source }
    }

    /// A format error in `path`.
    pub fn format(path: &Path, source: FormatError) -> Self {
        Self::Format { path: path.to_owned(), source }
    }

    /// A refusal that concerns `path`.
    pub fn refused(path: &Path, reason: Refusal) -> Self {
        Self::Refused { path: path.to_owned(), reason }
    }
}

fn of_data_file(is_there: bool) -> &'static str {
    if is_there { " its data file" } else { "" }
}

fn guest_at(guest: Option<GuestRange>) -> String {
    guest.map(|range| format!(" guest range {range}")).unwrap_or_default()
}

fn at(offset: Option<u64>) -> String {
    offset.map(|o| format!(" at offset {o:#x}")).unwrap_or_default()
}

fn held_by(holders: &[Holder]) -> String {
    if holders.is_empty() {
        return String::new();
    }
    let names: Vec<_> = holders.iter().map(|h| format!("{} (process {})", shown(&h.name), h.pid)).collect();
    format!(" by {}", names.join(", "))
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(shown).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests;
