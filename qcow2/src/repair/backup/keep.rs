//! Writes the first part of a backup: the image's metadata as it is before the repair.

use std::io;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use super::record::{BackupWriter, PIECE, RecordKind};
use crate::check::CheckOptions;
use crate::check::counts::Reference;
use crate::check::finding::Findings;
use crate::check::gaps::Gaps;
use crate::check::layout::{Scope, lay_out};
use crate::check::subject::Subject;
use crate::check::tables::{TableRef, Visitor, walk_l1};
use crate::error::{Error, FileOp, Result};
use crate::format::RefcountTableEntry;
use crate::stamp::Stamp;
use crate::storage::{Host, Place, Storage};

/// Copies the metadata of the image in `file` to the new file `to`: cluster 0, the refcount table and blocks,
/// the L1 and L2 tables (those of snapshots too), the snapshot table, and the directory and tables of bitmaps.
/// The copy and the file's name are durable afterwards.
///
/// # Errors
/// A file `to` that exists; those of a check, and of reading and writing. An incomplete file is removed.
pub(super) fn keep(
    path: &Path,
    file: &dyn Storage,
    host: &dyn Host,
    to: &Path,
    options: &CheckOptions<'_>,
) -> Result<BackupWriter> {
    let subject = Subject::open(path, file, None, options.cancel)?;
    let image = Stamp::of(host, path, file)?;
    let place = Place::named(host, to).map_err(|e| Error::io(to, FileOp::Create, None, e))?;
    let out = place.create(host).map_err(|e| Error::io(to, FileOp::Create, None, e))?;
    let mut keeper =
        Keeper { subject: &subject, to, out: BackupWriter::new(to, Arc::clone(&out)), records: 0 };
    let durable = keeper.all(&image).and_then(|()| {
        // Whoever may read the image may read its former metadata.
        out.take_rights(&[file]);
        place.sync(host).map_err(|e| Error::barrier(place.folder().path(), e))
    });
    match durable {
        Ok(()) => Ok(keeper.out),
        Err(error) => {
            // The first error is the one that counts.
            let _ = place.unlink_file(host, &*out);
            Err(error)
        }
    }
}

struct Keeper<'a> {
    subject: &'a Subject<'a>,
    to: &'a Path,
    out: BackupWriter,
    records: u64,
}

impl Keeper<'_> {
    fn all(&mut self, image: &Stamp) -> Result<()> {
        let subject = self.subject;
        let geometry = subject.geometry;
        let failed = failed(self.to);
        let id = [image.id.device.to_be_bytes(), image.id.inode.to_be_bytes()].concat();
        let path = image.path.as_os_str().as_bytes();
        let is_device = u64::from(image.is_device);
        self.out.put(RecordKind::Image, subject.file_len, is_device, &[&id, path]).map_err(&failed)?;
        let (layout, gaps) = lay_out(subject, Scope::Everything, &Findings::new(0))?;
        gaps.none(subject.path)?;
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
        walk_l1(subject, &layout.l1, None, self)?.none(subject.path)?;
        self.out.put(RecordKind::Full, self.records, 0, &[]).map_err(&failed)?;
        self.out.sync().map_err(&failed)
    }

    /// Records the bytes of a range, as far as it lies in the file.
    fn bytes(&mut self, range: Range<u64>) -> Result<()> {
        let end = range.end.min(self.subject.file_len);
        let mut at = range.start;
        while at < end {
            self.subject.may_go_on()?;
            let mut content = vec![0; PIECE.min(end - at) as usize];
            let read = self.subject.file.read_exact_or_zero(&mut content, at);
            read.map_err(|e| Error::io(self.subject.path, FileOp::Read, Some(at), e))?;
            self.out.put(RecordKind::Kept, at, 0, &[&content]).map_err(failed(self.to))?;
            self.records += 1;
            at += content.len() as u64;
        }
        Ok(())
    }
}

fn failed(to: &Path) -> impl Fn(io::Error) -> Error {
    |e| Error::io(to, FileOp::Write, None, e)
}

impl Visitor for Keeper<'_> {
    fn reference(&mut self, _: Range<u64>, _: Reference) {}

    fn batch(&mut self, tables: &[TableRef], _: &Gaps) -> Result<()> {
        let size = self.subject.geometry.cluster_size();
        for run in tables.chunk_by(|a, b| a.host + size == b.host) {
            if let (Some(first), Some(last)) = (run.first(), run.last()) {
                self.bytes(first.host..last.host.saturating_add(size))?;
            }
        }
        Ok(())
    }
}
