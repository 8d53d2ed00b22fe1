//! Writes to the file under repair, with barriers between the writes.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use crate::error::{Error, FileOp, Result};
use crate::storage::Storage;

use crate::check::subject::Subject;

/// Writes to the file of an image.
#[derive(Debug)]
pub(super) struct ImageWriter<'a> {
    subject: &'a Subject<'a>,
    file: &'a dyn Storage,
    /// Whether anything was written behind the last barrier.
    is_dirty: AtomicBool,
}

impl<'a> ImageWriter<'a> {
    pub(super) fn of(subject: &'a Subject<'a>) -> Self {
        Self { subject, file: subject.file, is_dirty: AtomicBool::new(false) }
    }

    /// Writes bytes at a host offset.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.is_dirty.store(true, Relaxed);
        let written = self.file.write_live(bytes, offset);
        written.map_err(|e| Error::io(self.subject.path, FileOp::Write, Some(offset), e))
    }

    /// Makes all writes so far durable.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn barrier(&self) -> Result<()> {
        if self.is_dirty.swap(false, Relaxed) {
            self.file.sync().map_err(|e| Error::barrier(self.subject.path, e))?;
        }
        Ok(())
    }

    /// Punches holes into unused clusters, if the file system can. The refcounts that make them unused must be
    /// durable.
    pub(super) fn punch(&self, first: u64, clusters: u64) {
        let bits = self.subject.geometry.cluster_bits();
        let start = first << bits;
        let end = first.saturating_add(clusters).saturating_mul(1 << bits).min(self.subject.file_len);
        if start < end {
            // If that fails, the clusters are free in the image all the same; they only keep their blocks.
            let _ = self.file.punch_hole(start, end - start);
        }
    }
}
