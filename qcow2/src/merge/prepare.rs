//! Committing layers into a base below them: opening, locking, judging and planning.
//!
//! [`Commit::prepare`] opens and locks the whole chain, refuses what is not safe, and plans; nothing is
//! written. [`Commit::execute`] carries the plan out (see `execute.rs`).

use super::commit::{Commit, Gone};
use crate::error::shown;
use crate::transfer::ask::down;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::options::{BaseChoice, CommitOptions};
use super::plan::{Afterwards, BeginsAnew, DataFileFate, Plan, PlannedDataFile, Resumed, Signs};
use super::resume::before;
use super::resume::remains::Remains;
use super::resume::work;
use super::switch::relink;
use super::{emptying, safety};
use crate::chain::{Chain, OpenOptions, index};
use crate::error::{Error, FileOp, Refusal, Result};
use crate::image::{Image, bitmaps, grow};
use crate::journal;
use crate::journal::Journal;
use crate::journal::record::Header;
use crate::storage::{Access, FileKind, Host};
use crate::transfer::ask::Span;
use crate::transfer::changes;
use crate::transfer::job::{Job, Totals};
use crate::units::GuestOffset;

impl Commit {
    /// Opens, locks, judges and plans; nothing is written.
    ///
    /// # Errors
    /// What [`Chain::open`] reports; [`Error::Usage`] for layers that are not there or in the wrong
    /// order; [`Error::Refused`] for every safety rule; [`Error::NoSpace`]; [`Error::Cancelled`].
    pub fn prepare(
        host: Arc<dyn Host>,
        active: &Path,
        options: &CommitOptions,
        cancel: &AtomicBool,
    ) -> Result<Self> {
        let journal_dir = options.journal_dir.clone();
        let healing = OpenOptions { lock: false, heal: true, journal_dir, ..options.open.clone() };
        if let Some(gone) = before::removed(&*host, active, options)? {
            return Self::over(host, options, gone, active);
        }
        let scout = Chain::open(&*host, active, &healing)?;
        // However often it is stopped, the same merge is known by the index that was asked for.
        let asked = options.top.as_deref().and_then(index);
        let meant = before::meant(&*host, &scout, options)?;
        let options = meant.as_ref().unwrap_or(options);
        if let Some((reason, remains)) = before::switched(&*host, &scout, options)? {
            return Ok(Self::nothing(host, options, scout, reason, remains));
        }
        if let Some(reason) = before::merged(&*host, &scout, options)? {
            return Ok(Self::nothing(host, options, scout, reason, Vec::new()));
        }
        let span = choose(&*host, &scout, options)?;
        let mut open = OpenOptions { lock: true, heal: false, ..options.open.clone() };
        for (at, layer) in scout.layers().iter().enumerate() {
            let written = at == span.base
                || (span.base < at && at <= span.top && !(span.top == span.active && options.keep_active))
                || (at == span.top + 1);
            let spared = span.base < at && at <= span.top && at != span.active;
            // A layer that cannot be written keeps its data, and the plan says so.
            if written && (!spared || emptying::is_writable(&*host, layer)) {
                open.access.insert(layer.id, Access::ReadWrite);
            }
        }
        let before: Vec<_> = scout.files();
        drop(scout);
        let chain = Chain::open(&*host, active, &open)?;
        if chain.files() != before {
            return Err(Error::refused(active, Refusal::ChainChanged));
        }
        Self::judge_and_plan(host, options, chain, span, asked, cancel)
    }

    fn judge_and_plan(
        host: Arc<dyn Host>,
        options: &CommitOptions,
        mut chain: Chain,
        span: Span,
        asked: Option<usize>,
        cancel: &AtomicBool,
    ) -> Result<Self> {
        let left = before::leftovers(&*host, &mut chain, span, options)?;
        safety::layers(&chain, span, options, &|at| left.is_ours(at, span))?;
        let merged = left.base.as_ref().map(|left| left.merged(&*host)).transpose()?.unwrap_or_default();
        let found = safety::siblings(&*host, &chain, span, merged, options)?;
        let afterwards = relink::plan(&*host, &chain, span, options)?;
        safety::journal_places(&*host, &chain, span, options, &afterwards)?;
        let leaks = safety::consistent(&chain, span.base, cancel)?;
        let (empties, kept) = emptying::plan(&chain, span, options, &found);
        for at in &empties {
            safety::consistent(&chain, *at, cancel)?;
        }
        if span.top == span.active && !options.keep_active {
            safety::consistent(&chain, span.active, cancel)?;
        }
        let mut header = work::describe(&*host, &chain, span, span.base)?;
        let images = chain.images();
        let mut job = down(&images, span)?;
        if let Some(size) = left.base.as_ref().and_then(|left| left.size_of_same(&header))
            && span.top < span.active
            && job.question.view.next_allocated(GuestOffset::new(size))?.is_none()
        {
            // Top was emptied, and has grown since. Base need not.
            job.limit_to(size);
        }
        header.top_index = asked.and_then(|index| u32::try_from(index).ok()).unwrap_or(header.top_index);
        (header.new_size, header.zero_until) = (job.new_size, job.question.zero_until);
        let (resume, begins_anew) = resume(&left, &header, &job, options, cancel)?;
        let from = GuestOffset::new(resume.map_or(0, |(watermark, _)| watermark));
        job.from = from;
        let mut totals = job.plan(cancel)?;
        let resumed = resume.map(|(_, done)| Resumed::new(done, totals.bytes_to_write));
        header.total = totals.bytes_to_write;
        // The bitmaps record all of the merge, however often it begins.
        job.from = GuestOffset::ZERO;
        let bitmaps = changes::plan(&job, cancel)?;
        let side_by_side = bitmaps.as_ref().map_or(0, bitmaps::Plan::side_by_side);
        totals.clusters_to_allocate += bitmaps.as_ref().map_or(0, bitmaps::Plan::clusters);
        let shared = found.shared.clone();
        let new_size = job.new_size;
        let mut plan = make_plan(&chain, span, options, (new_size, totals, side_by_side), afterwards, found)?;
        plan.will_empty(&chain, span, &empties, kept)?;
        (plan.resumed, plan.begins_anew) = (resumed, begins_anew);
        plan.strangers = journal::strangers(&*host, &chain.folders(&*host)?);
        if (span.base..=span.top).any(|at| left.is_ours(at, span)) {
            // The images are marked dirty, and must not stay so.
            plan.nothing_to_do = None;
        }
        header.restore_points_lost.clone_from(&plan.restore_points_lost);
        let remains = left.base.as_ref().map(|left| left.remains(&*host, &chain)).transpose()?.flatten();
        plan.remains = remains.map(|remains| remains.paths(&*host)).transpose()?.unwrap_or_default();
        plan.room_unknown = safety::space(&*host, &chain, span, &plan)?;
        let (base, top) = (span.base, span.top);
        let options = options.clone();
        let header = Some(header);
        let (gone, removing) = (None, None);
        Ok(Self {
            host,
            options,
            chain,
            base,
            top,
            plan,
            bitmaps,
            shared,
            empties,
            left,
            header,
            from,
            leaks,
            gone,
            removing,
        })
    }

    /// Nothing is to be merged; `remains` are files of a merge that was stopped.
    fn nothing(
        host: Arc<dyn Host>,
        options: &CommitOptions,
        chain: Chain,
        reason: String,
        remains: Vec<PathBuf>,
    ) -> Self {
        let path = |at: usize| chain.layers().get(at).map(|l| l.path.clone()).unwrap_or_default();
        let active = chain.active();
        let readable = chain.layers().first().filter(|l| !matches!(l.image, Image::Foreign(_)));
        let size = readable.map_or(0, |l| l.image.virtual_size());
        let plan = Plan {
            base: path(0),
            top: path(active),
            active: path(active),
            remains,
            totals: Totals::default(),
            base_size_before: size,
            base_size_after: size,
            base_file_size_after: 0,
            old_tail: 0,
            afterwards: Afterwards::Keep,
            obsolete: Vec::new(),
            emptied: Vec::new(),
            kept: Vec::new(),
            removes: false,
            bytes_freed: 0,
            restore_points_lost: Vec::new(),
            data_files: Vec::new(),
            bitmaps_lost: Vec::new(),
            searched: Vec::new(),
            signs: Signs::default(),
            unreadable: Vec::new(),
            room_unknown: Vec::new(),
            strangers: Vec::new(),
            nothing_to_do: Some(reason),
            resumed: None,
            begins_anew: None,
        };
        Self {
            host,
            options: options.clone(),
            base: 0,
            top: active,
            chain,
            plan,
            bitmaps: None,
            shared: Vec::new(),
            empties: Vec::new(),
            left: before::Leftovers::default(),
            header: None,
            from: GuestOffset::ZERO,
            leaks: 0,
            gone: None,
            removing: None,
        }
    }

    /// The active image was merged, and removed: only its journal is there, and perhaps its data file.
    fn over(host: Arc<dyn Host>, options: &CommitOptions, gone: Journal, asked: &Path) -> Result<Self> {
        let (chain, header) = (Chain::default(), gone.header());
        let (base, active) = (header.base.clone(), header.active.clone());
        let reason = before::was_merged(&active, &base);
        let remains = Remains::of(&*host, &gone, &chain, false)?;
        let remains = remains.map(|remains| remains.paths(&*host)).transpose()?.unwrap_or_default();
        let mut this = Self::nothing(host, options, chain, reason, remains);
        (this.plan.base, this.plan.top, this.plan.active) = (base, active.clone(), active);
        this.gone = Some(Gone { journal: gone, asked: asked.to_owned() });
        Ok(this)
    }
}

/// The guest offset below which all is done, and the bytes that were written for that.
type Watermark = (u64, u64);

/// Where the merge of a journal goes on: below which guest offset all is done, and the bytes that were written for that;
/// or why it does not. What is not certain is proved by reading it back, or it does not count.
fn resume(
    left: &before::Leftovers,
    header: &Header,
    job: &Job<'_>,
    options: &CommitOptions,
    cancel: &AtomicBool,
) -> Result<(Option<Watermark>, Option<BeginsAnew>)> {
    let Some(left) = &left.base else { return Ok((None, None)) };
    let begins_anew = left.begins_anew();
    let Some((watermark, done)) = left.resume(header).filter(|_| !options.restart) else {
        return Ok((None, begins_anew));
    };
    if !left.needs_proof() {
        return Ok((Some((watermark, done)), None));
    }
    // What lies behind the end of base's disk cannot be read yet.
    let base = job.image()?;
    let grain = base.as_qcow2().map_or(1, |image| image.geometry().cluster_size());
    let end = watermark.min(base.virtual_size());
    let end = end - end % grain;
    if job.holds(GuestOffset::new(end), cancel)? {
        return Ok(((end > 0).then_some((end, done)), None));
    }
    match left.may_be_newer() {
        true => Err(work::written_since(base.path(), left)),
        false => Ok((None, Some(BeginsAnew::NotProved))),
    }
}

/// Finds the layers that the options name, and judges their order.
fn choose(host: &dyn Host, chain: &Chain, options: &CommitOptions) -> Result<Span> {
    let active = chain.active();
    let top = match &options.top {
        Some(name) => chain.find(host, name)?,
        None => active,
    };
    let path = |at: usize| chain.layers().get(at).map(|l| shown(&l.path)).unwrap_or_default();
    if top == 0 {
        return Err(Error::Usage(format!(
            "{} has no backing file: there is nothing to merge it into",
            path(0)
        )));
    }
    let base = match &options.base {
        BaseChoice::Bottom => 0,
        BaseChoice::Shallow => top - 1,
        BaseChoice::Named(name) => chain.find(host, name)?,
    };
    if base >= top {
        return Err(Error::Usage(format!(
            "base [{}] {} must lie below top [{}] {}",
            base + 1,
            path(base),
            top + 1,
            path(top)
        )));
    }
    if let Some(Image::Foreign(foreign)) = chain.layers().get(base).map(|layer| &layer.image) {
        return Err(foreign.refuse());
    }
    Ok(Span { base, top, active })
}

fn make_plan(
    chain: &Chain,
    span: Span,
    options: &CommitOptions,
    (new_size, totals, side_by_side): (u64, Totals, u64),
    afterwards: Afterwards,
    found: safety::Searched,
) -> Result<Plan> {
    let path = |at: usize| chain.layers().get(at).map(|l| l.path.clone()).unwrap_or_default();
    let size = |at: usize| chain.layers().get(at).map_or(0, |l| l.image.virtual_size());
    let images = chain.images();
    let (base, top) = (size(span.base), size(span.top));
    let removed = options.delete && !options.keep_active;
    // The active image stays in use as an empty overlay.
    let last_obsolete = match () {
        () if span.top < span.active || removed => span.top + 1,
        // A kept active image still needs the layers below it.
        () if options.keep_active => span.base + 1,
        () => span.top,
    };
    let direct = span.top == span.active && span.base + 1 == span.top;
    let untouched = match images.get(span.active) {
        Some(active) => active.next_allocated(GuestOffset::ZERO)?.is_none(),
        None => false,
    };
    let nothing = direct && untouched && base >= top && totals.is_empty() && !removed;
    Ok(Plan {
        base: path(span.base),
        top: path(span.top),
        active: path(span.active),
        totals,
        base_size_before: base,
        base_size_after: new_size,
        base_file_size_after: file_size_after(&images, span, new_size, totals, side_by_side)?,
        old_tail: if span.top == span.active { base.saturating_sub(top) } else { 0 },
        afterwards,
        obsolete: (span.base + 1..last_obsolete).map(path).collect(),
        emptied: Vec::new(),
        kept: Vec::new(),
        removes: removed,
        bytes_freed: 0,
        remains: Vec::new(),
        restore_points_lost: (span.base..span.top).map(path).collect(),
        data_files: data_files(chain, span, options),
        bitmaps_lost: safety::bitmaps(chain, span, options)?,
        searched: found.searched,
        signs: found.signs,
        unreadable: found.unreadable,
        room_unknown: Vec::new(),
        strangers: Vec::new(),
        nothing_to_do: nothing.then(|| {
            format!("{} is an empty overlay on {}", shown(path(span.active)), shown(path(span.base)))
        }),
        resumed: None,
        begins_anew: None,
    })
}

/// What becomes of the external data files of base and of the merged layers.
fn data_files(chain: &Chain, span: Span, options: &CommitOptions) -> Vec<PlannedDataFile> {
    // A kept active image keeps its own data file, and reads through the layers below it.
    let last = if options.keep_active && span.top == span.active { span.base } else { span.top };
    let layers = chain.layers().iter().enumerate().take(last + 1).skip(span.base);
    let planned = layers.filter_map(|(at, layer)| {
        let data = layer.data_file.as_ref()?;
        let fate = match data.kept {
            _ if at == span.base => DataFileFate::Written,
            Some(why) => DataFileFate::Kept(why),
            None if options.delete => DataFileFate::Removed,
            None => DataFileFate::Emptied,
        };
        Some(PlannedDataFile { file: data.path.clone(), image: layer.path.clone(), fate })
    });
    planned.collect()
}

/// The length that base's file, or the block device that holds it, must have afterwards, at most.
fn file_size_after(
    images: &[&Image],
    span: Span,
    new_size: u64,
    totals: Totals,
    side_by_side: u64,
) -> Result<u64> {
    let Some(image) = images.get(span.base) else { return Ok(0) };
    let stat = image.file().stat().map_err(|e| Error::io(image.path(), FileOp::Stat, None, e))?;
    let needed = match image {
        // A file of odd length is filled up to a sector when its end is written.
        Image::Raw(_) => new_size,
        Image::Foreign(foreign) => return Err(foreign.refuse()),
        Image::Qcow2(qcow2) => {
            let l1 = grow::l1_growth(qcow2, new_size)?.unwrap_or(0);
            grow::end_after(qcow2, totals.clusters_to_allocate + l1, side_by_side + l1)?
                << qcow2.geometry().cluster_bits()
        }
    };
    Ok(if stat.kind == FileKind::Block { needed } else { needed.max(stat.len) })
}
