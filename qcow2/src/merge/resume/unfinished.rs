//! Describes an unfinished merge from its journal.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::error::{Error, FileOp, Result};
use crate::journal;
use crate::journal::record::{Phase, Purpose};
use crate::serial;
use crate::storage::{Access, Host};

/// A merge that was stopped, or is under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct UnfinishedMerge {
    /// The image that takes the data.
    #[serde(serialize_with = "serial::name")]
    pub base: PathBuf,
    /// The uppermost layer that is merged.
    #[serde(serialize_with = "serial::name")]
    pub top: PathBuf,
    /// The active image of the chain.
    #[serde(serialize_with = "serial::name")]
    pub active: PathBuf,
    /// The bytes that were written so far.
    #[serde(rename = "bytes-done")]
    pub done: u64,
    /// All bytes that the merge writes.
    #[serde(rename = "bytes-total")]
    pub total: u64,
    /// The same in percent, at most 99.
    pub percent: u64,
    /// Whether base holds everything, and the chain above it was or is being changed. Then the merge can only
    /// be finished, not given up.
    #[serde(rename = "switching")]
    pub is_switching: bool,
    /// Whether layers are removed at the end.
    #[serde(skip)]
    pub removes: bool,
    /// Whether everything else is done: base is released, and an image like any other.
    #[serde(rename = "removing")]
    pub is_removing: bool,
}

/// The unfinished merge into the image at `path`, by the journal beside it or in `dir`; `None` if there is none. Takes no lock, and
/// opens nothing but the image and the journal.
///
/// # Errors
/// The image cannot be opened, or the journal cannot be read.
pub fn unfinished_merge(host: &dyn Host, path: &Path, dir: Option<&Path>) -> Result<Option<UnfinishedMerge>> {
    let file = host.open(path, Access::Read).map_err(|e| Error::io(path, FileOp::Open, None, e))?;
    let found = journal::find(host, path, &*file, dir, Access::Read, journal::JOURNAL)?;
    Ok(found.filter(|found| found.last.is_some()).and_then(|found| of(&found.journal)))
}

/// A pull or a rebase that was stopped, or is under way: the image takes in data, and shows the same all the while.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum UnfinishedUp {
    /// A pull.
    Pull,
    /// A rebase: the image that is to lie below; nothing if there is none.
    Rebase(Option<PathBuf>),
}

/// The unfinished pull or rebase of the image at `path`, by the journal beside it or in `dir`; `None` if there is none.
///
/// # Errors
/// As [`unfinished_merge`].
pub fn unfinished_up(host: &dyn Host, path: &Path, dir: Option<&Path>) -> Result<Option<UnfinishedUp>> {
    let file = host.open(path, Access::Read).map_err(|e| Error::io(path, FileOp::Open, None, e))?;
    let found = journal::find(host, path, &*file, dir, Access::Read, journal::JOURNAL)?;
    Ok(found.filter(|found| found.last.is_some()).and_then(|found| up_of(&found.journal)))
}

/// The base that holds all data of the layer at `path`, if a merge is emptying the layer, or was stopped meanwhile.
/// The journal of the layer, beside it or in `dir`, tells that, and explains its dirty bit. Takes no lock, and opens
/// only the image and the journal.
///
/// # Errors
/// As [`unfinished_merge`].
pub(crate) fn unfinished_emptying(
    host: &dyn Host,
    path: &Path,
    dir: Option<&Path>,
) -> Result<Option<PathBuf>> {
    let file = host.open(path, Access::Read).map_err(|e| Error::io(path, FileOp::Open, None, e))?;
    let found = journal::find(host, path, &*file, dir, Access::Read, journal::JOURNAL)?;
    Ok(found.filter(is_emptying).map(|found| found.journal.header().base.clone()))
}

/// Unfinished work that keeps the dirty bit of an image set.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DirtyReason {
    /// A merge, a pull or a rebase writes into the image.
    Filling,
    /// A merge is emptying the image.
    Emptying {
        /// The base that holds all data of the image.
        into: PathBuf,
    },
}

/// Why the image at `path` may be marked dirty, by the journal beside it or in `dir`; `None` if no unfinished work
/// explains that. Takes no lock, and opens only the image and the journal.
///
/// # Errors
/// As [`unfinished_merge`].
pub fn dirty_reason(host: &dyn Host, path: &Path, dir: Option<&Path>) -> Result<Option<DirtyReason>> {
    let file = host.open(path, Access::Read).map_err(|e| Error::io(path, FileOp::Open, None, e))?;
    let found = journal::find(host, path, &*file, dir, Access::Read, journal::JOURNAL)?;
    Ok(found.filter(|found| found.last.is_some()).and_then(|found| {
        if is_emptying(&found) {
            return Some(DirtyReason::Emptying { into: found.journal.header().base.clone() });
        }
        // Once layers are being removed, base is released, and its dirty bit is clear.
        let is_merge = of(&found.journal).is_some_and(|merge| !merge.is_removing);
        (is_merge || up_of(&found.journal).is_some()).then_some(DirtyReason::Filling)
    }))
}

/// Whether a journal tells of a layer that is not empty yet. After the last of these phases the dirty bit is clear.
fn is_emptying(found: &journal::FoundJournal) -> bool {
    let is_going_on = found.last.is_some() && found.journal.state().phase <= Phase::Done;
    is_going_on && found.journal.header().purpose == Purpose::Empty && found.is_same_file()
}

/// The pull or rebase that a journal is about. Its last act is to remove the journal.
pub(crate) fn up_of(journal: &journal::Journal) -> Option<UnfinishedUp> {
    let header = journal.header();
    match header.purpose {
        Purpose::Pull => Some(UnfinishedUp::Pull),
        // Nothing is to lie below where the journal names the image itself.
        Purpose::Rebase => {
            Some(UnfinishedUp::Rebase((header.base != header.active).then(|| header.base.clone())))
        }
        Purpose::Merge | Purpose::Empty | Purpose::Header { .. } => None,
    }
}

/// The merge of a journal, unless everything is done.
pub(crate) fn of(journal: &journal::Journal) -> Option<UnfinishedMerge> {
    let (header, state) = (journal.header(), journal.state());
    let removes = journal.obsolete().is_some();
    if header.purpose != Purpose::Merge || (state.phase == Phase::Done && !removes) {
        return None;
    }
    Some(UnfinishedMerge {
        base: header.base.clone(),
        top: header.top.clone(),
        active: header.active.clone(),
        done: state.done,
        total: header.total,
        percent: percent(state.done, header.total),
        is_switching: state.phase >= Phase::Switching || header.has_emptied,
        removes,
        is_removing: state.phase >= Phase::Done,
    })
}

/// The part that is done, in percent; never 100 as long as the work is unfinished.
pub(crate) fn percent(done: u64, total: u64) -> u64 {
    (u128::from(done) * 100 / u128::from(total.max(1))).min(99) as u64
}
