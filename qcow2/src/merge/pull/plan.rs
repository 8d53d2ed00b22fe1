//! The options and the plan of a pull.

use std::ffi::OsString;
use std::path::PathBuf;

use serde::Serialize;

use crate::chain::OpenOptions;
use crate::merge::up::UpOptions;
use crate::serial;
use crate::transfer::Totals;

/// What a caller may ask of a pull.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct PullOptions {
    /// The layer that becomes the backing file, by path or index; without it, nothing is to lie below the image.
    pub base: Option<OsString>,
    /// The rest, as a rebase has it, too.
    pub up: UpOptions,
}

impl PullOptions {
    /// Has the active image of a chain that is opened like this take in all layers below it.
    pub fn new(open: OpenOptions) -> Self {
        Self { up: UpOptions::new(open), ..Self::default() }
    }
}

/// What a pull will do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct PullPlan {
    /// The image that takes the data.
    #[serde(serialize_with = "serial::name")]
    pub active: PathBuf,
    /// The layer that will be its backing file, if there is one.
    #[serde(serialize_with = "serial::some_name")]
    pub base: Option<PathBuf>,
    /// The layers whose data is taken in, the uppermost first: the image needs them no more.
    #[serde(serialize_with = "serial::names")]
    pub pulled: Vec<PathBuf>,
    /// What is moved and taken.
    #[serde(flatten)]
    pub totals: Totals,
    /// The backing name that will stand in the header; `None` if there is none.
    #[serde(rename = "backing-filename", serialize_with = "serial::some_name")]
    pub backing_name: Option<OsString>,
    /// The size of the image's disk, in bytes. It does not change.
    pub virtual_size: u64,
    /// The length that the image's file, or the block device that holds it, must have afterwards, at most.
    pub file_size_after: u64,
    /// Whether the same pull was stopped before.
    #[serde(rename = "resumed")]
    pub is_resumed: bool,
    /// Whether the file system does not say how much is free.
    #[serde(rename = "room-unknown")]
    pub is_room_unknown: bool,
}
