//! What is not begun, because it would do harm or could not end well.

use std::path::PathBuf;

use qapi::qmp::JobStatus;

/// Why something was not begun.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The layer that takes the data is too small, and its driver cannot make it larger.
    #[error("{file} has {size} bytes and must grow to {needed}, which the driver {driver} cannot do")]
    CannotGrow {
        /// The layer's file.
        file: String,
        /// Its size in bytes.
        size: u64,
        /// The size that it must have.
        needed: u64,
        /// The driver.
        driver: String,
    },
    /// QEMU would show base's old bytes where a short top showed zeros.
    #[error(
        "{top} is shorter than the overlay above it and than {base}: the bytes of base past its end would show; stop the \
         guest and merge offline"
    )]
    ShortTop {
        /// The uppermost layer that is merged.
        top: String,
        /// The layer that takes the data.
        base: String,
    },
    /// The try that the overlay can be written would write top's format as that of base.
    #[error("{overlay} and {top} differ in format")]
    FormatsDiffer {
        /// The overlay above top.
        overlay: String,
        /// The uppermost layer that is merged.
        top: String,
    },
    /// After a pivot onto a longer base the guest would see a disk of another size.
    #[error("{base} is longer than {top}: the disk would change its size")]
    DiskWouldGrow {
        /// The layer that takes the data.
        base: String,
        /// The active layer.
        top: String,
    },
    /// A base that grows cannot be made durable by a storage daemon before the switch.
    #[error(
        "{base} must grow, and then this storage daemon cannot make it durable before the switch; merge it with the active \
         layer, or offline"
    )]
    GrowsUnflushed {
        /// The layer that takes the data.
        base: String,
    },
    /// Persistent bitmaps of layers that go would be lost.
    #[error("these persistent bitmaps would be lost: {}", .names.join(", "))]
    Bitmaps {
        /// Their names.
        names: Vec<String>,
    },
    /// The guest is being moved to another host, or saved.
    #[error("the guest is being moved or saved ({status})")]
    GuestMoves {
        /// QEMU's word for what it does.
        status: String,
    },
    /// A migration is under way.
    #[error("a migration is under way ({status})")]
    Migration {
        /// QEMU's word for its status.
        status: String,
    },
    /// A merge of this disk is there already.
    #[error("the job {job} of this disk is {status:?}; end it first")]
    JobExists {
        /// The job's id.
        job: String,
        /// Its status.
        status: JobStatus,
    },
    /// A job has not come as far as it must for this step.
    #[error("the job {job} is {status:?}, not {wanted:?}")]
    JobStatus {
        /// The job's id.
        job: String,
        /// Its status.
        status: JobStatus,
        /// The statuses that were wanted.
        wanted: Vec<JobStatus>,
    },
    /// There is no such job any more.
    #[error("the job {job} is gone, not ready")]
    JobGone {
        /// The job's id.
        job: String,
    },
    /// The overlay whose header is to be switched names no backing file.
    #[error("the header of the overlay above top names no backing file")]
    NoBackingName,
    /// A merge whose preflight has not passed.
    #[error("the merge has not passed its preflight")]
    NotTried,
    /// A job whose id is one of this library's, and no state file that notes it was found. Ended without its note, the file
    /// would name the old image as the one that holds the disk.
    #[error(
        "the job {job} belongs to a merge of qmerge, and the file that notes how far that merge is was not found"
    )]
    NoStateFound {
        /// The job's id.
        job: String,
    },
    /// QEMU 10.0.2 crashes when it is asked for its nodes while it keeps a pull that has concluded.
    #[error(
        "the job {job} has {} and was not dismissed by the client that started it; QEMU may crash if it is asked for its \
         disks now. Dismiss it first: {{\"execute\": \"job-dismiss\", \"arguments\": {{\"id\": \"{job}\"}}}}",
        .error.as_ref().map_or("succeeded".to_owned(), |error| format!("failed ({error})"))
    )]
    KeptPull {
        /// The job's id.
        job: String,
        /// Its error, if it failed.
        error: Option<String>,
    },
    /// A snapshot that names a disk or a file twice.
    #[error("{disk}={} names a disk or a file that is named twice", .file.display())]
    NamedTwice {
        /// The disk.
        disk: String,
        /// The new overlay.
        file: PathBuf,
    },
    /// A path that QEMU, which may run in another folder, would take for another one.
    #[error("{} is no absolute path, and QEMU may run in another folder", .file.display())]
    RelativePath {
        /// The path.
        file: PathBuf,
    },
    /// A name that QMP cannot carry: JSON is UTF-8.
    #[error("the name {file:?} is not UTF-8, and QEMU's control socket carries no other names")]
    NotUtf8 {
        /// The path.
        file: PathBuf,
    },
    /// A new file would overwrite one that is there.
    #[error("{} exists; a snapshot would overwrite it", .file.display())]
    Exists {
        /// The path.
        file: PathBuf,
    },
    /// A new file whose folder is not there.
    #[error("the folder of {} does not exist", .file.display())]
    NoFolder {
        /// The path.
        file: PathBuf,
    },
    /// An active layer that has no name by which an overlay in another folder could find it.
    #[error("'{file}' is no name by which an overlay elsewhere can find it")]
    NoNameElsewhere {
        /// The name that QEMU has for it.
        file: String,
    },
    /// The state file speaks of a merge that is not cleaned up after.
    #[error("{} speaks of an earlier merge of {disk} that is not cleaned up after", .state_file.display())]
    NotCleanedUp {
        /// The state file.
        state_file: PathBuf,
        /// The disk of that merge.
        disk: String,
    },
    /// A step that only an active commit has.
    #[error("only an active commit {step}")]
    OnlyActiveCommit {
        /// What it does.
        step: &'static str,
    },
    /// An active commit has two ends, and neither was asked for.
    #[error("an active commit ends with a pivot, or without one")]
    EndOfActiveCommit,
    /// A job has ended, and the disk has another chain than before it.
    #[error("the job {job} has ended, and the disk has not the chain from before")]
    OtherChain {
        /// The job's id.
        job: String,
    },
    /// Nothing can slow this disk's guest down.
    #[error("{disk} cannot be throttled: {why}")]
    NoThrottle {
        /// The disk.
        disk: String,
        /// Why.
        why: &'static str,
    },
}
