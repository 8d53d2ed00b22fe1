//! Checks whether an image is consistent: whether its refcounts agree with the references in its tables.
//!
//! The check only reads; [`crate::repair`] acts on what it finds. A pass reads every table once per batch of L1
//! entries (see `tables`), however often tables are shared or overlap. It counts the references to each host
//! cluster in a window of packed counters, then compares the whole window with the stored refcounts. An image
//! with more clusters than the window takes several passes. Memory is bounded by about 60 MiB; it grows with
//! the length of the file, never with what the header claims.
//!
//! The findings are those of `qemu-img check`, and a few that it does not report:
//!
//! - metadata that shares its cluster with something else, even if the refcount says so;
//! - the zero flag in a version 2 image, bit 0 of an extended L2 entry, and the COPIED flag without a
//!   cluster;
//! - in an image with an external data file, data that does not lie where the guest sees it, or that lies
//!   behind the end of the data file.

pub(crate) mod census;
mod compare;
pub(crate) mod counts;
pub(crate) mod finding;
pub(crate) mod gaps;
pub(crate) mod layout;
mod naming;
pub(crate) mod scan;
pub(crate) mod snapshots;
pub(crate) mod subject;
pub(crate) mod sweep;
pub(crate) mod tables;
#[cfg(test)]
pub(crate) mod tests;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

pub use finding::{Finding, Severity, Structure, What};

use serde::Serialize;

use crate::error::{Error, Refusal, Result};
use crate::format::FormatError;
use crate::storage::Storage;
use crate::units::GuestRange;

use census::{Census, WINDOW_WORDS};
use counts::Width;
use subject::Subject;

/// How many findings of each severity are kept; all are counted.
const KEPT_FINDINGS: usize = 1000;

/// How to check.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct CheckOptions<'a> {
    /// When this becomes true, the check ends with [`Error::Cancelled`].
    pub cancel: Option<&'a AtomicBool>,
}

/// What a check found. The numbers are those of `qemu-img check --output=json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct CheckReport {
    /// How much is corrupt: clusters and entries whose data is damaged, or will be when the image is
    /// written.
    #[serde(skip_serializing_if = "is_zero")]
    pub corruptions: u64,
    /// How many clusters are lost space: their refcount is higher than their references.
    #[serde(skip_serializing_if = "is_zero")]
    pub leaks: u64,
    /// How many structures could not be read.
    pub check_errors: u64,
    /// Where the last cluster in use ends, in bytes.
    pub image_end_offset: u64,
    /// The clusters of the guest's disk.
    pub total_clusters: u64,
    /// The clusters of the guest's disk that have a host cluster.
    #[serde(skip_serializing_if = "is_zero")]
    pub allocated_clusters: u64,
    /// The allocated clusters that do not follow their predecessor in the file; compressed ones always count.
    #[serde(skip_serializing_if = "is_zero")]
    pub fragmented_clusters: u64,
    /// The allocated clusters that are compressed.
    #[serde(skip_serializing_if = "is_zero")]
    pub compressed_clusters: u64,
    /// What is wrong, by severity and host offset: the first thousand of each severity.
    pub findings: Vec<Finding>,
    /// What of the data cannot be read, where it was read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<DataReport>,
    /// Whether every reference could be followed. If not, clusters that are reported as leaked may belong
    /// to a structure that could not be read, and must not be freed.
    #[serde(skip)]
    pub references_complete: bool,
    /// Whether the image is marked dirty: it was not closed cleanly, and wrong refcounts are no surprise.
    #[serde(skip)]
    pub dirty: bool,
    /// Whether the image is marked corrupt.
    #[serde(skip)]
    pub marked_corrupt: bool,
}

/// What reading the data of an image has come to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct DataReport {
    /// What cannot be read, or not be inflated, by the guest's offset: first what the image holds now, then each snapshot.
    pub unreadable: Vec<UnreadableData>,
    /// Whether that is all; else there is more of it than is listed.
    pub lists_all: bool,
}

/// A range of the guest's disk that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct UnreadableData {
    /// The internal snapshot that holds it, by its name; `None` for what the image holds now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// The guest offset in bytes.
    pub start: u64,
    /// How many bytes.
    pub length: u64,
}

impl DataReport {
    /// Nothing so far, which is all there is.
    pub(crate) fn new() -> Self {
        Self { unreadable: Vec::new(), lists_all: true }
    }

    /// Adds ranges, and whether they are all.
    pub(crate) fn add(&mut self, snapshot: Option<&str>, found: (Vec<GuestRange>, bool)) {
        let (ranges, lists_all) = found;
        self.lists_all &= lists_all;
        self.unreadable.extend(ranges.iter().map(|range| UnreadableData {
            snapshot: snapshot.map(str::to_owned),
            start: range.start.get(),
            length: range.len,
        }));
    }
}

/// QEMU omits these numbers from its JSON where they are zero.
#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
pub(crate) fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// The outcome of a check in one word, as the exit code of `qemu-img check` tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing is wrong: 0.
    Clean,
    /// Something could not be read, and nothing else is corrupt: 1.
    Failed,
    /// The image is corrupt: 2.
    Corrupt,
    /// Space is lost, and nothing else: 3.
    Leaks,
}

impl CheckReport {
    /// Whether the image can be read and written without harm: leaks are allowed, nothing else is.
    pub fn is_consistent(&self) -> bool {
        self.corruptions == 0 && self.check_errors == 0
    }

    /// The outcome in one word. Data that cannot be read is corrupt.
    pub fn verdict(&self) -> Verdict {
        if self.data.as_ref().is_some_and(|data| !data.unreadable.is_empty()) {
            return Verdict::Corrupt;
        }
        match (self.corruptions, self.check_errors, self.leaks) {
            (1.., ..) => Verdict::Corrupt,
            (0, 1.., _) => Verdict::Failed,
            (0, 0, 1..) => Verdict::Leaks,
            (0, 0, 0) => Verdict::Clean,
        }
    }

    /// The first thing that makes the image inconsistent.
    pub fn first_corruption(&self) -> Option<&Finding> {
        self.findings.iter().find(|finding| finding.severity != Severity::Leak)
    }
}

/// Checks the image in `file`, whose name for messages is `path`. With the external data file, if the
/// image has one, it is also checked that the data lies inside it; its content is not read.
///
/// Encrypted images are checked without their key.
///
/// # Errors
/// An image whose header does not allow a check (its features are not supported, or its tables cannot be
/// found), I/O errors on cluster 0, and cancellation. Damage of anything else is a finding.
pub fn check(
    path: &Path,
    file: &dyn Storage,
    data_file: Option<&dyn Storage>,
    options: &CheckOptions<'_>,
) -> Result<CheckReport> {
    let subject = Subject::open(path, file, data_file, options.cancel)?;
    check_subject(&subject, WINDOW_WORDS)
}

/// As [`check`], for an image that is going to be written. It must be consistent, because its refcounts decide
/// which clusters are free. Leaks are allowed.
///
/// # Errors
/// Those of a check; the first read that failed, because an unread table may refer to any cluster;
/// [`Refusal::Inconsistent`].
pub(crate) fn check_consistent(
    path: &Path,
    file: &dyn Storage,
    data_file: Option<&dyn Storage>,
    options: &CheckOptions<'_>,
) -> Result<CheckReport> {
    let report = check_whole(&Subject::open(path, file, data_file, options.cancel)?)?;
    if report.is_consistent() {
        return Ok(report);
    }
    let first = report.first_corruption().map(ToString::to_string).unwrap_or_default();
    Err(Error::refused(path, Refusal::Inconsistent { corruptions: report.corruptions, first }))
}

/// As [`check`], but a table that cannot be read is an error, not a finding.
pub(crate) fn check_whole(subject: &Subject<'_>) -> Result<CheckReport> {
    let census = census_of(subject, WINDOW_WORDS)?;
    match census.findings.take_unread() {
        None => Ok(report(subject, census)),
        Some(unread) => Err(unread.error(subject.path)),
    }
}

fn check_subject(subject: &Subject<'_>, window_words: u64) -> Result<CheckReport> {
    census_of(subject, window_words).map(|census| report(subject, census))
}

pub(crate) fn census_of(subject: &Subject<'_>, window_words: u64) -> Result<Census> {
    for width in [Width::Narrow, Width::Wide] {
        if let Some(census) = census::take(subject, width, window_words, KEPT_FINDINGS)? {
            return Ok(census);
        }
    }
    Err(too_many_references(subject))
}

pub(crate) fn too_many_references(subject: &Subject<'_>) -> Error {
    let error = FormatError::malformed("host cluster", 0, "2^28 references or more", "fewer references");
    Error::format(subject.path, error)
}

fn report(subject: &Subject<'_>, census: Census) -> CheckReport {
    let Census { findings, totals, clusters_in_use } = census;
    let header = &subject.header;
    let cluster_size = subject.geometry.cluster_size();
    CheckReport {
        corruptions: findings.count(Severity::Corruption),
        leaks: findings.count(Severity::Leak),
        check_errors: findings.count(Severity::Error),
        image_end_offset: clusters_in_use.saturating_mul(cluster_size),
        // QEMU ignores a last sector that is not whole, and so does `virtual_size`.
        total_clusters: header.virtual_size().div_ceil(cluster_size),
        allocated_clusters: totals.allocated.load(Relaxed),
        fragmented_clusters: totals.fragmented.load(Relaxed),
        compressed_clusters: totals.compressed.load(Relaxed),
        data: None,
        references_complete: !findings.is_incomplete(),
        findings: findings.into_vec(),
        dirty: header.is_dirty(),
        marked_corrupt: header.is_corrupt(),
    }
}
