//! Ends a merge that was stopped behind the switch of its chain.

use super::unfinished_work::UnfinishedWork;
use crate::chain::Chain;
use crate::error::{Error, Refusal, Result};
use crate::image::Image;
use crate::journal;
use crate::journal::FoundJournal;
use crate::merge::options::CommitOptions;
use crate::merge::report::Report;
use crate::storage::{Access, Host, LockMode, Place, lock, may_be_unlocked};

/// Completes the unfinished work on the layer at `at`, of a merge that was stopped after it had changed the
/// chain. Only the layer's header is needed for that. Layers that should be removed are removed.
///
/// # Errors
/// [`Error::InUse`]; the system's.
pub(crate) fn end_left(
    host: &dyn Host,
    chain: &Chain,
    at: usize,
    options: &CommitOptions,
    report: &mut Report,
) -> Result<()> {
    let dir = options.journal_dir.as_deref();
    let Some(layer) = chain.layers().get(at) else { return Ok(()) };
    let Some(unfinished) = UnfinishedWork::find(host, layer, dir)? else { return Ok(()) };
    if !unfinished.is_switching() {
        return Ok(());
    }
    let path = &layer.path;
    let file = Place::of_file(host, path, &**layer.image.file())?.reopen(host, &**layer.image.file())?;
    lock(host, path, &*file, LockMode::Write)?;
    may_be_unlocked(host, path, layer.id, &*file, Access::ReadWrite, options.open.no_locks)?;
    let found = journal::find(host, path, &*file, dir, Access::ReadWrite, journal::JOURNAL)?;
    let Some(FoundJournal { journal, last, .. }) = found else { return Ok(()) };
    let data = layer.image.as_qcow2().filter(|q| q.has_data_file()).map(|q| q.data_file().clone());
    let mut image = Image::open(path, file, layer.image.format(), data)?;
    let unfinished = unfinished.reopened(journal, last);
    let work = if unfinished.is_ours() { Some(unfinished.take_up(host, &mut image, false)?) } else { None };
    // Read the image under the journal, which mends what a power cut has torn.
    let images = chain.images().into_iter().enumerate();
    let images: Vec<&Image> = images.map(|(n, layer)| if n == at { &image } else { layer }).collect();
    if unfinished.was_put_back(&images, at)? {
        return Err(Error::refused(path, Refusal::MergedDataLost));
    }
    if let Some(work) = work {
        work.release(&mut image)?;
    }
    if let Some(obsolete) = unfinished.obsolete_layers(host, chain)? {
        obsolete.settle(host, Some(chain), options, report)?;
    }
    unfinished.discard(host)
}
