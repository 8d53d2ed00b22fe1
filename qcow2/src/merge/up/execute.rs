//! Carrying a pull or a rebase out.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Instant;

use super::{Lower, Up, UpReport};
use crate::chain::digest;
use crate::chain::view::View;
use crate::error::{Error, FileOp, Result};
use crate::format::plan_backing_removal;
use crate::image::alloc::Allocator;
use crate::image::rewrite::{apply, header_error, read_cluster};
use crate::image::{Image, Qcow2};
use crate::journal::Journal;
use crate::journal::record::Phase;
use crate::merge::resume::unfinished_work::UnfinishedWork;
use crate::merge::resume::work::Work;
use crate::merge::switch::relink::relink_journaled;
use crate::transfer::target::{give_leaks_back, prepare};
use crate::transfer::verify::reopen;
use crate::transfer::{Progress, Run, Totals, Writer};
use crate::units::GuestOffset;

impl Up {
    /// Takes the data in, and changes the backing name.
    ///
    /// # Errors
    /// The system's; [`Error::Verify`]; [`Error::Cancelled`]. The guest's view is what it was, and the same work goes on.
    pub(in crate::merge) fn execute(
        mut self,
        progress: &dyn Progress,
        cancel: &AtomicBool,
    ) -> Result<UpReport> {
        let start = Instant::now();
        let work = self.begin(cancel)?;
        let mut report = UpReport::default();
        if let Err(e) = self.fill(work.journal(), &mut report, progress, cancel) {
            // After a failed barrier nothing may be written, and nothing may count as durable.
            let of_journal = matches!(&e, Error::Io { path, .. } if path == work.journal().path());
            if !of_journal && !matches!(e, Error::Barrier { .. }) {
                work.stop();
            }
            return Err(e);
        }
        let at = self.chain.active();
        let format = self.lower.format(&self.chain)?;
        let image = self.chain.image_at(at)?;
        if let Image::Qcow2(qcow2) = &*image {
            match (&self.backing_name, format) {
                (Some(name), Some(format)) => relink_journaled(qcow2, name, format)?,
                _ => remove_backing(qcow2)?,
            }
            qcow2.barrier()?;
        }
        work.finish(&*self.host, image)?;
        let file = self.chain.layer(at)?;
        report.file_size =
            file.image.file().size().map_err(|e| Error::io(&file.path, FileOp::Stat, None, e))?;
        report.elapsed = start.elapsed();
        Ok(report)
    }

    /// Puts the image under a journal.
    fn begin(&mut self, cancel: &AtomicBool) -> Result<Work> {
        let at = self.chain.active();
        let (left, taken_up) = self.unfinished.take().unzip();
        let image = self.chain.image_at(at)?;
        if let Some(work) = taken_up.flatten() {
            work.replay(image, None)?;
            work.unwrap(image)?;
        }
        let dir = self.options.journal_dir.as_deref();
        let inherited = left.as_ref().map(UnfinishedWork::inherited);
        let work = Work::begin(&*self.host, image, self.header.clone(), dir, inherited.as_ref())?;
        if left.is_some_and(|left| left.is_ours()) && self.leaks > 0 {
            give_leaks_back(image, cancel)?;
        }
        Ok(work)
    }

    /// Has the image hold everything, durably.
    fn fill(
        &mut self,
        journal: &Arc<Journal>,
        report: &mut UpReport,
        progress: &dyn Progress,
        cancel: &AtomicBool,
    ) -> Result<()> {
        report.totals = self.move_data(journal, progress, cancel)?;
        if self.options.verify {
            report.digest = Some(self.read_back(cancel)?);
        }
        self.names_are_the_same()?;
        journal.note(Phase::Switching, u64::MAX, journal.header().total)
    }

    fn move_data(
        &mut self,
        journal: &Journal,
        progress: &dyn Progress,
        cancel: &AtomicBool,
    ) -> Result<Totals> {
        let at = self.chain.active();
        let clusters = self.totals.clusters_to_allocate;
        let total = self.totals.bytes_to_write;
        let run = Run { progress, total, done: AtomicU64::new(0), cancel, journal: Some(journal) };
        let Image::Qcow2(image) = self.chain.image_at(at)? else { return Ok(Totals::default()) };
        let size = image.virtual_size();
        let refcounts = prepare(image, clusters, 0, size)?;
        let mut writer = Writer { refcounts: &refcounts, allocator: Allocator::new(&refcounts) };
        self.lower.with_job(&self.chain.images(), |job| job.run(Some(&mut writer), &run))
    }

    /// The names of the image and of the layers that will lie below it lead to the files that are open. Otherwise the image
    /// would read through another file than the one that was looked at.
    fn names_are_the_same(&self) -> Result<()> {
        let host = &*self.host;
        match &self.lower {
            Lower::Layer(base) => self.chain.names_are_the_same(host, base.unwrap_or(0)),
            Lower::Other { chain, .. } => {
                self.chain.names_are_the_same(host, self.chain.active())?;
                chain.iter().try_for_each(|chain| chain.names_are_the_same(host, 0))
            }
        }
    }

    /// Compares what the guest sees with what it will see, by the tables as they are on disk; gives the digest.
    fn read_back(&self, cancel: &AtomicBool) -> Result<u32> {
        let images = self.chain.images();
        let at = self.chain.active();
        let image = images.get(at).ok_or(Error::Broken { invariant: "a chain has its image" })?;
        let size = image.virtual_size();
        let now = digest(View::new(&images, 0, at), size, cancel)?;
        let fresh = reopen(image)?;
        let mut after: Vec<&Image> = self.lower.images(&images);
        after.push(&fresh);
        let then = digest(View::new(&after, 0, after.len() - 1), size, cancel)?;
        if now != then {
            let what = format!("its disk has the digest {now:08x}, and would have {then:08x}");
            let path = image.path().to_owned();
            return Err(Error::Verify { path, guest: GuestOffset::ZERO, what });
        }
        Ok(now)
    }
}

/// Has an image that is written under a journal name no backing file.
fn remove_backing(image: &Qcow2) -> Result<()> {
    let cluster = read_cluster(image)?;
    let switch = plan_backing_removal(&cluster).map_err(|e| header_error(image.path(), e))?;
    apply(image, &switch)
}
