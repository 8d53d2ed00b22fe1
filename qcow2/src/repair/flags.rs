//! Corrects COPIED flags that do not agree with the refcounts: the flag says that the refcount is one.
//!
//! The refcounts are right when this begins. Each flag is one bit of one entry, independent of the others; so
//! any of the writes may be missing after a power cut.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::error::Result;
use crate::format::{L1Entry, L2Entry, RefcountWidth, read_be_u64s};

use super::disk::ImageWriter;
use super::survey::{Survey, for_each_block, for_each_slot, for_each_window};
use crate::check::counts::{Counts, Reference};
use crate::check::finding::Structure;
use crate::check::gaps::Gaps;
use crate::check::subject::Subject;
use crate::check::tables::{TableRef, Visitor, for_each_table, walk_l1};

const COPIED: u64 = 1 << 63;

/// Which flags are corrected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Which {
    /// All that are wrong.
    All,
    /// Only flags that are missing.
    Missing,
}

/// Corrects the flags of the active tables durably; returns how many entries changed. Missing flags are set
/// only if all references are known.
///
/// # Errors
/// Those of a check; a table that cannot be read; those of writing.
pub(super) fn correct(survey: &Survey<'_>, disk: &ImageWriter<'_>, which: Which) -> Result<u64> {
    let mut changed = 0;
    // Clusters of a data file have no refcounts, so one walk through the entries is enough for them.
    let mut data_file = survey.subject.header.has_data_file() && which == Which::All;
    for_each_window(survey.subject, &survey.layout, None, &mut |counts| {
        let wanted = WantedFlags::of(survey, counts, which)?;
        if wanted.any || data_file {
            changed += fix(survey, disk, &wanted, data_file)?;
            data_file = false;
        }
        Ok(())
    })?;
    disk.barrier()?;
    Ok(changed)
}

/// The clusters of a window with a wrong flag somewhere, one bit each: whether it must be set or cleared.
struct WantedFlags {
    window: Range<u64>,
    set: Vec<u64>,
    clear: Vec<u64>,
    any: bool,
}

impl WantedFlags {
    fn of(survey: &Survey<'_>, counts: &Counts, which: Which) -> Result<Self> {
        let subject = survey.subject;
        let width = RefcountWidth::of(&subject.geometry);
        let window = counts.window();
        let words = ((window.end - window.start) / 64 + 1) as usize;
        let mut wanted = Self { window, set: vec![0; words], clear: vec![0; words], any: false };
        let mut buf = Vec::new();
        for_each_block(subject, counts, |block, clusters| {
            if !survey.read_block(block, &mut buf)? {
                return Ok(());
            }
            let start = clusters.start;
            for_each_slot(counts, clusters, |cluster, slot| {
                let stored = width.get(&buf, (cluster - start) as usize).unwrap_or(0);
                if slot.copied && stored > 1 && which == Which::All {
                    wanted.note(cluster, false);
                } else if slot.not_copied && stored == 1 && slot.count == 1 && survey.complete {
                    wanted.note(cluster, true);
                }
            });
            Ok(())
        })?;
        Ok(wanted)
    }

    fn note(&mut self, cluster: u64, flag: bool) {
        let bit = cluster - self.window.start;
        let words = if flag { &mut self.set } else { &mut self.clear };
        if let Some(word) = words.get_mut((bit / 64) as usize) {
            *word |= 1 << (bit % 64);
            self.any = true;
        }
    }

    /// What the flag of an entry for this host offset should be; `None` if it may stay.
    fn flag(&self, host: u64, subject: &Subject<'_>) -> Option<bool> {
        let cluster = host >> subject.geometry.cluster_bits();
        if !self.window.contains(&cluster) {
            return None;
        }
        let bit = cluster - self.window.start;
        let has = |words: &[u64]| words.get((bit / 64) as usize).is_some_and(|w| w >> (bit % 64) & 1 == 1);
        if has(&self.set) { Some(true) } else { has(&self.clear).then_some(false) }
    }
}

fn fix(survey: &Survey<'_>, disk: &ImageWriter<'_>, wanted: &WantedFlags, data_file: bool) -> Result<u64> {
    let mut fixer = FlagFixer { survey, disk, wanted, data_file, changed: AtomicU64::new(0) };
    fixer.l1()?;
    walk_l1(survey.subject, &survey.layout.l1, None, &mut fixer)?.none(survey.subject.path)?;
    Ok(fixer.changed.load(Relaxed))
}

struct FlagFixer<'a> {
    survey: &'a Survey<'a>,
    disk: &'a ImageWriter<'a>,
    wanted: &'a WantedFlags,
    data_file: bool,
    changed: AtomicU64,
}

/// The first word of an entry with the wanted flag; `None` if it has that already.
fn with_flag(raw: u64, wanted: Option<bool>) -> Option<u64> {
    let new = if wanted? { raw | COPIED } else { raw & !COPIED };
    (new != raw).then_some(new)
}

impl FlagFixer<'_> {
    fn l1(&self) -> Result<()> {
        let subject = self.survey.subject;
        let table = self.survey.layout.l1.active.clone();
        let len = table.end - table.start;
        if subject.is_past_end(table.start, len) || !self.survey.may_write(table.start, len) {
            return Ok(());
        }
        let mut bytes = vec![0; len as usize];
        let read = subject.read(Structure::ActiveL1, &mut bytes, table.start);
        read.map_err(|unread| unread.error(subject.path))?;
        let mut changes = Vec::new();
        for (raw, at) in read_be_u64s(&bytes).zip((0..).step_by(8)) {
            let place = table.start + at as u64;
            let Ok(L1Entry::Table { host, .. }) = L1Entry::decode(raw, &subject.geometry, place) else {
                continue;
            };
            if let Some(new) = with_flag(raw, self.wanted.flag(host.get(), subject)) {
                changes.push((at, new));
            }
        }
        self.write(table.start, &bytes, &changes)
    }

    /// Corrects the entries of one table with one write.
    fn table(&self, table: &TableRef, bytes: &[u8]) -> Result<()> {
        let subject = self.survey.subject;
        if table.active == 0 || !self.survey.may_write(table.host, bytes.len() as u64) {
            return Ok(());
        }
        let mut changes: Vec<(usize, u64)> = Vec::new();
        let mut words = read_be_u64s(bytes);
        let size = subject.geometry.l2_entry_size() as usize;
        let mut at = 0;
        while let Some(first) = words.next() {
            let second = if size == 16 { words.next().unwrap_or(0) } else { 0 };
            if first != 0
                && let Some(new) = with_flag(first, self.entry(first, second, table.host + at as u64))
            {
                changes.push((at, new));
            }
            at += size;
        }
        self.write(table.host, bytes, &changes)
    }

    /// Changes words of the table at a host offset with one write; `changes` are offsets in the table and new
    /// words.
    fn write(&self, host: u64, table: &[u8], changes: &[(usize, u64)]) -> Result<()> {
        let (Some((first, _)), Some((last, _))) = (changes.first(), changes.last()) else { return Ok(()) };
        let start = *first;
        let mut new = table.get(start..last + 8).unwrap_or_default().to_vec();
        for (at, word) in changes {
            if let Some(place) = new.get_mut(at - start..at - start + 8) {
                place.copy_from_slice(&word.to_be_bytes());
            }
        }
        self.changed.fetch_add(changes.len() as u64, Relaxed);
        self.disk.write(host + start as u64, &new)
    }

    /// What the flag of an L2 entry should be; `None` if it may stay, or if the entry is damaged.
    fn entry(&self, first: u64, second: u64, place: u64) -> Option<bool> {
        let subject = self.survey.subject;
        let (version, in_data_file) = (subject.header.version, subject.header.has_data_file());
        let entry = L2Entry::decode(first, second, &subject.geometry, version, in_data_file, place).ok()?;
        let (L2Entry::Standard { host, .. }
        | L2Entry::Zero { host: Some(host), .. }
        | L2Entry::Mixed { host: Some(host), .. }) = entry
        else {
            return None;
        };
        if in_data_file { self.data_file.then_some(true) } else { self.wanted.flag(host.get(), subject) }
    }
}

impl Visitor for FlagFixer<'_> {
    fn reference(&mut self, _: Range<u64>, _: Reference) {}

    fn batch(&mut self, tables: &[TableRef], gaps: &Gaps) -> Result<()> {
        for_each_table(self.survey.subject, tables, gaps, |table, bytes| self.table(table, bytes))
    }
}
