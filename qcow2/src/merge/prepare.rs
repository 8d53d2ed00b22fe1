//! Committing layers into a base below them: opening, locking, judging and planning.
//!
//! [`Commit::prepare`] opens and locks the whole chain, refuses what is not safe, and plans; nothing is
//! written. [`Commit::execute`] carries the plan out (see `execute.rs`).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::commit::Commit;
use super::make_plan::{Needed, is_nothing, make_plan};
use super::options::{BaseChoice, CommitOptions};
use super::plan::{BeginsAnew, Resumed};
use super::reason::NothingReason;
use super::removal::Gone;
use super::resume::before::{self, Before};
use super::resume::describe::describe;
use super::resume::obsolete::ObsoleteLayers;
use super::resume::torn::{refuse_torn_header, refuse_torn_tables};
use super::resume::unfinished_work;
use super::settled::{Done, Finish, Nothing, Prepared, Settled, Unfinished, obsolete_of};
use super::stack::Stack;
use super::switch::relink;
use super::{emptying, safety};
use crate::chain::{Chain, OpenOptions, index};
use crate::error::{Error, Refusal, Result, shown};
use crate::image::{Image, bitmaps};
use crate::journal;
use crate::journal::Journal;
use crate::journal::record::Header;
use crate::storage::{Access, Host};
use crate::transfer::ask::{Span, down};
use crate::transfer::changes;
use crate::transfer::job::Job;
use crate::units::GuestOffset;

impl Commit {
    /// Opens, locks, judges and plans; nothing is written. Headers that a power cut has torn must be whole: see
    /// [`heal`](super::heal()).
    ///
    /// # Errors
    /// [`Refusal::TornHeader`]; [`Refusal::TornTables`] of a layer below base; what [`Chain::open`] reports; [`Error::Usage`] for layers that are not there or in the wrong
    /// order; [`Error::Refused`] for every safety rule; [`Error::NoSpace`]; [`Error::Cancelled`].
    pub fn prepare(
        host: Arc<dyn Host>,
        active: &Path,
        options: &CommitOptions,
        cancel: &AtomicBool,
    ) -> Result<Prepared> {
        if let Some(gone) = before::removed(&*host, active, options)? {
            return over(host, options, gone, active);
        }
        let dir = options.journal_dir.as_deref();
        let unlocked = OpenOptions { lock: false, ..options.open.clone() };
        let scout =
            Chain::open_after(&*host, active, &unlocked, &|path| refuse_torn_header(&*host, path, dir))?;
        // However often it is stopped, the same merge is known by the index that was asked for.
        let asked = options.top.as_deref().and_then(index);
        let meant = match before::look(&*host, &scout, options)? {
            Before::Open(meant) => meant,
            Before::Switched(reason, unremoved) => {
                let done = done(host, options, &scout, reason, unremoved)?;
                let unfinished = Unfinished::Switched(scout);
                return Ok(Prepared::Finish(Box::new(Finish { done, unfinished })));
            }
            Before::Merged(reason) => {
                let done = done(host, options, &scout, reason, Vec::new())?;
                return Ok(Prepared::Nothing(Box::new(Nothing { done, chain: scout })));
            }
        };
        let options = meant.as_ref().unwrap_or(options);
        let span = choose(&*host, &scout, options)?;
        let mut open = OpenOptions { lock: true, ..options.open.clone() };
        for (at, layer) in scout.layers().iter().enumerate() {
            let written = at == span.base
                || (span.base < at && at <= span.top && !(span.top == span.active && options.keep_active))
                || (at == span.top + 1);
            let spared = span.base < at && at <= span.top && at != span.active;
            // A layer that cannot be written keeps its data, and the plan says so.
            let may_be_emptied = || {
                Ok::<_, Error>(
                    emptying::is_writable(&*host, layer) && !safety::has_other_names(&*host, layer)?,
                )
            };
            if written && (!spared || may_be_emptied()?) {
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
    ) -> Result<Prepared> {
        let unfinished = before::find_unfinished(&*host, &mut chain, span, options, cancel)?;
        // They are read where layers above them hold a part of a cluster.
        let below = chain.layers().get(..span.base).unwrap_or_default();
        refuse_torn_tables(&*host, below, options.journal_dir.as_deref())?;
        safety::one_chain(&*host, &chain)?;
        let stack = Stack::of(&chain, span)?;
        safety::layers(&stack, options, &|at| unfinished.is_ours(at, span))?;
        let merged = unfinished
            .base
            .as_ref()
            .map(|unfinished| unfinished.merged(&*host))
            .transpose()?
            .unwrap_or_default();
        let found = safety::siblings(&*host, &stack, merged, options)?;
        let afterwards = relink::plan(&*host, &stack, options)?;
        safety::journal_places(&*host, &stack, options, &afterwards)?;
        let leaks = safety::consistent(stack.base, cancel)?;
        let (empties, kept) = emptying::plan(&stack, options, &found);
        for at in &empties {
            safety::consistent(chain.layer(*at)?, cancel)?;
        }
        if stack.has_active() && !options.keep_active {
            safety::consistent(stack.active, cancel)?;
        }
        let mut header = describe(&*host, &chain, span, span.base)?;
        let images = chain.images();
        let mut job = down(&images, span)?;
        if let Some(size) = unfinished.base.as_ref().and_then(|unfinished| unfinished.size_of_same(&header))
            && span.top < span.active
            && job.question.view.next_allocated(GuestOffset::new(size))?.is_none()
        {
            // Top was emptied, and has grown since. Base need not.
            job.limit_to(size);
        }
        header.top_index = asked.and_then(|index| u32::try_from(index).ok()).unwrap_or(header.top_index);
        (header.new_size, header.zero_until) = (job.new_size, job.question.zero_until);
        let (resume, begins_anew) = resume(&unfinished, &header, &job, options, cancel)?;
        let from = GuestOffset::new(resume.map_or(0, |(watermark, _)| watermark));
        job.from = from;
        let mut totals = job.plan(cancel)?;
        let resumed = resume.map(|(_, done)| Resumed::new(done, totals.bytes_to_write));
        header.total = totals.bytes_to_write;
        // The bitmaps record all of the merge, however often it begins.
        job.from = GuestOffset::ZERO;
        let bitmaps = changes::plan(&job, cancel)?;
        let side_by_side = bitmaps.as_ref().map_or(0, bitmaps::BitmapPlan::side_by_side);
        totals.clusters_to_allocate += bitmaps.as_ref().map_or(0, bitmaps::BitmapPlan::clusters);
        let shared = found.shared.clone();
        let new_size = job.new_size;
        let is_ours = (span.base..=span.top).any(|at| unfinished.is_ours(at, span));
        let unremoved = obsolete_of(&*host, &chain, &unfinished)?;
        let unremoved = unremoved.map(|unremoved| unremoved.paths(&*host)).transpose()?.unwrap_or_default();
        // Images that a merge has marked dirty must not stay so.
        if !is_ours && is_nothing(&stack, options, totals)? {
            let (active, base) = (stack.active.path.clone(), stack.base.path.clone());
            let reason = NothingReason::EmptyOverlay { active, base };
            let mut done = done(host, options, &chain, reason, unremoved)?;
            done.settled.base = stack.base.path.clone();
            done.settled.base_size = stack.base.image.virtual_size();
            return Ok(
                match unfinished.base.is_none()
                    && unfinished.above.is_empty()
                    && done.settled.unremoved.is_empty()
                {
                    true => Prepared::Nothing(Box::new(Nothing { done, chain })),
                    false => Prepared::Finish(Box::new(Finish {
                        done,
                        unfinished: Unfinished::Journals(chain, Box::new(unfinished)),
                    })),
                },
            );
        }
        let needed = Needed { size: new_size, totals, side_by_side };
        let mut plan = make_plan(&stack, options, needed, afterwards, found)?;
        plan.will_empty(&stack, &empties, kept)?;
        (plan.resumed, plan.begins_anew, plan.unremoved) = (resumed, begins_anew, unremoved);
        plan.strangers = journal::strangers(&*host, &chain.folders(&*host)?);
        header.restore_points_lost.clone_from(&plan.restore_points_lost);
        plan.room_unknown = safety::space(&*host, &stack, &plan)?;
        let (base, top) = (span.base, span.top);
        let options = options.clone();
        Ok(Prepared::Merge(Box::new(Self {
            host,
            options,
            chain,
            base,
            top,
            plan,
            bitmaps,
            shared,
            empties,
            unfinished,
            header,
            from,
            leaks,
            removing: None,
        })))
    }
}

/// The active image was merged, and removed: only its journal is there, and perhaps its data file.
fn over(host: Arc<dyn Host>, options: &CommitOptions, gone: Journal, asked: &Path) -> Result<Prepared> {
    let header = gone.header();
    let (base, active) = (header.base.clone(), header.active.clone());
    let unremoved = ObsoleteLayers::of(&*host, &gone, None, false)?;
    let settled = Settled {
        reason: NothingReason::merged(&active, &base),
        base_size: 0,
        unremoved: unremoved.map(|unremoved| unremoved.paths(&*host)).transpose()?.unwrap_or_default(),
        base,
        top: active.clone(),
        active,
    };
    let gone = Gone { journal: gone, asked: asked.to_owned() };
    let done = Done { host, options: options.clone(), settled };
    Ok(Prepared::Finish(Box::new(Finish { done, unfinished: Unfinished::Removed(Box::new(gone)) })))
}

/// What is known of a chain in which nothing is to be merged.
fn done(
    host: Arc<dyn Host>,
    options: &CommitOptions,
    chain: &Chain,
    reason: NothingReason,
    unremoved: Vec<PathBuf>,
) -> Result<Done> {
    let (bottom, active) = (chain.layer(0)?, chain.layer(chain.active())?.path.clone());
    let base_size = match &bottom.image {
        Image::Foreign(_) => 0,
        image => image.virtual_size(),
    };
    let base = bottom.path.clone();
    let settled = Settled { base, top: active.clone(), active, base_size, reason, unremoved };
    Ok(Done { host, options: options.clone(), settled })
}

/// The guest offset below which all is done, and the bytes that were written for that.
type Watermark = (u64, u64);

/// Where the merge of a journal goes on: below which guest offset all is done, and the bytes that were written for that;
/// or why it does not. What is not certain is proved by reading it back, or it does not count.
fn resume(
    unfinished: &before::UnfinishedInChain,
    header: &Header,
    job: &Job<'_>,
    options: &CommitOptions,
    cancel: &AtomicBool,
) -> Result<(Option<Watermark>, Option<BeginsAnew>)> {
    let Some(unfinished) = &unfinished.base else { return Ok((None, None)) };
    let begins_anew = unfinished.begins_anew();
    let Some((watermark, done)) = unfinished.resume(header).filter(|_| !options.restart) else {
        return Ok((None, begins_anew));
    };
    if !unfinished.needs_proof() {
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
    match unfinished.may_be_newer() {
        true => Err(unfinished_work::written_since(base.path(), unfinished)),
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
    let path = |at: usize| chain.layer(at).map(|layer| shown(&layer.path));
    if top == 0 {
        let bottom = path(0)?;
        return Err(Error::Usage(format!("{bottom} has no backing file: there is nothing to merge it into")));
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
            path(base)?,
            top + 1,
            path(top)?
        )));
    }
    if let Image::Foreign(foreign) = &chain.layer(base)?.image {
        return Err(foreign.refuse());
    }
    Ok(Span { base, top, active })
}
