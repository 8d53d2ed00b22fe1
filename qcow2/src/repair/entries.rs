//! Mends L2 entries whose meaning is known although their host offset is wrong: zero clusters that are
//! preallocated at an unaligned offset. The offset is dropped, as QEMU does (iotest 060, "unaligned
//! pre-allocated zero cluster").
//!
//! Each change is one word of one entry, and does not change what the guest reads.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::error::Result;
use crate::format::{L2Entry, read_be_u64s};

use super::disk::ImageWriter;
use super::survey::Survey;
use crate::check::counts::Reference;
use crate::check::gaps::Gaps;
use crate::check::tables::{TableRef, Visitor, for_each_table, walk_l1};

/// Drops the offsets durably, in the tables of snapshots too; returns how many.
///
/// # Errors
/// A table that cannot be read; those of writing.
pub(super) fn drop_stray_hosts(survey: &Survey<'_>, disk: &ImageWriter<'_>) -> Result<u64> {
    let mut fixer = EntryFixer { survey, disk, dropped: AtomicU64::new(0) };
    walk_l1(survey.subject, &survey.layout.l1, None, &mut fixer)?.none(survey.subject.path)?;
    disk.barrier()?;
    Ok(fixer.dropped.into_inner())
}

struct EntryFixer<'a> {
    survey: &'a Survey<'a>,
    disk: &'a ImageWriter<'a>,
    dropped: AtomicU64,
}

impl EntryFixer<'_> {
    fn table(&self, table: &TableRef, bytes: &[u8]) -> Result<()> {
        let subject = self.survey.subject;
        if !self.survey.may_write(table.host, bytes.len() as u64) {
            return Ok(());
        }
        let step = subject.geometry.l2_entry_size();
        let mut words = read_be_u64s(bytes);
        let mut at = table.host;
        while let Some(first) = words.next() {
            let second = if step == 16 { words.next().unwrap_or(0) } else { 0 };
            if let Some(new) =
                L2Entry::without_stray_host(first, second, &subject.geometry, subject.header.version)
            {
                self.disk.write(at, &new.to_be_bytes())?;
                self.dropped.fetch_add(1, Relaxed);
            }
            at += step;
        }
        Ok(())
    }
}

impl Visitor for EntryFixer<'_> {
    fn reference(&mut self, _: Range<u64>, _: Reference) {}

    fn batch(&mut self, tables: &[TableRef], gaps: &Gaps) -> Result<()> {
        for_each_table(self.survey.subject, tables, gaps, |table, bytes| self.table(table, bytes))
    }
}
