//! What is wrong with a state file.

/// Why a state file is not believed, or says nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateFault {
    /// Its name is that of a folder, a link, a device or a pipe.
    #[error("it is no plain file, so it is not believed")]
    NoPlainFile,
    /// It belongs to somebody else than root and the caller.
    #[error(
        "it belongs to the user {user}, who is not trusted here: run the command as that user, or remove it"
    )]
    OfStranger {
        /// The owner.
        user: u32,
    },
    /// Its group or everybody may write it.
    #[error("others may write it, so it is not trusted: take that right away, or remove it")]
    OthersMayWrite,
    /// It was written by another build, which describes merges in another way.
    #[error(
        "it has version {found}, and this program reads version {expected}: finish the merge with the program that began \
         it, or see the chain and remove the file"
    )]
    OtherVersion {
        /// The version that it has.
        found: u64,
        /// The version that is read.
        expected: u32,
    },
    /// It describes no merge.
    #[error("{0}")]
    NoState(String),
    /// The state cannot be written as JSON: a name in it is not UTF-8.
    #[error("it cannot be written: {0}")]
    Unwritable(serde_json::Error),
}

impl StateFault {
    /// Whether the file does not count, whatever it holds: anybody may have put it there.
    pub fn is_disbelief(&self) -> bool {
        matches!(self, Self::NoPlainFile | Self::OfStranger { .. } | Self::OthersMayWrite)
    }
}
