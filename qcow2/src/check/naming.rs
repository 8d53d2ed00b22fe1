//! Finds the guest offsets that findings concern. This takes a second walk through the tables, so it is done
//! only when something is wrong.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::error::Result;
use crate::format::{L2Entry, read_be_u64s};
use crate::units::GuestOffset;

use super::counts::Reference;
use super::finding::{Finding, Findings, What};
use super::gaps::Gaps;
use super::layout::Layout;
use super::subject::Subject;
use super::sweep::{Segment, sweep};
use super::tables::{TableRef, Visitor, for_each_piece, read_piece, walk_l1};

/// Walks the active tables once more, and writes into each finding the first guest offset that refers to its
/// clusters.
pub(crate) fn name_guests(subject: &Subject<'_>, layout: &Layout, findings: &Findings) -> Result<()> {
    let mut ranges = Vec::new();
    findings.update(|finding| ranges.extend(unnamed(subject, finding)));
    if ranges.is_empty() {
        return Ok(());
    }
    let segments = sweep(&ranges);
    let guests: Vec<AtomicU64> = segments.iter().map(|_| AtomicU64::new(u64::MAX)).collect();
    let mut naming = Naming { subject, segments: &segments, guests: &guests };
    walk_l1(subject, &layout.l1, None, &mut naming)?.report(findings);
    findings.update(|finding| {
        if let Some(range) = unnamed(subject, finding) {
            let from = segments.partition_point(|segment| segment.range.end <= range.start);
            let inside = segments.iter().zip(&guests).skip(from);
            let first = inside
                .take_while(|(segment, _)| segment.range.start < range.end)
                .map(|(_, guest)| guest.load(Relaxed))
                .min();
            finding.guest = first.filter(|&guest| guest != u64::MAX).map(GuestOffset::new);
        }
    });
    Ok(())
}

/// The clusters of a finding that has no guest offset yet, but may get one.
fn unnamed(subject: &Subject<'_>, finding: &Finding) -> Option<Range<u64>> {
    let referred = matches!(
        finding.what,
        What::RefcountTooLow { .. }
            | What::RefcountTooHigh { references: 1.., .. }
            | What::RefcountOverflow { .. }
            | What::CopiedFlag { .. }
            | What::Overlap { .. }
    );
    let first = finding.host.get() >> subject.geometry.cluster_bits();
    (referred && finding.guest.is_none()).then(|| first..first.saturating_add(finding.clusters))
}

/// Finds the entries of the active tables that refer to certain clusters.
struct Naming<'a> {
    subject: &'a Subject<'a>,
    /// The clusters, sorted.
    segments: &'a [Segment],
    /// For each segment, the first guest offset that refers to it.
    guests: &'a [AtomicU64],
}

impl Naming<'_> {
    fn name(&self, clusters: Range<u64>, guest: Option<GuestOffset>) {
        let Some(guest) = guest else { return };
        let from = self.segments.partition_point(|segment| segment.range.end <= clusters.start);
        for (segment, first) in self.segments.iter().zip(self.guests).skip(from) {
            if segment.range.start >= clusters.end {
                break;
            }
            first.fetch_min(guest.get(), Relaxed);
        }
    }

    fn table(&self, table: &TableRef, bytes: &[u8]) {
        let geometry = self.subject.geometry;
        let step = geometry.l2_entry_size() as usize / 8;
        // The first word of an entry says where its cluster lies; the second does not matter here.
        for (index, first) in read_be_u64s(bytes).step_by(step).enumerate() {
            let (host, len) = match L2Entry::salvage(first, &geometry, false) {
                L2Entry::Standard { host, .. } => (host.get(), geometry.cluster_size()),
                L2Entry::Compressed { host, len } => (host.get(), len),
                _ => continue,
            };
            self.name(self.subject.clusters(host, len), table.guest(self.subject, index as u64));
        }
    }
}

impl Visitor for Naming<'_> {
    fn reference(&mut self, _: Range<u64>, _: Reference) {}

    fn batch(&mut self, tables: &[TableRef], gaps: &Gaps) -> Result<()> {
        let this = &*self;
        for_each_piece(self.subject, tables, |_, piece, buf| {
            for table in piece.iter().filter(|table| table.active > 0) {
                let host = table.host;
                this.name(this.subject.clusters(host, 1), table.guest(this.subject, 0));
            }
            if piece.iter().any(|table| table.active > 0) {
                read_piece(this.subject, piece, buf, gaps, |table, bytes| this.table(table, bytes));
            }
        })?;
        Ok(())
    }
}
