//! An image for programs: the keys of `qemu-img info --output=json`, which leaves out what an image does not have, and some of
//! our own.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::ImageFacts;
use crate::error::Holder;
use crate::format::{Bitmap, Cluster0, Snapshot};
use crate::journal::Stranger;
use crate::merge::{UnfinishedMerge, UnfinishedUp};
use crate::serial;
use crate::storage::LockMode;

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct ImageShape<'f> {
    filename: Cow<'f, str>,
    format: &'static str,
    virtual_size: Option<u64>,
    actual_size: u64,
    file_length: u64,
    #[serde(flatten)]
    qcow2: Option<Qcow2Shape<'f>>,
    dirty_flag: bool,
    in_use: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    in_use_for: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    holders: Option<Vec<HolderShape<'f>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    merge_pending: Option<&'f UnfinishedMerge>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pull_pending: bool,
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "serial::some_name")]
    emptying_into: Option<&'f Path>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rebase_pending: Option<RebaseShape<'f>>,
    #[serde(skip_serializing_if = "<[Stranger]>::is_empty")]
    strangers: &'f [Stranger],
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

/// A rebase that was stopped.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct RebaseShape<'f> {
    /// What is to lie below.
    #[serde(serialize_with = "serial::some_name")]
    onto: Option<&'f Path>,
}

impl<'f> RebaseShape<'f> {
    fn of(facts: &'f ImageFacts) -> Option<Self> {
        match &facts.unfinished_up {
            Some(UnfinishedUp::Rebase(onto)) => Some(Self { onto: onto.as_deref() }),
            _ => None,
        }
    }
}

#[derive(Serialize)]
struct HolderShape<'f> {
    pid: u32,
    name: &'f str,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Qcow2Shape<'f> {
    cluster_size: u64,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    encrypted: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "serial::some_name")]
    full_backing_filename: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename_format: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "serial::some_name")]
    merged_into: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "serial::some_name")]
    merging_into: Option<PathBuf>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    snapshots: Vec<SnapshotShape<'f>>,
    format_specific: SpecificShape<'f>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct SnapshotShape<'f> {
    id: Cow<'f, str>,
    name: Cow<'f, str>,
    vm_state_size: u64,
    date_sec: u32,
    date_nsec: u32,
    vm_clock_sec: u64,
    vm_clock_nsec: u64,
    icount: u64,
}

#[derive(Serialize)]
struct SpecificShape<'f> {
    #[serde(rename = "type")]
    format: &'static str,
    data: DataShape<'f>,
}

/// Version 2 cannot say more than the first three.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct DataShape<'f> {
    compat: &'static str,
    compression_type: &'static str,
    refcount_bits: u32,
    #[serde(flatten)]
    version3: Option<Version3Shape<'f>>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Version3Shape<'f> {
    lazy_refcounts: bool,
    corrupt: bool,
    extended_l2: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_file: Option<Cow<'f, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_file_raw: Option<bool>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    bitmaps: Vec<BitmapShape>,
}

#[derive(Serialize)]
struct BitmapShape {
    name: String,
    granularity: u64,
    flags: Vec<&'static str>,
}

impl<'f> ImageShape<'f> {
    pub(super) fn of(facts: &'f ImageFacts) -> Self {
        let used = facts.used;
        let process = |h: &'f Holder| HolderShape { pid: h.pid, name: &h.name };
        Self {
            filename: facts.path.to_string_lossy(),
            format: facts.format.name(),
            virtual_size: facts.virtual_size(),
            actual_size: facts.stat.allocated,
            file_length: facts.stat.len,
            qcow2: facts.cluster0.as_ref().map(|cluster0| Qcow2Shape::of(facts, cluster0)),
            dirty_flag: facts.cluster0.as_ref().is_some_and(|c| c.header.is_dirty()),
            in_use: (facts.has_locks || used.is_some()).then_some(used.is_some()),
            in_use_for: used.map(|mode| if mode == LockMode::Write { "writing" } else { "reading" }),
            holders: used.map(|_| facts.holders.iter().map(process).collect()),
            merge_pending: facts.unfinished.as_ref(),
            pull_pending: facts.unfinished_up == Some(UnfinishedUp::Pull),
            emptying_into: facts.emptying_into.as_deref(),
            rebase_pending: RebaseShape::of(facts),
            strangers: &facts.strangers,
            problem: facts.problem.as_ref().map(ToString::to_string),
        }
    }
}

impl<'f> Qcow2Shape<'f> {
    fn of(facts: &'f ImageFacts, cluster0: &'f Cluster0) -> Self {
        let (name, resolved) = facts.backing().unzip();
        Self {
            cluster_size: cluster0.header.geometry().cluster_size(),
            encrypted: cluster0.header.crypt_method != 0,
            backing_filename: name,
            full_backing_filename: resolved.and_then(Result::ok),
            backing_filename_format: cluster0.backing_format(),
            merged_into: cluster0.merged_into(),
            merging_into: cluster0.merging_into(),
            snapshots: facts.snapshots.iter().map(SnapshotShape::of).collect(),
            format_specific: SpecificShape {
                format: facts.format.name(),
                data: DataShape::of(facts, cluster0),
            },
        }
    }
}

impl<'f> SnapshotShape<'f> {
    fn of(snapshot: &'f Snapshot) -> Self {
        Self {
            id: String::from_utf8_lossy(&snapshot.id),
            name: String::from_utf8_lossy(&snapshot.name),
            vm_state_size: snapshot.vm_state_size,
            date_sec: snapshot.date_sec,
            date_nsec: snapshot.date_nsec,
            vm_clock_sec: snapshot.vm_clock_nsec / 1_000_000_000,
            vm_clock_nsec: snapshot.vm_clock_nsec % 1_000_000_000,
            icount: snapshot.icount.unwrap_or_default(),
        }
    }
}

impl<'f> DataShape<'f> {
    fn of(facts: &'f ImageFacts, cluster0: &'f Cluster0) -> Self {
        let header = &cluster0.header;
        let name = cluster0.data_file_name().filter(|_| header.has_data_file());
        let recorded = |b: &Bitmap| {
            let flags = [(b.is_in_use(), "in-use"), (b.is_auto(), "auto")];
            let flags = flags.iter().filter(|(is_set, _)| *is_set).map(|(_, flag)| *flag).collect();
            BitmapShape { name: b.display_name(), granularity: b.granularity(), flags }
        };
        let version3 = || Version3Shape {
            lazy_refcounts: header.lazy_refcounts(),
            corrupt: header.is_corrupt(),
            extended_l2: header.extended_l2(),
            data_file: name.map(String::from_utf8_lossy),
            data_file_raw: header.has_data_file().then(|| header.data_file_raw()),
            bitmaps: facts.bitmaps.iter().map(recorded).collect(),
        };
        Self {
            compat: if header.version < 3 { "0.10" } else { "1.1" },
            compression_type: header.compression.name(),
            refcount_bits: header.geometry().refcount_bits(),
            version3: (header.version >= 3).then(version3),
        }
    }
}
