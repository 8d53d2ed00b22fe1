//! The passes of a check. Each counts the references to one window of host clusters, compares them with the
//! refcounts, and moves the window on.

use std::ops::Range;

use crate::error::{Error, Refusal, Result};
use crate::format::{BitmapTableEntry, RefcountTableEntry};
use crate::units::HostOffset;

use super::compare::compare;
use super::counts::{Counts, Reference, ReferenceKind, Width};
use super::finding::{Finding, Findings, Structure, What};
use super::gaps::{Counted, Gaps};
use super::layout::{Layout, Scope, for_each_word, lay_out};
use super::naming::name_guests;
use super::scan::{ClusterTotals, Scanner};
use super::subject::Subject;
use super::tables::{TableRef, Visitor, for_each_piece, read_piece, tables_per_piece, walk_l1};

/// Words of slots in a window: 40 MiB, enough for 1 TiB of clusters of 64 KiB in one pass.
pub(crate) const WINDOW_WORDS: u64 = 5 << 20;
/// For how many pieces of L2 tables the next window that they refer to is remembered.
const REMEMBERED: usize = 1 << 20;

const METADATA: Reference = Reference { kind: ReferenceKind::Other, copied: None, times: 1 };

/// What the passes found.
#[derive(Debug)]
pub(crate) struct Census {
    pub(crate) findings: Findings,
    pub(crate) totals: ClusterTotals,
    /// How many clusters lie before the end of the last one in use.
    pub(crate) clusters_in_use: u64,
}

/// Checks the whole image with slots of the given width, `window_words` words of them at a time. `None` if the
/// slots are too narrow for the image. `limit` findings of each severity are kept.
pub(crate) fn take(
    subject: &Subject<'_>,
    width: Width,
    window_words: u64,
    limit: usize,
) -> Result<Option<Census>> {
    let findings = Findings::new(limit);
    let totals = ClusterTotals::default();
    let (layout, gaps) = lay_out(subject, Scope::Everything, &findings)?;
    gaps.report(&findings);
    let mut clusters_in_use = 0;
    let fits = count(subject, &layout, width, window_words, Some((&findings, &totals)), &mut |counted| {
        let counts = counted.noted(&findings);
        clusters_in_use = clusters_in_use.max(compare(subject, &layout, counts, &findings)?);
        Ok(())
    })?;
    if !fits {
        return Ok(None);
    }
    name_guests(subject, &layout, &findings)?;
    Ok(Some(Census { findings, totals, clusters_in_use }))
}

/// Counts all references, one window of host clusters after the other, and calls `visit` with each window that
/// something refers to or that has refcounts. Damage is reported to `first` by the first pass, which reads all
/// tables. `visit` also gets what its pass could not read. False if the slots are too narrow; the windows that
/// were visited until then are right.
pub(crate) fn count(
    subject: &Subject<'_>,
    layout: &Layout,
    width: Width,
    window_words: u64,
    first: Option<(&Findings, &ClusterTotals)>,
    visit: &mut dyn FnMut(Counted<'_>) -> Result<()>,
) -> Result<bool> {
    let slots = (subject.file_clusters() + 1).min(window_words.saturating_mul(width.lanes()));
    let mut counts = Counts::new(slots, width)
        .ok_or_else(|| Error::refused(subject.path, Refusal::NoMemory { counters: slots }))?;
    let mut memory = Memory::default();
    let mut window = 0;
    let mut is_first = true;
    loop {
        let (next, gaps) = {
            let scanner = Scanner { subject, counts: &counts, first: first.filter(|_| is_first) };
            let mut pass =
                Pass { scanner: &scanner, memory: &mut memory, is_first, window, piece: 0, next: u64::MAX };
            let gaps = pass.run(layout)?;
            (pass.next, gaps)
        };
        if counts.is_saturated() {
            return Ok(false);
        }
        visit(Counted::new(subject.path, &counts, gaps))?;
        is_first = false;
        // A window without references still has to be compared if it has refcounts: those would be leaks. All
        // other windows are skipped.
        window = next.min(next_block(subject, layout, window, slots));
        if window == u64::MAX {
            return Ok(true);
        }
        counts.restart_at(window.saturating_mul(slots));
    }
}

/// The first window behind `window` for whose clusters the refcount table names a block.
fn next_block(subject: &Subject<'_>, layout: &Layout, window: u64, slots: u64) -> u64 {
    let per_block = subject.geometry.refcounts_per_block();
    let start = (window + 1).saturating_mul(slots);
    let skip = usize::try_from(start / per_block).unwrap_or(usize::MAX);
    let block = layout.refcount_table.iter().skip(skip).position(|&raw| raw != 0);
    let Some(block) = block else { return u64::MAX };
    let cluster = (skip as u64 + block as u64).saturating_mul(per_block).max(start);
    if cluster < subject.file_clusters() { cluster / slots } else { u64::MAX }
}

/// For every piece of L2 tables, the next window that it refers to. A later pass reads a piece only if it
/// refers to the pass's window.
#[derive(Debug, Default)]
struct Memory {
    due: Vec<u64>,
}

struct Pass<'a> {
    scanner: &'a Scanner<'a>,
    memory: &'a mut Memory,
    /// Whether this is the first pass, so that nothing is remembered yet.
    is_first: bool,
    window: u64,
    /// The number of the first piece in the next batch. Pieces have the same numbers in every pass.
    piece: usize,
    /// The first later window that something refers to.
    next: u64,
}

impl Pass<'_> {
    fn run(&mut self, layout: &Layout) -> Result<Gaps> {
        let gaps = Gaps::default();
        let subject = self.scanner.subject;
        for segment in &layout.metadata {
            self.count(segment.range.clone(), Reference { times: segment.times, ..METADATA });
        }
        if layout.scope == Scope::Everything {
            self.refcount_blocks(layout);
        }
        for segment in &layout.bitmap_tables {
            self.bitmap_table(segment.range.clone(), segment.times, &gaps)?;
        }
        let findings = self.scanner.first.map(|(findings, _)| findings);
        gaps.join(walk_l1(subject, &layout.l1, findings, self)?);
        Ok(gaps)
    }

    fn count(&mut self, clusters: Range<u64>, reference: Reference) {
        self.next = self.next.min(self.scanner.count(clusters, reference));
    }

    /// Counts a cluster of metadata that `times` entries name.
    fn metadata_cluster(&mut self, structure: Structure, host: HostOffset, times: u64) {
        let subject = self.scanner.subject;
        let len = subject.geometry.cluster_size();
        if subject.is_past_end(host.get(), len) {
            self.report(What::PastEnd { structure, len, file_len: subject.file_len }, host.get());
        } else {
            self.count(subject.clusters(host.get(), len), Reference { times, ..METADATA });
        }
    }

    fn report(&self, what: What, host: u64) {
        if let Some((findings, _)) = self.scanner.first {
            findings.add_blind(Finding::corruption(what, host, None));
        }
    }

    fn refcount_blocks(&mut self, layout: &Layout) {
        let subject = self.scanner.subject;
        let table = subject.header.refcount_table_offset.get();
        for (n, &raw) in layout.refcount_table.iter().enumerate() {
            if raw == 0 {
                continue;
            }
            let place = table.saturating_add(n as u64 * 8);
            match RefcountTableEntry::decode(raw, &subject.geometry, place) {
                Ok(entry) => {
                    if let Some(host) = entry.block() {
                        self.metadata_cluster(Structure::RefcountBlock, host, 1);
                    }
                }
                Err(error) => self.report(What::Malformed(error), place),
            }
        }
    }

    fn bitmap_table(&mut self, bytes: Range<u64>, times: u64, gaps: &Gaps) -> Result<()> {
        let subject = self.scanner.subject;
        for_each_word(subject, Structure::BitmapTable, bytes, gaps, |place, raw| {
            match BitmapTableEntry::decode(raw, &subject.geometry, place) {
                Ok(BitmapTableEntry::AllZero | BitmapTableEntry::AllOne) => {}
                Ok(BitmapTableEntry::Data(host)) => {
                    self.metadata_cluster(Structure::BitmapData, host, times);
                }
                Err(error) => self.report(What::Malformed(error), place),
            }
        })
    }
}

impl Visitor for Pass<'_> {
    fn reference(&mut self, table: Range<u64>, reference: Reference) {
        self.count(table, reference);
    }

    fn batch(&mut self, tables: &[TableRef], gaps: &Gaps) -> Result<()> {
        let subject = self.scanner.subject;
        let first_piece = self.piece;
        let due = &self.memory.due;
        let first_pass = self.is_first;
        let nexts = for_each_piece(subject, tables, |n, piece, buf| {
            let known = due.get(first_piece + n).copied();
            // The piece refers to nothing in this window: its answer stays as it is.
            if let Some(due) = known.filter(|&due| !first_pass && due > self.window) {
                return due;
            }
            let mut next = u64::MAX;
            read_piece(subject, piece, buf, gaps, |table, bytes| {
                next = next.min(self.scanner.scan(table, bytes));
            });
            next
        })?;
        self.piece += tables.len().div_ceil(tables_per_piece(subject));
        for (n, next) in nexts.into_iter().enumerate() {
            self.next = self.next.min(next);
            let place = first_piece + n;
            if let Some(due) = self.memory.due.get_mut(place) {
                *due = next;
            } else if first_pass && place < REMEMBERED {
                self.memory.due.push(next);
            }
        }
        Ok(())
    }
}
