//! What is asked of a pull, what it will do, and how it came out.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use crate::chain::OpenOptions;
use crate::transfer::Totals;

/// What a caller may ask of a pull.
#[derive(Clone, Debug, Default)]
pub struct PullOptions {
    /// The layer that becomes the backing file, by path or index; without it, nothing is to lie below the image.
    pub base: Option<OsString>,
    /// How the chain is opened: policy and formats. Access and locks are the pull's own matter.
    pub open: OpenOptions,
    /// Read everything back before the backing name changes.
    pub verify: bool,
    /// Pull although internal snapshots of the image will show something else.
    pub allow_snapshot_change: bool,
    /// Where the journal is kept if it cannot lie beside the image.
    pub journal_dir: Option<PathBuf>,
}

/// What a pull will do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PullPlan {
    /// The image that takes the data.
    pub active: PathBuf,
    /// The layer that will be its backing file, if there is one.
    pub base: Option<PathBuf>,
    /// The layers whose data is taken in, the uppermost first: the image needs them no more.
    pub pulled: Vec<PathBuf>,
    /// What is moved and taken.
    pub totals: Totals,
    /// The backing name that will stand in the header; `None` if there is none.
    pub backing_name: Option<OsString>,
    /// The size of the image's disk, in bytes. It does not change.
    pub virtual_size: u64,
    /// The length that the image's file, or the block device that holds it, must have afterwards, at most.
    pub file_size_after: u64,
    /// Whether the same pull was stopped before.
    pub is_resumed: bool,
    /// Whether the file system does not say how much is free.
    pub is_room_unknown: bool,
}

/// How a pull came out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PullReport {
    /// What was moved and taken.
    pub totals: Totals,
    /// How long it took.
    pub elapsed: Duration,
    /// The digest (CRC-32) of the guest's view, if everything was verified.
    pub digest: Option<u32>,
    /// The length of the image's file, in bytes.
    pub file_size: u64,
}
