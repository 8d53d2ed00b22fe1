//! The exit codes that scripts rely on.

use std::process::ExitCode;

use qcow2::ErrorKind;

/// The exit code of the process.
///
/// `check` and `compare` use the codes of `qemu-img check` and `qemu-img compare`; every other verb uses the
/// table in [`TABLE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exit(u8);

impl Exit {
    /// Everything was done.
    pub(crate) const DONE: Self = Self(0);
    /// The operation failed.
    pub(crate) const FAILED: Self = Self(1);
    /// The arguments make no sense.
    pub(crate) const USAGE: Self = Self(2);
    /// A merge stopped half-way; nothing is lost, and the same command goes on.
    pub(crate) const HALFWAY: Self = Self(4);
    /// Another process holds an image.
    pub(crate) const IN_USE: Self = Self(5);
    /// A safety rule forbids it.
    pub(crate) const REFUSED: Self = Self(6);
    /// An image uses a feature that is not supported.
    pub(crate) const UNSUPPORTED: Self = Self(7);
    /// Not enough room.
    pub(crate) const NO_SPACE: Self = Self(8);
    /// An image is dirty, corrupt or inconsistent.
    pub(crate) const DAMAGED: Self = Self(9);

    /// `check`: the image could not be checked.
    pub(crate) const CHECK_FAILED: Self = Self(1);
    /// `check`: corruption was found.
    pub(crate) const CHECK_CORRUPT: Self = Self(2);
    /// `check`: clusters are leaked, and nothing worse.
    pub(crate) const CHECK_LEAKS: Self = Self(3);
    /// `check`: the format has nothing to check.
    pub(crate) const CHECK_UNSUPPORTED: Self = Self(63);

    /// `compare`: the contents differ.
    pub(crate) const COMPARE_DIFFERENT: Self = Self(1);
    /// `compare`: the comparison failed.
    pub(crate) const COMPARE_FAILED: Self = Self(2);

    /// The code of an error of this class.
    pub(crate) fn of(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::Usage => Self::USAGE,
            ErrorKind::InUse => Self::IN_USE,
            ErrorKind::Refused => Self::REFUSED,
            ErrorKind::Unsupported => Self::UNSUPPORTED,
            ErrorKind::NoSpace => Self::NO_SPACE,
            ErrorKind::Damaged => Self::DAMAGED,
            ErrorKind::Cancelled => Self::HALFWAY,
            _ => Self::FAILED,
        }
    }

    /// The code after a signal, as shells count it.
    pub(crate) fn signal(number: u8) -> Self {
        Self(number.saturating_add(128))
    }

    /// The number.
    pub(crate) fn code(self) -> u8 {
        self.0
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.0)
    }
}

/// The table for `--help`.
pub(crate) const TABLE: &str = "\
Exit codes:
  0  done
  1  failed
  2  bad usage
  4  stopped half-way: nothing is lost, and the same command goes on
  5  an image is in use
  6  refused by a safety rule; nothing was changed
  7  a feature that is not supported
  8  no space
  9  an image is dirty, corrupt or inconsistent
  129, 130, 143  stopped by SIGHUP, by Ctrl-C or by SIGTERM
check:    0 clean, 1 could not check, 2 corruption, 3 leaks only, 7 another format, 63 nothing to check (raw)
compare:  0 same, 1 different, 2 failed, 7 another format";
