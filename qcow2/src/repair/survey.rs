//! Finds out what must be known before a repair: which clusters must not be written, whether the refcount
//! structures can be used, and whether every reference is known.

use std::ops::Range;

use crate::error::{Error, FileOp, Result};
use crate::format::{RefcountTableEntry, RefcountWidth};
use crate::storage::FileKind;
use crate::units::HostOffset;

use crate::check::census;
use crate::check::census::WINDOW_WORDS;
use crate::check::counts::{Counts, Slot, Width};
use crate::check::finding::{Findings, Structure};
use crate::check::layout::{Layout, Scope, lay_out};
use crate::check::scan::ClusterTotals;
use crate::check::subject::Subject;
use crate::check::too_many_references;

/// The state of an image before a step of its repair.
pub(super) struct Survey<'a> {
    pub(super) subject: &'a Subject<'a>,
    pub(super) layout: Layout,
    /// The metadata without the refcount structures.
    pub(super) rest: Layout,
    /// Clusters that hold metadata and something else: they must not be written.
    overlaps: Vec<Range<u64>>,
    /// The first cluster of a structure that extends behind the end of the file: nothing is written from there
    /// on.
    cut_from: u64,
    /// Whether the refcount table lies inside the file and shares no cluster. Otherwise its entries cannot be
    /// trusted.
    table_usable: bool,
    /// Why the refcount structures cannot be used as they are; `None` if they can.
    pub(super) broken: Option<&'static str>,
    /// Whether all references are known: no table is damaged. References by refcount structures do not matter
    /// here.
    pub(super) complete: bool,
    /// Whether an entry is damaged. The cluster that it meant may be among those that look unused.
    pub(super) damaged: bool,
    /// Whether entries point behind the end of the file. A structure that is put there would become their data.
    pub(super) past_end: bool,
    /// The end of the last cluster that anything but the refcount structures refers to.
    pub(super) references_end: u64,
}

impl<'a> Survey<'a> {
    /// Surveys an image.
    ///
    /// # Errors
    /// Those of a check; any metadata that cannot be read.
    pub(super) fn of(subject: &'a Subject<'a>) -> Result<Self> {
        let ignored = Findings::new(0);
        let findings = Findings::new(0);
        let whole = |scope, findings: &Findings| {
            let (layout, gaps) = lay_out(subject, scope, findings)?;
            gaps.none(subject.path).map(|()| layout)
        };
        let layout = whole(Scope::Everything, &ignored)?;
        let rest = whole(Scope::WithoutRefcounts, &findings)?;
        let mut overlaps: Vec<Range<u64>> = Vec::new();
        let mut uncounted = false;
        for_each_window(subject, &layout, None, &mut |counts| {
            for_each_block(subject, counts, |block, clusters| {
                let is_there = raw_entry(&layout, block) != 0;
                for_each_slot(counts, clusters, |cluster, slot| {
                    uncounted |= slot.count > 0 && !is_there;
                    if !slot.overlap {
                        return;
                    }
                    match overlaps.last_mut() {
                        Some(last) if last.end == cluster => last.end += 1,
                        _ => overlaps.push(cluster..cluster + 1),
                    }
                });
                Ok(())
            })
        })?;
        overlaps.sort_unstable_by_key(|range| range.start);
        let mut references_end = 0;
        let totals = ClusterTotals::default();
        for_each_window(subject, &rest, Some((&findings, &totals)), &mut |counts| {
            for_each_block(subject, counts, |_, clusters| {
                for_each_slot(counts, clusters, |cluster, slot| {
                    if slot.count > 0 {
                        references_end = references_end.max(cluster + 1);
                    }
                });
                Ok(())
            })
        })?;
        let mut survey = Self {
            subject,
            layout,
            rest,
            overlaps,
            cut_from: findings.cut_from() >> subject.geometry.cluster_bits(),
            table_usable: false,
            broken: None,
            complete: !findings.is_incomplete(),
            damaged: findings.is_damaged(),
            past_end: findings.is_past_end(),
            references_end,
        };
        let header = &subject.header;
        let (table, len) = (header.refcount_table_offset.get(), header.refcount_table_bytes());
        survey.table_usable = !subject.is_past_end(table, len) && survey.may_write(table, len);
        survey.broken = survey.judge(uncounted)?;
        Ok(survey)
    }

    /// Why the refcount structures cannot be used; `None` if they can. `uncounted` says that something lies in
    /// a cluster that no block counts.
    fn judge(&self, uncounted: bool) -> Result<Option<&'static str>> {
        if !self.table_usable {
            return Ok(Some(
                "the refcount table lies behind the end of the file, or where something else lies too",
            ));
        }
        let entries = self.layout.refcount_table.iter().enumerate();
        let used = entries.filter(|(_, raw)| **raw != 0).map(|(block, _)| block as u64);
        let mut buf = Vec::new();
        for block in used {
            if self.block(block).is_none() {
                return Ok(Some("the refcount table names a block that cannot be one"));
            }
            self.read_block(block, &mut buf)?;
        }
        Ok(uncounted.then_some("a refcount block is missing"))
    }

    /// Whether all clusters of a range hold one thing only, as far as the references tell.
    pub(super) fn may_write(&self, host: u64, len: u64) -> bool {
        let clusters = self.subject.clusters(host, len);
        if clusters.end > self.cut_from {
            return false;
        }
        let from = self.overlaps.partition_point(|range| range.end <= clusters.start);
        self.overlaps.get(from).is_none_or(|range| range.start >= clusters.end)
    }

    /// The offset of a refcount block; `None` unless it is aligned, lies inside the file, and shares no
    /// cluster, and the table is usable.
    pub(super) fn block(&self, block: u64) -> Option<HostOffset> {
        if !self.table_usable {
            return None;
        }
        let raw = raw_entry(&self.layout, block);
        let host = RefcountTableEntry::decode(raw, &self.subject.geometry, 0).ok()?.block()?;
        let size = self.subject.geometry.cluster_size();
        let usable = !self.subject.is_past_end(host.get(), size) && self.may_write(host.get(), size);
        usable.then_some(host)
    }

    /// What kind of file the image lies in.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn file_kind(&self) -> Result<FileKind> {
        let stat = self.subject.file.stat();
        stat.map(|stat| stat.kind).map_err(|e| Error::io(self.subject.path, FileOp::Stat, None, e))
    }

    /// The refcount at an index of a block's bytes.
    pub(super) fn stored(&self, block: &[u8], index: u64) -> u64 {
        let width = RefcountWidth::of(&self.subject.geometry);
        usize::try_from(index).ok().and_then(|index| width.get(block, index)).unwrap_or(0)
    }

    /// Reads a refcount block; false if there is no sound one.
    ///
    /// # Errors
    /// It cannot be read.
    pub(super) fn read_block(&self, block: u64, buf: &mut Vec<u8>) -> Result<bool> {
        let Some(host) = self.block(block) else { return Ok(false) };
        buf.resize(self.subject.geometry.cluster_size() as usize, 0);
        let read = self.subject.read(Structure::RefcountBlock, buf, host.get());
        read.map(|()| true).map_err(|unread| unread.error(self.subject.path))
    }
}

fn raw_entry(layout: &Layout, block: u64) -> u64 {
    let index = usize::try_from(block).ok();
    index.and_then(|index| layout.refcount_table.get(index)).copied().unwrap_or(0)
}

/// Counts all references, and visits the windows of host clusters with references or refcounts. A window begins
/// and ends where a refcount block does. If the narrow slots turn out too narrow, windows are visited again
/// with wide ones.
///
/// # Errors
/// Those of `visit`; those of a check; the first table that cannot be read, because nothing may be done by a
/// count that lacks references.
pub(super) fn for_each_window(
    subject: &Subject<'_>,
    layout: &Layout,
    first: Option<(&Findings, &ClusterTotals)>,
    visit: &mut dyn FnMut(&Counts) -> Result<()>,
) -> Result<()> {
    for width in [Width::Narrow, Width::Wide] {
        // Never zero: a block holds at least 64 refcounts, a power of two.
        let words_per_block = (subject.geometry.refcounts_per_block() / width.lanes()).max(1);
        let words = (WINDOW_WORDS / words_per_block).max(1) * words_per_block;
        if census::count(subject, layout, width, words, first, &mut |counted| visit(counted.whole()?))? {
            return Ok(());
        }
    }
    Err(too_many_references(subject))
}

/// Calls `visit` with each refcount block of a window, and the clusters that it counts up to the end of the
/// file.
///
/// # Errors
/// Those of `visit`; cancellation.
pub(super) fn for_each_block(
    subject: &Subject<'_>,
    counts: &Counts,
    mut visit: impl FnMut(u64, Range<u64>) -> Result<()>,
) -> Result<()> {
    let per_block = subject.geometry.refcounts_per_block();
    let window = counts.window();
    // One cluster more than the file has: an entry may refer to the cluster that begins where the file ends.
    let end = window.end.min(subject.file_clusters() + 1);
    for block in window.start / per_block..end.div_ceil(per_block) {
        subject.may_go_on()?;
        let first = block * per_block;
        visit(block, first..first.saturating_add(per_block).min(end))?;
    }
    Ok(())
}

/// Calls `visit` with each cluster of a range that may have references. The range begins where a refcount block
/// does.
pub(super) fn for_each_slot(counts: &Counts, clusters: Range<u64>, mut visit: impl FnMut(u64, Slot)) {
    let lanes = counts.lanes();
    let mut cluster = clusters.start;
    while cluster < clusters.end {
        let word = counts.word(cluster);
        if word != 0 {
            for lane in 0..lanes.min(clusters.end - cluster) {
                visit(cluster + lane, counts.slot(word, lane as u32));
            }
        }
        cluster += lanes;
    }
}
