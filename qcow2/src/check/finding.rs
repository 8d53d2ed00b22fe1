//! The findings of a check, as typed values.

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use serde::{Serialize, Serializer};

use crate::error::{Error, FileOp};
use crate::format::FormatError;
use crate::units::{GuestOffset, HostOffset};

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The guest's data is damaged, or will be when the image is written.
    Corruption,
    /// The check itself failed here: something could not be read.
    Error,
    /// Space is lost, and nothing else.
    Leak,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Corruption => "corruption",
            Self::Error => "error",
            Self::Leak => "leak",
        })
    }
}

/// A part of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Structure {
    /// Cluster 0.
    Header,
    /// The L1 table of the guest's disk.
    ActiveL1,
    /// The L1 table of an internal snapshot.
    SnapshotL1,
    /// An L2 table.
    L2Table,
    /// A cluster of guest data.
    Data,
    /// A cluster of guest data in the external data file.
    ExternalData,
    /// A compressed cluster.
    Compressed,
    /// The refcount table.
    RefcountTable,
    /// A refcount block.
    RefcountBlock,
    /// The table of internal snapshots.
    SnapshotTable,
    /// The directory of persistent bitmaps.
    BitmapDirectory,
    /// The table of a persistent bitmap.
    BitmapTable,
    /// A cluster of a persistent bitmap.
    BitmapData,
    /// The header of the encryption.
    EncryptionHeader,
}

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum What {
    /// Clusters have a lower refcount than references: they may be allocated again while in use.
    RefcountTooLow {
        /// The refcount in the image.
        stored: u64,
        /// How many references there are.
        references: u64,
    },
    /// Clusters have a higher refcount than references: they are never freed.
    RefcountTooHigh {
        /// The refcount in the image.
        stored: u64,
        /// How many references there are.
        references: u64,
    },
    /// Clusters have more references than the image's refcounts can express.
    RefcountOverflow {
        /// How many references there are.
        references: u64,
        /// The largest refcount.
        max: u64,
    },
    /// The COPIED flag of an active L1 or L2 entry does not say whether the refcount is one.
    CopiedFlag {
        /// Whether the entry has the flag.
        set: bool,
        /// The refcount in the image.
        refcount: u64,
    },
    /// Metadata shares a cluster with something else.
    Overlap {
        /// How many references there are.
        references: u64,
    },
    /// Something lies behind the end of the file.
    PastEnd {
        /// What lies there.
        structure: Structure,
        /// Its length in bytes.
        len: u64,
        /// The length of the file in bytes.
        file_len: u64,
    },
    /// Bytes break a rule of the format.
    Malformed(FormatError),
    /// Something could not be read.
    Unreadable {
        /// What was to be read.
        structure: Structure,
        /// The system's answer.
        error: String,
    },
}

/// One thing that a check found.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What is wrong.
    pub what: What,
    /// The first host cluster concerned, or the place of the entry that is wrong.
    pub host: HostOffset,
    /// How many clusters in a row are concerned; 1 for anything but refcounts and flags.
    pub clusters: u64,
    /// The guest offset in the active disk that is affected, where it is known: the first one.
    pub guest: Option<GuestOffset>,
}

impl Serialize for Finding {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        #[serde(rename_all = "kebab-case")]
        struct FindingShape {
            severity: Severity,
            host_offset: u64,
            clusters: u64,
            message: String,
            #[serde(skip_serializing_if = "Option::is_none")]
            guest_offset: Option<u64>,
        }
        FindingShape {
            severity: self.severity,
            host_offset: self.host.get(),
            clusters: self.clusters,
            message: self.to_string(),
            guest_offset: self.guest.map(GuestOffset::get),
        }
        .serialize(to)
    }
}

/// Something that could not be read.
#[derive(Debug)]
pub(crate) struct Unread {
    pub(crate) structure: Structure,
    pub(crate) offset: u64,
    pub(crate) source: io::Error,
}

impl Unread {
    /// The read error, for callers that need the bytes.
    pub(crate) fn error(self, path: &Path) -> Error {
        Error::io(path, FileOp::Read, Some(self.offset), self.source)
    }
}

impl Finding {
    /// A finding of severity corruption that concerns one place.
    pub(crate) fn corruption(what: What, host: u64, guest: Option<GuestOffset>) -> Self {
        Self { severity: Severity::Corruption, what, host: HostOffset::new(host), clusters: 1, guest }
    }
}

impl fmt::Display for Structure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Header => "header",
            Self::ActiveL1 => "L1 table",
            Self::SnapshotL1 => "snapshot's L1 table",
            Self::L2Table => "L2 table",
            Self::Data => "data cluster",
            Self::ExternalData => "cluster in the external data file",
            Self::Compressed => "compressed cluster",
            Self::RefcountTable => "refcount table",
            Self::RefcountBlock => "refcount block",
            Self::SnapshotTable => "snapshot table",
            Self::BitmapDirectory => "bitmap directory",
            Self::BitmapTable => "bitmap table",
            Self::BitmapData => "bitmap cluster",
            Self::EncryptionHeader => "encryption header",
        })
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.what {
            What::Malformed(source) => write!(f, "{source}")?,
            _ if self.clusters == 1 => write!(f, "host offset {}", self.host)?,
            _ => write!(f, "{} clusters from host offset {}", self.clusters, self.host)?,
        }
        if let Some(guest) = self.guest {
            write!(f, " (guest offset {guest})")?;
        }
        let times = |n: u64| if n == 1 { "once".to_owned() } else { format!("{n} times") };
        match &self.what {
            What::RefcountTooLow { stored, references } => {
                write!(f, ": used {}, but the refcount is {stored}", times(*references))
            }
            What::RefcountTooHigh { stored, references: 0 } => {
                write!(f, ": leaked: not used, but the refcount is {stored}")
            }
            What::RefcountTooHigh { stored, references } => {
                write!(f, ": leaked: used {}, but the refcount is {stored}", times(*references))
            }
            What::RefcountOverflow { references, max } => {
                write!(f, ": used {}, but refcounts end at {max}", times(*references))
            }
            What::CopiedFlag { set: true, refcount } => {
                write!(f, ": the entry has the COPIED flag, but the refcount is {refcount}")
            }
            What::CopiedFlag { set: false, .. } => {
                f.write_str(": the entry lacks the COPIED flag, but the refcount is 1")
            }
            What::Overlap { references } => {
                write!(f, ": metadata lies where something else lies too: used {}", times(*references))
            }
            What::PastEnd { structure, len, file_len } => {
                write!(f, ": the {structure} of {len} bytes lies behind the end of the file at {file_len:#x}")
            }
            What::Malformed(_) => Ok(()),
            What::Unreadable { structure, error } => write!(f, ": the {structure} cannot be read: {error}"),
        }
    }
}

/// Collects findings from many threads. All are counted; the first ones of each severity are kept.
#[derive(Debug)]
pub(crate) struct Findings {
    limit: usize,
    kept: [Mutex<Vec<Finding>>; 3],
    counted: [AtomicU64; 3],
    taken: [AtomicUsize; 3],
    incomplete: AtomicBool,
    damaged: AtomicBool,
    past_end: AtomicBool,
    cut_from: AtomicU64,
    /// The places that could not be read. Every pass fails at the same places, and each is reported once.
    unread: Mutex<HashSet<(Structure, u64)>>,
    first_unread: Mutex<Option<Unread>>,
}

impl Findings {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            limit,
            kept: Default::default(),
            counted: Default::default(),
            taken: Default::default(),
            incomplete: AtomicBool::new(false),
            damaged: AtomicBool::new(false),
            past_end: AtomicBool::new(false),
            cut_from: AtomicU64::new(u64::MAX),
            unread: Mutex::default(),
            first_unread: Mutex::default(),
        }
    }

    pub(crate) fn add(&self, finding: Finding) {
        if matches!(finding.what, What::Malformed(_) | What::PastEnd { .. } | What::Unreadable { .. }) {
            self.damaged.store(true, Relaxed);
        }
        if let What::PastEnd { structure, .. } = finding.what
            && structure != Structure::ExternalData
        {
            self.past_end.store(true, Relaxed);
            self.cut_from.fetch_min(finding.host.get(), Relaxed);
        }
        let place = finding.severity as usize;
        if let Some(counted) = self.counted.get(place) {
            counted.fetch_add(finding.clusters, Relaxed);
        }
        if let Some(taken) = self.taken.get(place)
            && taken.fetch_add(1, Relaxed) < self.limit
            && let Some(Ok(mut kept)) = self.kept.get(place).map(Mutex::lock)
        {
            kept.push(finding);
        }
    }

    /// Adds a corruption that hides references: the damaged structure may have referred to any cluster.
    pub(crate) fn add_blind(&self, finding: Finding) {
        self.incomplete.store(true, Relaxed);
        self.add(finding);
    }

    /// Adds a place that could not be read, unless it was added before.
    pub(crate) fn add_unread(&self, unread: Unread) {
        let mut known = self.unread.lock().unwrap_or_else(PoisonError::into_inner);
        if !known.insert((unread.structure, unread.offset)) {
            return;
        }
        self.add_blind(Finding {
            severity: Severity::Error,
            what: What::Unreadable { structure: unread.structure, error: unread.source.to_string() },
            host: HostOffset::new(unread.offset),
            clusters: 1,
            guest: None,
        });
        self.first_unread.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(unread);
    }

    /// The first read that failed.
    pub(crate) fn take_unread(&self) -> Option<Unread> {
        self.first_unread.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// How many findings of a severity there are, kept or not.
    pub(crate) fn count(&self, severity: Severity) -> u64 {
        self.counted.get(severity as usize).map_or(0, |n| n.load(Relaxed))
    }

    /// Whether some references could not be followed.
    pub(crate) fn is_incomplete(&self) -> bool {
        self.incomplete.load(Relaxed)
    }

    /// Whether an entry or a structure is damaged, so that its meaning is unknown.
    pub(crate) fn is_damaged(&self) -> bool {
        self.damaged.load(Relaxed)
    }

    /// Whether something refers to bytes behind the end of the image file.
    pub(crate) fn is_past_end(&self) -> bool {
        self.past_end.load(Relaxed)
    }

    /// The lowest offset of a structure that extends behind the end of the file, in bytes. Its part inside the
    /// file is in use, though it is not counted.
    pub(crate) fn cut_from(&self) -> u64 {
        self.cut_from.load(Relaxed)
    }

    /// The kept findings: corruptions, errors, leaks, each in the order of host offsets.
    pub(crate) fn into_vec(self) -> Vec<Finding> {
        let mut all: Vec<Finding> =
            self.kept.into_iter().flat_map(|kept| kept.into_inner().unwrap_or_default()).collect();
        all.sort_by_key(|f| (f.severity, f.host));
        all
    }

    /// Lets `visit` complete the findings that were kept.
    pub(crate) fn update(&self, mut visit: impl FnMut(&mut Finding)) {
        for kept in &self.kept {
            if let Ok(mut kept) = kept.lock() {
                kept.iter_mut().for_each(&mut visit);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(severity: Severity, what: What) -> Finding {
        Finding { severity, what, host: HostOffset::new(0x50000), clusters: 1, guest: None }
    }

    #[test]
    fn sentences_name_place_and_trouble() {
        let low = What::RefcountTooLow { stored: 0, references: 1 };
        let mut f = finding(Severity::Corruption, low);
        assert_eq!(f.to_string(), "host offset 0x50000: used once, but the refcount is 0");
        f.guest = Some(GuestOffset::new(0x1000));
        f.clusters = 3;
        assert_eq!(
            f.to_string(),
            "3 clusters from host offset 0x50000 (guest offset 0x1000): used once, but the refcount is 0"
        );
        let leak = finding(Severity::Leak, What::RefcountTooHigh { stored: 2, references: 0 });
        assert_eq!(leak.to_string(), "host offset 0x50000: leaked: not used, but the refcount is 2");
        let bad = What::Malformed(FormatError::malformed("L2 entry", 0x40008, "1", "2"));
        assert_eq!(
            finding(Severity::Corruption, bad).to_string(),
            "L2 entry at offset 0x40008: found 1, expected 2"
        );
    }

    #[test]
    fn many_findings_are_counted_and_few_are_kept() {
        let findings = Findings::new(10);
        for n in 0..100 {
            let what = What::RefcountTooHigh { stored: 1, references: 0 };
            findings.add(Finding { clusters: 2, host: HostOffset::new(n), ..finding(Severity::Leak, what) });
        }
        findings.add(finding(Severity::Corruption, What::Overlap { references: 2 }));
        assert_eq!(findings.count(Severity::Leak), 200);
        assert_eq!(findings.count(Severity::Corruption), 1);
        let kept = findings.into_vec();
        assert_eq!(kept.len(), 11);
        assert_eq!(kept[0].severity, Severity::Corruption);
    }
}
