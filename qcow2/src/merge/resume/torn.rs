//! Refuses images that a power cut has torn during a merge, and that only the merge's journal can mend. Without
//! the journal, a reader would see other bytes than the guest wrote.

use std::path::Path;

use super::unfinished::{UnfinishedMerge, unfinished_merge, unfinished_up};
use super::unfinished_work::{FoundImage, UnfinishedWork};
use crate::chain::{Chain, Layer, OpenOptions};
use crate::error::{Error, Refusal, Result};
use crate::journal;
use crate::storage::{Access, Host, Storage};

/// Opens a chain to read it without the journals of unfinished merges.
///
/// # Errors
/// [`Refusal::TornHeader`], [`Refusal::TornTables`]: the merge must be finished or given up first; what [`Chain::open`]
/// reports.
pub fn open_whole(
    host: &dyn Host,
    active: &Path,
    options: &OpenOptions,
    dir: Option<&Path>,
) -> Result<Chain> {
    let chain = Chain::open_after(host, active, options, &|path| refuse_torn_header(host, path, dir))?;
    refuse_torn_tables(host, chain.layers(), dir)?;
    Ok(chain)
}

/// Refuses an image that cannot be read, or if it `is_repaired` cannot be written, without the journal of an unfinished merge.
/// `data` is its external data file. A repair clears the dirty bit by which a merge knows its base; where layers have been
/// emptied, nothing but base holds what they held.
///
/// # Errors
/// As [`open_whole`]; [`Refusal::MergeDone`] for a repair.
pub(crate) fn refuse_to_check(
    host: &dyn Host,
    path: &Path,
    file: &dyn Storage,
    data: Option<(&Path, &dyn Storage)>,
    is_dirty: bool,
    is_repaired: bool,
) -> Result<()> {
    let image = FoundImage { path, file, data, access: Access::Read, is_dirty };
    let Some(work) = UnfinishedWork::of(host, &image, None)? else { return Ok(()) };
    refuse_torn(path, &work)?;
    match work.merge().filter(|_| is_repaired && work.is_ours() && work.may_have_emptied()) {
        Some(UnfinishedMerge { top, active, removes, .. }) => {
            Err(Error::refused(path, Refusal::MergeDone { top, active, removes }))
        }
        None => Ok(()),
    }
}

/// Whether a record lies beside an image that can mend it after a power cut: the record of an edit of its
/// header, or the journal of an unfinished merge.
pub fn can_be_healed(host: &dyn Host, path: &Path) -> bool {
    let is_written = |merge: UnfinishedMerge| !merge.is_removing;
    journal::has_edit(host, path)
        || unfinished_merge(host, path, None).is_ok_and(|merge| merge.is_some_and(is_written))
        || unfinished_up(host, path, None).is_ok_and(|up| up.is_some())
}

/// Refuses an image whose header a power cut has torn: it is neither the old header nor the new one.
///
/// # Errors
/// [`Refusal::TornHeader`]; those of looking.
pub(crate) fn refuse_torn_header(host: &dyn Host, path: &Path, dir: Option<&Path>) -> Result<()> {
    match journal::is_torn_header(host, path, dir)? {
        true => Err(Error::refused(path, Refusal::TornHeader)),
        false => Ok(()),
    }
}

/// Refuses layers with torn blocks that the journal of a merge must write again.
///
/// # Errors
/// [`Refusal::TornTables`]; [`Error::InUse`] if the merge is under way; the system's.
pub(crate) fn refuse_torn_tables(host: &dyn Host, layers: &[Layer], dir: Option<&Path>) -> Result<()> {
    for layer in layers {
        if let Some(work) = UnfinishedWork::find(host, layer, dir)? {
            refuse_torn(&layer.path, &work)?;
        }
    }
    Ok(())
}

fn refuse_torn(path: &Path, work: &UnfinishedWork) -> Result<()> {
    match work.is_torn() {
        true => Err(Error::refused(path, Refusal::TornTables)),
        false => Ok(()),
    }
}
