//! A way out of an error, as a value: what to do, and why just that.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::error::Role;
use crate::image::ImageFormat;

/// What was asked for when the error was met: what succeeds next depends on it.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// Which kind of work.
    pub task: Task,
    /// The (first) image that was named.
    pub image: &'a Path,
    /// Whether the format of that image was stated.
    pub states_format: bool,
    /// Whether the format of a backing file was stated.
    pub states_backing_format: bool,
    /// Whether the format of a new backing file was stated.
    pub states_new_format: bool,
}

/// A kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// To say what images are, or which layer holds what: reads the chain.
    Look,
    /// To say what a single image is.
    Info,
    /// To check, to repair or to restore an image.
    Check,
    /// To merge down.
    Commit,
    /// To merge up.
    Pull,
    /// To write other names into a header.
    Relink,
    /// To give an image another backing file.
    Rebase,
    /// To write a new file.
    Flatten,
    /// To write a new file with whatever can be read.
    Salvage,
    /// Anything else.
    Other,
}

/// One thing to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Way {
    /// What.
    pub act: Act,
    /// Why, or what must be put right first.
    pub why: Why,
}

/// What can be done.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Act {
    /// Something outside of this project, which the reason says.
    Outside,
    /// The same again.
    Again,
    /// The same again, by root.
    AgainAsRoot,
    /// The same again, which goes on where it was stopped.
    GoOn,
    /// The same again, in earnest if it was to change nothing.
    InEarnest,
    /// The same again, into this file.
    Into(PathBuf),
    /// The same again, with something allowed or stated.
    Allow(Allow),
    /// Looking at an image.
    Info(PathBuf),
    /// Looking at the layers of a chain.
    InfoChain(PathBuf),
    /// Checking an image.
    Check(PathBuf),
    /// Repairing an image.
    Repair(PathBuf),
    /// Writing a chain into one new file.
    Flatten {
        /// The uppermost image of the chain.
        image: PathBuf,
        /// A name that no file has.
        output: PathBuf,
    },
    /// Giving up a merge into an image.
    Abort(PathBuf),
    /// Finishing a merge.
    Finish {
        /// The active image of the chain.
        active: PathBuf,
        /// The layer that takes the data.
        base: PathBuf,
        /// The uppermost layer that is merged, if that is not the active image.
        top: Option<PathBuf>,
        /// Whether layers are removed at the end.
        removes: bool,
    },
    /// Merging a layer first that lies deeper.
    MergeLower(PathBuf),
    /// Writing another backing name, and a format, into the header of an image.
    Relink {
        /// The image.
        image: PathBuf,
        /// The name.
        name: OsString,
        /// The format of the backing file.
        format: ImageFormat,
        /// Whether nothing proves that the name leads to the right file.
        trust: bool,
    },
    /// Looking at the files of a folder.
    ListFolder(PathBuf),
    /// Removing the mark that makes a file immutable.
    Unmark(PathBuf),
    /// Looking for the processes that have a file open, as root.
    FindHolders(PathBuf),
    /// Moving a file to a name that nothing has.
    MoveAway {
        /// The file.
        file: PathBuf,
        /// The name.
        to: PathBuf,
    },
    /// Giving a journal the name by which the image is found that it is about.
    RenameJournal {
        /// The journal.
        journal: PathBuf,
        /// Its new name.
        to: PathBuf,
    },
}

/// What can be allowed, or stated.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Allow {
    /// That images outside the chain break.
    SharedBase,
    /// That internal snapshots change.
    SnapshotChange,
    /// That persistent bitmaps are lost.
    BitmapLoss,
    /// That zeros take the place of what cannot be read.
    DataLoss,
    /// That a block device is overwritten.
    OverDevice,
    /// That images name files in these folders.
    Folders(Vec<PathBuf>),
    /// The format of the named image: its bytes are the disk itself.
    Raw,
    /// The format of the new backing file: its bytes are the disk itself.
    NewRaw,
    /// The format of a backing file.
    BackingFormat {
        /// Its name, as it is written.
        name: OsString,
        /// Its format.
        format: ImageFormat,
    },
    /// Work on a file system without locks.
    NoLocks,
    /// A merge over what others wrote.
    Restart,
    /// Restoring to a copy.
    Copy,
    /// Names that nothing proves.
    Unproved,
}

/// Why something is to be done, or what must be put right first.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Why {
    /// When what was named before is done.
    Then,
    /// Nothing is lost.
    NothingLost,
    /// The process may not open more files.
    OpenFiles,
    /// The system may not open more files.
    SystemFiles,
    /// The file may not become so large.
    FileSize,
    /// A quota is used up.
    Quota,
    /// The system has no memory.
    Memory,
    /// A file system is mounted so that it cannot be written.
    ReadOnlyMount,
    /// The system gives no reason that one could tell.
    SystemsReason,
    /// Root may not do it either to this file.
    NotEvenRoot(PathBuf),
    /// Only root may do it.
    AsRoot,
    /// A device is full.
    DeviceFull,
    /// The file system of this folder is full.
    FolderFull(PathBuf),
    /// A name is too long.
    NameTooLong(PathBuf),
    /// A name leads in a circle of links.
    CircleOfLinks(PathBuf),
    /// A part of a name is no folder.
    NoFolderInName(PathBuf),
    /// There is no such folder.
    NoFolder(PathBuf),
    /// Somebody changes a folder.
    FolderChanges(PathBuf),
    /// The files that are there.
    FilesThere,
    /// A file is immutable, as templates are.
    Immutable,
    /// A name is taken.
    Taken(PathBuf),
    /// A new file needs a name that is free.
    OtherName,
    /// A file is neither a regular one nor a block device.
    NoFileOrDevice(PathBuf),
    /// A verification has failed before anything was switched.
    VerifyFailed,
    /// How base is, after that.
    BaseAfterwards,
    /// A mistake of the program.
    Broken,
    /// The layers of the chain.
    Layers,
    /// What an image is.
    WhatItIs,
    /// What was stopped.
    WhatWasStopped,
    /// A name that is wrong.
    WrongName,
    /// A new name leads to no file.
    NoFileOfNewName(PathBuf),
    /// The data file is not where its name leads.
    NoDataFileThere(PathBuf),
    /// The file of a new name reads through the image itself.
    NewNameReadsThrough,
    /// The user knows that a file is the right one.
    IsRightFile,
    /// The format of the file of a new name is another one.
    OtherFormatOfNewName,
    /// The same makes a header whole.
    SameMakesWhole,
    /// What the new backing file reads through.
    ReadsThrough,
    /// The names of the snapshots.
    SnapshotNames,
    /// A layer that lies deeper is to be merged first; this shows the one below.
    LayerBelow,
    /// A lower part is to be merged first.
    TooDeep,
    /// Layers above a foreign one can be merged.
    LayersAbove,
    /// Of two chains, that of the file itself.
    ChainOfFile,
    /// How far the damage goes.
    Damage,
    /// How the image is.
    HowImageIs,
    /// A backup does not fit what was written since.
    BackupOutdated,
    /// An image must be repaired before.
    RepairFirst,
    /// Whoever shares base needs it as it is.
    OwnFile,
    /// What can be read is saved.
    SaveReadable,
    /// A new file instead.
    NewFile,
    /// What a chain shows.
    ShownByChain,
    /// Whatever can be read is saved, with zeros for the rest.
    ZerosForTheRest,
    /// Nobody needs what a block device holds.
    NobodyNeedsDevice,
    /// A stopped merge is not wanted.
    GiveMergeUp,
    /// The same, where only one is in question.
    GiveUp,
    /// The same, as another way.
    OrGiveUp,
    /// A stopped merge is wanted.
    Unfinished,
    /// What a power cut has torn is made whole by the merge.
    MadeWhole,
    /// The same, by a pull.
    MadeWholeByPull,
    /// The same, by a rebase.
    MadeWholeByRebase,
    /// QEMU may still read the image.
    QemuReads(PathBuf),
    /// The image must come from a backup.
    Restore(PathBuf),
    /// The same, as a repair cannot mend it.
    Unmendable(PathBuf),
    /// The file is packed, by this program if it is known.
    Packed(Option<&'static str>),
    /// The file holds a machine's memory.
    MachineState,
    /// Another program reads the format.
    OtherFormat,
    /// The bytes may be the disk itself.
    PerhapsRaw,
    /// A file that an image names is missing.
    Missing(PathBuf),
    /// The same, and it may have been moved.
    MissingOrMoved(PathBuf),
    /// The same, and it holds the data.
    DataMissing(PathBuf),
    /// When the missing file is there again.
    ThereAgain,
    /// This file may be the missing one.
    Moved(PathBuf),
    /// A `json:` name says more than stays true.
    NameSaysMore,
    /// What an image names must be a local file, named as this.
    CopyHere(Role),
    /// Nobody needs the images that use a layer.
    NobodyNeedsUsers {
        /// They hold nothing themselves.
        hold_nothing: bool,
    },
    /// A folder is trusted.
    Trusted,
    /// A data file is that of the image.
    IsItsData,
    /// Nobody needs the snapshots.
    DeleteSnapshots,
    /// The change of snapshots is accepted.
    AcceptChange,
    /// No backup needs the bitmaps.
    NoBackupNeedsBitmaps,
    /// The header has no room for a long name.
    ShorterName,
    /// No virtual machine uses the images.
    NobodyUsesImages,
    /// The journal needs a folder that lasts.
    LastingFolder,
    /// The owner of a file knows whether it is needed.
    AskOwner(PathBuf),
    /// The journal may lie in a folder of one's own.
    OwnJournalFolder,
    /// Something is in the way, and is moved away.
    MoveAway,
    /// The same, if nothing needs it there.
    NothingNeedsIt,
    /// The journal may lie elsewhere.
    OtherJournalFolder,
    /// Only this file as it was holds the data.
    OnlyAsItWas(PathBuf),
    /// Whoever made a backup is trusted: a copy of it is used.
    CopyOfBackup(PathBuf),
    /// This file was only opened, or what was written may be lost.
    OnlyOpened(PathBuf),
    /// The version that began a merge must end it.
    OtherVersion,
    /// The images must be as they were when the machine stopped.
    AllAsItWas,
    /// A journal is about this image.
    JournalIsOf(PathBuf),
    /// A stopped merge is not to go on.
    NotToGoOn,
    /// An image was not touched; a copy of this one keeps it so.
    TakeCopy(PathBuf),
    /// The image that a backup is about.
    NameThatImage,
    /// This image is a copy of it.
    IsCopy(PathBuf),
    /// Only the user knows the format.
    SayFormat,
    /// A plain disk may have any bytes.
    PlainDisk,
    /// The first bytes say this format, which a guest could have written.
    FirstBytesSay(ImageFormat),
    /// This file is empty, as a copy that failed leaves it.
    EmptyFile(PathBuf),
    /// This file has lost its header, or is another one.
    LostHeader(PathBuf),
    /// Whether this file really has that format must be found out.
    FindOutWhoWrote(PathBuf, ImageFormat),
    /// A raw disk, whose bytes a guest wrote.
    GuestWrote,
    /// No process here shows who holds this file.
    HolderNotSeen(PathBuf),
    /// Other users' processes are seen by root only.
    WhoHolds,
}

impl Way {
    /// To do this, for that reason.
    pub(super) fn to(act: Act, why: Why) -> Self {
        Self { act, why }
    }

    /// What only the reason says.
    pub(super) fn outside(why: Why) -> Self {
        Self::to(Act::Outside, why)
    }

    /// The same again.
    pub(super) fn again(why: Why) -> Self {
        Self::to(Act::Again, why)
    }

    /// The same again, with something allowed.
    pub(super) fn allow(allow: Allow, why: Why) -> Self {
        Self::to(Act::Allow(allow), why)
    }
}
