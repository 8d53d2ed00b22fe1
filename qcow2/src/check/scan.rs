//! Counts what the entries of L2 tables refer to.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::format::{FormatError, L2Entry, read_be_u64s};
use crate::units::GuestOffset;

use super::counts::{Counts, Reference, ReferenceKind};
use super::finding::{Finding, Findings, Structure, What};
use super::subject::Subject;
use super::tables::TableRef;

/// Clusters of the active disk, as `qemu-img check` counts them.
#[derive(Debug, Default)]
pub(crate) struct ClusterTotals {
    pub(crate) allocated: AtomicU64,
    pub(crate) fragmented: AtomicU64,
    pub(crate) compressed: AtomicU64,
}

/// Counts the references of L2 tables in a window of host clusters.
#[derive(Debug)]
pub(crate) struct Scanner<'a> {
    pub(crate) subject: &'a Subject<'a>,
    pub(crate) counts: &'a Counts,
    /// Where findings and totals go; `None` after the first pass, so that nothing is reported twice.
    pub(crate) first: Option<(&'a Findings, &'a ClusterTotals)>,
}

/// The progress through one table.
struct Cursor<'a> {
    table: &'a TableRef,
    next_window: u64,
    /// Where the next cluster would lie if the disk were contiguous; zero before the first.
    contiguous: u64,
    allocated: u64,
    fragmented: u64,
    compressed: u64,
}

impl Scanner<'_> {
    /// Counts a reference to a range of clusters. If the range goes on behind the window, the number of
    /// the first window behind it that it touches is returned, otherwise [`u64::MAX`].
    pub(crate) fn count(&self, clusters: std::ops::Range<u64>, reference: Reference) -> u64 {
        let window = self.counts.window();
        let slots = (window.end - window.start).max(1);
        let behind = clusters.start.max(window.end);
        let next = if behind < clusters.end { behind / slots } else { u64::MAX };
        self.counts.add(clusters, reference);
        next
    }

    /// Goes through one table; returns the first later window that it refers to.
    pub(crate) fn scan(&self, table: &TableRef, bytes: &[u8]) -> u64 {
        let mut cursor = Cursor {
            table,
            next_window: u64::MAX,
            contiguous: 0,
            allocated: 0,
            fragmented: 0,
            compressed: 0,
        };
        if self.subject.geometry.extended_l2() {
            self.scan_extended(&mut cursor, bytes);
        } else {
            self.scan_standard(&mut cursor, bytes);
        }
        if let Some((_, totals)) = self.first {
            let times = u64::from(table.active);
            for (total, n) in [
                (&totals.allocated, cursor.allocated),
                (&totals.fragmented, cursor.fragmented),
                (&totals.compressed, cursor.compressed),
            ] {
                if n > 0 {
                    total.fetch_add(n.saturating_mul(times), Relaxed);
                }
            }
        }
        cursor.next_window
    }

    fn scan_standard(&self, cursor: &mut Cursor<'_>, bytes: &[u8]) {
        let geometry = self.subject.geometry;
        let size = geometry.cluster_size();
        let data_file = self.subject.header.has_data_file();
        let mut words = read_be_u64s(bytes);
        let mut next = words.next();
        let mut index = 0;
        while let Some(raw) = next {
            // Contiguous clusters with equal flags are the most common case, and unallocated entries the next:
            // a run of either is handled as a whole.
            let run = L2Entry::plain(raw, &geometry).filter(|_| !data_file);
            let step = if run.is_some() { size } else { 0 };
            let repeats = run.is_some() || raw == 0;
            let mut len = 1;
            let mut expected = raw.wrapping_add(step);
            next = words.next();
            while repeats && next == Some(expected) {
                len += 1;
                expected = expected.wrapping_add(step);
                next = words.next();
            }
            match run {
                Some((host, copied)) if self.is_inside(host.get(), len) => {
                    self.run(cursor, host.get(), len, copied);
                }
                _ if raw == 0 => {}
                _ => {
                    for n in 0..len {
                        self.entry(cursor, index + n, raw.wrapping_add(n * step), 0);
                    }
                }
            }
            index += len;
        }
    }

    fn scan_extended(&self, cursor: &mut Cursor<'_>, bytes: &[u8]) {
        let mut words = read_be_u64s(bytes);
        let mut index = 0;
        while let (Some(first), Some(second)) = (words.next(), words.next()) {
            if first != 0 || second != 0 {
                self.entry(cursor, index, first, second);
            }
            index += 1;
        }
    }

    /// Whether `len` clusters lie inside the file, at offsets that an entry can hold.
    fn is_inside(&self, host: u64, len: u64) -> bool {
        let end = host.saturating_add(len << self.subject.geometry.cluster_bits());
        end <= 1 << 56 && !self.subject.is_past_end(host, end - host)
    }

    /// Counts `len` contiguous data clusters inside the file.
    fn run(&self, cursor: &mut Cursor<'_>, host: u64, len: u64, copied: bool) {
        let bits = self.subject.geometry.cluster_bits();
        let first = host >> bits;
        let reference = Reference {
            kind: ReferenceKind::Data,
            copied: (cursor.table.active > 0).then_some(copied),
            times: cursor.table.times,
        };
        cursor.note(host, len, bits);
        cursor.next_window = cursor.next_window.min(self.count(first..first + len, reference));
    }

    /// Handles any entry: reports what is wrong with it, and counts its reference if that can be made out.
    fn entry(&self, cursor: &mut Cursor<'_>, index: u64, first: u64, second: u64) {
        let geometry = self.subject.geometry;
        let header = &self.subject.header;
        let data_file = header.has_data_file();
        let place = cursor.table.host + index * geometry.l2_entry_size();
        let guest = cursor.table.guest(self.subject, index);
        let decoded = L2Entry::decode(first, second, &geometry, header.version, data_file, place);
        let entry = decoded.unwrap_or_else(|error| {
            self.report(What::Malformed(error), place, guest);
            L2Entry::salvage(first, &geometry, data_file)
        });
        let (host, copied) = match entry {
            L2Entry::Unallocated | L2Entry::Zero { host: None, .. } | L2Entry::Mixed { host: None, .. } => {
                return;
            }
            L2Entry::Zero { host: Some(host), copied }
            | L2Entry::Standard { host, copied }
            | L2Entry::Mixed { host: Some(host), copied, .. } => (host.get(), copied),
            L2Entry::Compressed { host, len } => {
                cursor.note_compressed();
                if !data_file {
                    self.refer(cursor, Structure::Compressed, host.get(), len, None, guest);
                }
                return;
            }
        };
        cursor.note(host, 1, geometry.cluster_bits());
        if data_file {
            let stores = !matches!(entry, L2Entry::Zero { .. });
            self.data_file_entry(place, host, copied, stores, guest);
        } else {
            self.refer(cursor, Structure::Data, host, geometry.cluster_size(), Some(copied), guest);
        }
    }

    /// Counts a reference to `len` bytes, which may lie outside the file.
    fn refer(
        &self,
        cursor: &mut Cursor<'_>,
        structure: Structure,
        host: u64,
        len: u64,
        copied: Option<bool>,
        guest: Option<GuestOffset>,
    ) {
        if self.subject.is_past_end(host, len) {
            let what = What::PastEnd { structure, len, file_len: self.subject.file_len };
            self.report(what, host, guest);
            return;
        }
        let copied = copied.filter(|_| cursor.table.active > 0);
        let reference = Reference { kind: ReferenceKind::Data, copied, times: cursor.table.times };
        let next = self.count(self.subject.clusters(host, len), reference);
        cursor.next_window = cursor.next_window.min(next);
    }

    /// Checks a cluster in an external data file. It has no refcount, so it is never shared and always COPIED.
    /// It must lie at its guest offset, and inside the file if it `stores` anything.
    fn data_file_entry(&self, place: u64, host: u64, copied: bool, stores: bool, guest: Option<GuestOffset>) {
        // A table of snapshots only has no guest offset. QEMU makes no snapshots of images with a data file.
        let Some(guest) = guest else { return };
        if !copied {
            self.report(What::CopiedFlag { set: false, refcount: 1 }, place, Some(guest));
        }
        if host != guest.get() {
            let error = FormatError::malformed(
                "L2 entry",
                place,
                format!("offset {host:#x} in the data file"),
                format!("the guest offset {guest}"),
            );
            self.report(What::Malformed(error), place, Some(guest));
        } else if let Some(len) = self.subject.data_len
            && stores
            && host >= len
        {
            let what = What::PastEnd {
                structure: Structure::ExternalData,
                len: self.subject.geometry.cluster_size(),
                file_len: len,
            };
            self.report(what, host, Some(guest));
        }
    }

    fn report(&self, what: What, host: u64, guest: Option<GuestOffset>) {
        if let Some((findings, _)) = self.first {
            findings.add(Finding::corruption(what, host, guest));
        }
    }
}

impl Cursor<'_> {
    fn note(&mut self, host: u64, len: u64, cluster_bits: u32) {
        self.allocated += len;
        if self.contiguous != 0 && host != self.contiguous {
            self.fragmented += 1;
        }
        self.contiguous = host.saturating_add(len << cluster_bits);
    }

    /// A compressed cluster counts as fragmented, but does not end a contiguous run, as in QEMU.
    fn note_compressed(&mut self) {
        self.allocated += 1;
        self.compressed += 1;
        self.fragmented += 1;
    }
}
