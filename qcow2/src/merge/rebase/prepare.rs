//! Preparing a rebase: both chains are opened, judged and compared, and what will be done is planned.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::{PreparedRebase, Rebase, RebaseOptions, RebasePlan};
use crate::chain::differences::{Differences, Sides};
use crate::chain::{Chain, OpenOptions};
use crate::error::{Error, FileOp, Refusal, Result};
use crate::image::{Image, ImageFormat};
use crate::journal;
use crate::journal::record::{Header, Purpose};
use crate::merge::resume::describe::{describe, stamp};
use crate::merge::resume::torn::refuse_torn_tables;
use crate::merge::safety;
use crate::merge::up::{self, Lower, Up};
use crate::storage::{FileId, Host, if_there};
use crate::transfer::Progress;
use crate::transfer::ask::Span;
use crate::transfer::workers::on_workers;

impl Rebase {
    /// Opens, locks, judges, compares and plans; nothing is written. Headers that a power cut has torn must be whole: see
    /// [`heal`](crate::merge::heal()). `progress` counts the bytes of the disk that were compared.
    ///
    /// # Errors
    /// [`Refusal::TornHeader`], [`Refusal::UnfinishedMerge`]; what [`Chain::open`] reports; [`Refusal::Loop`] for a new
    /// backing file that reads through the image; [`Error::Refused`] for every safety rule; [`Error::NoSpace`];
    /// [`Error::Cancelled`].
    pub fn prepare(
        host: Arc<dyn Host>,
        image: &Path,
        options: &RebaseOptions,
        progress: &dyn Progress,
        cancel: &AtomicBool,
    ) -> Result<PreparedRebase> {
        let dir = options.up.journal_dir.as_deref();
        let id = host.stat(image).map_err(|e| Error::io(image, FileOp::Open, None, e))?.id;
        let mut chain = up::open(&*host, image, &options.up.open, Some(id), dir, |_| Ok(()))?;
        refuse_foreign(&chain)?;
        let onto =
            options.onto.as_deref().map(|onto| open_onto(&*host, &chain, onto, options)).transpose()?;
        let at = chain.active();
        let unfinished = up::unfinished(&*host, &mut chain, dir)?;
        let is_ours = unfinished.as_ref().is_some_and(|(work, _)| work.is_ours());
        let layer = chain.layer(at)?;
        let qcow2 = up::judge(layer, &options.up, is_ours)?;
        let new = onto.as_ref().map(|onto| onto.layer(onto.active())).transpose()?;
        let mut plan = RebasePlan {
            image: layer.path.clone(),
            onto: new.map(|new| new.path.clone()),
            format: new.map(|new| new.image.format().name()),
            backing_name: new.map(|new| up::name_of(&*host, layer, new)).transpose()?,
            unneeded: unneeded(&chain, onto.as_ref()),
            virtual_size: qcow2.virtual_size(),
            is_resumed: is_ours,
            ..RebasePlan::default()
        };
        if unfinished.is_none() && is_there(&chain, onto.as_ref()) {
            return Ok(PreparedRebase::Nothing(Box::new(plan)));
        }
        up::fits(qcow2, plan.backing_name.as_deref().zip(plan.format))?;
        journal::place(&*host, &layer.path, &**layer.image.file(), dir, journal::JOURNAL)?;
        let leaks = safety::consistent(layer, cancel)?;
        let differences = compare(&chain, onto.as_ref(), progress, cancel)?;
        let base = new.map_or(layer, |new| new);
        let header = Header {
            purpose: Purpose::Rebase,
            // No index leads to this rebase.
            top_index: 0,
            base: stamp(&*host, base)?.path,
            ..describe(&*host, &chain, Span { base: 0, top: at, active: at }, at)?
        };
        let lower = Lower::Other { chain: onto.map(Box::new), differences };
        let totals = on_workers(|| lower.with_job(&chain.images(), |job| job.plan(cancel)))?;
        let header = Header { total: totals.bytes_to_write, ..header };
        plan.totals = totals;
        (plan.file_size_after, plan.is_room_unknown) = up::room(&*host, layer, qcow2, totals)?;
        let backing_name = plan.backing_name.clone();
        let up = Up {
            host,
            options: options.up.clone(),
            chain,
            lower,
            totals,
            backing_name,
            header,
            unfinished,
            leaks,
        };
        Ok(PreparedRebase::Ready(Box::new(Self { plan, up })))
    }
}

/// Opens and locks the new backing file and what it reads through; `chain` is that of the image.
fn open_onto(host: &dyn Host, chain: &Chain, onto: &Path, options: &RebaseOptions) -> Result<Chain> {
    let id = host.stat(onto).map_err(|e| Error::io(onto, FileOp::Open, None, e))?.id;
    let format = match options.onto_format {
        Some(format) => Some(format),
        None => given_format(host, chain, onto, id, &options.up.open)?,
    };
    let open = OpenOptions { active_format: format, ..options.up.open.clone() };
    let dir = options.up.journal_dir.as_deref();
    let image = chain.layer(chain.active())?;
    let own = [Some(image.id), image.data_file.as_ref().map(|data| data.id)];
    let is_own = |chain: &Chain| match chain.files().iter().any(|file| own.contains(&Some(*file))) {
        true => Err(Error::refused(onto, Refusal::Loop { file: image.path.clone() })),
        false => Ok(()),
    };
    // The image is locked for writing by now: it must not be locked for reading, too.
    if own.contains(&Some(id)) {
        return Err(Error::refused(onto, Refusal::Loop { file: image.path.clone() }));
    }
    let found = up::open(host, onto, &open, None, dir, is_own)?;
    refuse_foreign(&found)?;
    refuse_torn_tables(host, found.layers(), dir)?;
    up::refuse_merges(host, &found, dir)?;
    Ok(found)
}

/// What the caller, or the chain of the image, says of the format of the new backing file.
fn given_format(
    host: &dyn Host,
    chain: &Chain,
    onto: &Path,
    id: FileId,
    open: &OpenOptions,
) -> Result<Option<ImageFormat>> {
    for (name, format) in &open.backing_formats {
        let stat = if_there(host.stat(name)).map_err(|e| Error::io(name, FileOp::Stat, None, e))?;
        if name == onto || stat.is_some_and(|stat| stat.id == id) {
            return Ok(Some(*format));
        }
    }
    let layer = chain.layers().iter().find(|layer| layer.id == id);
    Ok(layer.map(|layer| layer.image.format()))
}

/// Whether the image has that backing file already, or has none as it should.
fn is_there(chain: &Chain, onto: Option<&Chain>) -> bool {
    let below = chain.active().checked_sub(1).and_then(|below| chain.layers().get(below));
    match (below, onto.and_then(|onto| onto.layers().last())) {
        (None, None) => true,
        (Some(old), Some(new)) => old.id == new.id && old.image.format() == new.image.format(),
        _ => false,
    }
}

/// The layers below the image that are no part of what will lie there, the uppermost first.
fn unneeded(chain: &Chain, onto: Option<&Chain>) -> Vec<PathBuf> {
    let kept = onto.map(Chain::files).unwrap_or_default();
    let below = chain.layers().get(..chain.active()).unwrap_or_default();
    below.iter().rev().filter(|layer| !kept.contains(&layer.id)).map(|layer| layer.path.clone()).collect()
}

/// What lies in a format that is not read here cannot be compared.
fn refuse_foreign(chain: &Chain) -> Result<()> {
    match chain.layers().first().map(|layer| &layer.image) {
        Some(Image::Foreign(foreign)) => Err(foreign.refuse()),
        _ => Ok(()),
    }
}

/// Where the image would show something else.
fn compare(
    chain: &Chain,
    onto: Option<&Chain>,
    progress: &dyn Progress,
    cancel: &AtomicBool,
) -> Result<Differences> {
    let (images, then) = (chain.images(), onto.map(Chain::images).unwrap_or_default());
    let sides = Sides::new(&images, chain.active(), &then)?;
    let total = images.last().map_or(0, |image| image.virtual_size());
    let done = AtomicU64::new(0);
    let count = |bytes: u64| progress.written(done.fetch_add(bytes, Ordering::Relaxed) + bytes, total);
    on_workers(|| Differences::find(&sides, cancel, &count))
}
