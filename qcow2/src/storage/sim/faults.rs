//! Operations that fail.

use std::io;

/// How an operation fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// The device reports an error (EIO); any operation on a file or a name.
    Io,
    /// The device is full (ENOSPC); whatever may need room.
    NoSpace,
    /// Half of the sectors of a write are written, then the device is full.
    Short,
    /// A barrier fails (EIO): what was pending may be lost for good.
    Sync,
    /// The process has too many open files (EMFILE); whatever opens, creates or lists.
    Files,
}

/// Which operation fails, how, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// How it fails.
    pub kind: FaultKind,
    /// Which one of those that can fail so, counted from 1.
    pub nth: u64,
    /// Whether all that can fail so do from then on.
    pub for_ever: bool,
}

/// What an operation does, as far as faults care.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Asks or reads; takes a lock, or looks at those of others.
    Look,
    /// Opens a file, or lists a folder.
    Open,
    /// Makes a file.
    Create,
    /// Changes a name or shortens something.
    Change,
    /// May need room.
    Grow,
    /// Writes bytes.
    Write,
    /// A barrier.
    Sync,
}

/// What has become of a fault.
#[derive(Debug, Default)]
pub(super) struct Faults {
    fault: Option<Fault>,
    pub(super) seen: u64,
    pub(super) fired: u64,
}

impl Faults {
    pub(super) fn set(&mut self, fault: Option<Fault>) {
        *self = Self { fault, ..Self::default() };
    }

    /// Says how an operation that is about to be done fails, if it does.
    pub(super) fn strike(&mut self, action: Action) -> Option<FaultKind> {
        let Fault { kind, nth, for_ever } = self.fault?;
        let concerned = match kind {
            FaultKind::Io => true,
            FaultKind::NoSpace => matches!(action, Action::Create | Action::Grow | Action::Write),
            FaultKind::Short => action == Action::Write,
            FaultKind::Sync => action == Action::Sync,
            FaultKind::Files => matches!(action, Action::Open | Action::Create),
        };
        self.seen += u64::from(concerned);
        let strikes = concerned && (self.seen == nth || (for_ever && self.seen > nth));
        self.fired += u64::from(strikes);
        strikes.then_some(kind)
    }
}

impl FaultKind {
    /// What the system says.
    pub(super) fn error(self) -> io::Error {
        use rustix::io::Errno;
        match self {
            Self::Io | Self::Sync => Errno::IO.into(),
            Self::NoSpace | Self::Short => Errno::NOSPC.into(),
            Self::Files => Errno::MFILE.into(),
        }
    }
}
