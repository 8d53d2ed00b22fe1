//! The safety rules, as reasons to refuse.

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;

use super::{Doubt, Role, shown};
use crate::format::RewriteError;

/// Why a safety rule refuses; each says what the rule protects.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Images outside the chain read through base or a merged layer.
    #[error("it is also used by {}, which the merge would corrupt", list(users))]
    SharedBase {
        /// The images that use it.
        users: Vec<PathBuf>,
    },
    /// Images whose backing names lead nowhere may have used base or a merged layer before something was moved.
    #[error(
        "the backing name of {} leads nowhere now, and ends in its name: before a move, it may have been used there",
        list(users)
    )]
    PossiblyShared {
        /// The images.
        users: Vec<PathBuf>,
    },
    /// An image names a backing file without its format; formats are never guessed.
    #[error("its backing file '{}' has no format, and formats are never guessed", shown(name))]
    MissingFormat {
        /// The backing name as written.
        name: String,
    },
    /// The backing format that an image states is contradicted by the file.
    #[error(
        "its backing file '{}' is declared as {declared}, but the file's own bytes {}",
        shown(name),
        found.map_or_else(|| format!("do not begin as {declared} does"), |found| format!("say {found}"))
    )]
    FormatMismatch {
        /// The backing name as written.
        name: String,
        /// The declared format.
        declared: &'static str,
        /// What the magic says; `None` if there is none.
        found: Option<&'static str>,
    },
    /// A backing name that is not a local file: a network protocol or an unknown driver.
    #[error("its {role} '{}' is not a local file ({why})", shown(name))]
    NotLocal {
        /// As what it is named.
        role: Role,
        /// The name as written.
        name: String,
        /// What was found.
        why: String,
    },
    /// The caller's policy lets no image name other files.
    #[error("it names {role} '{}', and the policy does not allow images to name files", shown(name))]
    NamesDenied {
        /// As what it is named.
        role: Role,
        /// The name as written.
        name: String,
    },
    /// An image names a fifo, a socket, a character device, a directory or a file of the kernel.
    #[error("its {role} '{}' is {what}, not a regular file or a block device", shown(name))]
    NotAFile {
        /// As what it is named.
        role: Role,
        /// The name as written.
        name: String,
        /// What it is.
        what: String,
    },
    /// A file outside the folders that the caller allowed.
    #[error("{} lies outside the allowed folders", shown(file))]
    OutsideAllowed {
        /// The file.
        file: PathBuf,
    },
    /// The chain comes back to a file that it already holds.
    #[error("the backing chain is a loop: it comes back to {}", shown(file))]
    Loop {
        /// The file seen twice.
        file: PathBuf,
    },
    /// The chain is longer than the limit.
    #[error("the backing chain is longer than {limit} layers")]
    TooDeep {
        /// The limit.
        limit: usize,
    },
    /// Internal snapshots in a merged layer would change their content.
    #[error("it holds {count} internal snapshot(s), whose content would change")]
    Snapshots {
        /// How many.
        count: usize,
    },
    /// Persistent bitmaps of merged layers would be lost.
    #[error("its persistent bitmap(s) {} would be lost", names.iter().map(shown).collect::<Vec<_>>().join(", "))]
    Bitmaps {
        /// Their names.
        names: Vec<String>,
    },
    /// The dirty bit is set: refcounts cannot be trusted.
    #[error("the image is marked dirty: it was not closed cleanly, and its refcounts cannot be trusted")]
    Dirty,
    /// A power cut has torn the header, or stopped a change of it in the middle.
    #[error(
        "a power cut has stopped a change of its header in the middle, and what the header says is neither old nor new"
    )]
    TornHeader,
    /// A power cut has torn tables or data while a merge was under way, and only the merge's journal makes them whole.
    #[error(
        "a power cut has stopped a merge into it in the middle, and has torn what only that merge can make whole"
    )]
    TornTables,
    /// A merge was stopped, and must be finished or given up first.
    #[error("a merge was stopped here at {percent} %, and must be finished or given up first")]
    UnfinishedMerge {
        /// How far it was, in percent.
        percent: u64,
    },
    /// The corrupt bit is set.
    #[error("the image is marked corrupt")]
    CorruptBit,
    /// The consistency check found corruption.
    #[error("the image is inconsistent: {corruptions} error(s), the first: {first}")]
    Inconsistent {
        /// How many.
        corruptions: u64,
        /// The first finding.
        first: String,
    },
    /// The new backing name does not fit into cluster 0.
    #[error("its header has no room for the backing name '{}'", shown(name))]
    HeaderRoom {
        /// The name.
        name: OsString,
    },
    /// The file is not writable, or lies on a read-only file system.
    #[error("it cannot be written: {why}")]
    NotWritable {
        /// The system's answer.
        why: String,
        /// What kind of answer it is.
        kind: io::ErrorKind,
    },
    /// Its file system has no locks, so that nobody can tell whether somebody else uses the file.
    #[error("its file system has no locks, so it cannot be told whether another process uses it")]
    NoLocks,
    /// A file is not the one that the caller knows, or was changed since.
    #[error("it is not as it was recorded: {what}")]
    NotAsKnown {
        /// What is different.
        what: String,
    },
    /// No journal can be made beside an image that is to be written.
    #[error("there is no place for a journal of the work: {why}")]
    JournalPlace {
        /// What is in the way.
        why: String,
    },
    /// Where a file about the image is to be made there is one already, of somebody who may not write the image.
    #[error(
        "{} is in the way of the journal; it belongs to the user {user}, who may not write the image, so what it says is \
         not believed, and it was not touched",
        shown(file)
    )]
    Stranger {
        /// The file.
        file: PathBuf,
        /// The number of the user to whom it belongs.
        user: u32,
    },
    /// Where a file about the image is to be made there is something that is no file.
    #[error(
        "{} is in the way of the journal: it is {what}, which no version of qmerge makes, and it was not touched",
        shown(file)
    )]
    InTheWay {
        /// Its name.
        file: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// An image names a data file that its owner may not write.
    #[error(
        "it names {} as its data file, which its owner may not write: whoever wrote the image may have named any file",
        file.display()
    )]
    DataFileOwner {
        /// The data file.
        file: PathBuf,
    },
    /// The file is a journal that another version of this program has written.
    #[error(
        "it is the journal of a merge that another version of qmerge has begun (format {version}, this one \
         knows format {expected}): that version can go on with the merge, or give it up"
    )]
    JournalVersion {
        /// The version of its format.
        version: u32,
        /// The version that is known.
        expected: u32,
    },
    /// What a power cut has torn in an image might be made whole from a journal, but that the journal is about this
    /// image is not certain.
    #[error(
        "its header is torn, and {} was written for another file of its name: whether it fits this one is \
         not certain, so that nothing was changed",
        journal.display()
    )]
    JournalOfAnother {
        /// The journal.
        journal: PathBuf,
    },
    /// The journal beside the image is about another file, which had the image's name and lies beside it under another one.
    #[error(
        "{} is about {}, which had this name when a merge into it was stopped",
        shown(journal),
        shown(image)
    )]
    JournalOfRenamed {
        /// The journal.
        journal: PathBuf,
        /// The image that it is about.
        image: PathBuf,
        /// Where the journal would lie to be found with that image.
        wanted: PathBuf,
    },
    /// A merge into the image is unfinished, and somebody has written to the image since it was stopped.
    #[error(
        "a merge into it was stopped at {percent} %, and somebody has opened it for writing since: what the \
         merge noted does not fit it any more"
    )]
    WrittenSince {
        /// How far the merge was.
        percent: u64,
    },
    /// An unfinished merge cannot be given up: the chain has been switched already.
    #[error("the merge of {} into it has begun to change the chain, and can only be finished", shown(top))]
    MergeDone {
        /// The uppermost layer that was merged.
        top: PathBuf,
        /// The active image of the merge.
        active: PathBuf,
        /// Whether it removes layers that are not needed any more.
        removes: bool,
    },
    /// A backup of metadata cannot be used.
    #[error("the backup is damaged or not whole at offset {offset:#x}: {what}")]
    BackupDamaged {
        /// Where in the backup.
        offset: u64,
        /// What is wrong.
        what: String,
    },
    /// A backup of metadata may have been written by somebody who may not write the image.
    #[error(
        "the backup {} belongs to the user {user}, or may be written by others, who may not write the image",
        file.display()
    )]
    BackupOwner {
        /// The backup.
        file: PathBuf,
        /// The number of the user to whom it belongs.
        user: u32,
    },
    /// A backup of metadata is about another file.
    #[error("the backup is about another file: {}", shown(image))]
    OtherImage {
        /// The file that it is about, by its name at that time.
        image: PathBuf,
    },
    /// An image is not as a repair has left it, so a backup of its metadata does not fit it.
    #[error(
        "it was written by others since the repair: at offset {offset:#x}, {what}{}",
        breaks_off.map(|at| format!("; or the backup was cut off: it breaks off at offset {at:#x}")).unwrap_or_default()
    )]
    WrittenSinceRepair {
        /// Where in the image.
        offset: u64,
        /// What is there.
        what: String,
        /// Where the backup ends too early, if it does.
        breaks_off: Option<u64>,
    },
    /// A file that is to be made is there already.
    #[error("it exists already, and is never replaced")]
    Exists,
    /// A block device has the name of a file that is to be made.
    #[error("it is a block device, and all that it holds would be overwritten")]
    DeviceIsThere,
    /// A persistent bitmap would have to become larger than a qcow2 image can hold.
    #[error(
        "its persistent bitmap '{name}' cannot grow to a disk of {size} bytes: more than 512 MiB of bits would be needed \
         (remove it, or make it coarser)"
    )]
    BitmapTooLarge {
        /// Its name.
        name: String,
        /// The size of the disk, in bytes.
        size: u64,
    },
    /// A header cannot be rewritten as it must be.
    #[error("its header cannot be rewritten: {why}")]
    Header {
        /// Why not.
        why: RewriteError,
    },
    /// An image names a file of its own chain as its data file.
    #[error("its data file {} is also another file of the chain", shown(file))]
    DataFileIsLayer {
        /// The data file.
        file: PathBuf,
    },
    /// The name in an overlay says something else of an image than the image itself.
    #[error("the name in the overlay above {0}")]
    Contradicted(Contradiction),
    /// No backing name that a header can hold leads from the image to another.
    #[error("no backing name leads from it to {}", shown(base))]
    NoNameFor {
        /// The other image.
        base: PathBuf,
    },
    /// A name was given to another file while it was opened.
    #[error("the name was given to another file while it was opened")]
    NameMoved,
    /// The files of the chain changed while it was opened.
    #[error("its chain changed while it was opened")]
    ChainChanged,
    /// A relative name begins at the working directory, as QEMU takes it, and another file of that name lies beside the
    /// image.
    #[error(
        "its {role} '{}' starts at the working directory, as in QEMU, but a different file of that name lies beside the \
         image ({}): run the command in the directory where the VM is started",
        shown(name),
        shown(beside)
    )]
    WorkingDirectory {
        /// As what it is named.
        role: Role,
        /// The name as written.
        name: String,
        /// The file beside the image.
        beside: PathBuf,
    },
    /// A file that is to be removed is no regular file.
    #[error("it is not a regular file")]
    NotRegular,
    /// A raw image has no backing name.
    #[error("it is raw, and has no backing name to change")]
    Raw,
    /// An image that should be an overlay has no backing file.
    #[error("it has no backing file")]
    NoBackingFile,
    /// An image that is to name another data file has none.
    #[error("it has no external data file")]
    NoDataFile,
    /// Nothing proves that the file of a new name is the one that the image was made with.
    #[error(
        "nothing proves that {} is its {role}: {doubt}; with a wrong one the guest would see wrong data, and spoil it by \
         writing",
        shown(file)
    )]
    NotProved {
        /// As what it would be named.
        role: Role,
        /// The file of the new name.
        file: PathBuf,
        /// Why not.
        doubt: Doubt,
    },
    /// A data file has one place for each cluster, and internal snapshots share it.
    #[error("its internal snapshots share its data file")]
    SnapshotsInDataFile,
    /// Internal snapshots of version 2 do not say how large their disk was, so the disk must keep its size.
    #[error("it must grow, and in version 2 its internal snapshots do not say how large their disk was")]
    SnapshotsWithoutSize,
    /// The disk of an image is larger than that of the base into which it is said to be merged.
    #[error("its disk of {size} bytes cannot have been merged into one of {base} bytes")]
    LargerThanBase {
        /// Its size in bytes.
        size: u64,
        /// That of base.
        base: u64,
    },
    /// An image that keeps its data reads through this one.
    #[error("an image that is kept reads through it")]
    ReadThrough,
    /// The overlay of an interrupted merge names another file than the base of that.
    #[error("its backing file is not the base of the merge")]
    NotOnBase,
    /// A backing name does not lead to the uppermost of the merged layers.
    #[error("the name '{}' does not lead to the top of the merge", shown(name))]
    NotTop {
        /// The name.
        name: String,
    },
    /// Base may lack what was merged into it, and a stopped merge has emptied layers above it.
    #[error(
        "somebody has written to it or put it back since a merge into it was stopped, and layers above it were emptied by \
         then: only base as it was holds their data"
    )]
    MergedDataLost,
    /// A layer that was merged before keeps its data, as it could not be emptied.
    #[error(
        "it was merged into {} before, and kept its data: merging it again could bring old data back",
        shown(base)
    )]
    MergedBefore {
        /// The base that it was merged into.
        base: PathBuf,
    },
    /// The name of an image is a symbolic link, and the image means another chain beside the link than beside the file.
    #[error(
        "it is a symbolic link, and beside the file itself its backing name leads to {}: it means two chains",
        shown(beside)
    )]
    TwoChains {
        /// The file itself.
        real: PathBuf,
        /// Where the backing name leads from there.
        beside: PathBuf,
    },
    /// There is no memory to count the references of an image.
    #[error("there is no memory for {counters} refcounts")]
    NoMemory {
        /// How many counters there would be.
        counters: u64,
    },
}

impl Refusal {
    /// A stable word for the rule, which programs may rely on: `shared-base`, `dirty`.
    pub fn code(&self) -> &'static str {
        match self {
            Self::SharedBase { .. } => "shared-base",
            Self::PossiblyShared { .. } => "possibly-shared",
            Self::MissingFormat { .. } => "missing-format",
            Self::FormatMismatch { .. } => "format-mismatch",
            Self::NotLocal { .. } => "not-local",
            Self::NotAFile { .. } => "not-a-file",
            Self::OutsideAllowed { .. } => "outside-allowed",
            Self::Loop { .. } => "loop",
            Self::TooDeep { .. } => "too-deep",
            Self::Snapshots { .. } => "snapshots",
            Self::Bitmaps { .. } => "bitmaps",
            Self::Dirty => "dirty",
            Self::UnfinishedMerge { .. } => "unfinished-merge",
            Self::CorruptBit => "corrupt",
            Self::TornHeader | Self::TornTables => "torn",
            Self::TwoChains { .. } => "two-chains",
            Self::Inconsistent { .. } => "inconsistent",
            Self::HeaderRoom { .. } => "header-room",
            Self::NotWritable { .. } => "not-writable",
            Self::NoLocks => "no-locks",
            Self::NotAsKnown { .. } => "changed",
            Self::JournalPlace { .. } => "journal-place",
            Self::Stranger { .. } => "stranger",
            Self::InTheWay { .. } => "in-the-way",
            Self::MergedDataLost => "merged-data-lost",
            Self::DataFileOwner { .. } => "data-file-owner",
            Self::BackupOwner { .. } => "backup-owner",
            Self::JournalVersion { .. } => "journal-version",
            Self::JournalOfAnother { .. } | Self::JournalOfRenamed { .. } => "journal-of-another",
            Self::NotProved { .. } => "not-proved",
            Self::WrittenSince { .. } => "written-since",
            Self::MergeDone { .. } => "merge-done",
            Self::BackupDamaged { .. } => "backup-damaged",
            Self::OtherImage { .. } => "other-image",
            Self::WrittenSinceRepair { .. } => "written-since",
            _ => "refused",
        }
    }
}

/// What the name in an overlay says of an image, and the image does not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Contradiction {
    /// That it has a backing file.
    #[error("gives it a backing file, but it has none")]
    Backing,
    /// That it has none.
    #[error("says that it has no backing file, but it has one")]
    NoBacking,
    /// That it has another one.
    #[error("says that its backing file is {}, but it names {}", shown(stated), shown(named))]
    OtherBacking {
        /// The one of the overlay's name.
        stated: PathBuf,
        /// The one of the image.
        named: PathBuf,
    },
    /// That it has another data file.
    #[error("gives it another data file than it names")]
    OtherDataFile,
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(shown).collect::<Vec<_>>().join(", ")
}
