//! What can be done after a failure, as values: what, and why just that. Whoever speaks to a user spells them.

mod after;

use std::path::PathBuf;

use crate::live::counterpart::StoppedMerge;
use crate::qmp::address::Address;
use crate::qmp::owner::Owner;

pub use after::{after, end_first, not_begun, stopped, unplanned};

/// What was asked for when something failed: what succeeds next depends on it.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// The monitor.
    pub address: &'a Address,
    /// Which kind of work.
    pub task: LiveTask<'a>,
    /// Whether merged files were to be removed.
    pub deletes: bool,
}

/// A kind of work, with the disk that it is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LiveTask<'a> {
    /// New overlays.
    Snapshot,
    /// A merge down.
    Commit(&'a str),
    /// A merge up.
    Pull(&'a str),
    /// The end of a merge.
    End(&'a str),
    /// Anything else.
    Other,
}

/// One thing to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LiveWay {
    /// What.
    pub act: LiveAct,
    /// Why, or what must be put right first.
    pub why: LiveWhy,
}

/// What can be done.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LiveAct {
    /// Something outside of this project, which the reason says.
    Outside,
    /// The same again.
    Again,
    /// The same again, by root.
    AgainAsRoot,
    /// The same again, with something allowed or wanted.
    With(Wish),
    /// The same again, with the active layer left out: this is the uppermost one then.
    BelowActive(usize),
    /// The same again, with values that only the user knows.
    Give(&'static [Value]),
    /// The same again, without a name for base.
    WithoutName,
    /// Reading what the work can be asked.
    Help,
    /// Looking at the disks.
    List,
    /// Looking at the chain of a disk.
    Chain(String),
    /// Looking at the jobs.
    Jobs,
    /// Ending a merge of this disk.
    End {
        /// The disk.
        disk: String,
        /// Whether the guest moves to base then.
        pivots: bool,
    },
    /// Ending the job of a disk without its effect.
    Cancel(String),
    /// A merge up of this disk instead.
    Pull(String),
    /// Putting right what a merge has left: of this disk, if it is known.
    Recover(Option<String>),
    /// The same merge of the stopped machine.
    Offline(StoppedMerge),
    /// Looking at the same in the words of whoever manages the machine.
    AskOwner(Owner),
    /// Looking for the names of the internal snapshots of a file.
    Snapshots(String),
    /// Looking at the files of a folder.
    ListFolder(PathBuf),
    /// The same, with hidden ones.
    ListAll(PathBuf),
    /// Looking at who may use a file.
    ListRights(PathBuf),
    /// Looking at files.
    ListFiles(Vec<String>),
}

/// What can be allowed, or wished for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Wish {
    /// That persistent bitmaps are lost.
    BitmapLoss,
    /// That internal snapshots change.
    SnapshotChange,
    /// That encrypted data goes into plain text.
    Plaintext,
    /// That an old image stays bootable.
    Stale,
    /// That images outside the chain break.
    SharedBase,
    /// That merged files are removed.
    Removal,
    /// That the active layer is merged, and the guest moves to base.
    Active,
}

/// A value that only the user knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Value {
    /// The folder where the merge keeps its state.
    StateFolder,
    /// The socket of the NBD server that QEMU runs.
    NbdSocket,
    /// What base is called in the header above.
    BackingName,
}

/// Why something is to be done, or what must be put right first.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LiveWhy {
    /// It needs no reason.
    Plain,
    /// When what was named before is done.
    Then,
    /// QEMU must be started with a monitor at this port.
    StartWithPort(u16),
    /// QEMU makes a socket if it is told to; these are there.
    QemuMakesSocket,
    /// Only root may.
    AsRoot,
    /// It must be seen who listens.
    WhoListens,
    /// This one holds the monitor.
    HeldBy(Owner),
    /// Another client holds the monitor.
    OtherClient,
    /// If QEMU still runs, its jobs go on.
    JobsGoOn,
    /// If QEMU has ended, this says which image holds the disk.
    WhichImage,
    /// QEMU must be able to write the folders of new files; nothing was changed.
    WritableFolders,
    /// How it stands.
    HowItStands,
    /// How things stand there.
    HowThingsStand,
    /// Who may use a file.
    WhoMay,
    /// The system's reason must be looked for.
    SystemsReason,
    /// Too many files are open; which limit it is.
    OpenFiles(qcow2::ways::Why),
    /// What notes how far a merge is.
    NotesMerge,
    /// The socket of QEMU's NBD server makes base durable.
    NbdServer,
    /// It can be merged as a whole, or when nobody uses it.
    MergeWhole,
    /// What base is called there must be said.
    NameOfBase,
    /// Without that name.
    WithoutName,
    /// The folder that the merge was begun with.
    FolderOfMerge,
    /// That file may be lost.
    StateLost,
    /// No backup needs the bitmaps.
    NoBackupNeedsBitmaps,
    /// Nobody needs the snapshots.
    NobodyNeedsSnapshots,
    /// The names of the snapshots.
    SnapshotNames,
    /// It is meant.
    Meant,
    /// Nothing will start from this image again.
    NothingStarts(String),
    /// It is removed instead.
    Removed,
    /// QEMU runs elsewhere, as seen from here.
    QemuElsewhere,
    /// A job works on this disk; how far it is.
    JobWorks(String),
    /// A job works on this disk, and may end.
    JobMayEnd(String),
    /// It is not to have its effect.
    WithoutEffect,
    /// There is no room in this folder.
    MakeRoom(PathBuf),
    /// A merge up changes no layer below.
    TakeUp,
    /// Nobody needs the images that use a layer.
    NobodyNeedsImages,
    /// Nobody needs what another node shows.
    NobodyNeedsNode,
    /// Folders to be searched must exist.
    SearchFolders,
    /// The state needs a folder that lasts.
    LastingFolder,
    /// That layer is left out.
    LeaveOut,
    /// What was asked for is for the active layer alone.
    OnlyForActive,
    /// The merge gets ready when the guest writes less.
    NotSlowed,
    /// Layers have names that this shows.
    LayerNames,
    /// The machine must be shut down before.
    ShutDown,
    /// QEMU must be able to write these files; nothing was changed.
    WritableFiles,
    /// If QEMU still runs, the job goes on, and the same picks it up.
    PicksUp,
    /// The chain is as it was; the reason must be looked for.
    AsItWas,
    /// It must be known which image is valid.
    ValidImage,
    /// Nothing is switched, and the job waits.
    JobWaits,
    /// The merge is not wanted.
    GiveUp,
    /// The chain as it is tells.
    ChainAsItIs,
}

impl LiveWay {
    fn to(act: LiveAct, why: LiveWhy) -> Self {
        Self { act, why }
    }
}
