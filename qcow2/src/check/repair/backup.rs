//! A copy of an image's metadata, for the worst case.
//!
//! The file, all numbers big-endian: the 16 bytes `qmerge-metadata1`; the length of the image file (8);
//! then records, each of a host offset (8), a length in bytes (8), the CRC-32 of these 16 bytes and
//! the content (4), and the content; at the end a record with the offset 2^64 - 1 and the number
//! of the records before it instead of a length. To go back, write each content to its offset, and cut the
//! image file to its length. Tables that are shared or damaged may be there twice, with the same bytes.

use std::ops::Range;
use std::path::Path;

use crate::error::{Error, Result};
use crate::format::RefcountTableEntry;
use crate::storage::{Host, Storage};

use super::super::CheckOptions;
use super::super::counts::Reference;
use super::super::finding::Findings;
use super::super::layout::{Scope, lay_out};
use super::super::subject::Subject;
use super::super::tables::{TableRef, Visitor, walk_l1};

const MAGIC: &[u8; 16] = b"qmerge-metadata1";
/// The longest content of a record, in bytes.
const PIECE: u64 = 1 << 20;

/// Copies the metadata of the image in `file` to the new file `to`: the header's cluster, refcount table
/// and blocks, L1 and L2 tables, those of snapshots too, the snapshot table, and the directory and tables of
/// bitmaps. The file and its name are durable afterwards. Returns its length in bytes.
///
/// # Errors
/// A file `to` that exists; those of a check, and of reading and writing. An incomplete file is removed.
pub fn backup(
    path: &Path,
    file: &dyn Storage,
    host: &dyn Host,
    to: &Path,
    options: &CheckOptions<'_>,
) -> Result<u64> {
    let subject = Subject::open(path, file, None, options.cancel)?;
    let out = host.create_new(to).map_err(|e| Error::io(to, "create", None, e))?;
    let mut writer = Writer { subject: &subject, out: &*out, to, pending: Vec::new(), at: 0, records: 0 };
    let written = writer.all();
    let durable = written.and_then(|len| {
        out.sync().map_err(|e| Error::io(to, "sync", None, e))?;
        let folder = match to.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        host.sync_dir(folder).map_err(|e| Error::io(folder, "sync", None, e))?;
        Ok(len)
    });
    if durable.is_err() {
        // The first error is the one that counts.
        let _ = host.unlink(to);
    }
    durable
}

struct Writer<'a> {
    subject: &'a Subject<'a>,
    out: &'a dyn Storage,
    to: &'a Path,
    /// What is not yet written, and where it will be.
    pending: Vec<u8>,
    at: u64,
    records: u64,
}

impl Writer<'_> {
    fn all(&mut self) -> Result<u64> {
        let subject = self.subject;
        let geometry = subject.geometry;
        let layout = lay_out(subject, Scope::Everything, &Findings::new(0))?;
        self.pending.extend_from_slice(MAGIC);
        self.pending.extend_from_slice(&subject.file_len.to_be_bytes());
        let bits = geometry.cluster_bits();
        for segment in &layout.metadata {
            self.bytes(segment.range.start << bits..segment.range.end << bits)?;
        }
        for &raw in &layout.refcount_table {
            if let Ok(Some(block)) = RefcountTableEntry::decode(raw, &geometry, 0).map(|entry| entry.block())
            {
                self.bytes(block.get()..block.get().saturating_add(geometry.cluster_size()))?;
            }
        }
        walk_l1(subject, &layout.l1, None, self)?;
        let count = self.records;
        self.record(u64::MAX, count, &[]);
        self.flush()?;
        Ok(self.at)
    }

    /// Records for the bytes of a range, as far as it lies in the file.
    fn bytes(&mut self, range: Range<u64>) -> Result<()> {
        let end = range.end.min(self.subject.file_len);
        let mut at = range.start;
        while at < end {
            self.subject.may_go_on()?;
            let mut content = vec![0; PIECE.min(end - at) as usize];
            let read = self.subject.file.read_exact_or_zero(&mut content, at);
            // What cannot be read cannot be kept, and is not what will be written.
            if read.is_ok() {
                self.record(at, content.len() as u64, &content);
                self.records += 1;
            }
            at += content.len() as u64;
            if self.pending.len() as u64 >= PIECE {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn record(&mut self, offset: u64, len: u64, content: &[u8]) {
        let mut head = offset.to_be_bytes().to_vec();
        head.extend(len.to_be_bytes());
        let mut crc = crc32fast::Hasher::new();
        crc.update(&head);
        crc.update(content);
        self.pending.extend(head);
        self.pending.extend(crc.finalize().to_be_bytes());
        self.pending.extend_from_slice(content);
    }

    fn flush(&mut self) -> Result<()> {
        let written = self.out.write_all_at(&self.pending, self.at);
        written.map_err(|e| Error::io(self.to, "write", Some(self.at), e))?;
        self.at += self.pending.len() as u64;
        self.pending.clear();
        Ok(())
    }
}

impl Visitor for Writer<'_> {
    fn reference(&mut self, _: Range<u64>, _: Reference) {}

    fn batch(&mut self, tables: &[TableRef]) -> Result<()> {
        let size = self.subject.geometry.cluster_size();
        for run in tables.chunk_by(|a, b| a.host + size == b.host) {
            if let (Some(first), Some(last)) = (run.first(), run.last()) {
                self.bytes(first.host..last.host.saturating_add(size))?;
            }
        }
        Ok(())
    }
}
