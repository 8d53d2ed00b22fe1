//! Carries a commit out step by step. Each step is durable before the next one begins.
//!
//! 1. Base gets a journal and its dirty bit (see `work.rs`); what an unfinished merge has left is put in order.
//! 2. Base is prepared: feature bits, bitmaps, room in the metadata, a larger L1 table.
//! 3. Data and mappings, batch by batch (see `job.rs`).
//! 4. The size of base's disk.
//! 5. With `verify`, everything is read back.
//! 6. Layers that become obsolete are marked as being merged, and become empty overlays (see `emptying.rs`).
//! 7. The overlay above top gets base as its backing file; or the active image is emptied.
//! 8. Obsolete layers get base as their backing file, and are marked as merged.
//! 9. Base's dirty bit is cleared, and its journal removed.
//!
//! With `delete`, base's journal lists the obsolete layers behind step 6. They are removed instead of step 8,
//! from the top down, after the dirty bit is cleared; then the journal is removed, and last the active image,
//! which is an empty overlay by then (see `removal.rs`). So as long as there is anything left to do, the chain
//! can be opened, and leads to the journal.

use super::report::Report;
use crate::transfer::target::{give_leaks_back, grow_raw, prepare};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Instant;

use super::commit::Commit;
use super::plan::Afterwards;
use super::resume::samples;
use super::resume::unfinished_work::UnfinishedWork;
use super::resume::work::Work;
use super::settled::obsolete_of;
use super::stack::Stack;
use super::switch::relink;
use crate::error::{Error, FileOp, Result};
use crate::image::Image;
use crate::image::alloc::Allocator;
use crate::image::bitmaps;
use crate::image::refcounts::Refcounts;
use crate::journal::record::Phase;
use crate::journal::{self, Journal};
use crate::transfer::ask::Span;
use crate::transfer::ask::down;
use crate::transfer::changes;
use crate::transfer::job::{Job, Totals, Writer};
use crate::transfer::ops::{Progress, Run};
use crate::transfer::workers::on_workers;
use crate::units::GuestOffset;

impl Commit {
    /// Carries the plan out.
    ///
    /// # Errors
    /// An I/O error, or [`Error::Cancelled`]. The guest still sees the same disk then, and the same commit can
    /// be prepared again.
    pub fn execute(self, progress: &dyn Progress, cancel: &AtomicBool) -> Result<Report> {
        on_workers(|| self.carry_out(progress, cancel))
    }

    fn carry_out(mut self, progress: &dyn Progress, cancel: &AtomicBool) -> Result<Report> {
        let start = Instant::now();
        let mut report = Report::default();
        let (folders, dir) = (self.chain.folders(&*self.host)?, self.options.journal_dir.clone());
        journal::sweep(&*self.host, &folders, dir.as_deref(), self.options.open.no_locks)?;
        if let Some(unremoved) = obsolete_of(&*self.host, &self.chain, &self.unfinished)? {
            // Only base's journal lists these layers: remove them before a new journal takes its place.
            unremoved.settle(&*self.host, Some(&self.chain), &self.options, &mut report)?;
        }
        let work = self.begin(cancel)?;
        match self.fill(&work, &mut report, progress, cancel) {
            Ok(()) => {}
            Err(e) => {
                // After a failed barrier nothing may be written, and nothing may count as durable. The same is
                // true if the journal itself cannot be written. Otherwise stop in good order.
                let of_journal = matches!(&e, Error::Io { path, .. } if path == work.journal().path());
                if !of_journal && !matches!(e, Error::Barrier { .. }) {
                    work.stop();
                }
                return Err(e);
            }
        }
        let held = self.held_above()?;
        self.link(&work)?;
        report.freed = held.saturating_sub(self.held_above()?);
        report.emptied = self.emptied();
        // This comes before base's journal is removed: relinking shortens the chain, and the journal still
        // knows which layer an index in the same command meant.
        if !self.options.delete {
            self.mark_merged(&mut report)?;
        }
        // A file is removed only when everything written is durable, so that no power cut can tear a write that
        // needs the file.
        work.release(self.chain.image_at(self.base)?)?;
        if self.options.delete {
            self.remove_layers(&mut report)?;
        }
        work.journal().remove(&*self.host)?;
        self.remove_active(&mut report)?;
        report.emptied.retain(|path| !report.deleted.contains(path));
        let base = self.stack()?.base;
        report.base_file_size =
            base.image.file().size().map_err(|e| Error::io(&base.path, FileOp::Stat, None, e))?;
        report.elapsed = start.elapsed();
        Ok(report)
    }

    /// Puts base under a journal: the one of an unfinished merge, if this merge continues it.
    fn begin(&mut self, cancel: &AtomicBool) -> Result<Work> {
        let host = Arc::clone(&self.host);
        let (unfinished, work) = (self.unfinished.base.take(), self.unfinished.base_work.take());
        let (resumed, leaks) = (self.plan.resumed.is_some(), self.leaks);
        let mut header = self.header.clone();
        let has_emptied = self.unfinished.has_emptied;
        if !resumed {
            let images = self.chain.images();
            let mut job = down(&images, self.span())?;
            job.limit_to(self.plan.base_size_after);
            let before = unfinished.as_ref().filter(|_| has_emptied).map_or(&[][..], UnfinishedWork::samples);
            header.samples = samples::take(&job, self.top, before)?;
            header.has_emptied = has_emptied;
        }
        let dir = self.options.journal_dir.clone();
        let (base, from) = (self.base, self.from);
        let inherited = unfinished.as_ref().map(UnfinishedWork::inherited);
        let image = self.chain.image_at(base)?;
        let work = match work {
            Some(work) => {
                match resumed {
                    true => work.replay(image, Some(from))?,
                    false if has_emptied => work.replay_emptied(image)?,
                    false => work.replay(image, None)?,
                }
                if resumed {
                    work
                } else {
                    work.unwrap(image)?;
                    Work::begin(&*host, image, header, dir.as_deref(), inherited.as_ref())?
                }
            }
            None => Work::begin(&*host, image, header, dir.as_deref(), inherited.as_ref())?,
        };
        if unfinished.is_some_and(|unfinished| unfinished.is_ours()) && leaks > 0 {
            give_leaks_back(image, cancel)?;
        }
        Ok(work)
    }

    /// Moves everything into base, durably, and enters the phase of switching.
    fn fill(
        &mut self,
        work: &Work,
        report: &mut Report,
        progress: &dyn Progress,
        cancel: &AtomicBool,
    ) -> Result<()> {
        report.totals = self.move_data(work.journal(), progress, cancel)?;
        if self.options.verify {
            report.digest = self.read_back(progress, cancel)?;
        }
        self.chain.names_are_the_same(&*self.host, self.base)?;
        work.journal().note(Phase::Switching, u64::MAX, work.journal().header().total)
    }

    fn move_data(
        &mut self,
        journal: &Journal,
        progress: &dyn Progress,
        cancel: &AtomicBool,
    ) -> Result<Totals> {
        let span = self.span();
        let size = self.plan.base_size_after;
        let clusters = self.plan.totals.clusters_to_allocate;
        let before = self.plan.resumed.map_or(0, |resumed| resumed.done);
        let from = self.from;
        let total = self.plan.totals.bytes_to_write.saturating_add(before);
        let run = Run { progress, total, done: AtomicU64::new(before), cancel, journal: Some(journal) };
        let grows = size > self.plan.base_size_before;
        match self.chain.image_at(span.base)? {
            Image::Raw(raw) => {
                if grows {
                    grow_raw(raw, size)?;
                }
                let images = self.chain.images();
                let mut job = down(&images, span)?;
                job.limit_to(size);
                Job { from, ..job }.run(None, &run)
            }
            Image::Qcow2(image) => {
                let Some(bitmaps) = self.bitmaps.take() else { return Ok(Totals::default()) };
                let bitmap_clusters = bitmaps.clusters();
                let refcounts = prepare(image, clusters, bitmaps.side_by_side(), size)?;
                let (mut totals, growth) =
                    move_into_qcow2(&self.chain.images(), span, (from, size), bitmaps, &refcounts, &run)?;
                totals.clusters_to_allocate += bitmap_clusters;
                if let Image::Qcow2(image) = self.chain.image_at(span.base)? {
                    growth.publish(image, &refcounts)?;
                }
                Ok(totals)
            }
            Image::Foreign(foreign) => Err(foreign.refuse()),
        }
    }

    fn link(&mut self, work: &Work) -> Result<()> {
        // Mark first: after a power cut behind the switch, an old layer without a mark would look like any
        // other image.
        let marked = self.mark_obsolete()?;
        let dir = self.options.journal_dir.clone();
        let top_index = work.journal().header().top_index;
        self.empty_layers(dir.as_deref(), top_index)?;
        self.note_obsolete(work.journal(), &marked)?;
        match self.plan.afterwards.clone() {
            Afterwards::Relink { name, .. } => {
                let Stack { base, overlay, .. } = self.stack()?;
                let overlay =
                    overlay.ok_or(Error::Broken { invariant: "what is relinked lies above top" })?;
                relink::relink(&*self.host, base, overlay, &name, dir.as_deref())
            }
            Afterwards::Empty { name, .. } | Afterwards::Delete { name, .. } => {
                self.empty_active(name.as_deref(), dir.as_deref(), top_index)
            }
            Afterwards::Keep => Ok(()),
        }
    }
}

/// Sets the bits of base's bitmaps, then moves the data. The size of base's disk does not change yet.
fn move_into_qcow2(
    images: &[&Image],
    span: Span,
    (from, size): (GuestOffset, u64),
    bitmaps: bitmaps::BitmapPlan,
    refcounts: &Refcounts,
    run: &Run<'_>,
) -> Result<(Totals, bitmaps::BitmapGrowth)> {
    let mut job = down(images, span)?;
    job.limit_to(size);
    let Some(Image::Qcow2(image)) = images.get(span.base) else {
        return Err(Error::Broken { invariant: "the base is the image that was planned for" });
    };
    let growth = changes::set_bits(bitmaps, &job, image, refcounts, run.cancel)?;
    let mut writer = Writer { refcounts, allocator: Allocator::new(refcounts) };
    match (Job { from, ..job }).run(Some(&mut writer), run) {
        Ok(totals) => Ok((totals, growth)),
        Err(Error::Cancelled) => {
            growth.abandon(image, refcounts)?;
            Err(Error::Cancelled)
        }
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::atomic::Ordering::Relaxed;

    use kit::ok;

    use super::*;
    use crate::error::Refusal;
    use crate::image::bitmaps::tests::qemu;
    use crate::merge::CommitOptions;
    use crate::storage::OsHost;
    use crate::testing::local;

    /// Gives the name of an image to another file when the first bytes are written.
    struct Exchange<'a> {
        image: &'a Path,
        by: &'a Path,
        done: AtomicBool,
    }

    impl Progress for Exchange<'_> {
        fn written(&self, _: u64, _: u64) {
            if !self.done.swap(true, Relaxed) {
                std::fs::rename(self.by, self.image).unwrap();
            }
        }
    }

    #[test]
    fn a_base_that_is_exchanged_during_the_merge_costs_no_data() {
        if !qemu() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let arg = |name: &str| at(name).to_str().unwrap().to_owned();
        ok("qemu-img", &["create", "-q", "-f", "qcow2", &arg("base"), "1M"]);
        std::fs::copy(at("base"), at("other")).unwrap();
        ok("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &arg("base"), "-F", "qcow2", &arg("top")]);
        ok("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 64k", &arg("top")]);
        let held = std::fs::read(at("top")).unwrap();

        let (image, by, never) = (at("base"), at("other"), AtomicBool::new(false));
        let exchange = Exchange { image: &image, by: &by, done: AtomicBool::new(false) };
        let options = CommitOptions { open: local(), ..CommitOptions::default() };
        let commit = Commit::prepare(Arc::new(OsHost), &at("top"), &options, &never).unwrap();
        let refused = commit.execute(&exchange, &never).unwrap_err();
        assert!(matches!(&refused, Error::Refused { reason: Refusal::NotAsKnown { .. }, .. }), "{refused}");
        assert!(std::fs::read(at("top")).unwrap() == held, "the overlay was changed");
        // Typed again, it merges into the new base.
        let commit = Commit::prepare(Arc::new(OsHost), &at("top"), &options, &never).unwrap();
        assert_eq!(commit.execute(&exchange, &never).unwrap().totals.bytes_to_write, 1 << 16);
        ok("qemu-io", &["-f", "qcow2", "-c", "read -P 7 0 64k", &arg("base")]);
    }
}
