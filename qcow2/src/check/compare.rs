//! Compares stored refcounts with counted references, for a window of host clusters.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use rayon::prelude::*;

use crate::error::Result;
use crate::format::{RefcountTableEntry, RefcountWidth};
use crate::units::HostOffset;

use super::counts::{Counts, Slot};
use super::finding::{Finding, Findings, Severity, Structure, What};
use super::gaps::Gaps;
use super::layout::Layout;
use super::subject::Subject;

/// Compares the window of `counts`, block by block on all threads; returns the end of the last cluster
/// in use in the window (as a cluster number), or zero.
pub(crate) fn compare(
    subject: &Subject<'_>,
    layout: &Layout,
    counts: &Counts,
    findings: &Findings,
) -> Result<u64> {
    let per_block = subject.geometry.refcounts_per_block();
    // One cluster more than the file has: an entry may refer to the cluster that begins where the file ends.
    let end = counts.window().end.min(subject.file_clusters() + 1);
    let clusters = counts.window().start..end;
    let in_use = AtomicU64::new(0);
    let comparison = CountComparison { subject, counts, findings, in_use: &in_use };
    (clusters.start / per_block..end.div_ceil(per_block)).into_par_iter().try_for_each_init(
        Vec::new,
        |buf, block| {
            subject.may_go_on()?;
            let first = block * per_block;
            let range = first.max(clusters.start)..(first + per_block).min(end);
            let raw = usize::try_from(block).ok().and_then(|block| layout.refcount_table.get(block));
            comparison.block(raw.copied().unwrap_or(0), first, range, buf);
            Ok(())
        },
    )?;
    Ok(in_use.load(Relaxed))
}

struct CountComparison<'a> {
    subject: &'a Subject<'a>,
    counts: &'a Counts,
    findings: &'a Findings,
    in_use: &'a AtomicU64,
}

impl CountComparison<'_> {
    /// Compares the clusters of `range` with the block that the refcount table's entry `raw` names;
    /// its first refcount is that of cluster `first`.
    fn block(&self, raw: u64, first: u64, range: Range<u64>, buf: &mut Vec<u8>) {
        let geometry = self.subject.geometry;
        let entry = RefcountTableEntry::decode(raw, &geometry, 0);
        let known = match entry.map(RefcountTableEntry::block) {
            Ok(None) => {
                buf.clear();
                true
            }
            Ok(Some(host)) if !self.subject.is_past_end(host.get(), geometry.cluster_size()) => {
                buf.resize(geometry.cluster_size() as usize, 0);
                let read = self.subject.read(Structure::RefcountBlock, buf, host.get());
                let gaps = Gaps::default();
                let is_known = read.map_err(|unread| gaps.note(unread)).is_ok();
                gaps.report(self.findings);
                is_known
            }
            // The pass that counts the entries reports this one.
            _ => false,
        };
        if !known {
            // These refcounts are unknown. Overlaps and overflows show in the slots alone, and are still
            // reported.
            buf.clear();
        }
        let mut report = RowReporter { findings: self.findings, subject: self.subject, open: Vec::new() };
        let in_use = self.words(first, range, buf, known, &mut report);
        report.close();
        self.in_use.fetch_max(in_use, Relaxed);
    }

    fn words(
        &self,
        first: u64,
        range: Range<u64>,
        block: &[u8],
        known: bool,
        report: &mut RowReporter<'_>,
    ) -> u64 {
        let counts = self.counts;
        let width = RefcountWidth::of(&self.subject.geometry);
        let lanes = counts.lanes();
        let once = counts.all_copied_once();
        // The common case by far: four 16-bit refcounts of one, and four slots with one reference and the
        // COPIED flag. One comparison settles them.
        let ones = [0, 1, 0, 1, 0, 1, 0, 1];
        let quick = width.max() == 0xffff && lanes == 4;
        let mut in_use = 0;
        let mut cluster = range.start;
        while cluster < range.end {
            let word = counts.word(cluster);
            let index = (cluster - first) as usize;
            let whole = range.end - cluster >= lanes;
            if quick && whole && word == once && block.get(index * 2..index * 2 + 8) == Some(&ones) {
                in_use = cluster + lanes;
                cluster += lanes;
                continue;
            }
            if word == 0 && block.is_empty() {
                cluster += lanes;
                continue;
            }
            for lane in 0..lanes.min(range.end - cluster) {
                let slot = counts.slot(word, lane as u32);
                // A cluster behind the file's end matters only if something refers to it.
                if slot.count == 0 && cluster + lane >= self.subject.file_clusters() {
                    continue;
                }
                let stored = width.get(block, index + lane as usize).unwrap_or(0);
                if stored > 0 || slot.count > 0 {
                    in_use = cluster + lane + 1;
                    report.cluster(cluster + lane, slot, known.then_some(stored), width.max());
                }
            }
            cluster += lanes;
        }
        in_use
    }
}

/// Joins neighbouring clusters with the same trouble into one finding.
struct RowReporter<'a> {
    findings: &'a Findings,
    subject: &'a Subject<'a>,
    /// The runs that may still grow, at most one for each kind of trouble.
    open: Vec<(What, Severity, Range<u64>)>,
}

impl RowReporter<'_> {
    /// Judges a cluster; `stored` is its refcount, if that is known.
    fn cluster(&mut self, cluster: u64, slot: Slot, stored: Option<u64>, max: u64) {
        let references = slot.count;
        if slot.overlap {
            self.add(Severity::Corruption, What::Overlap { references }, cluster);
        }
        if references > max {
            self.add(Severity::Corruption, What::RefcountOverflow { references, max }, cluster);
        }
        let Some(stored) = stored else { return };
        if stored < references.min(max) {
            self.add(Severity::Corruption, What::RefcountTooLow { stored, references }, cluster);
        } else if stored > references {
            self.add(Severity::Leak, What::RefcountTooHigh { stored, references }, cluster);
        }
        if slot.copied && stored != 1 {
            let what = What::CopiedFlag { set: true, refcount: stored };
            self.add(Severity::Corruption, what, cluster);
        }
        if slot.not_copied && stored == 1 {
            let what = What::CopiedFlag { set: false, refcount: 1 };
            self.add(Severity::Corruption, what, cluster);
        }
    }

    fn add(&mut self, severity: Severity, what: What, cluster: u64) {
        for (open, _, range) in &mut self.open {
            if *open == what && range.end == cluster {
                range.end += 1;
                return;
            }
        }
        let ended = self.open.extract_if(.., |(_, _, range)| range.end < cluster);
        ended.for_each(|run| emit(self.findings, self.subject, run));
        self.open.push((what, severity, cluster..cluster + 1));
    }

    fn close(self) {
        self.open.into_iter().for_each(|run| emit(self.findings, self.subject, run));
    }
}

fn emit(findings: &Findings, subject: &Subject<'_>, (what, severity, range): (What, Severity, Range<u64>)) {
    findings.add(Finding {
        severity,
        what,
        host: HostOffset::new(range.start << subject.geometry.cluster_bits()),
        clusters: range.end - range.start,
        guest: None,
    });
}
