//! What must be known before an image is repaired: which clusters must not be written, whether the refcount
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

/// An image as it is before a step of its repair.
pub(super) struct Survey<'a> {
    pub(super) subject: &'a Subject<'a>,
    pub(super) layout: Layout,
    /// The metadata without the refcount structures.
    pub(super) rest: Layout,
    /// Clusters that hold metadata and something else: nothing is written there.
    overlaps: Vec<Range<u64>>,
    /// The first cluster of a structure that leaves the file: nothing is written there or behind it.
    cut_from: u64,
    /// Whether the refcount table lies in the file, alone: only then can what it names be believed.
    table_usable: bool,
    /// Why the refcount structures cannot be used as they are.
    pub(super) broken: Option<&'static str>,
    /// Whether all references are known, those of damaged refcount structures aside: no table is damaged.
    pub(super) complete: bool,
    /// Whether an entry is damaged: what it meant may be among the clusters that look unused.
    pub(super) damaged: bool,
    /// Whether entries point behind the end of the file: what is put there would become what they mean.
    pub(super) past_end: bool,
    /// The end of the last cluster that something else than refcount structures refers to.
    pub(super) references_end: u64,
}

impl<'a> Survey<'a> {
    /// Looks at an image.
    ///
    /// # Errors
    /// Those of a check, and anything that cannot be read.
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

    /// Why the refcount structures cannot be used, if so. `uncounted`: something lies in a cluster that
    /// no block counts.
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

    /// Whether bytes lie in clusters that hold one thing only, as far as that is known.
    pub(super) fn may_write(&self, host: u64, len: u64) -> bool {
        let clusters = self.subject.clusters(host, len);
        if clusters.end > self.cut_from {
            return false;
        }
        let from = self.overlaps.partition_point(|range| range.end <= clusters.start);
        self.overlaps.get(from).is_none_or(|range| range.start >= clusters.end)
    }

    /// Where a refcount block lies, if it is sound: inside the file, aligned, and alone there, as the table is.
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

    /// The refcount at an index of a block that was read.
    pub(super) fn stored(&self, block: &[u8], index: u64) -> u64 {
        let width = RefcountWidth::of(&self.subject.geometry);
        usize::try_from(index).ok().and_then(|index| width.get(block, index)).unwrap_or(0)
    }

    /// Reads a sound refcount block; false if it is none.
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

/// Counts all references, and visits the windows of host clusters that are of interest; a window begins
/// and ends where a refcount block does. It may happen that windows are visited twice.
///
/// # Errors
/// Those of `visit`, those of a check, and the first table that cannot be read: nothing is done by a count that lacks
/// references.
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

/// Calls `visit` with each refcount block of a window and the clusters that it counts, those behind the
/// end of the file left out.
///
/// # Errors
/// Those of `visit`, and cancellation.
pub(super) fn for_each_block(
    subject: &Subject<'_>,
    counts: &Counts,
    mut visit: impl FnMut(u64, Range<u64>) -> Result<()>,
) -> Result<()> {
    let per_block = subject.geometry.refcounts_per_block();
    let window = counts.window();
    // The last cluster in use may begin where the file ends in the cluster before.
    let end = window.end.min(subject.file_clusters() + 1);
    for block in window.start / per_block..end.div_ceil(per_block) {
        subject.may_go_on()?;
        let first = block * per_block;
        visit(block, first..first.saturating_add(per_block).min(end))?;
    }
    Ok(())
}

/// Calls `visit` with the clusters of a range that something refers to; the range begins where a refcount
/// block does.
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
