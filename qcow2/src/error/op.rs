//! What was tried with a file, for errors.

use std::fmt;

/// An operation on a file or a folder, as errors name it. Callers decide by the variant; the words are for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FileOp {
    /// Opening it.
    Open,
    /// Making a file that is not there yet.
    Create,
    /// Reading bytes.
    Read,
    /// Writing bytes.
    Write,
    /// Keeping bytes in memory that are meant for it.
    WriteInMemory,
    /// Taking QEMU's byte locks.
    Lock,
    /// Looking at the locks of others.
    ReadLocks,
    /// Reading its metadata.
    Stat,
    /// Following its name to a file.
    Resolve,
    /// Reading its length.
    Size,
    /// Reading the length of an image's data file.
    DataFileSize,
    /// Making it longer.
    Grow,
    /// Making an image's data file longer.
    GrowDataFile,
    /// Making it shorter.
    Shrink,
    /// Giving a range back to the file system.
    Punch,
    /// Emptying an image's data file.
    EmptyDataFile,
    /// Looking for its holes.
    FindData,
    /// Comparing an image with what a journal says.
    CompareWith,
    /// Dropping what the kernel keeps of it in memory.
    DropCache,
    /// Looking at it for consistency.
    Check,
    /// Giving a new file its name.
    Rename,
    /// Removing it.
    Remove,
    /// Listing a folder.
    List,
    /// Making a folder.
    CreateDir,
    /// Making a folder the current one.
    EnterDir,
    /// Removing a folder.
    RemoveDir,
    /// Asking a file system for its free space.
    FreeSpace,
}

impl fmt::Display for FileOp {
    /// A verb, which the name of the file follows: "read", "look at the locks of".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Open => "open",
            Self::Create => "create",
            Self::Read => "read",
            Self::Write => "write",
            Self::WriteInMemory => "write in memory",
            Self::Lock => "lock",
            Self::ReadLocks => "look at the locks of",
            Self::Stat => "read the state of",
            Self::Resolve => "find",
            Self::Size => "read the length of",
            Self::DataFileSize => "read the length of the data file of",
            Self::Grow => "grow",
            Self::GrowDataFile => "grow the data file of",
            Self::Shrink => "shorten",
            Self::Punch => "punch a hole into",
            Self::EmptyDataFile => "empty the data file of",
            Self::FindData => "find the data of",
            Self::CompareWith => "compare the image with",
            Self::DropCache => "drop the cache of",
            Self::Check => "check",
            Self::Rename => "rename the new file to",
            Self::Remove => "remove",
            Self::List => "list",
            Self::CreateDir => "make a folder in",
            Self::EnterDir => "enter a folder of",
            Self::RemoveDir => "remove a folder of",
            Self::FreeSpace => "ask for the free space of",
        })
    }
}
