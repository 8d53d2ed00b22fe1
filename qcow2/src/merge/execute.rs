//! Carrying a commit out, step by step, each durable before the next.
//!
//! 1. Base gets a journal and its dirty bit (see `work.rs`); what a stopped merge has left is put in order.
//! 2. Base is prepared: feature bits, bitmaps, room in the metadata, a larger L1 table.
//! 3. Data and mappings, batch by batch (see `job.rs`).
//! 4. The size of base's disk.
//! 5. With `verify`, everything is read back.
//! 6. Layers that will not be needed are marked as being merged.
//! 7. The overlay above top gets base as its backing file; or the active image is emptied.
//! 8. Layers that are no longer needed are marked as merged.
//! 9. Base's dirty bit is cleared, and its journal removed; with `delete` these layers are then removed from the
//!    top down.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use super::commit::{Commit, job};
use super::job::{Job, Totals, Writer};
use super::ops::{Progress, Run};
use super::options::Span;
use super::plan::Afterwards;
use super::work::{Work, describe, end_left};
use super::workers::on_workers;
use super::{empty, link, record};
use crate::chain::Layer;
use crate::check::CheckOptions;
use crate::check::repair::{self, RepairMode};
use crate::error::{Error, Result};
use crate::format::{Mark, plan_feature_bits};
use crate::image::alloc::Allocator;
use crate::image::bitmaps;
use crate::image::refcounts::Refcounts;
use crate::image::{Image, Qcow2, grow};
use crate::journal::record::Phase;
use crate::journal::{self, Journal};
use crate::storage::{FileId, FileKind};
use crate::units::{GuestOffset, HostOffset};

/// How a commit came out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// What was moved and taken.
    pub totals: Totals,
    /// How long it took.
    pub elapsed: Duration,
    /// The digest (CRC-32) of the guest's view, if everything was verified.
    pub digest: Option<u32>,
    /// The length of the base's file, in bytes.
    pub base_file_size: u64,
    /// Layers that were removed.
    pub deleted: Vec<PathBuf>,
    /// Layers that are no longer needed and are still there, marked as merged.
    pub marked: Vec<PathBuf>,
    /// Layers that are no longer needed and have no room for a mark in their header.
    pub unmarked: Vec<PathBuf>,
    /// Layers that were not removed, and why.
    pub kept: Vec<(PathBuf, String)>,
}

impl Commit {
    /// Carries the plan out.
    ///
    /// # Errors
    /// An I/O error, or [`Error::Cancelled`]. What the guest sees is unchanged then; the same commit can
    /// be prepared again.
    pub fn execute(self, progress: &dyn Progress, cancel: &AtomicBool) -> Result<Report> {
        on_workers(|| self.carry_out(progress, cancel))
    }

    fn carry_out(mut self, progress: &dyn Progress, cancel: &AtomicBool) -> Result<Report> {
        let start = Instant::now();
        let mut report = Report::default();
        let (folders, dir) = (self.chain.folders(&*self.host), self.options.journal_dir.clone());
        journal::sweep(&*self.host, &folders, dir.as_deref())?;
        if self.plan.nothing_to_do.is_some() {
            self.end_left()?;
            if self.options.verify {
                report.digest = Some(self.read_back(progress, cancel)?);
            }
        } else {
            let work = self.begin(cancel)?;
            match self.fill(&work, &mut report, progress, cancel) {
                Ok(()) => {}
                Err(e) => {
                    // A failed barrier is final: nothing may be written, or called durable, behind it.
                    let of_journal = matches!(&e, Error::Io { path, .. } if path == work.journal().path());
                    if !of_journal && !matches!(e, Error::Io { op: "sync", .. }) {
                        work.stop();
                    }
                    return Err(e);
                }
            }
            self.link()?;
            // Until base is finished, its journal tells that an index of the same command meant another chain.
            // But a file is only removed when nothing is left to be written that a power cut may tear.
            if !self.options.delete {
                self.retire(&mut report)?;
            }
            let host = Arc::clone(&self.host);
            if let Some(image) = self.chain.image_mut(self.base) {
                work.finish(&*host, image)?;
            }
            if self.options.delete {
                self.retire(&mut report)?;
            }
        }
        let base = self.layer(self.base)?;
        report.base_file_size =
            base.image.file().size().map_err(|e| Error::io(&base.path, "stat", None, e))?;
        report.elapsed = start.elapsed();
        Ok(report)
    }

    /// Puts base under a journal: that of a merge that was stopped, if this one goes on with it.
    fn begin(&mut self, cancel: &AtomicBool) -> Result<Work> {
        let host = Arc::clone(&self.host);
        let (left, work) = (self.left.base.take(), self.left.base_work.take());
        let (resumed, leaks) = (self.plan.resumed.is_some(), self.leaks);
        let header = self.header.take().ok_or_else(|| Error::Usage("there is nothing to merge".into()))?;
        let dir = self.options.journal_dir.clone();
        let base = self.base;
        let image =
            self.chain.image_mut(base).ok_or_else(|| Error::Usage("the chain has no such layer".into()))?;
        let work = match work {
            Some(work) => {
                work.replay(image)?;
                if resumed {
                    work
                } else {
                    work.unwrap(image)?;
                    Work::begin(&*host, image, header, dir.as_deref(), left.as_ref())?
                }
            }
            None => Work::begin(&*host, image, header, dir.as_deref(), left.as_ref())?,
        };
        if left.is_some_and(|left| left.is_ours()) && leaks > 0 {
            give_leaks_back(image, cancel)?;
        }
        Ok(work)
    }

    /// Has base hold everything, durably.
    fn fill(
        &mut self,
        work: &Work,
        report: &mut Report,
        progress: &dyn Progress,
        cancel: &AtomicBool,
    ) -> Result<()> {
        report.totals = self.move_data(work.journal(), progress, cancel)?;
        if self.options.verify {
            report.digest = Some(self.read_back(progress, cancel)?);
        }
        work.journal().note(Phase::Switching, u64::MAX, work.journal().header().total)
    }

    /// Ends what merges have left that were stopped when they had changed the chain.
    fn end_left(&self) -> Result<()> {
        if self.header.is_some() {
            // The images are locked, and not marked dirty: only the journals are there still.
            let left = [&self.left.base, &self.left.active];
            return left.into_iter().flatten().try_for_each(|left| left.discard(&*self.host));
        }
        let dir = self.options.journal_dir.as_deref();
        self.chain.layers().iter().try_for_each(|layer| end_left(&*self.host, layer, dir).map(drop))
    }

    fn layer(&self, at: usize) -> Result<&Layer> {
        self.chain.layers().get(at).ok_or_else(|| Error::Usage("the chain has no such layer".into()))
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
        let from = GuestOffset::new(self.plan.resumed.map_or(0, |_| journal.state().watermark));
        let total = self.plan.totals.bytes_to_write.saturating_add(before);
        let run = Run { progress, total, done: AtomicU64::new(before), cancel, journal: Some(journal) };
        let grows = size > self.plan.base_size_before;
        match self.chain.image_mut(span.base) {
            Some(Image::Raw(raw)) => {
                if grows {
                    grow_raw(raw, size)?;
                }
                let images = self.chain.images();
                Job { from, ..job(&images, span)? }.run(None, &run)
            }
            Some(Image::Qcow2(image)) => {
                let Some(bitmaps) = self.bitmaps.take() else { return Ok(Totals::default()) };
                let bitmap_clusters = bitmaps.clusters();
                let refcounts = prepare(image, clusters, bitmaps.side_by_side(), size)?;
                let (mut totals, growth) =
                    move_into_qcow2(&self.chain.images(), span, from, bitmaps, &refcounts, &run)?;
                totals.clusters_to_allocate += bitmap_clusters;
                if let Some(Image::Qcow2(image)) = self.chain.image_mut(span.base) {
                    growth.publish(image, &refcounts)?;
                }
                Ok(totals)
            }
            None => Ok(Totals::default()),
        }
    }

    fn link(&mut self) -> Result<()> {
        let span = self.span();
        // A power cut behind the switch must not leave old layers that nobody knows for what they are.
        self.mark_obsolete(Mark::Merging)?;
        let dir = self.options.journal_dir.clone();
        match self.plan.afterwards.clone() {
            Afterwards::Relink { name, .. } => {
                link::relink(&*self.host, &self.chain, span, span.top + 1, &name, dir.as_deref())
            }
            Afterwards::Empty { name, .. } => self.empty_active(name.as_deref(), dir.as_deref()),
            Afterwards::Keep | Afterwards::Delete => Ok(()),
        }
    }

    /// Turns the active image into an empty overlay on base, under a journal of its own.
    fn empty_active(&mut self, name: Option<&str>, dir: Option<&Path>) -> Result<()> {
        let span = self.span();
        let host = Arc::clone(&self.host);
        let (left, work) = (self.left.active.take(), self.left.active_work.take());
        let format = self.layer(span.base)?.image.format().name();
        let header = describe(&*host, &self.chain, span, span.active)?;
        let missing = || Error::Usage("the chain has no such layer".into());
        let image = self.chain.image_mut(span.active).ok_or_else(missing)?;
        let work = match work {
            Some(work) => {
                work.replay(image)?;
                work
            }
            None => Work::begin(&*host, image, header, dir, left.as_ref())?,
        };
        if left.is_some_and(|left| left.is_ours()) {
            // Mappings that are gone lead nobody to the clusters that were not given back yet.
            give_leaks_back(image, &AtomicBool::new(false))?;
        }
        if let Image::Qcow2(active) = &mut *image {
            if let Some(name) = name {
                link::relink_journaled(active, name, format)?;
            }
            clear_autoclear(active)?;
            let refcounts = Refcounts::load(active)?;
            bitmaps::drop_all(active, &refcounts)?;
            empty::empty(active)?;
        }
        work.finish(&*host, image)
    }

    /// Marks or removes what is no longer needed, from the top down.
    fn retire(&self, report: &mut Report) -> Result<()> {
        if !self.options.delete {
            for (path, marked) in self.mark_obsolete(Mark::Merged)? {
                if marked { &mut report.marked } else { &mut report.unmarked }.push(path);
            }
            return Ok(());
        }
        let base = self.base_name()?;
        for layer in self.chain.layers().iter().rev().filter(|l| self.plan.obsolete.contains(&l.path)) {
            if report.kept.is_empty() {
                self.delete(layer, &base, report)?;
            } else {
                // Whoever uses the layer that is kept reads through those below it.
                report.kept.push((layer.path.clone(), "a layer above it is kept".to_owned()));
                self.mark(layer, &base, report)?;
            }
        }
        Ok(())
    }

    fn base_name(&self) -> Result<PathBuf> {
        let base = self.layer(self.base)?;
        Ok(self.host.canonicalize(&base.path).unwrap_or_else(|_| base.path.clone()))
    }

    /// Marks the layers between base and the active image that are no longer needed, side by side; says
    /// for each, the top first, whether its header had room. The active image never gets a mark: until it
    /// is removed, a guest may go on writing to it.
    fn mark_obsolete(&self, mark: Mark) -> Result<Vec<(PathBuf, bool)>> {
        let base = self.base_name()?;
        let active = self.chain.active();
        let layers: Vec<&Layer> = self
            .chain
            .layers()
            .iter()
            .rev()
            .filter(|l| l.index <= active && self.plan.obsolete.contains(&l.path))
            .collect();
        link::mark(&*self.host, &layers, &base, mark, self.options.journal_dir.as_deref())
    }

    /// Removes a layer, and its data file, if its name still leads to the file of the plan, and that is a
    /// regular file. A symbolic link stays, and leads nowhere. A layer that is kept is marked instead, and
    /// keeps its data file.
    fn delete(&self, layer: &Layer, base: &Path, report: &mut Report) -> Result<()> {
        let data_file = layer.data_file.as_ref().map(|file| (&file.path, file.id));
        for (path, id) in [(&layer.path, layer.id)].into_iter().chain(data_file) {
            let found = self.host.canonicalize(path).and_then(|real| Ok((self.host.stat(&real)?, real)));
            let why = match found {
                Ok((stat, real))
                    if stat.id == id && stat.kind == FileKind::Regular && !self.is_shared(id) =>
                {
                    self.host.unlink(&real).map_err(|e| Error::io(&real, "remove", None, e))?;
                    let dir = real.parent().unwrap_or(Path::new("/"));
                    self.host.sync_dir(dir).map_err(|e| Error::io(dir, "sync", None, e))?;
                    report.deleted.push(path.clone());
                    continue;
                }
                Ok((stat, _)) if stat.id != id => "its name leads to another file now".to_owned(),
                Ok(_) if self.is_shared(id) => "another image uses it".to_owned(),
                Ok(_) => "it is not a regular file".to_owned(),
                Err(e) if e.kind() == io::ErrorKind::NotFound => e.to_string(),
                Err(e) => return Err(Error::io(path, "stat", None, e)),
            };
            report.kept.push((path.clone(), why));
            if id == layer.id {
                return self.mark(layer, base, report);
            }
        }
        Ok(())
    }

    fn is_shared(&self, id: FileId) -> bool {
        self.shared.contains(&id)
    }

    fn mark(&self, layer: &Layer, base: &Path, report: &mut Report) -> Result<()> {
        let dir = self.options.journal_dir.as_deref();
        for (path, marked) in link::mark(&*self.host, &[layer], base, Mark::Merged, dir)? {
            if marked { &mut report.marked } else { &mut report.unmarked }.push(path);
        }
        Ok(())
    }
}

/// Sets the bits of the base's bitmaps, then moves the data; the size of its disk does not change yet.
fn move_into_qcow2(
    images: &[&Image],
    span: Span,
    from: GuestOffset,
    bitmaps: bitmaps::Plan,
    refcounts: &Refcounts,
    run: &Run<'_>,
) -> Result<(Totals, bitmaps::Growth)> {
    let job = job(images, span)?;
    let Some(Image::Qcow2(image)) = images.get(span.base) else {
        return Err(Error::Usage("the base is not a qcow2 image".into()));
    };
    let growth = record::set_bits(bitmaps, &job, image, refcounts, run.cancel)?;
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

/// Makes a raw base larger; what is new reads as zeros.
fn grow_raw(raw: &mut crate::image::Raw, size: u64) -> Result<()> {
    raw.file().set_len(size).map_err(|e| Error::io(raw.path(), "grow", Some(size), e))?;
    raw.file().sync().map_err(|e| Error::io(raw.path(), "sync", None, e))
}

/// Prepares a qcow2 base: autoclear bits that are not known are cleared, as the specification asks of
/// every writer; room is made in refcounts and in the L1 table. `side_by_side` of the clusters lie in
/// one run.
pub(super) fn prepare(image: &mut Qcow2, clusters: u64, side_by_side: u64, size: u64) -> Result<Refcounts> {
    clear_autoclear(image)?;
    let mut refcounts = Refcounts::load(image)?;
    let l1 = grow::l1_growth(image, size)?.unwrap_or(0);
    if let Some(switch) = grow::make_room(image, &mut refcounts, clusters + l1, side_by_side + l1)? {
        switch.publish(image, &mut refcounts)?;
    }
    grow::grow_l1(image, &refcounts, size)?;
    if image.has_data_file() && image.header().data_file_raw() && size > image.virtual_size() {
        // A raw data file is the disk, byte for byte.
        let io = |e| Error::io(image.path(), "grow the data file of", Some(size), e);
        let data = image.data_file();
        if data.size().map_err(io)? < size {
            data.set_len(size).map_err(io)?;
        }
    }
    Ok(refcounts)
}

/// Gives back the clusters that a merge has leaked when it was stopped.
fn give_leaks_back(image: &mut Image, cancel: &AtomicBool) -> Result<()> {
    let Image::Qcow2(qcow2) = image else { return Ok(()) };
    let data = qcow2.has_data_file().then(|| &**qcow2.data_file());
    let options = CheckOptions { cancel: Some(cancel) };
    repair::repair(qcow2.path(), &**qcow2.file(), data, RepairMode::Leaks, &options)?;
    qcow2.barrier()?;
    qcow2.refresh_lengths()
}

fn clear_autoclear(image: &Qcow2) -> Result<()> {
    if image.header().version < 3 || image.header().unknown_autoclear() == 0 {
        return Ok(());
    }
    let mut cluster = vec![0; image.geometry().cluster_size() as usize];
    image.read_table(HostOffset::ZERO, &mut cluster)?;
    let header = image.header();
    let switch = plan_feature_bits(&cluster, header.incompatible, header.autoclear)
        .map_err(|e| Error::Usage(format!("{}: {e}", image.path().display())))?;
    link::apply(image, &switch)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::image::bitmaps::tests::{ok, qemu};
    use crate::merge::CommitOptions;
    use crate::merge::testing::{Silent, local};
    use crate::storage::OsHost;

    fn delete(active: &Path, allow_shared_base: bool) -> Report {
        let options = CommitOptions { open: local(), delete: true, allow_shared_base, ..Default::default() };
        let never = AtomicBool::new(false);
        let commit = Commit::prepare(Arc::new(OsHost), active, &options, &never).unwrap();
        commit.execute(&Silent, &never).unwrap()
    }

    fn create(dir: &Path, args: &str) {
        let in_dir = args.split(' ').map(|arg| match arg.strip_prefix('@') {
            Some(name) => dir.join(name).to_str().unwrap().to_owned(),
            None => arg.to_owned(),
        });
        let args: Vec<String> =
            ["create", "-q", "-f", "qcow2"].map(str::to_owned).into_iter().chain(in_dir).collect();
        ok("qemu-img", &args.iter().map(String::as_str).collect::<Vec<_>>());
    }

    #[test]
    fn a_layer_behind_a_symbolic_link_is_removed_itself() {
        if !qemu() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        std::fs::create_dir(dir.join("store")).unwrap();
        create(dir, "@base 1M");
        create(dir, "-b @base -F qcow2 @store/mid");
        symlink("store/mid", dir.join("mid")).unwrap();
        create(dir, "-b @mid -F qcow2 @top");
        let report = delete(&dir.join("top"), false);
        assert_eq!(report.deleted, [dir.join("top"), dir.join("mid")]);
        assert!(!dir.join("store/mid").exists() && !dir.join("top").exists());
    }

    #[test]
    fn a_layer_that_is_kept_is_marked_and_keeps_its_data_file() {
        if !qemu() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        create(dir, "@base 1M");
        let data = dir.join("data");
        create(dir, &format!("-o data_file={} -b @base -F qcow2 @mid 1M", data.display()));
        create(dir, "-b @mid -F qcow2 @top");
        create(dir, "-b @mid -F qcow2 @other");
        let report = delete(&dir.join("top"), true);
        assert_eq!(report.deleted, [dir.join("top")]);
        assert_eq!(report.kept, [(dir.join("mid"), "another image uses it".to_owned())]);
        assert_eq!(report.marked, [dir.join("mid")]);
        assert!(data.exists());
    }
}
