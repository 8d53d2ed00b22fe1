//! Gives up an unfinished merge.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use serde::Serialize;

use super::torn::refuse_torn_header;
use super::unfinished::{UnfinishedMerge, UnfinishedUp};
use super::unfinished_work::UnfinishedWork;
use crate::chain::{Chain, OpenOptions};
use crate::error::{Error, FileOp, Refusal, Result};
use crate::journal;
use crate::merge::safety;
use crate::serial;
use crate::storage::{Access, Host};
use crate::transfer::target::give_leaks_back;

/// The result of giving a merge up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Aborted {
    /// The merge; `None` if none was unfinished.
    #[serde(skip)]
    pub unfinished: Option<UnfinishedMerge>,
    /// The pull or the rebase, which has changed nothing that the guest sees; `None` if none was unfinished.
    #[serde(skip)]
    pub up: Option<UnfinishedUp>,
    /// The layers that have stopped being restore points, base among them.
    #[serde(serialize_with = "serial::names")]
    pub restore_points_lost: Vec<PathBuf>,
    /// Whether somebody has written to base since the merge was stopped, so that only its journal was removed.
    pub written_since: bool,
    /// Whether base is not the file that the merge wrote to, or an older state of it, so that only the journal was
    /// removed, or base was made consistent without it.
    pub put_back: bool,
}

/// Gives up the unfinished merge into the image at `base`: leaked clusters are freed, the dirty bit is cleared,
/// and the journal is removed. The overlays keep all their data. If somebody has written to base since, only
/// the journal is removed. A torn header must be mended before: see [`heal_image`](super::heal::heal_image).
///
/// # Errors
/// [`Refusal::TornHeader`]; [`Refusal::MergeDone`] if the chain has been changed already; [`Refusal::JournalOfRenamed`]; [`Error::InUse`]; a base that cannot be
/// opened or written.
pub fn abort(
    host: &dyn Host,
    base: &Path,
    open: &OpenOptions,
    dir: Option<&Path>,
    cancel: &AtomicBool,
) -> Result<Aborted> {
    refuse_torn_header(host, base, dir)?;
    let id = host.stat(base).map_err(|e| Error::io(base, FileOp::Open, None, e))?.id;
    let access = [(id, Access::ReadWrite)].into();
    let mut chain = Chain::open(host, base, &OpenOptions { lock: true, access, ..open.clone() })?;
    let at = chain.active();
    let nothing = Aborted {
        unfinished: None,
        up: None,
        restore_points_lost: Vec::new(),
        written_since: false,
        put_back: false,
    };
    let layer = chain.layer(at)?;
    let path = layer.path.clone();
    let Some(stopped) = UnfinishedWork::find(host, layer, dir)? else {
        journal::refuse_strangers(host, &path, &**layer.image.file(), dir, journal::JOURNAL)?;
        return Ok(nothing);
    };
    stopped.refuse_renamed(host, &path)?;
    let unfinished = stopped.merge();
    if let Some(UnfinishedMerge { is_switching: true, top, active, removes, .. }) = unfinished.clone() {
        return Err(Error::refused(&path, Refusal::MergeDone { top, active, removes }));
    }
    let lost = if unfinished.is_some() { stopped.restore_points_lost() } else { Vec::new() };
    let put_back = stopped.begins_anew().is_some();
    let result = Aborted {
        unfinished,
        up: stopped.up(),
        restore_points_lost: lost,
        written_since: stopped.is_foreign(),
        put_back,
    };
    if !stopped.is_ours() {
        stopped.discard(host)?;
        return Ok(result);
    }
    let work = stopped.take_up(host, chain.image_at(at)?, false)?;
    if stopped.is_doubtful() {
        // The journal is replayed in memory first, so that a base that it does not fit stays unchanged.
        safety::consistent(chain.layer(at)?, cancel)?;
    }
    let image = chain.image_at(at)?;
    work.replay(image, None)?;
    give_leaks_back(image, cancel)?;
    work.finish(host, image)?;
    Ok(result)
}
