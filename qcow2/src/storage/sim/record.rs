//! What was done to the files of a simulated disk.

use std::path::{Path, PathBuf};

use super::SECTOR;

/// One entry of a log. Files are told apart by their inode, whatever names they have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskOp {
    /// Bytes inside one sector.
    Write {
        /// The file.
        file: u64,
        /// What tells one call from the others: when it was.
        call: u64,
        /// Where the first byte goes.
        offset: u64,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// A new length.
    SetLen {
        /// The file.
        file: u64,
        /// The length in bytes.
        len: u64,
        /// When it was.
        at: u64,
    },
    /// A barrier of one file.
    Sync {
        /// The file.
        file: u64,
        /// False if it failed: what was pending may now be lost for good, whatever later barriers say.
        done: bool,
    },
    /// A new empty file.
    Create {
        /// Its name.
        path: PathBuf,
        /// The file.
        file: u64,
        /// When it was made.
        at: u64,
    },
    /// A file got another name; what had it lost it.
    Rename {
        /// The name that is gone.
        from: PathBuf,
        /// The new name.
        to: PathBuf,
        /// The file.
        file: u64,
    },
    /// A name was removed.
    Unlink {
        /// The name.
        path: PathBuf,
    },
    /// A barrier for the names in a directory.
    SyncDir {
        /// The directory.
        dir: PathBuf,
    },
    /// Something that a test wants to find again.
    Note(&'static str),
}

impl DiskOp {
    /// The file whose content or length it changes.
    pub fn changed_file(&self) -> Option<u64> {
        match self {
            Self::Write { file, .. } | Self::SetLen { file, .. } => Some(*file),
            _ => None,
        }
    }

    /// The directory whose names it changes.
    pub fn changed_dir(&self) -> Option<&Path> {
        match self {
            Self::Create { path, .. } | Self::Rename { to: path, .. } | Self::Unlink { path } => {
                Some(path.parent().unwrap_or(path))
            }
            _ => None,
        }
    }

    /// Whether it is a barrier, even one that failed.
    pub fn is_barrier(&self) -> bool {
        matches!(self, Self::Sync { .. } | Self::SyncDir { .. })
    }

    /// File and sector that a write changes.
    pub fn sector(&self) -> Option<(u64, u64)> {
        match self {
            Self::Write { file, offset, .. } => Some((*file, offset / SECTOR)),
            _ => None,
        }
    }
}

/// Cuts a write at sectors.
pub(super) fn fragments(file: u64, call: u64, mut offset: u64, mut bytes: &[u8]) -> Vec<DiskOp> {
    let mut ops = Vec::with_capacity(bytes.len() / SECTOR as usize + 2);
    while !bytes.is_empty() {
        let (piece, rest) = bytes.split_at(bytes.len().min((SECTOR - offset % SECTOR) as usize));
        ops.push(DiskOp::Write { file, call, offset, bytes: piece.to_vec() });
        offset += piece.len() as u64;
        bytes = rest;
    }
    ops
}
