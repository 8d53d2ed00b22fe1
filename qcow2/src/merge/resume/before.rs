//! Finds, before a merge is planned, unfinished and completed merges of the same layers. They decide which
//! layers the caller's names mean.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use super::describe::stamp;
use super::obsolete::ObsoleteLayers;
use super::torn::refuse_torn_header;
use super::unfinished_work;
use super::unfinished_work::UnfinishedWork;
use super::work::Work;
use crate::chain::{Chain, index};
use crate::error::{Error, FileOp, Refusal, Result};
use crate::format::Cluster0;
use crate::image::Qcow2;
use crate::journal;
use crate::journal::Journal;
use crate::journal::record::{Phase, Purpose};
use crate::merge::options::CommitOptions;
use crate::merge::reason::NothingReason;
use crate::storage::{Access, FileId, Host, if_there};
use crate::transfer::ask::{Span, down};
use crate::units::GuestOffset;

/// The unfinished work in the images of a chain.
#[derive(Debug, Default)]
pub(crate) struct UnfinishedInChain {
    pub(crate) base: Option<UnfinishedWork>,
    pub(crate) base_work: Option<Work>,
    /// The unfinished work of layers above base that were being emptied, by their positions.
    pub(crate) above: BTreeMap<usize, (UnfinishedWork, Option<Work>)>,
    /// Whether layers were emptied: then only base holds their data.
    pub(crate) has_emptied: bool,
}

impl UnfinishedInChain {
    /// Whether the unfinished work explains the present state of the layer at a position: nobody else has
    /// written to it.
    pub(crate) fn is_ours(&self, at: usize, span: Span) -> bool {
        let unfinished = if at == span.base {
            self.base.as_ref()
        } else {
            self.above.get(&at).map(|(unfinished, _)| unfinished)
        };
        unfinished.is_some_and(UnfinishedWork::is_ours)
    }
}

/// Finds unfinished work in the images that will be written. From then on torn headers read as they should;
/// nothing is written.
pub(crate) fn find_unfinished(
    host: &dyn Host,
    chain: &mut Chain,
    span: Span,
    options: &CommitOptions,
    cancel: &AtomicBool,
) -> Result<UnfinishedInChain> {
    let mut all = UnfinishedInChain::default();
    let dir = options.journal_dir.as_deref();
    let is_kept = span.top == span.active && options.keep_active;
    for at in span.base..=span.top {
        let layer = chain.layer(at)?;
        let Some(unfinished) = UnfinishedWork::find(host, layer, dir)? else { continue };
        if !options.restart {
            unfinished.refuse_renamed(host, &layer.path)?;
        }
        if unfinished.is_foreign() && at == span.base && !options.restart && !unfinished.may_have_emptied() {
            return Err(unfinished_work::written_since(&layer.path, &unfinished));
        }
        // As long as it is not certain that base holds everything, the data of the active image counts.
        let as_it_is = at != span.base && !all.base.as_ref().is_some_and(UnfinishedWork::is_certain);
        // Look also at layers that will not be written: an earlier merge may have emptied them.
        let work = match unfinished.is_ours() && (at == span.base || !is_kept) {
            true => Some(unfinished.take_up(host, chain.image_at(at)?, as_it_is)?),
            false => None,
        };
        if at == span.base {
            (all.base, all.base_work) = (Some(unfinished), work);
        } else {
            all.above.insert(at, (unfinished, work));
        }
    }
    all.has_emptied = has_emptied(host, chain, span, &all)?;
    if is_kept {
        // They will not be written, so their journals are neither taken over nor removed.
        all.above.clear();
    }
    let Some(unfinished) = &all.base else { return Ok(all) };
    let base = chain.layer(span.base)?;
    // The options do not matter here: nothing else holds the data.
    if all.has_emptied
        && (unfinished.may_lack_merged() || !unfinished.holds_samples(&chain.images(), span.base)?)
        && !(unfinished.is_foreign() && holds_all(unfinished, chain, span, cancel)?)
    {
        return Err(Error::refused(&base.path, Refusal::MergedDataLost));
    }
    if unfinished.is_foreign() && !options.restart {
        return Err(unfinished_work::written_since(&base.path, unfinished));
    }
    Ok(all)
}

/// Whether base shows all that was merged into it, although somebody has written to it since: a repair that cleared the
/// dirty bit, say. The samples tell of what the layers no longer hold, and what they still hold is compared. So the merge
/// that goes on writes nothing that base does not hold already.
fn holds_all(unfinished: &UnfinishedWork, chain: &Chain, span: Span, cancel: &AtomicBool) -> Result<bool> {
    let images = chain.images();
    let is_told = unfinished.is_switching() && !unfinished.samples().is_empty();
    if !is_told || !unfinished.holds_samples(&images, span.base)? {
        return Ok(false);
    }
    let job = down(&images, span)?;
    let end = job.question.end();
    Ok(end <= job.image()?.virtual_size() && job.holds(GuestOffset::new(end), cancel)?)
}

/// Whether a merge that was stopped has emptied a layer, or has begun to: then the overlays do not hold everything any
/// more. Not every header has room for a mark that says so.
fn has_emptied(host: &dyn Host, chain: &Chain, span: Span, all: &UnfinishedInChain) -> Result<bool> {
    let Some(base) = all.base.as_ref().filter(|base| base.may_have_emptied()) else { return Ok(false) };
    // Layers that another merge has emptied do not belong to this chain.
    if base.journal_has_emptied() || base.is_of_others(&chain.files()) {
        return Ok(true);
    }
    for (at, layer) in chain.layers().iter().enumerate().take(span.top + 1).skip(span.base + 1) {
        if all.above.get(&at).is_some_and(|(unfinished, _)| unfinished.is_emptying()) {
            return Ok(true);
        }
        let Some(image) = layer.image.as_qcow2() else { continue };
        // A changed layer was emptied: a guest writes to the active image only, and a repair of a layer that is
        // being emptied ends the emptying.
        let may_be_emptied = at != span.active || image.next_allocated(GuestOffset::ZERO)?.is_none();
        if may_be_emptied && base.has_changed(&stamp(host, layer)?) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The state of the requested merge, before any of its layers is locked.
pub(crate) enum Before {
    /// It can be planned. If the chain is shorter than when the same merge was stopped, the options are
    /// corrected so that they mean the same layers.
    Open(Option<CommitOptions>),
    /// The chain is switched, and only the end of the merge is unfinished: the reason why nothing is merged,
    /// and the obsolete files that must still be removed.
    Switched(NothingReason, Vec<PathBuf>),
    /// It is done: the reason why nothing is merged.
    Merged(NothingReason),
}

/// Finds out what of the requested merge is unfinished or done. Nothing is changed.
///
/// # Errors
/// A layer that does not exist; the system's.
pub(crate) fn look(host: &dyn Host, chain: &Chain, options: &CommitOptions) -> Result<Before> {
    let journals = Journals { host, chain, dir: options.journal_dir.as_deref(), found: OnceCell::new() };
    let meant = meant(host, chain, options, &journals)?;
    let options = meant.as_ref().unwrap_or(options);
    if let Some((reason, obsolete)) = switched(host, chain, options, &journals)? {
        return Ok(Before::Switched(reason, obsolete));
    }
    let Some((reason, holds_nothing)) = merged(host, chain, options)? else { return Ok(Before::Open(meant)) };
    let is_switching = journals
        .all()?
        .iter()
        .any(|(_, journal)| journal.state().phase >= Phase::Switching && !journal.header().purpose.is_up());
    Ok(match is_switching {
        true => Before::Switched(reason, Vec::new()),
        false if holds_nothing => Before::Merged(reason),
        // Somebody has written to it since.
        false => Before::Open(meant),
    })
}

/// The journal of the active image, if the same merge has removed that image: then there is no chain any more.
///
/// # Errors
/// The system's.
pub(crate) fn removed(host: &dyn Host, active: &Path, options: &CommitOptions) -> Result<Option<Journal>> {
    let is_gone = matches!(host.stat(active), Err(e) if e.kind() == io::ErrorKind::NotFound);
    if !is_gone || !options.delete {
        return Ok(None);
    }
    journal::find_removed(host, active, options.journal_dir.as_deref())
}

/// The journals of the layers of a chain, which are searched once, when they are first needed.
struct Journals<'a> {
    host: &'a dyn Host,
    chain: &'a Chain,
    dir: Option<&'a Path>,
    found: OnceCell<Vec<(&'a Path, Journal)>>,
}

impl<'a> Journals<'a> {
    /// Each with the path of its layer, from the bottom up.
    ///
    /// # Errors
    /// The system's.
    fn all(&self) -> Result<&[(&'a Path, Journal)]> {
        if let Some(found) = self.found.get() {
            return Ok(found);
        }
        let mut all = Vec::new();
        for layer in self.chain.layers() {
            let file = &**layer.image.file();
            let found =
                journal::find(self.host, &layer.path, file, self.dir, layer.access, journal::JOURNAL)?;
            all.extend(found.map(|found| (layer.path.as_path(), found.journal)));
        }
        Ok(self.found.get_or_init(|| all))
    }
}

/// The options with the active image as top, if the caller names top by an index that no layer has any more, and the active
/// image had it when the same merge was stopped.
///
/// # Errors
/// The system's.
fn meant(
    host: &dyn Host,
    chain: &Chain,
    options: &CommitOptions,
    journals: &Journals<'_>,
) -> Result<Option<CommitOptions>> {
    let Some(top) = &options.top else { return Ok(None) };
    let (Some(asked), Some(active)) = (index(top), chain.layers().last()) else { return Ok(None) };
    match chain.find(host, top) {
        Err(Error::Usage(_)) => {}
        found => return found.map(|_| None),
    }
    for (_, journal) in journals.all()? {
        let header = journal.header();
        let may = header.top == header.active && header.top_index as usize == asked;
        if may && id_of(host, &header.active)? == Some(active.id) {
            return Ok(Some(CommitOptions { top: None, ..options.clone() }));
        }
    }
    Ok(None)
}

/// The reason why nothing is merged, and the obsolete files that are still to be removed, if a merge was stopped behind the
/// switch of the chain. The layer asked for as top must have left the chain by that switch, or be named by an index: an
/// index means another layer by now.
///
/// # Errors
/// The system's.
fn switched(
    host: &dyn Host,
    chain: &Chain,
    options: &CommitOptions,
    journals: &Journals<'_>,
) -> Result<Option<(NothingReason, Vec<PathBuf>)>> {
    let Some(top) = &options.top else { return Ok(None) };
    let files = chain.files();
    let is_layer = |path: &Path| id_of(host, path).map(|id| id.is_some_and(|id| files.contains(&id)));
    if is_layer(Path::new(top))? {
        return Ok(None);
    }
    for (base, journal) in journals.all()? {
        let merged = &journal.header().top;
        let is_switched = journal.header().purpose == Purpose::Merge
            && journal.state().phase >= Phase::Switching
            && !is_layer(merged)?;
        if is_switched && names(host, top, merged) {
            let reason = NothingReason::merged(merged, base);
            let obsolete = ObsoleteLayers::of(host, journal, Some(chain), false)?;
            let paths = obsolete.map(|obsolete| obsolete.paths(host)).transpose()?;
            return Ok(Some((reason, paths.unwrap_or_default())));
        }
    }
    Ok(None)
}

/// The file that a name leads to, if there is one.
fn id_of(host: &dyn Host, path: &Path) -> Result<Option<FileId>> {
    let stat = if_there(host.stat(path)).map_err(|e| Error::io(path, FileOp::Stat, None, e))?;
    Ok(stat.map(|stat| stat.id))
}

/// Whether a user may mean the layer at `merged`, which may be removed by now: by an index, by a path that
/// leads to it, or by its name in the layer above.
fn names(host: &dyn Host, top: &OsStr, merged: &Path) -> bool {
    let last = top.as_bytes().rsplit(|b| b"/:".contains(b)).next();
    let same_name = || merged.file_name().map(OsStr::as_bytes) == last;
    index(top).is_some() || host.resolve(Path::new(top)).is_ok_and(|path| path == merged) || same_name()
}

/// The reason why there is nothing to do, if the layers asked for bear the mark of a merge; and whether the uppermost holds
/// nothing more than that, or is no layer of the chain.
///
/// # Errors
/// A layer that does not exist; the system's.
fn merged(host: &dyn Host, chain: &Chain, options: &CommitOptions) -> Result<Option<(NothingReason, bool)>> {
    let either = |cluster0: &Cluster0| cluster0.merged_into().or_else(|| cluster0.merging_into());
    let of_layer = |at: usize, mark: &dyn Fn(&Cluster0) -> Option<PathBuf>| {
        let layer = chain.layer(at)?;
        let Some(image) = layer.image.as_qcow2() else { return Ok(None) };
        let Some(base) = mark(image.cluster0()) else { return Ok(None) };
        let has_nothing =
            image.cluster0().keeps_merged_data() || image.next_allocated(GuestOffset::ZERO)?.is_none();
        Ok(Some((NothingReason::merged(&layer.path, &base), has_nothing)))
    };
    let Some(top) = &options.top else { return of_layer(chain.active(), &either) };
    match chain.find(host, top) {
        // A layer that is still in its chain and was only about to be merged still has to be merged.
        Ok(at) => of_layer(at, &Cluster0::merged_into),
        Err(e @ Error::Io { .. }) => Err(e),
        Err(not_found) => {
            // A layer that was merged is not in the chain any more.
            let path = Path::new(top);
            refuse_torn_header(host, path, options.journal_dir.as_deref())?;
            let opened = if_there(host.open(path, Access::Read));
            let Some(file) = opened.map_err(|e| Error::io(path, FileOp::Open, None, e))? else {
                return Err(not_found);
            };
            let cluster0 = match Qcow2::read_cluster0(path, &*file) {
                Err(e @ Error::Io { .. }) => return Err(e),
                other => other.ok(),
            };
            match cluster0.as_ref().and_then(either) {
                Some(base) => Ok(Some((NothingReason::merged(path, &base), true))),
                None => Err(not_found),
            }
        }
    }
}
