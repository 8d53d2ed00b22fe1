//! Checks, repairs and restores of an image by its name, under the lock that each needs.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde::{Serialize, Serializer};

use crate::chain::{OpenOptions, open_data_file};
use crate::check::{CheckOptions, CheckReport, DataReport, check, is_zero};
use crate::error::{Error, ErrorKind, FileOp, Result};
use crate::image::{Image, ImageFormat, Qcow2, read_snapshots};
use crate::merge::refuse_to_check;
use crate::repair::{
    RepairMode, RepairPlan, RestoreOptions, RestorePlan, plan, plan_restore, repair, repair_with_backup,
    restore,
};
use crate::storage::{Access, Host, LockMode, Storage, lock, may_be_unlocked};
use crate::transfer::unread::unreadable;

/// What is asked of an image.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct CheckRequest<'a> {
    /// What is repaired; otherwise it is only checked.
    pub repair: Option<RepairMode>,
    /// Only what would be repaired is wanted: nothing is written.
    pub dry_run: bool,
    /// All data that the image holds is read, and inflated where it is compressed. Not with a repair.
    pub data: bool,
    /// Where the metadata is copied to before a repair.
    pub backup: Option<&'a Path>,
}

/// What came of it.
// There is one of these, and it is about as large as what it holds.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Checked {
    /// It was checked.
    Checked(CheckReport),
    /// This would be repaired.
    Planned(RepairPlan),
    /// This was repaired.
    Repaired(RepairPlan),
}

impl Checked {
    /// The state of the image as it is now.
    pub fn report(&self) -> &CheckReport {
        match self {
            Self::Checked(report) => report,
            Self::Planned(plan) => &plan.before,
            Self::Repaired(plan) => &plan.after,
        }
    }
}

impl Serialize for Checked {
    /// With the keys of `qemu-img check --output=json`, the findings, and the plan of a repair.
    fn serialize<S: Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        #[serde(rename_all = "kebab-case")]
        struct CheckedShape<'a> {
            #[serde(flatten)]
            report: &'a CheckReport,
            #[serde(skip_serializing_if = "is_zero")]
            corruptions_fixed: u64,
            #[serde(skip_serializing_if = "is_zero")]
            leaks_fixed: u64,
            #[serde(skip_serializing_if = "Option::is_none")]
            plan: Option<&'a RepairPlan>,
            #[serde(skip_serializing_if = "Option::is_none")]
            repair: Option<&'a RepairPlan>,
        }
        let (planned, repaired) = match self {
            Self::Checked(_) => (None, None),
            Self::Planned(plan) => (Some(plan), None),
            Self::Repaired(plan) => (None, Some(plan)),
        };
        CheckedShape {
            report: self.report(),
            corruptions_fixed: repaired.map_or(0, RepairPlan::corruptions_fixed),
            leaks_fixed: repaired.map_or(0, RepairPlan::leaks_fixed),
            plan: planned,
            repair: repaired,
        }
        .serialize(to)
    }
}

/// Checks the image at `path` and its external data file under a reader's lock, or repairs it under a writer's, as `open` says;
/// other files are not opened. `None` for a raw image, which has nothing to check.
///
/// # Errors
/// [`Error::InUse`]; [`Refusal::TornHeader`](crate::Refusal::TornHeader); [`Refusal::MergeDone`](crate::Refusal::MergeDone) for a repair; those of [`check`] and of [`repair`].
pub fn check_named(
    host: &dyn Host,
    path: &Path,
    open: &OpenOptions,
    request: &CheckRequest<'_>,
) -> Result<Option<Checked>> {
    let writes = request.repair.is_some() && !request.dry_run;
    let file = open_locked(host, path, writes, open.no_locks)?;
    let format = match open.active_format {
        Some(format) => format,
        None => ImageFormat::detect_readable(path, &*file)?,
    };
    if format == ImageFormat::Raw {
        return Ok(None);
    }
    let cluster0 = Qcow2::read_cluster0(path, &*file)?;
    let data = open_data_file(host, path, &*file, &cluster0, open)?;
    let data_file = data.as_ref().map(|(_, storage)| storage);
    let named = data.as_ref().map(|(data, storage)| (&*data.path, &**storage as &dyn Storage));
    refuse_to_check(host, path, &*file, named, cluster0.header.is_dirty(), writes)?;
    let data = named.map(|(_, storage)| storage);
    let how = CheckOptions::default();
    let done = match (request.repair, request.backup) {
        (None, _) => {
            let mut report = check(path, &*file, data, &how)?;
            if request.data {
                report.data = Some(read_data(path, &file, data_file)?);
            }
            Checked::Checked(report)
        }
        (Some(mode), _) if request.dry_run => Checked::Planned(plan(path, &*file, data, mode, &how)?),
        (Some(mode), Some(to)) => {
            Checked::Repaired(repair_with_backup(path, &*file, data, mode, host, to, &how)?)
        }
        (Some(mode), None) => Checked::Repaired(repair(path, &*file, data, mode, &how)?),
    };
    Ok(Some(done))
}

/// Reads all data that an image and its internal snapshots hold.
fn read_data(path: &Path, file: &Arc<dyn Storage>, data: Option<&Arc<dyn Storage>>) -> Result<DataReport> {
    let open = || {
        let mut image = Qcow2::open(path, Arc::clone(file), data.cloned())?;
        image.salvage();
        Ok::<_, Error>(image)
    };
    let never = AtomicBool::new(false);
    let image = open()?;
    // What is broken of the snapshots is a finding of the check.
    let snapshots = read_snapshots(path, &**file, image.header()).unwrap_or_default();
    let mut report = DataReport::new();
    report.add(None, unreadable(&Image::Qcow2(image), &never)?);
    for snapshot in snapshots {
        let mut image = open()?;
        if image.show_snapshot(&snapshot.id).is_ok() {
            let name = String::from_utf8_lossy(&snapshot.name);
            report.add(Some(&name), unreadable(&Image::Qcow2(image), &never)?);
        }
    }
    Ok(report)
}

/// A restore that failed.
#[derive(Debug)]
#[non_exhaustive]
pub struct RestoreFailure {
    /// Why.
    pub error: Box<Error>,
    /// Whether it had begun to write: the same restore goes on.
    pub has_begun: bool,
}

/// Puts back the metadata of the image at `path` under a writer's lock, or says under a reader's what that would do, if it is a
/// `dry_run`; see [`restore`].
///
/// # Errors
/// [`Error::InUse`]; those of [`restore`].
pub fn restore_named(
    host: &dyn Host,
    path: &Path,
    from: &Path,
    options: &RestoreOptions<'_>,
    dry_run: bool,
    no_locks: bool,
) -> std::result::Result<RestorePlan, RestoreFailure> {
    let unchanged = |error| RestoreFailure { error: Box::new(error), has_begun: false };
    let file = open_locked(host, path, !dry_run, no_locks).map_err(unchanged)?;
    let plan = || plan_restore(path, &*file, host, from, options);
    if dry_run {
        return plan().map_err(unchanged);
    }
    restore(path, &*file, host, from, options).map_err(|error| {
        let has_begun = error.kind() == ErrorKind::Io && plan().is_ok_and(|plan| plan.continues);
        RestoreFailure { error: Box::new(error), has_begun }
    })
}

/// Opens an image under a lock, for reading or for writing.
fn open_locked(host: &dyn Host, path: &Path, writes: bool, no_locks: bool) -> Result<Arc<dyn Storage>> {
    let (access, mode) =
        if writes { (Access::ReadWrite, LockMode::Write) } else { (Access::Read, LockMode::Read) };
    let file = host.open(path, access).map_err(|e| Error::io(path, FileOp::Open, None, e))?;
    let id = file.stat().map_err(|e| Error::io(path, FileOp::Stat, None, e))?.id;
    lock(host, path, &*file, mode)?;
    may_be_unlocked(host, path, id, &*file, access, no_locks)?;
    Ok(file)
}
