//! Finds where an image's metadata lies, except for L2 tables and what they refer to.

use std::ops::Range;

use crate::error::{Error, FileOp, Result};
use crate::format::{Bitmap, FormatError, Snapshot, decode_bitmap_directory, read_be_u64s};

use super::finding::{Finding, Findings, Structure, What};
use super::gaps::Gaps;
use super::snapshots::{Entry, for_each_snapshot};
use super::subject::Subject;
use super::sweep::{Segment, sweep};
use super::tables::L1Tables;

/// Bytes of a table that are read at once.
const CHUNK: u64 = 1 << 20;

/// Where the metadata lies.
#[derive(Debug)]
pub(crate) struct Layout {
    pub(crate) scope: Scope,
    /// Host clusters that hold metadata which nothing else may share.
    pub(crate) metadata: Vec<Segment>,
    pub(crate) l1: L1Tables,
    /// The bytes of all bitmap tables.
    pub(crate) bitmap_tables: Vec<Segment>,
    /// The refcount table's entries as they stand on disk.
    pub(crate) refcount_table: Vec<u64>,
}

/// Which structures are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// All.
    Everything,
    /// All but the refcount table and its blocks: what remains in use when those are rebuilt.
    WithoutRefcounts,
}

/// Finds the metadata of an image and reports damage to it. Returns what could not be read as well.
///
/// # Errors
/// Cancellation; a refcount table that cannot be read.
pub(crate) fn lay_out(subject: &Subject<'_>, scope: Scope, findings: &Findings) -> Result<(Layout, Gaps)> {
    let header = &subject.header;
    let mut survey = LayoutSurvey { subject, findings, gaps: Gaps::default(), metadata: Vec::new() };
    survey.claim(Structure::Header, 0, subject.geometry.cluster_size());
    let active = header.l1_offset.get()..header.l1_offset.get().saturating_add(header.l1_bytes());
    survey.claim(Structure::ActiveL1, active.start, header.l1_bytes());
    if scope == Scope::Everything {
        let table_bytes = header.refcount_table_bytes();
        survey.claim(Structure::RefcountTable, header.refcount_table_offset.get(), table_bytes);
    }
    if let Some((host, len)) = subject.encryption {
        survey.claim(Structure::EncryptionHeader, host.get(), len);
    }
    let snapshots = survey.snapshots()?;
    let bitmap_tables = survey.bitmaps()?;
    let refcount_table = survey.refcount_table()?;
    let metadata = sweep(&survey.metadata);
    let layout = Layout {
        scope,
        metadata,
        l1: L1Tables { active, snapshots: sweep(&snapshots) },
        bitmap_tables: sweep(&bitmap_tables),
        refcount_table,
    };
    Ok((layout, survey.gaps))
}

struct LayoutSurvey<'a> {
    subject: &'a Subject<'a>,
    findings: &'a Findings,
    gaps: Gaps,
    metadata: Vec<Range<u64>>,
}

impl LayoutSurvey<'_> {
    /// Notes that a structure takes `len` bytes.
    fn claim(&mut self, structure: Structure, host: u64, len: u64) {
        if len == 0 {
            return;
        }
        if self.subject.is_past_end(host, len) {
            let what = What::PastEnd { structure, len, file_len: self.subject.file_len };
            self.findings.add_blind(Finding::corruption(what, host, None));
        } else {
            self.metadata.push(self.subject.clusters(host, len));
        }
    }

    /// Reads the snapshot table; returns the byte ranges of the snapshots' L1 tables.
    fn snapshots(&mut self) -> Result<Vec<Range<u64>>> {
        let subject = self.subject;
        let start = subject.header.snapshots_offset.get();
        let mut tables = Vec::new();
        let len = for_each_snapshot(subject, |entry| {
            match entry {
                Entry::Known { snapshot, wrong } => tables.extend(self.snapshot(&snapshot, wrong)),
                Entry::Broken { at, error } => {
                    self.findings.add_blind(Finding::corruption(What::Malformed(error), at, None));
                }
                Entry::TooLong(len) => {
                    let structure = Structure::SnapshotTable;
                    let what = What::PastEnd { structure, len, file_len: subject.file_len };
                    self.findings.add_blind(Finding::corruption(what, start, None));
                }
                Entry::Unread(unread) => self.gaps.note(unread),
            }
            Ok(())
        })?;
        self.claim(Structure::SnapshotTable, start, len);
        Ok(tables)
    }

    /// Reports what is wrong with an entry of the snapshot table; returns the byte range of its L1 table.
    fn snapshot(&mut self, snapshot: &Snapshot, wrong: Option<FormatError>) -> Option<Range<u64>> {
        let host = snapshot.l1_offset;
        let usable = host.is_aligned(self.subject.geometry.cluster_size())
            && snapshot.l1_bytes() <= crate::format::MAX_L1_BYTES
            && (host.get() != 0 || snapshot.l1_entries == 0);
        let wrong = wrong.into_iter().chain(snapshot.validate(&self.subject.header).err());
        for error in wrong {
            let finding = Finding::corruption(What::Malformed(error), snapshot.offset, None);
            // If the L1 table is known all the same, no reference is hidden.
            if usable { self.findings.add(finding) } else { self.findings.add_blind(finding) }
        }
        if !usable {
            return None;
        }
        self.claim(Structure::SnapshotL1, host.get(), snapshot.l1_bytes());
        Some(host.get()..host.get().saturating_add(snapshot.l1_bytes()))
    }

    /// Reads the bitmap directory; returns the byte ranges of the bitmaps' tables.
    fn bitmaps(&mut self) -> Result<Vec<Range<u64>>> {
        let Some(extension) = self.subject.bitmaps else {
            return Ok(Vec::new());
        };
        let (start, len) = (extension.directory_offset.get(), extension.directory_size);
        self.claim(Structure::BitmapDirectory, start, len);
        if start.saturating_add(len)
            > self.subject.file_len.saturating_add(self.subject.geometry.cluster_size())
        {
            return Ok(Vec::new());
        }
        let mut bytes = vec![0; len as usize];
        if let Err(unread) = self.subject.read(Structure::BitmapDirectory, &mut bytes, start) {
            self.gaps.note(unread);
            return Ok(Vec::new());
        }
        let bitmaps = decode_bitmap_directory(&bytes, &extension).unwrap_or_else(|error| {
            self.findings.add_blind(Finding::corruption(What::Malformed(error), start, None));
            Vec::new()
        });
        Ok(bitmaps.iter().filter_map(|bitmap| self.bitmap_table(bitmap)).collect())
    }

    fn bitmap_table(&mut self, bitmap: &Bitmap) -> Option<Range<u64>> {
        if let Err(error) = bitmap.validate(&self.subject.geometry, self.subject.header.virtual_size()) {
            self.findings.add_blind(Finding::corruption(What::Malformed(error), bitmap.offset, None));
            return None;
        }
        let (host, len) = (bitmap.table_offset.get(), bitmap.table_bytes());
        self.claim(Structure::BitmapTable, host, len);
        Some(host..host.saturating_add(len))
    }

    /// Reads the refcount table. The check cannot go on without it, so a read error here ends the check.
    fn refcount_table(&self) -> Result<Vec<u64>> {
        let header = &self.subject.header;
        let start = header.refcount_table_offset.get();
        let end = start.saturating_add(header.refcount_table_bytes()).min(self.subject.file_len);
        let mut bytes = vec![0; end.saturating_sub(start) as usize];
        let read = self.subject.read(Structure::RefcountTable, &mut bytes, start);
        read.map_err(|unread| Error::io(self.subject.path, FileOp::Read, Some(start), unread.source))?;
        Ok(read_be_u64s(&bytes).collect())
    }
}

/// Reads a table of 64-bit entries piece by piece, and calls `visit` with each entry's offset and value.
/// Entries that cannot be read are noted in `gaps` and taken as zero.
///
/// # Errors
/// Cancellation.
pub(crate) fn for_each_word(
    subject: &Subject<'_>,
    structure: Structure,
    bytes: Range<u64>,
    gaps: &Gaps,
    mut visit: impl FnMut(u64, u64),
) -> Result<()> {
    let mut buf = Vec::new();
    let mut at = bytes.start;
    let end = bytes.end.min(subject.file_len);
    while at < end {
        subject.may_go_on()?;
        let len = CHUNK.min(bytes.end - at);
        buf.resize(len as usize, 0);
        if let Err(unread) = subject.read(structure, &mut buf, at) {
            gaps.note(unread);
            buf.fill(0);
        }
        for (n, raw) in read_be_u64s(&buf).enumerate() {
            visit(at + n as u64 * 8, raw);
        }
        at += len;
    }
    Ok(())
}
