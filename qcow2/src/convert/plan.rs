//! The options, the plan and the report of a flatten.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Serialize, Serializer};

use crate::chain::OpenOptions;
use crate::image::ImageFormat;
use crate::serial;
use crate::transfer::Totals;
use crate::units::GuestRange;

/// What a caller may ask of a flatten.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct FlattenOptions {
    /// How the chain is opened: policy and formats. The flatten sets access and locks itself.
    pub open: OpenOptions,
    /// Write this internal snapshot of the active image, given by its id or name, instead of the present disk.
    /// Its disk has the size from when the snapshot was taken; ranges that it does not hold come from the
    /// layers below.
    pub snapshot: Option<OsString>,
    /// The new file. It must not exist.
    pub output: PathBuf,
    /// Its format.
    pub to: ImageFormat,
    /// Flatten only the layers above this one, given by path or index. The new file gets it as its backing
    /// file.
    pub base: Option<OsString>,
    /// Write zeros that lie among the data, instead of leaving holes for runs of 4 KiB or more.
    pub keep_zeros: bool,
    /// Write whatever can be read. Data behind a damaged table or on a bad sector, and compressed clusters that
    /// cannot be inflated, become zeros, and are named in the report. For that, all data is read before it is
    /// copied.
    pub salvage: bool,
    /// The output is a block device that is there, and all that it holds is overwritten.
    pub onto_device: bool,
}

impl FlattenOptions {
    /// The whole chain, as its active image shows it, becomes `output`.
    pub fn new(open: OpenOptions, output: PathBuf, to: ImageFormat) -> Self {
        Self {
            open,
            snapshot: None,
            output,
            to,
            base: None,
            keep_zeros: false,
            salvage: false,
            onto_device: false,
        }
    }
}

/// What a flatten will do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct FlattenPlan {
    /// The chain's active image.
    #[serde(serialize_with = "serial::name")]
    pub active: PathBuf,
    /// The internal snapshot that is written, as the caller named it.
    #[serde(serialize_with = "serial::some_name")]
    pub snapshot: Option<OsString>,
    /// The new file.
    #[serde(serialize_with = "serial::name")]
    pub output: PathBuf,
    /// Its format.
    #[serde(rename = "format")]
    pub to: ImageFormat,
    /// The layer that becomes its backing file.
    #[serde(serialize_with = "serial::some_name")]
    pub base: Option<PathBuf>,
    /// The backing name that is written into it.
    #[serde(rename = "backing-filename", serialize_with = "serial::some_name")]
    pub backing_name: Option<OsString>,
    /// The size of its disk in bytes.
    pub virtual_size: u64,
    /// What is copied and taken.
    #[serde(flatten, serialize_with = "moved")]
    pub totals: Totals,
    /// The most bytes that the new file will take on the disk. (A raw file is as long as its disk, but with
    /// holes.)
    pub file_size_after: u64,
    /// Whether the file system does not say how much is free.
    #[serde(rename = "room-unknown")]
    pub is_room_unknown: bool,
}

/// The result of a flatten.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct FlattenReport {
    /// What was copied and taken.
    #[serde(flatten, serialize_with = "moved")]
    pub totals: Totals,
    /// The length of the new file in bytes.
    #[serde(rename = "file-size-after")]
    pub file_size: u64,
    /// Bytes that it holds on the disk.
    #[serde(rename = "actual-size")]
    pub allocated: u64,
    /// How long it took.
    #[serde(rename = "seconds", serialize_with = "serial::seconds")]
    pub elapsed: Duration,
    /// The ranges that could not be read and are zeros now, in order. Empty unless this was a salvage.
    #[serde(serialize_with = "ranges")]
    pub lost: Vec<GuestRange>,
    /// Whether the list is complete; otherwise more ranges were lost than are listed.
    pub lists_all_lost: bool,
}

/// Ranges of the disk, as `map` has them.
fn ranges<S: Serializer>(list: &[GuestRange], to: S) -> std::result::Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Range {
        start: u64,
        length: u64,
    }
    to.collect_seq(list.iter().map(|range| Range { start: range.start.get(), length: range.len }))
}

/// The totals as programs get them, without those that say nothing of their own here: a flatten writes all that
/// it copies.
fn moved<S: Serializer>(totals: &Totals, to: S) -> std::result::Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    #[serde(rename_all = "kebab-case")]
    struct Moved {
        bytes_to_copy: u64,
        bytes_to_zero: u64,
        clusters_to_allocate: u64,
    }
    let Totals { bytes_to_copy, bytes_to_zero, clusters_to_allocate, .. } = *totals;
    Moved { bytes_to_copy, bytes_to_zero, clusters_to_allocate }.serialize(to)
}
