//! Why an obsolete layer is not removed, or does not become an empty overlay.

use std::fmt;
use std::path::PathBuf;

use qcow2::error::shown;
use qcow2::{Error, Refusal};

use crate::live::plan::Obstacle;

/// Why a layer stays as it is, for good or for now.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StaysReason {
    /// A layer above it is kept, and reads through this one.
    BelowKept,
    /// An image outside the chain uses it.
    UsedBy(PathBuf),
    /// Its name leads to another file by now.
    OtherFile,
    /// QEMU still has it open.
    OpenInQemu,
    /// It is not a file on this host.
    NotHere,
    /// It cannot become an empty overlay on base.
    Obstacle(Obstacle),
    /// A safety rule of the engine forbids it.
    Refused(Refusal),
    /// Something else has failed.
    Failed {
        /// The engine's stable word for it.
        code: &'static str,
        /// What failed, and where.
        what: String,
    },
}

impl StaysReason {
    /// The reason if another image uses the layer: `user`, if it is known.
    pub(crate) fn used_by(user: Option<&PathBuf>) -> Self {
        user.map_or(Self::BelowKept, |user| Self::UsedBy(user.clone()))
    }

    /// The reason for a file that can never be handled as it is: the rule, without the file's name.
    pub(crate) fn of(error: &Error) -> Self {
        match error {
            Error::Refused { reason: Refusal::SharedBase { users }, .. } if !users.is_empty() => {
                Self::used_by(users.first())
            }
            Error::Refused { reason, .. } => Self::Refused(reason.clone()),
            _ => Self::failed(error),
        }
    }

    /// The reason for a file that cannot be handled now.
    pub(crate) fn failed(error: &Error) -> Self {
        Self::Failed { code: error.code(), what: error.to_string() }
    }
}

impl fmt::Display for StaysReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BelowKept => f.write_str("a layer above it is kept"),
            Self::UsedBy(user) => write!(f, "{} uses it", shown(user)),
            Self::OtherFile => f.write_str("it is another file by now"),
            Self::OpenInQemu => f.write_str("QEMU still has it open"),
            Self::NotHere => f.write_str("it is no file here"),
            Self::Obstacle(obstacle) => obstacle.fmt(f),
            Self::Refused(reason) => reason.fmt(f),
            Self::Failed { what, .. } => f.write_str(what),
        }
    }
}
