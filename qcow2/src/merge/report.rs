//! How a commit came out.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use super::plan::Kept;
use crate::serial;
use crate::transfer::Totals;

/// How a commit came out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Report {
    /// What was moved and taken.
    #[serde(flatten)]
    pub totals: Totals,
    /// How long it took.
    #[serde(rename = "seconds", serialize_with = "serial::seconds")]
    pub elapsed: Duration,
    /// The digest (CRC-32) of the guest's view, if everything was verified and every layer can be read.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "serial::checksum")]
    pub digest: Option<u32>,
    /// The length of the base's file, in bytes.
    #[serde(rename = "base-file-size-after")]
    pub base_file_size: u64,
    /// Merged layers that are empty overlays on base now.
    #[serde(serialize_with = "serial::names")]
    pub emptied: Vec<PathBuf>,
    /// Bytes on disk that were freed, in merged layers and by removing some.
    #[serde(rename = "bytes-freed")]
    pub freed: u64,
    /// Layers that were removed.
    #[serde(serialize_with = "serial::names")]
    pub deleted: Vec<PathBuf>,
    /// Obsolete layers that stay, marked as merged.
    #[serde(serialize_with = "serial::names")]
    pub marked: Vec<PathBuf>,
    /// Obsolete layers that stay without a mark, because their headers have no room for it.
    #[serde(serialize_with = "serial::names")]
    pub unmarked: Vec<PathBuf>,
    /// Layers that were not removed, and why.
    pub kept: Vec<Kept>,
}
