//! What is asked of a rebase, and what it will do.

use std::ffi::OsString;
use std::path::PathBuf;

use serde::Serialize;

use crate::chain::OpenOptions;
use crate::image::ImageFormat;
use crate::merge::up::UpOptions;
use crate::serial;
use crate::transfer::Totals;

/// What a caller may ask of a rebase.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct RebaseOptions {
    /// The new backing file; without it, nothing is to lie below the image.
    pub onto: Option<PathBuf>,
    /// The format of the new backing file. Without it, that is what the image's chain says, if the file is a layer of it, and
    /// else what the file's magic says, since the caller has named it.
    pub onto_format: Option<ImageFormat>,
    /// The rest, as a pull has it, too.
    pub up: UpOptions,
}

impl RebaseOptions {
    /// Has nothing lie below an image whose chain is opened like this.
    pub fn new(open: OpenOptions) -> Self {
        Self { up: UpOptions::new(open), ..Self::default() }
    }
}

/// What a rebase will do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct RebasePlan {
    /// The image that gets another backing file.
    #[serde(serialize_with = "serial::name")]
    pub image: PathBuf,
    /// The new backing file, if there is one.
    #[serde(serialize_with = "serial::some_name")]
    pub onto: Option<PathBuf>,
    /// Its format.
    #[serde(rename = "backing-filename-format")]
    pub format: Option<&'static str>,
    /// The backing name that will stand in the header; `None` if there is none.
    #[serde(rename = "backing-filename", serialize_with = "serial::some_name")]
    pub backing_name: Option<OsString>,
    /// The layers that the image needs no more, the uppermost first.
    #[serde(serialize_with = "serial::names")]
    pub unneeded: Vec<PathBuf>,
    /// What is moved and taken.
    #[serde(flatten)]
    pub totals: Totals,
    /// The size of the image's disk, in bytes. It does not change.
    pub virtual_size: u64,
    /// The length that the image's file, or the block device that holds it, must have afterwards, at most.
    pub file_size_after: u64,
    /// Whether the same rebase was stopped before.
    #[serde(rename = "resumed")]
    pub is_resumed: bool,
    /// Whether the file system does not say how much is free.
    #[serde(rename = "room-unknown")]
    pub is_room_unknown: bool,
}
