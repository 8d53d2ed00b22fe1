//! The findings about an interrupted merge, and what was done, as values. The command finds the words for them.

use std::path::PathBuf;

use qapi::qmp::JobStatus;

use crate::live::outline::Outline;
use crate::live::tidy::StaysReason;
use crate::live::verdict::Doubt;
use crate::qmp::address::Address;

/// What was found out about one interrupted merge, and what was done, or would be done.
#[derive(Debug)]
#[non_exhaustive]
pub struct Finding {
    /// The merge.
    pub merge: Outline,
    /// Its outcome.
    pub outcome: Found,
    /// The image that holds the disk; `None` if that is not certain.
    pub valid_top: Option<String>,
    /// What was found, in this order.
    pub facts: Vec<Fact>,
    /// What was done, or would be done.
    pub did: Vec<Deed>,
    /// What the user can do next.
    pub next: Option<Next>,
    /// What stands in the way.
    pub trouble: Option<Trouble>,
}

/// The outcome of an interrupted merge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Found {
    /// QEMU is running, and the merge is its business.
    Running,
    /// Somebody holds the images.
    InUse,
    /// The merge did not switch: the disk is the chain from before.
    NotSwitched,
    /// The merge is complete.
    Completed,
    /// An overlay got its former backing file back.
    RelinkedBack,
    /// Only the user can tell which image is the disk.
    Unclear,
    /// An error stopped the recovery.
    Failed,
}

/// Something that was found.
#[derive(Debug)]
#[non_exhaustive]
pub enum Fact {
    /// The chain is as it was.
    NothingSwitched,
    /// The merge is complete.
    Complete,
    /// The merge is complete, and the guest ran on base already.
    GuestMoved,
    /// The pull is complete; this disk no longer needs these files.
    Pulled(Vec<String>),
    /// QEMU had switched, but base lacks data.
    BaseLacks {
        /// Base.
        base: String,
        /// The first such byte of the disk.
        at: u64,
    },
    /// A file stays as it is.
    Stays {
        /// The file.
        file: PathBuf,
        /// Why.
        why: StaysReason,
    },
    /// QEMU is running, and has the job.
    JobIs(JobStatus),
    /// The job can be cancelled over this monitor.
    CanBeCancelled(Address),
    /// A killed client had left the guest paused; it runs again.
    GuestGoesOn,
    /// QEMU is running, the job is gone, and nothing was switched.
    JobIsGone,
    /// QEMU is running and has switched; only the end is not noted.
    HasSwitched,
    /// Another image lies above the merge's top, and is the disk.
    LiesAbove {
        /// The image.
        above: String,
        /// The image that the merge left on top.
        top: String,
    },
    /// It could not be found out whether an image lies above the merge's top.
    AboveNotSeen {
        /// The image that the merge left on top.
        top: String,
        /// Why.
        error: qcow2::Error,
    },
    /// An image is the backing file of several, besides another trouble.
    Fork {
        /// The image.
        image: PathBuf,
        /// The images that have it as their backing file.
        users: Vec<PathBuf>,
    },
    /// Only these folders were searched for images above the top. A snapshot in another folder would be the
    /// disk.
    Searched(Vec<PathBuf>),
    /// The configuration of the virtual machine should name this image.
    ShouldBeNamed {
        /// The image.
        top: String,
        /// Whether a running QEMU shows it. Otherwise it is only the uppermost image that was found.
        certain: bool,
    },
}

/// Something that was done, or would be done.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Deed {
    /// Files are removed.
    Remove(Vec<PathBuf>),
    /// Files become empty overlays on base.
    Empty {
        /// The files.
        files: Vec<PathBuf>,
        /// Base.
        base: String,
    },
    /// An overlay is relinked to its former backing file.
    RelinkBack {
        /// The overlay.
        overlay: String,
        /// The former backing name.
        name: String,
    },
    /// The state file is removed.
    Forget(PathBuf),
}

/// What the user can do next.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Next {
    /// Repeat the merge offline, with this image as the active one.
    Offline {
        /// The active image.
        active: String,
    },
    /// End the merge over this monitor.
    End(Address),
    /// Begin the merge anew over this monitor.
    Begin(Address),
}

/// What keeps an interrupted merge from being recovered.
#[derive(Debug)]
#[non_exhaustive]
pub enum Trouble {
    /// Only the user can tell which data is wanted. Nothing was changed.
    InDoubt(Doubt),
    /// An image is the backing file of several, any of which may be the disk.
    Fork {
        /// The image.
        image: PathBuf,
        /// The images that have it as their backing file.
        users: Vec<PathBuf>,
    },
    /// QEMU is running, and another client holds its monitor.
    MonitorInUse(Address),
    /// The images could not be read or changed.
    Engine(qcow2::Error),
    /// Everything is done, but the state file could not be removed.
    NotForgotten(crate::Error),
}

impl Finding {
    pub(super) fn new(merge: Outline, outcome: Found) -> Self {
        let valid_top = Some(merge.valid_top.clone());
        Self { merge, outcome, valid_top, facts: Vec::new(), did: Vec::new(), next: None, trouble: None }
    }
}
