//! How a commit came out.

use std::path::PathBuf;
use std::time::Duration;

use crate::transfer::Totals;

/// How a commit came out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// What was moved and taken.
    pub totals: Totals,
    /// How long it took.
    pub elapsed: Duration,
    /// The digest (CRC-32) of the guest's view, if everything was verified and every layer can be read.
    pub digest: Option<u32>,
    /// The length of the base's file, in bytes.
    pub base_file_size: u64,
    /// Merged layers that are empty overlays on base now.
    pub emptied: Vec<PathBuf>,
    /// Bytes on disk that merged layers gave back, with those that were removed.
    pub freed: u64,
    /// Layers that were removed.
    pub deleted: Vec<PathBuf>,
    /// Layers that are no longer needed and are still there, marked as merged.
    pub marked: Vec<PathBuf>,
    /// Layers that are no longer needed and have no room for a mark in their header.
    pub unmarked: Vec<PathBuf>,
    /// Layers that were not removed, and why.
    pub kept: Vec<(PathBuf, String)>,
}
