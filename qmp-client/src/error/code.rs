//! A stable word for each failure, which programs may rely on, and its class.

use std::io;

use qcow2::ErrorKind;

use super::Error;
use crate::live::Hindrance;
use crate::live::plan::Obstacle;

impl Error {
    /// A stable word for the failure, such as `no-monitor`.
    pub fn code(&self) -> &'static str {
        self.class().0
    }

    /// Its class.
    pub fn kind(&self) -> ErrorKind {
        self.class().1
    }

    fn class(&self) -> (&'static str, ErrorKind) {
        use ErrorKind::{Io, NoSpace, Refused, Unsupported, Usage};
        match self {
            Self::Address { .. } | Self::TcpNotAllowed { .. } | Self::Layer { .. } => ("usage", Usage),
            Self::NoSuchDisk { .. } => ("no-such-disk", Usage),
            Self::Connect { .. } => ("no-monitor", Io),
            Self::NoGreeting { .. } => ("monitor-in-use", Io),
            Self::Disconnected { .. } => ("disconnected", Io),
            Self::TimedOut { .. } => ("timed-out", Io),
            Self::Job { .. } => ("job-failed", Io),
            Self::Refused { .. } | Self::BackingName { .. } | Self::NotFlushed { .. } => ("refused", Refused),
            Self::Managed { .. } => ("managed", Refused),
            Self::File { source, .. } if source.kind() == io::ErrorKind::StorageFull => ("no-space", NoSpace),
            Self::File { .. } => ("io", Io),
            Self::State { .. } => ("state-file", Io),
            Self::Hindered(hindrance) => hindrance.class(),
            Self::Command { failure, .. } if failure.class == "CommandNotFound" => {
                ("unsupported", Unsupported)
            }
            Self::Command { .. } => ("qemu-refused", Io),
            _ => ("qmp", Io),
        }
    }
}

impl Hindrance {
    fn class(&self) -> (&'static str, ErrorKind) {
        use ErrorKind::{Io, NoSpace, Refused, Unsupported, Usage};
        match self {
            Self::Bitmaps { .. } => ("bitmaps", Refused),
            Self::Snapshots { .. } => ("snapshots", Refused),
            Self::Plaintext { .. } => ("plaintext", Refused),
            Self::StaleActive { obstacle: Obstacle::Format { .. } | Obstacle::Encrypted { .. }, .. } => {
                ("stale-image", Unsupported)
            }
            Self::StaleActive { .. } => ("stale-image", Refused),
            Self::NotHere { .. } => ("not-here", Refused),
            Self::JobExists { .. } | Self::UnderWay { .. } => ("job-exists", Refused),
            Self::NoSpace { .. } => ("no-space", NoSpace),
            Self::SharedBase { .. } | Self::SharedInside { .. } => ("shared-base", Refused),
            Self::NotSearched { .. } => ("io", Io),
            Self::NoStateFolder { .. } => ("no-state-folder", Refused),
            Self::StateOfAnother { .. } => ("state-of-another", Refused),
            Self::RecoverFirst { .. } => ("recover-first", Refused),
            Self::ActiveNotAskedFor { .. } | Self::OnlyForActive { .. } => ("usage", Usage),
            Self::NotSlowed { source } => source.class(),
        }
    }
}
