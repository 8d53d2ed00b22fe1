//! The road from needs to bytes: planning a merge, and carrying it out.
//!
//! Both go through the same steps in the same order; planning counts what carrying out does. A window
//! of the disk is resolved, its needs become operations and changes, and batches of these are brought
//! to disk behind barriers. Nothing is kept of a window once its batch is done.

use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;

use super::cluster::{Base, Effect, WholeClusters};
use super::needs::{Need, Question};
use super::ops::{Ops, Run, Target};
use super::origin::Origin;
use super::pace::Pace;
use super::zeros::{AHEAD, Zeros, split};
use serde::Serialize;

use crate::chain::view::View;
use crate::error::{Error, FileOp, Result};
use crate::image::alloc::Allocator;
use crate::image::edits::{Batch, ClusterSource};
use crate::image::refcounts::Refcounts;
use crate::image::{Extent, Image, Lost, Mapping, Qcow2, Raw};
use crate::storage::FileKind;
use crate::units::{GuestOffset, GuestRange, HostOffset};

/// A batch is brought to disk when it holds this many operations,
const BATCH_OPS: usize = 32 << 10;
/// or this many clusters that come whole from one place; they are sorted, so more are better,
const BATCH_WHOLE: usize = 256 << 10;
/// or the bytes of data that [`Pace`] tells,
/// or this much metadata.
const BATCH_MEMORY: usize = 8 << 20;

/// How many windows are resolved side by side.
const WINDOWS: usize = 4;

/// What a merge moves and takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Totals {
    /// Bytes of the guest's disk that come from the layers.
    pub bytes_to_copy: u64,
    /// Bytes of the guest's disk that become zeros.
    pub bytes_to_zero: u64,
    /// Clusters that a qcow2 base needs for data and L2 tables.
    pub clusters_to_allocate: u64,
    /// Bytes that a raw base or a data file needs where it has a hole now.
    #[serde(skip)]
    pub hole_bytes: u64,
    /// Bytes that are written, old content that moves along included.
    pub bytes_to_write: u64,
}

impl Totals {
    /// Whether the merge changes nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// A merge of some layers into a base.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job<'a> {
    /// The whole chain, bottom first.
    pub(crate) layers: &'a [&'a Image],
    /// The base's position.
    pub(crate) base: usize,
    /// What is asked of the layers above base.
    pub(crate) question: Question<'a>,
    /// The size of the base's disk when the merge is done.
    pub(crate) new_size: u64,
    /// Where to begin: what lies below was merged before, and is durable.
    pub(crate) from: GuestOffset,
    /// Which zeros of the layers are not copied.
    pub(crate) zeros: Zeros,
    /// Where data is noted that cannot be read, if zeros are to be in its place. All data is read before it is copied, then.
    pub(crate) lost: Option<&'a Lost>,
}

/// The parts of a qcow2 base that a merge changes.
#[derive(Debug)]
pub(crate) struct Writer<'a> {
    pub(crate) refcounts: &'a Refcounts,
    pub(crate) allocator: Allocator,
}

impl<'a> Job<'a> {
    /// Has base's disk be no larger than `size` bytes when the merge is done.
    pub(crate) fn limit_to(&mut self, size: u64) {
        self.new_size = self.new_size.min(size);
        self.question.limit = self.new_size;
    }

    pub(crate) fn image(&self) -> Result<&'a Image> {
        self.layers.get(self.base).copied().ok_or(Error::Broken { invariant: "a merge has all its layers" })
    }

    /// A qcow2 base as the cluster steps see it.
    fn qcow2(&self, image: &'a Qcow2) -> Result<Base<'a>> {
        let below = (self.base > 0).then(|| View::new(self.layers, 0, self.base - 1));
        let stat = image.file().stat().map_err(|e| Error::io(image.path(), FileOp::Stat, None, e))?;
        let blank_from = match stat.kind {
            FileKind::Regular => image.file_len().div_ceil(image.geometry().cluster_size()),
            _ => u64::MAX,
        };
        let below_size = below.map_or(0, |below| below.size()).max(self.question.below_size);
        Ok(Base { image, layer: self.base, below, below_size, size: self.new_size, blank_from })
    }

    /// Calls `f` with the needs of each window in order, and where the window ends; windows are resolved in
    /// parallel.
    fn for_each_window(&self, mut f: impl FnMut(&[Need], GuestOffset) -> Result<()>) -> Result<()> {
        let mut windows = self.question.windows(self.from);
        loop {
            let some = windows.by_ref().take(WINDOWS).collect::<Result<Vec<_>>>()?;
            if some.is_empty() {
                return Ok(());
            }
            let needs: Vec<_> =
                some.into_par_iter().map(|window| Ok((self.question.needs(window)?, window.end()))).collect();
            for needs in needs {
                let (mut needs, end): (Vec<Need>, _) = needs?;
                let reads = self.zeros == Zeros::Read || self.lost.is_some();
                while let Some(first) = needs.first().filter(|_| reads) {
                    let border = first.range.start.align_down(AHEAD) + AHEAD;
                    let some = split(&mut needs, border);
                    f(&self.zeros.found_in(some, self.layers, self.lost), border.min(end))?;
                }
                f(&self.zeros.found_in(needs, self.layers, self.lost), end)?;
            }
        }
    }

    /// Calls `f` with the ranges in which the base's own disk may change, in order. Zeros behind its old
    /// end change nothing: that is what a larger disk holds there.
    ///
    /// # Errors
    /// A table that cannot be read or is damaged, [`Error::Cancelled`], or what `f` returns.
    pub(crate) fn for_each_change(
        &self,
        cancel: &AtomicBool,
        mut f: impl FnMut(GuestRange) -> Result<()>,
    ) -> Result<()> {
        let old_end = GuestOffset::new(self.question.base_size);
        self.for_each_window(|needs, _| {
            check(cancel)?;
            for need in needs {
                let end = match need.origin {
                    Origin::Zeros => need.range.end().min(old_end),
                    Origin::Plain { .. } | Origin::Compressed { .. } => need.range.end(),
                };
                let range = GuestRange::between(need.range.start, end);
                if !range.is_empty() {
                    f(range)?;
                }
            }
            Ok(())
        })
    }

    /// What the merge will do; nothing is changed.
    ///
    /// # Errors
    /// A table that cannot be read or is damaged, or [`Error::Cancelled`].
    pub(crate) fn plan(&self, cancel: &AtomicBool) -> Result<Totals> {
        let image = match self.image()? {
            Image::Raw(raw) => return self.plan_raw(raw, cancel),
            Image::Foreign(foreign) => return Err(foreign.refuse()),
            Image::Qcow2(image) => image,
        };
        let mut bytes_to_write = 0;
        let refcounts = Refcounts::load(image)?;
        let allocator = Allocator::new(&refcounts);
        let beyond = allocator.limit().max(image.file_len() >> image.geometry().cluster_bits());
        let mut scout = Scout { image, refcounts: &refcounts, allocator, taken: 0, beyond };
        let mut pace = Pace::longest();
        let effect = self.steps(&self.qcow2(image)?, &mut scout, &mut pace, |batch, ops, _| {
            check(cancel)?;
            bytes_to_write += ops.bytes();
            *ops = Ops::default();
            batch.forget();
            Ok(0)
        })?;
        Ok(Totals {
            bytes_to_copy: effect.copied,
            bytes_to_zero: effect.zeroed,
            clusters_to_allocate: scout.taken,
            hole_bytes: if image.has_data_file() { effect.copied } else { 0 },
            bytes_to_write,
        })
    }

    /// Carries the merge out; the size of the base's disk does not change here. When it returns, all
    /// data and metadata is durable.
    ///
    /// # Errors
    /// An I/O error, damage, or [`Error::Cancelled`]: what was brought to disk by then is consistent.
    pub(crate) fn run(&self, writer: Option<&mut Writer<'_>>, run: &Run<'_>) -> Result<Totals> {
        let image = match self.image()? {
            Image::Raw(raw) => return self.run_raw(raw, run),
            Image::Foreign(foreign) => return Err(foreign.refuse()),
            Image::Qcow2(image) => image,
        };
        let Some(writer) = writer else { return Ok(Totals::default()) };
        let refcounts = writer.refcounts;
        let mut source = Source { image, refcounts, allocator: &mut writer.allocator };
        let target = Target { path: image.path(), file: &**image.data_file() };
        let mut totals = Totals::default();
        let mut pace = Pace::default();
        let effect = self.steps(&self.qcow2(image)?, &mut source, &mut pace, |batch, ops, end| {
            check(run.cancel)?;
            let bytes = ops.bytes();
            totals.clusters_to_allocate += batch.allocated();
            totals.bytes_to_write += bytes;
            std::mem::take(ops).run(self.layers, &target, run)?;
            bring_to_disk(std::mem::take(batch), image, refcounts)?;
            run.note(end)?;
            Ok(bytes)
        })?;
        totals.bytes_to_copy = effect.copied;
        totals.bytes_to_zero = effect.zeroed;
        Ok(totals)
    }

    /// Goes through all clusters that need something; `full` is called whenever a batch is, with the guest
    /// offset up to which all is in it or in one before, and returns the bytes that it has written.
    fn steps(
        &self,
        base: &Base<'_>,
        source: &mut dyn ClusterSource,
        pace: &mut Pace,
        mut full: impl FnMut(&mut Batch, &mut Ops, GuestOffset) -> Result<u64>,
    ) -> Result<Effect> {
        let (mut batch, mut ops, mut whole) = (Batch::default(), Ops::default(), WholeClusters::default());
        let mut total = Effect::default();
        let cluster = base.image.geometry().cluster_size();
        let mut end = self.from;
        self.for_each_window(|needs, _| {
            for_each_cluster(needs, cluster, |start, needs| {
                if start < self.from {
                    return Ok(());
                }
                let effect = base.take(start, needs, &mut whole, &mut batch, &mut ops, source)?;
                total.copied += effect.copied;
                total.zeroed += effect.zeroed;
                end = start + cluster;
                let memory = batch.memory() + whole.tables() * cluster as usize;
                if ops.len() >= BATCH_OPS
                    || whole.len() >= BATCH_WHOLE
                    || ops.bytes() + whole.bytes() >= pace.bytes()
                    || memory >= BATCH_MEMORY
                {
                    whole.place(base, &mut batch, &mut ops, source)?;
                    let bytes = full(&mut batch, &mut ops, end)?;
                    pace.done(bytes);
                }
                Ok(())
            })
        })?;
        whole.place(base, &mut batch, &mut ops, source)?;
        full(&mut batch, &mut ops, end)?;
        Ok(total)
    }

    fn plan_raw(&self, raw: &Raw, cancel: &AtomicBool) -> Result<Totals> {
        let mut totals = Totals::default();
        self.for_each_window(|needs, _| {
            check(cancel)?;
            let needs = &self.rest(needs);
            let mut ops = Ops::default();
            add_raw(&mut totals, raw, needs, &mut ops)?;
            totals.bytes_to_write += ops.bytes();
            totals.hole_bytes += holes_under(raw, needs)?;
            Ok(())
        })?;
        Ok(totals)
    }

    fn run_raw(&self, raw: &Raw, run: &Run<'_>) -> Result<Totals> {
        let target = Target { path: raw.path(), file: &**raw.file() };
        let mut totals = Totals::default();
        let mut ops = Ops::default();
        let mut pace = Pace::default();
        let bring = |ops: &mut Ops| {
            let bytes = ops.bytes();
            std::mem::take(ops).run(self.layers, &target, run)?;
            // Also when nothing was written: what a merge that was killed has written need not be durable.
            raw.file().sync().map_err(|e| Error::barrier(raw.path(), e))?;
            Ok(bytes)
        };
        self.for_each_window(|needs, end| {
            add_raw(&mut totals, raw, &self.rest(needs), &mut ops)?;
            if ops.len() >= BATCH_OPS || ops.bytes() >= pace.bytes() {
                let bytes = bring(&mut ops)?;
                run.note(end)?;
                totals.bytes_to_write += bytes;
                pace.done(bytes);
            }
            Ok(())
        })?;
        totals.bytes_to_write += bring(&mut ops)?;
        Ok(totals)
    }

    /// The needs, without what was merged before.
    fn rest(&self, needs: &[Need]) -> Vec<Need> {
        let rest = GuestRange::between(self.from, GuestOffset::new(u64::MAX));
        needs.iter().filter_map(|need| need.clip(&rest)).collect()
    }
}

/// Brings a batch to disk whose data was written: see [`crate::image::edits`] for the order.
pub(crate) fn bring_to_disk(mut batch: Batch, image: &Qcow2, refcounts: &Refcounts) -> Result<()> {
    if batch.is_empty() {
        // Data may have been written in place.
        return image.barrier();
    }
    batch.stage(image, refcounts)?;
    image.barrier()?;
    batch.publish(image)?;
    image.barrier()?;
    batch.settle(image, refcounts)?;
    image.refresh_lengths()
}

/// Free clusters of an image, one by one.
#[derive(Debug)]
pub(crate) struct Source<'a> {
    pub(crate) image: &'a Qcow2,
    pub(crate) refcounts: &'a Refcounts,
    pub(crate) allocator: &'a mut Allocator,
}

impl ClusterSource for Source<'_> {
    fn take(&mut self) -> Result<u64> {
        Ok(self.allocator.take(self.image, self.refcounts, 1)?.start)
    }
}

/// The clusters that a merge would take, when it is only planned: free ones in the order in which the
/// allocator will hand them out, then some behind the end of the file.
#[derive(Debug)]
struct Scout<'a> {
    image: &'a Qcow2,
    refcounts: &'a Refcounts,
    allocator: Allocator,
    taken: u64,
    /// A cluster behind the file and behind all that has a refcount block.
    beyond: u64,
}

impl ClusterSource for Scout<'_> {
    fn take(&mut self) -> Result<u64> {
        self.taken += 1;
        let free = self.allocator.try_take(self.image, self.refcounts, 1)?;
        Ok(free.map_or_else(
            || {
                self.beyond += 1;
                self.beyond
            },
            |run| run.start,
        ))
    }
}

fn check(cancel: &AtomicBool) -> Result<()> {
    if cancel.load(Ordering::Relaxed) { Err(Error::Cancelled) } else { Ok(()) }
}

/// Cuts sorted needs at cluster borders, and calls `f` once for each cluster with its parts.
pub(crate) fn for_each_cluster(
    needs: &[Need],
    cluster: u64,
    mut f: impl FnMut(GuestOffset, &[Need]) -> Result<()>,
) -> Result<()> {
    let mut parts: Vec<Need> = Vec::new();
    for need in needs {
        let mut at = need.range.start;
        while at < need.range.end() {
            let start = at.align_down(cluster);
            if parts.first().is_some_and(|first| first.range.start.align_down(cluster) != start) {
                f(parts[0].range.start.align_down(cluster), &parts)?;
                parts.clear();
            }
            let whole = GuestRange { start, len: cluster };
            let Some(part) = need.clip(&whole) else { break };
            at = part.range.end();
            parts.push(part);
        }
    }
    match parts.first() {
        Some(first) => f(first.range.start.align_down(cluster), &parts),
        None => Ok(()),
    }
}

/// Adds the operations that a raw base needs. Zeros are written only where there is something else.
fn add_raw(totals: &mut Totals, raw: &Raw, needs: &[Need], ops: &mut Ops) -> Result<()> {
    let mut extents: Vec<Extent> = Vec::new();
    for need in needs {
        if need.origin != Origin::Zeros {
            totals.bytes_to_copy += need.range.len;
            ops.push(HostOffset::new(need.range.start.get()), need.range.len, need.origin);
            continue;
        }
        extents.clear();
        raw.map(need.range, &mut extents)?;
        for extent in extents.iter().filter(|e| matches!(e.mapping, Mapping::Data { .. })) {
            totals.bytes_to_zero += extent.range.len;
            ops.push(HostOffset::new(extent.range.start.get()), extent.range.len, Origin::Zeros);
        }
    }
    Ok(())
}

/// Bytes that data would take where a raw file has a hole, or ends.
fn holes_under(raw: &Raw, needs: &[Need]) -> Result<u64> {
    let mut extents: Vec<Extent> = Vec::new();
    let mut bytes = 0;
    for need in needs.iter().filter(|need| need.origin != Origin::Zeros) {
        extents.clear();
        raw.map(need.range, &mut extents)?;
        let held = extents.iter().filter(|e| matches!(e.mapping, Mapping::Data { .. }));
        bytes += need.range.len - held.map(|e| e.range.len).sum::<u64>();
    }
    Ok(bytes)
}
