//! What was found out about an interrupted merge, and what was done: values, for which others find words.

use std::path::PathBuf;

use qapi::qmp::JobStatus;

use crate::live::outline::Outline;
use crate::live::tidy::StaysReason;
use crate::live::verdict::Doubt;
use crate::qmp::address::Address;

/// What was found out about one interrupted merge, and what was done, or would be.
#[derive(Debug)]
#[non_exhaustive]
pub struct Finding {
    /// The merge.
    pub merge: Outline,
    /// What came of it.
    pub outcome: Found,
    /// The image that holds the disk, where that is certain.
    pub valid_top: Option<String>,
    /// What was found, in the order in which it was.
    pub facts: Vec<Fact>,
    /// What was done, or would be.
    pub did: Vec<Deed>,
    /// How to go on.
    pub next: Option<Next>,
    /// What keeps it from being done.
    pub trouble: Option<Trouble>,
}

/// What came of an interrupted merge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Found {
    /// QEMU runs, and has it in hand.
    Running,
    /// Somebody holds the images.
    InUse,
    /// Nothing was switched.
    NotSwitched,
    /// It is complete.
    Completed,
    /// An overlay got its former backing file back.
    RelinkedBack,
    /// Only the user can tell.
    Unclear,
    /// An error came in between.
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
    /// The merge is complete, and the guest had moved to base.
    GuestMoved,
    /// The pull is complete; this disk needs these files no more.
    Pulled(Vec<String>),
    /// QEMU had switched, and base lacks data.
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
    /// QEMU runs, and has the job.
    JobIs(JobStatus),
    /// The job can be cancelled over this monitor.
    CanBeCancelled(Address),
    /// The guest was still paused by a client that was killed, and goes on now.
    GuestGoesOn,
    /// QEMU runs, the job is gone, and nothing was switched.
    JobIsGone,
    /// QEMU runs, and has switched; only the end is not noted.
    HasSwitched,
    /// An image lies above the one that the merge left on top, and is the disk.
    LiesAbove {
        /// The image.
        above: String,
        /// The one that the merge left on top.
        top: String,
    },
    /// Whether an image lies above that one cannot be seen.
    AboveNotSeen {
        /// The one that the merge left on top.
        top: String,
        /// Why.
        error: qcow2::Error,
    },
    /// An image is the backing file of several, and there is another trouble.
    Fork {
        /// The image.
        image: PathBuf,
        /// Those that have it as their backing file.
        users: Vec<PathBuf>,
    },
    /// Only these folders were searched for an image above the top; a snapshot in another one would be the disk.
    Searched(Vec<PathBuf>),
    /// What starts the virtual machine should name this image.
    ShouldBeNamed {
        /// The image.
        top: String,
        /// Whether QEMU shows that. Otherwise it is the uppermost image that was found.
        certain: bool,
    },
}

/// Something that was done, or would be.
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
    /// An overlay gets its former backing file back.
    RelinkBack {
        /// The overlay.
        overlay: String,
        /// The name.
        name: String,
    },
    /// The state file is removed.
    Forget(PathBuf),
}

/// How to go on.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Next {
    /// The same merge of the stopped machine, with this image as the active one.
    Offline {
        /// The active image.
        active: String,
    },
    /// The merge is ended over this monitor.
    End(Address),
    /// The merge is begun anew over this monitor.
    Begin(Address),
}

/// What keeps an interrupted merge from being put right.
#[derive(Debug)]
#[non_exhaustive]
pub enum Trouble {
    /// Only the user can tell what is wanted. Nothing was changed.
    InDoubt(Doubt),
    /// An image is the backing file of several: which of them is the disk cannot be told.
    Fork {
        /// The image.
        image: PathBuf,
        /// Those that have it as their backing file.
        users: Vec<PathBuf>,
    },
    /// QEMU runs, and another client holds its monitor.
    MonitorInUse(Address),
    /// The images could not be looked at or changed.
    Engine(qcow2::Error),
    /// All is done, and the state file could not be removed.
    NotForgotten(crate::Error),
}

impl Finding {
    pub(super) fn new(merge: Outline, outcome: Found) -> Self {
        let valid_top = Some(merge.valid_top.clone());
        Self { merge, outcome, valid_top, facts: Vec::new(), did: Vec::new(), next: None, trouble: None }
    }
}
