//! What a commit will do, as a value: printed by `--dry-run`, carried out otherwise.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

use super::reason::KeptReason;
use crate::chain::DataFileKept;
use crate::error::shown;
use crate::journal::Stranger;
use crate::serial;
use crate::transfer::job::Totals;

/// The plan of a commit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Plan {
    /// The layer that takes the data.
    #[serde(serialize_with = "serial::name")]
    pub base: PathBuf,
    /// The uppermost layer that is merged.
    #[serde(serialize_with = "serial::name")]
    pub top: PathBuf,
    /// The chain's active image.
    #[serde(serialize_with = "serial::name")]
    pub active: PathBuf,
    /// What is moved and taken.
    #[serde(flatten)]
    pub totals: Totals,
    /// The base's virtual size before, in bytes.
    #[serde(rename = "base-virtual-size-before")]
    pub base_size_before: u64,
    /// The base's virtual size afterwards, in bytes.
    #[serde(rename = "base-virtual-size-after")]
    pub base_size_after: u64,
    /// The length of the base's file afterwards, at most, in bytes.
    pub base_file_size_after: u64,
    /// Bytes of the base's old content behind the active image's end, which a virtual machine that
    /// boots the base will see.
    pub old_tail: u64,
    /// What happens to the layers above base when base holds their data.
    pub afterwards: Afterwards,
    /// Layers that are no longer needed.
    #[serde(serialize_with = "serial::names")]
    pub obsolete: Vec<PathBuf>,
    /// Merged layers that become empty overlays on base, and stay on disk.
    #[serde(serialize_with = "serial::names")]
    pub emptied: Vec<PathBuf>,
    /// Merged layers that stay on disk with their data: a chain that was recorded layer by layer and names one shows old
    /// data.
    #[serde(rename = "not-emptied")]
    pub kept: Vec<Kept>,
    /// Whether layers that are no longer needed are removed.
    #[serde(skip)]
    pub removes: bool,
    /// Bytes on disk that emptying merged layers frees, at most, with those that are removed.
    pub bytes_freed: u64,
    /// Files of layers that an unfinished merge still had to remove. They are removed now, or marked as merged
    /// if this merge removes none.
    #[serde(rename = "left-over", serialize_with = "serial::names")]
    pub unremoved: Vec<PathBuf>,
    /// Layers that stop being restore points as soon as the first byte is written.
    #[serde(serialize_with = "serial::names")]
    pub restore_points_lost: Vec<PathBuf>,
    /// External data files of base and of the merged layers, and what becomes of them.
    pub data_files: Vec<PlannedDataFile>,
    /// Bitmaps of merged layers that will be lost.
    pub bitmaps_lost: Vec<LostBitmap>,
    /// Directories that were searched for images that share layers.
    #[serde(serialize_with = "serial::names")]
    pub searched: Vec<PathBuf>,
    /// Signs of a user of base whom the search did not find.
    pub signs: Signs,
    /// Files there that could not be read. They may be users.
    #[serde(serialize_with = "serial::names")]
    pub unreadable: Vec<PathBuf>,
    /// Files that the merge makes larger, on file systems that do not say how much is free: the merge may run out of room.
    #[serde(serialize_with = "serial::names")]
    pub room_unknown: Vec<PathBuf>,
    /// Journals and records in the chain's folders that do not count, and are left alone.
    pub strangers: Vec<Stranger>,
    /// Set when an earlier run of the same merge was stopped, and this one goes on where it was.
    pub resumed: Option<Resumed>,
    /// Set when an earlier run was stopped, but nothing that it did counts, because base is not as it left it.
    #[serde(serialize_with = "serial::some_words")]
    pub begins_anew: Option<BeginsAnew>,
}

/// Why a merge that was stopped does not go on where it was. The layers above base still hold everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BeginsAnew {
    /// Base is older than the merge left it: it was put back from a copy.
    PutBack,
    /// Base is another file than the one that the merge wrote to: its folder was copied, or it was replaced.
    Copied,
    /// Base was read back, and does not hold what the merge noted as done.
    NotProved,
}

impl fmt::Display for BeginsAnew {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PutBack => "base was put back from a copy since the merge was stopped",
            Self::Copied => "base is another file than the one that the stopped merge wrote to",
            Self::NotProved => "base does not hold what the stopped merge noted as done",
        })
    }
}

/// An external data file of a layer that the merge writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct PlannedDataFile {
    /// The file.
    #[serde(serialize_with = "serial::name")]
    pub file: PathBuf,
    /// The image that names it; nothing else may know of it.
    #[serde(serialize_with = "serial::name")]
    pub image: PathBuf,
    /// What becomes of it.
    #[serde(flatten)]
    pub fate: DataFileFate,
}

/// What becomes of an external data file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(into = "DataFileAction")]
#[non_exhaustive]
pub enum DataFileFate {
    /// The merged data is written to it.
    Written,
    /// It is emptied with its image.
    Emptied,
    /// It is removed with its image.
    Removed,
    /// It stays as it is, though nobody needs it for this chain any more.
    Kept(DataFileKept),
}

/// What becomes of a data file, as programs read it.
#[derive(Serialize)]
struct DataFileAction {
    action: &'static str,
    #[serde(serialize_with = "serial::some_words")]
    reason: Option<DataFileKept>,
}

impl From<DataFileFate> for DataFileAction {
    fn from(fate: DataFileFate) -> Self {
        let (action, reason) = match fate {
            DataFileFate::Written => ("write", None),
            DataFileFate::Emptied => ("empty", None),
            DataFileFate::Removed => ("remove", None),
            DataFileFate::Kept(why) => ("keep", Some(why)),
        };
        Self { action, reason }
    }
}

/// A persistent bitmap that will be lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct LostBitmap {
    /// The layer that holds it.
    #[serde(serialize_with = "serial::name")]
    pub file: PathBuf,
    /// Its name.
    pub name: String,
}

/// Signs of a user of base whom a search for images did not find.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Signs {
    /// How many names were looked at.
    pub looked_at: usize,
    /// Folders in whose sub-folders was looked, too, as far as that was possible.
    #[serde(rename = "searched-nearby", serialize_with = "serial::names")]
    pub nearby: Vec<PathBuf>,
    /// Folders that were skipped because a limit of the search was reached.
    #[serde(rename = "not-searched", serialize_with = "serial::names")]
    pub left_out: Vec<PathBuf>,
    /// How many names base's file has.
    #[serde(rename = "base-links")]
    pub links: u64,
    /// Those that were found, without base's own.
    #[serde(rename = "base-other-names", serialize_with = "serial::names")]
    pub other_names: Vec<PathBuf>,
    /// Merged layers whose files, or data files, have other names: hard links.
    #[serde(rename = "linked-layers", serialize_with = "serial::names")]
    pub linked: Vec<PathBuf>,
    /// Nobody has the permission to write base, as is usual for a template.
    #[serde(rename = "base-read-only")]
    pub is_read_only: bool,
    /// Base lies in another folder than the active image.
    #[serde(rename = "base-elsewhere")]
    pub is_elsewhere: bool,
    /// Images whose backing name leads nowhere, and ends in the name of base or of a merged layer.
    #[serde(serialize_with = "serial::names")]
    pub possible_users: Vec<PathBuf>,
}

/// A layer that keeps its data, or a file that is not removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Kept {
    /// The layer, or the file.
    #[serde(rename = "file", serialize_with = "serial::name")]
    pub path: PathBuf,
    /// Why.
    #[serde(rename = "reason", serialize_with = "serial::words")]
    pub why: KeptReason,
}

/// Where a merge goes on that was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Resumed {
    /// Bytes that were written before, and are not written again.
    #[serde(rename = "bytes-done")]
    pub done: u64,
    /// The same in percent of the whole merge.
    pub percent: u64,
}

impl Resumed {
    /// `done` bytes were written, and `rest` will be.
    pub(super) fn new(done: u64, rest: u64) -> Self {
        let percent = u128::from(done) * 100 / u128::from(done.saturating_add(rest).max(1));
        Self { done, percent: percent as u64 }
    }
}

/// What happens above base when base holds the data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "action", rename_all = "kebab-case")]
pub enum Afterwards {
    /// The overlay above top gets base as its backing file.
    Relink {
        /// The overlay.
        #[serde(serialize_with = "serial::name")]
        overlay: PathBuf,
        /// The backing name that is written into it.
        #[serde(rename = "backing-filename", serialize_with = "serial::name")]
        name: OsString,
        /// Whether a power cut at any instant leaves the old or the new name; if not, the header is
        /// rewritten across sectors.
        atomic: bool,
    },
    /// The active image becomes an empty overlay on base.
    Empty {
        /// The backing name that is written into it, where it changes.
        #[serde(rename = "backing-filename", serialize_with = "serial::some_name")]
        name: Option<OsString>,
        /// As for [`Afterwards::Relink`].
        atomic: bool,
    },
    /// The active image stays as it is.
    Keep,
    /// The active image becomes an empty overlay on base, and is removed when nothing else is left to be done.
    Delete {
        /// The backing name that is written into it, where it changes.
        #[serde(skip)]
        name: Option<OsString>,
        /// As for [`Afterwards::Relink`].
        #[serde(skip)]
        atomic: bool,
    },
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "merge {} into {}", shown(&self.top), shown(&self.base))?;
        writeln!(f, "  copy {} bytes, zero {} bytes", self.totals.bytes_to_copy, self.totals.bytes_to_zero)?;
        writeln!(f, "  allocate {} clusters", self.totals.clusters_to_allocate)?;
        write!(f, "  base grows to at most {} bytes", self.base_file_size_after)
    }
}
