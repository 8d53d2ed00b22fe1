//! Repairs what a check finds, without ever inventing data.
//!
//! Refcounts and COPIED flags follow from the references, so they can be corrected, and the refcount structures
//! can be rebuilt. An entry that points nowhere has lost its meaning: it is left as it is, and reported. As
//! long as there is such an entry, no cluster is freed, because the cluster that it meant may be among those
//! that look unused. An image is not repaired at all if any of its metadata cannot be read.
//!
//! Memory is bounded like that of a check. For that, the tables are read several times.
//!
//! The writes go in this order, with a barrier behind each step. So a power cut leaves an image that is no
//! worse than before, and that can be repaired again. Before all steps, autoclear bits that this engine does
//! not know are cleared, as every writer must.
//!
//! 1. Host offsets that are not aligned are dropped from entries of clusters that read as zeros.
//! 2. Refcounts that are too low are raised: from here on no cluster in use can be allocated again. If the
//!    refcount structures themselves are damaged, new ones are written to unused space instead, and one write
//!    in the header's first sector names them. A snapshot table whose entries lack the disk size, or have too
//!    much extra data, is rewritten in the same way.
//! 3. Refcounts that are too high are lowered. Holes are punched into freed clusters only behind the barrier.
//! 4. COPIED flags are corrected: they follow refcounts that are durable.
//! 5. The dirty bit and the corrupt bit are cleared, if a new check finds nothing.
//!
//! A cluster that holds metadata and something else is never written.

mod adjust;
mod backup;
mod disk;
mod entries;
mod flags;
mod free;
mod plan;
mod rebuild;
mod scratch;
mod snapshots;
mod survey;
#[cfg(test)]
pub(crate) mod tests;

use std::path::Path;

use crate::error::{Error, FileOp, Result};
use crate::format::features;
use crate::storage::{Host, Storage};

use self::disk::ImageWriter;
use self::scratch::{Never, Scratch};
use self::survey::Survey;

pub use self::backup::{RestoreOptions, RestorePlan, plan_restore, restore};
pub use self::plan::RepairPlan;

use crate::check::subject::Subject;
use crate::check::{CheckOptions, Verdict, check_whole};

/// Where the header holds the three words of feature bits.
const FEATURES: u64 = 72;

/// What is repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RepairMode {
    /// Leaked clusters are freed, and nothing else. COPIED flags are set where a refcount becomes one by that.
    Leaks,
    /// Everything that can be repaired.
    All,
}

/// Finds out what a repair of the image in `file` would do; nothing is written. The writes are made in memory
/// only. The parameters are those of [`check`](crate::check::check).
///
/// # Errors
/// Those of a check.
pub fn plan(
    path: &Path,
    file: &dyn Storage,
    data_file: Option<&dyn Storage>,
    mode: RepairMode,
    options: &CheckOptions<'_>,
) -> Result<RepairPlan> {
    let scratch = Scratch::new(file, Never);
    repair(path, &scratch, data_file, mode, options)
}

/// Repairs the image in `file`, which must be held under a writer's lock, and returns what was done. The data
/// of the guest and of snapshots is not touched. The parameters are those of [`check`](crate::check::check).
///
/// # Errors
/// Those of a check, and of writing. If any metadata cannot be read, nothing is written: the clusters of an
/// unread table would look unused. Cancellation and errors leave an image that is no worse than before, and
/// that can be repaired again.
pub fn repair(
    path: &Path,
    file: &dyn Storage,
    data_file: Option<&dyn Storage>,
    mode: RepairMode,
    options: &CheckOptions<'_>,
) -> Result<RepairPlan> {
    let open = || Subject::open(path, file, data_file, options.cancel);
    let subject = open()?;
    let before = check_whole(&subject)?;
    let mut plan = RepairPlan::nothing(mode, before);
    if plan.before.verdict() == Verdict::Clean && !plan.before.dirty && !plan.before.marked_corrupt {
        return Ok(plan);
    }
    clear_autoclear(&Survey::of(&subject)?, &ImageWriter::of(&subject))?;
    if mode == RepairMode::All {
        mend_all(&open, &mut plan)?;
    }
    // The steps before may have moved structures: read everything again.
    let subject = open()?;
    let survey = Survey::of(&subject)?;
    let disk = ImageWriter::of(&subject);
    plan.withheld = !survey.complete || survey.damaged || survey.broken.is_some();
    if !plan.withheld {
        (plan.lowered, plan.freed) = adjust::lower(&survey, &disk)?;
    }
    let which = if mode == RepairMode::All { flags::Which::All } else { flags::Which::Missing };
    if mode == RepairMode::All || plan.lowered > 0 {
        plan.flags = flags::correct(&survey, &disk, which)?;
    }
    plan.after = check_whole(&subject)?;
    if mode == RepairMode::All && plan.after.verdict() == Verdict::Clean {
        clear_marks(&survey, &disk, &mut plan)?;
    }
    Ok(plan)
}

/// Repairs as [`repair`], and keeps in the new file `to` what [`restore`] needs to undo it: first all metadata,
/// then every change. Freed clusters stay allocated in the file system, so that they can be taken back.
///
/// # Errors
/// Those of [`repair`]; a file `to` that exists, and those of writing to it.
pub fn repair_with_backup(
    path: &Path,
    file: &dyn Storage,
    data_file: Option<&dyn Storage>,
    mode: RepairMode,
    host: &dyn Host,
    to: &Path,
    options: &CheckOptions<'_>,
) -> Result<RepairPlan> {
    let recorded = backup::record(path, file, host, to, options)?;
    let plan = repair(path, &recorded, data_file, mode, options)?;
    recorded.note_end().map_err(|e| Error::io(to, FileOp::Write, None, e))?;
    Ok(plan)
}

/// Mends damaged entries whose meaning is known, and makes sure that no cluster in use can be allocated again.
fn mend_all<'a>(open: &impl Fn() -> Result<Subject<'a>>, plan: &mut RepairPlan) -> Result<()> {
    let subject = open()?;
    let (mut survey, disk) = (Survey::of(&subject)?, ImageWriter::of(&subject));
    if survey.broken.is_none() && plan.before.corruptions == 0 {
        return Ok(());
    }
    if survey.damaged {
        plan.offsets_dropped = entries::drop_stray_hosts(&survey, &disk)?;
        if plan.offsets_dropped > 0 {
            survey = Survey::of(&subject)?;
        }
    }
    mend(&survey, &disk, plan)?;
    if survey.damaged && subject.header.snapshots > 0 {
        // The new table needs free clusters: refcounts can be relied on now, but structures may have moved.
        let subject = open()?;
        let (survey, disk) = (Survey::of(&subject)?, ImageWriter::of(&subject));
        plan.snapshots = snapshots::mend(&survey, &disk)?;
        if plan.snapshots > 0 {
            let subject = open()?;
            let (survey, disk) = (Survey::of(&subject)?, ImageWriter::of(&subject));
            mend(&survey, &disk, plan)?;
        }
    }
    Ok(())
}

/// Makes sure that no cluster in use can be allocated again: raises refcounts, or rebuilds them.
fn mend(survey: &Survey<'_>, disk: &ImageWriter<'_>, plan: &mut RepairPlan) -> Result<()> {
    if let Some(why) = survey.broken {
        plan.broken = Some(why);
        if survey.complete {
            match rebuild::rebuild(survey, disk)? {
                Ok(rebuilt) => {
                    plan.rebuilt = Some((rebuilt.table, rebuilt.blocks));
                    return Ok(());
                }
                Err(why) => plan.not_rebuilt = Some(why),
            }
        } else {
            plan.not_rebuilt = Some("not all references are known");
        }
    }
    plan.raised += adjust::raise(survey, disk)?;
    Ok(())
}

/// Clears the autoclear bits that this engine does not know, as every writer must.
fn clear_autoclear(survey: &Survey<'_>, disk: &ImageWriter<'_>) -> Result<()> {
    let header = &survey.subject.header;
    if header.unknown_autoclear() == 0 || !survey.may_write(0, 1) {
        return Ok(());
    }
    let known = header.autoclear & features::KNOWN_AUTOCLEAR;
    disk.write(FEATURES + 16, &known.to_be_bytes())?;
    disk.barrier()
}

/// Clears the dirty bit and the corrupt bit of an image that is clean now.
fn clear_marks(survey: &Survey<'_>, disk: &ImageWriter<'_>, plan: &mut RepairPlan) -> Result<()> {
    let marks = survey.subject.header.incompatible & (features::DIRTY | features::CORRUPT);
    if marks != 0 {
        // Everything that the marks stood for must be durable before they are cleared.
        disk.barrier()?;
        disk.write(FEATURES, &(survey.subject.header.incompatible & !marks).to_be_bytes())?;
        disk.barrier()?;
        plan.after.dirty = false;
        plan.after.marked_corrupt = false;
    }
    Ok(())
}
