//! What can go wrong, with the file, the offset, what was found and what was expected.

mod doubt;
mod op;
mod refusal;
mod shown;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

pub use self::doubt::Doubt;
pub use self::op::FileOp;
pub use self::refusal::{Contradiction, Refusal};
pub use self::shown::{is_harmful, shown};
pub use crate::format::{FormatError, RewriteError};

use crate::format::Container;
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
    /// A barrier failed: what was written before it may not be durable, whatever a later one says. Nothing may be written
    /// behind it that depends on what came before.
    #[error("{}: cannot sync: {source}", shown(path))]
    Barrier {
        /// The file or the folder.
        path: PathBuf,
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
        /// As what it is named.
        role: Role,
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
    /// Something that cannot be is: this program is wrong, not the caller and not an image.
    #[error("this is a mistake in the program, please report it: {invariant} does not hold")]
    Broken {
        /// What should always hold.
        invariant: &'static str,
    },
}

/// As what an image names a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Role {
    /// What lies below it.
    BackingFile,
    /// What holds its data.
    DataFile,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BackingFile => "backing file",
            Self::DataFile => "data file",
        })
    }
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
    /// A mistake in the program.
    Broken,
}

impl Error {
    /// The class of the error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Io { source, .. } | Self::Barrier { source, .. } | Self::Unreadable { source, .. } => {
                match source.kind() {
                    io::ErrorKind::StorageFull
                    | io::ErrorKind::QuotaExceeded
                    | io::ErrorKind::FileTooLarge => ErrorKind::NoSpace,
                    _ => ErrorKind::Io,
                }
            }
            Self::Format { source, .. } | Self::Mapping { source, .. } => {
                if source.is_unsupported() {
                    ErrorKind::Unsupported
                } else {
                    ErrorKind::Damaged
                }
            }
            Self::Refused { reason, .. } => match reason {
                Refusal::Dirty
                | Refusal::TornHeader
                | Refusal::TornTables
                | Refusal::CorruptBit
                | Refusal::Inconsistent { .. } => ErrorKind::Damaged,
                _ => ErrorKind::Refused,
            },
            Self::Foreign { .. } => ErrorKind::Unsupported,
            Self::MissingLayer { .. } => ErrorKind::Io,
            Self::InUse { .. } => ErrorKind::InUse,
            Self::NoSpace { .. } => ErrorKind::NoSpace,
            Self::Cancelled => ErrorKind::Cancelled,
            Self::Usage(_) => ErrorKind::Usage,
            Self::Verify { .. } => ErrorKind::Damaged,
            Self::Broken { .. } => ErrorKind::Broken,
        }
    }

    /// A stable word for the error, which programs may rely on: `shared-base`, `in-use`, `io`.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Refused { reason, .. } => reason.code(),
            Self::Foreign { .. } => "foreign-format",
            Self::MissingLayer { .. } => "missing-layer",
            Self::Verify { .. } => "verify-failed",
            _ => match self.kind() {
                ErrorKind::Damaged => "malformed",
                ErrorKind::Unsupported => "unsupported",
                ErrorKind::Refused => "refused",
                ErrorKind::InUse => "in-use",
                ErrorKind::NoSpace => "no-space",
                ErrorKind::Cancelled => "interrupted",
                ErrorKind::Usage => "usage",
                ErrorKind::Broken => "internal",
                _ => "io",
            },
        }
    }

    /// An I/O error on `path`, at a host offset where there is one.
    pub fn io(path: &Path, op: FileOp, offset: Option<u64>, source: io::Error) -> Self {
        Self::Io { path: path.to_owned(), op, offset, source }
    }

    /// A failed barrier of the file or folder `path`.
    pub fn barrier(path: &Path, source: io::Error) -> Self {
        Self::Barrier { path: path.to_owned(), source }
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

#[cfg(test)]
mod tests;
