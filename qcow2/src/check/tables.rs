//! Walks from L1 tables to L2 tables, and reads every L2 table once per batch of L1 entries, however often
//! these refer to it.
//!
//! L1 entries are gathered into batches and sorted by the offsets of their L2 tables; duplicates (tables shared
//! with snapshots, or a hostile image) are merged. So L2 tables are read in file order, in large pieces, by all
//! threads, and the length of the file bounds the work per batch. Only an L1 table with more than [`BATCH`]
//! entries can have a table read again.

use std::ops::Range;

use rayon::prelude::*;

use crate::error::Result;
use crate::format::{L1Entry, read_be_u64s};
use crate::units::GuestOffset;

use super::counts::{Reference, ReferenceKind};
use super::finding::{Finding, Findings, Structure, What};
use super::gaps::Gaps;
use super::subject::Subject;
use super::sweep::Segment;

/// L1 entries that are sorted together: 8 MiB of memory at most.
const BATCH: usize = 1 << 18;
/// Bytes of an L1 table that are read at once.
const L1_CHUNK: u64 = 1 << 18;
/// Bytes of L2 tables that one thread takes at once; at least one table.
const PIECE: u64 = 1 << 20;
/// Runs of tables of this length are worth a question to the file whether they are a hole.
const WORTH_ASKING: u64 = 1 << 18;

/// An L2 table, and who refers to it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TableRef {
    pub(crate) host: u64,
    /// How many L1 entries refer to it, those of snapshots included.
    pub(crate) times: u64,
    /// How many entries of the active L1 table do.
    pub(crate) active: u32,
    /// The lowest index among these entries.
    pub(crate) l1_index: u32,
}

impl TableRef {
    /// The guest offset of entry `index`, if the table belongs to the active disk.
    pub(crate) fn guest(&self, subject: &Subject<'_>, index: u64) -> Option<GuestOffset> {
        let g = subject.geometry;
        let table = u64::from(self.l1_index).checked_mul(g.l2_coverage())?;
        (self.active > 0).then(|| GuestOffset::new(table.saturating_add(index << g.cluster_bits())))
    }
}

/// The L1 tables of an image, cut so that each byte is read once.
#[derive(Debug)]
pub(crate) struct L1Tables {
    /// The active table.
    pub(crate) active: Range<u64>,
    /// Those of snapshots.
    pub(crate) snapshots: Vec<Segment>,
}

/// Receives what the walk finds.
pub(crate) trait Visitor: Sync {
    /// An L1 entry that refers to a table, which lies in the clusters `table`.
    fn reference(&mut self, table: Range<u64>, reference: Reference);

    /// A batch of distinct tables inside the file, in the order of their offsets. What cannot be read must be
    /// noted in `gaps`.
    fn batch(&mut self, tables: &[TableRef], gaps: &Gaps) -> Result<()>;
}

/// Walks all L1 tables, and reports damage to `findings`. Returns what could not be read.
pub(crate) fn walk_l1(
    subject: &Subject<'_>,
    tables: &L1Tables,
    findings: Option<&Findings>,
    visitor: &mut dyn Visitor,
) -> Result<Gaps> {
    let gaps = Gaps::default();
    let mut batch = Vec::with_capacity(BATCH);
    let active = Segment { range: tables.active.clone(), times: 1 };
    for (segment, is_active) in
        std::iter::once((&active, true)).chain(tables.snapshots.iter().map(|segment| (segment, false)))
    {
        let structure = if is_active { Structure::ActiveL1 } else { Structure::SnapshotL1 };
        let end = segment.range.end.min(subject.file_len);
        let mut at = segment.range.start;
        let mut index = 0u32;
        let mut buf = Vec::new();
        while at < end {
            subject.may_go_on()?;
            let len = L1_CHUNK.min(segment.range.end - at);
            buf.resize(len as usize, 0);
            if let Err(unread) = subject.read(structure, &mut buf, at) {
                // The entries are taken as zero, which may be wrong: the gap tells the caller so.
                gaps.note(unread);
                buf.fill(0);
            }
            for (raw, place) in read_be_u64s(&buf).zip((at..).step_by(8)) {
                let l1_index = index;
                index = index.saturating_add(1);
                if raw == 0 {
                    continue;
                }
                let table = TableRef {
                    host: 0,
                    times: segment.times,
                    active: u32::from(is_active),
                    l1_index: if is_active { l1_index } else { u32::MAX },
                };
                if let Some(host) = examine(subject, raw, place, table, findings, visitor) {
                    if batch.len() == BATCH {
                        flush(&mut batch, &gaps, visitor)?;
                    }
                    batch.push(TableRef { host, ..table });
                }
            }
            at += len;
        }
    }
    flush(&mut batch, &gaps, visitor)?;
    Ok(gaps)
}

/// Reports what is wrong with an L1 entry and counts its reference. Returns the offset of the table if it can
/// be read.
fn examine(
    subject: &Subject<'_>,
    raw: u64,
    place: u64,
    table: TableRef,
    findings: Option<&Findings>,
    visitor: &mut dyn Visitor,
) -> Option<u64> {
    let g = subject.geometry;
    let (host, copied) = match L1Entry::decode(raw, &g, place) {
        Ok(L1Entry::Unallocated) => return None,
        Ok(L1Entry::Table { host, copied }) => (host.get(), Some(copied)),
        Err(error) => {
            if let Some(findings) = findings {
                findings.add_blind(Finding::corruption(
                    What::Malformed(error),
                    place,
                    table.guest(subject, 0),
                ));
            }
            (L1Entry::salvage(raw)?.get(), None)
        }
    };
    let size = g.cluster_size();
    if subject.is_past_end(host, size) {
        if let Some(findings) = findings {
            let what = What::PastEnd { structure: Structure::L2Table, len: size, file_len: subject.file_len };
            findings.add_blind(Finding::corruption(what, host, table.guest(subject, 0)));
        }
        return None;
    }
    let copied = copied.filter(|_| table.active > 0);
    let reference = Reference { kind: ReferenceKind::L2Table, copied, times: table.times };
    visitor.reference(subject.clusters(host, size), reference);
    (host & (size - 1) == 0).then_some(host)
}

fn flush(batch: &mut Vec<TableRef>, gaps: &Gaps, visitor: &mut dyn Visitor) -> Result<()> {
    batch.sort_unstable_by_key(|table| (table.host, table.l1_index));
    batch.dedup_by(|next, kept| {
        let same = next.host == kept.host;
        if same {
            kept.times = kept.times.saturating_add(next.times);
            kept.active = kept.active.saturating_add(next.active);
        }
        same
    });
    let result = if batch.is_empty() { Ok(()) } else { visitor.batch(batch, gaps) };
    batch.clear();
    result
}

/// How many tables make up a piece.
pub(crate) fn tables_per_piece(subject: &Subject<'_>) -> usize {
    (PIECE / subject.geometry.cluster_size()).max(1) as usize
}

/// Calls `work` for every piece of a batch, on all threads; collects the answers in the order of the pieces.
/// Each thread has a buffer of its own.
pub(crate) fn for_each_piece<T: Send>(
    subject: &Subject<'_>,
    tables: &[TableRef],
    work: impl Fn(usize, &[TableRef], &mut Vec<u8>) -> T + Sync,
) -> Result<Vec<T>> {
    tables
        .par_chunks(tables_per_piece(subject))
        .enumerate()
        .map_init(Vec::new, |buf, (n, piece)| {
            subject.may_go_on()?;
            Ok(work(n, piece, buf))
        })
        .collect()
}

/// Calls `visit` with each table of a batch, on all threads. Tables that are known to be all zeros are skipped;
/// those that cannot be read are noted in `gaps`.
///
/// # Errors
/// The first error of `visit`; cancellation.
pub(crate) fn for_each_table(
    subject: &Subject<'_>,
    tables: &[TableRef],
    gaps: &Gaps,
    visit: impl Fn(&TableRef, &[u8]) -> Result<()> + Sync,
) -> Result<()> {
    let results = for_each_piece(subject, tables, |_, piece, buf| {
        let mut result = Ok(());
        read_piece(subject, piece, buf, gaps, |table, bytes| {
            if result.is_ok() {
                result = visit(table, bytes);
            }
        });
        result
    })?;
    results.into_iter().collect()
}

/// Reads the tables of a piece, neighbours with one read, and calls `visit` with each that is not known to be
/// all zeros. If neighbours cannot be read together, each is read by itself, so that one bad sector does not
/// hide the others; what still cannot be read is noted in `gaps`.
pub(crate) fn read_piece(
    subject: &Subject<'_>,
    piece: &[TableRef],
    buf: &mut Vec<u8>,
    gaps: &Gaps,
    mut visit: impl FnMut(&TableRef, &[u8]),
) {
    let size = subject.geometry.cluster_size();
    for run in piece.chunk_by(|a, b| a.host + size == b.host) {
        let Some(first) = run.first() else { continue };
        let len = size * run.len() as u64;
        if len >= WORTH_ASKING && is_hole(subject, first.host, len) {
            continue;
        }
        buf.resize(len as usize, 0);
        if subject.read(Structure::L2Table, buf, first.host).is_err() {
            buf.truncate(size as usize);
            for table in run {
                match subject.read(Structure::L2Table, buf, table.host) {
                    Ok(()) => visit(table, buf),
                    Err(unread) => gaps.note(unread),
                }
            }
            continue;
        }
        for (table, bytes) in run.iter().zip(buf.chunks_exact(size as usize)) {
            visit(table, bytes);
        }
    }
}

fn is_hole(subject: &Subject<'_>, offset: u64, len: u64) -> bool {
    match subject.file.next_data(offset) {
        Ok(Some(data)) => data.start >= offset.saturating_add(len),
        Ok(None) => true,
        Err(_) => false,
    }
}
