//! `qmerge check`: is an image consistent?

mod restore;

use qcow2::error::shown;
use std::path::Path;
use std::sync::Arc;

use qcow2::chain::{OpenOptions, open_data_file};
use qcow2::check::{self, CheckOptions, CheckReport, Severity, Verdict};
use qcow2::error::FileOp;
use qcow2::image::{ImageFormat, Qcow2};
use qcow2::merge;
use qcow2::repair::{self, RepairMode, RepairPlan};
use qcow2::storage::{Access, Host, LockError, LockMode, OsHost, Storage, may_be_unlocked};
use qcow2::{Error, ErrorKind};
use serde_json::{Map, Value, json};

use super::open;
use crate::call::Call;
use crate::cli::{CheckArgs, RepairWhat};
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::hint::{Command, Hint, can_be_flattened, free_name, word};
use crate::output::Console;
use crate::output::human::plural;
use crate::output::json::path;
use crate::output::size;

/// Checks the image and its external data file, and repairs the image if asked to; other files are not
/// opened.
pub(super) fn run(args: &CheckArgs, call: &Call, console: &Console) -> Result<Exit, Failure> {
    if let Some(from) = &args.restore {
        return restore::run(args, from, call, console);
    }
    let options = OpenOptions { lock: true, ..open::image_options(&args.open) };
    let outcome = check(args, &options).map_err(|e| failure(&e, args, call))?;
    let Some(outcome) = outcome else { return Err(nothing_to_check(&args.image)) };
    if console.is_json() {
        console.document(&json(&args.image, &outcome))?;
    } else {
        console.result(&human(&args.image, &outcome))?;
    }
    Ok(match outcome.report().verdict() {
        Verdict::Clean => Exit::DONE,
        Verdict::Failed => Exit::CHECK_FAILED,
        Verdict::Corrupt => Exit::CHECK_CORRUPT,
        Verdict::Leaks => Exit::CHECK_LEAKS,
    })
}

/// What came out.
// There is one of these, and it is about as large as what it holds.
#[allow(clippy::large_enum_variant)]
enum CheckOutcome {
    Checked(CheckReport),
    Planned(RepairPlan),
    Repaired(RepairPlan),
}

impl CheckOutcome {
    /// The state that the exit code tells: that of the image as it is now.
    fn report(&self) -> &CheckReport {
        match self {
            Self::Checked(report) => report,
            Self::Planned(plan) => &plan.before,
            Self::Repaired(plan) => &plan.after,
        }
    }
}

/// An image in use is something else than a failed check when it was to be repaired.
fn failure(error: &Error, args: &CheckArgs, call: &Call) -> Failure {
    match Failure::engine(error, call) {
        Failure::Reported(report) if args.repair.is_some() && error.kind() == ErrorKind::InUse => {
            Report { exit: Exit::IN_USE, ..report }.into()
        }
        other => other,
    }
}

/// Checks under a reader's lock, repairs under a writer's; `None` for raw images.
fn check(args: &CheckArgs, options: &OpenOptions) -> qcow2::Result<Option<CheckOutcome>> {
    let image = &args.image;
    let file = open_locked(image, args.repair.is_some() && !args.dry_run, args.open.no_lock)?;
    let format = match options.active_format {
        Some(format) => format,
        None => ImageFormat::detect_readable(image, &*file)?,
    };
    if format == ImageFormat::Raw {
        return Ok(None);
    }
    let cluster0 = Qcow2::read_cluster0(image, &*file)?;
    let data = open_data_file(&OsHost, image, &*file, &cluster0, options)?;
    let data_file = data.as_ref().map(|(data, storage)| (&*data.path, &**storage as &dyn Storage));
    merge::refuse_torn(&OsHost, image, &*file, data_file, cluster0.header.is_dirty())?;
    let data = data_file.map(|(_, storage)| storage);
    let how = CheckOptions::default();
    let Some(what) = args.repair else {
        return check::check(image, &*file, data, &how).map(CheckOutcome::Checked).map(Some);
    };
    let what = match what {
        RepairWhat::Leaks => RepairMode::Leaks,
        RepairWhat::All => RepairMode::All,
    };
    if args.dry_run {
        return repair::plan(image, &*file, data, what, &how).map(CheckOutcome::Planned).map(Some);
    }
    let done = match &args.backup {
        Some(to) => repair::repair_with_backup(image, &*file, data, what, &OsHost, to, &how),
        None => repair::repair(image, &*file, data, what, &how),
    };
    done.map(CheckOutcome::Repaired).map(Some)
}

/// Opens an image under a lock, for reading or for writing.
fn open_locked(image: &Path, writes: bool, no_locks: bool) -> qcow2::Result<Arc<dyn Storage>> {
    let (access, mode) =
        if writes { (Access::ReadWrite, LockMode::Write) } else { (Access::Read, LockMode::Read) };
    let file = OsHost.open(image, access).map_err(|e| Error::io(image, FileOp::Open, None, e))?;
    let id = file.stat().map_err(|e| Error::io(image, FileOp::Stat, None, e))?.id;
    file.lock(mode).map_err(|e| match e {
        LockError::Held { .. } => Error::InUse { path: image.to_owned(), holders: OsHost.holders(id) },
        LockError::Io(e) => Error::io(image, FileOp::Lock, None, e),
    })?;
    may_be_unlocked(&OsHost, image, id, &*file, access, no_locks)?;
    Ok(file)
}

fn nothing_to_check(image: &Path) -> Failure {
    Report {
        kind: "unsupported",
        message: format!("{}: a raw image has no structure that could be checked", shown(image)),
        hint: Hint::advice("only qcow2 images can be checked").into(),
        exit: Exit::CHECK_UNSUPPORTED,
    }
    .into()
}

/// What was done, what was found, worst first, and what it means.
fn human(image: &Path, outcome: &CheckOutcome) -> String {
    let report = outcome.report();
    let (mut lines, repaired) = match outcome {
        CheckOutcome::Checked(_) => (Vec::new(), false),
        CheckOutcome::Planned(plan) => return format!("This would be done:\n{plan}"),
        CheckOutcome::Repaired(plan) => (plan.steps(), true),
    };
    for finding in &report.findings {
        lines.push(format!("{}: {finding}", name(finding.severity)));
    }
    let counted = report.corruptions + report.check_errors + report.leaks;
    let told: u64 = report.findings.iter().map(|finding| finding.clusters).sum();
    if counted > told {
        lines.push(format!("... and {} more", counted - told));
    }
    if report.marked_corrupt {
        lines.push("The image is marked corrupt.".to_owned());
    }
    if report.dirty {
        lines.push("The image is marked dirty: it was not closed cleanly.".to_owned());
    }
    let file = word(image);
    lines.push(match report.verdict() {
        Verdict::Clean => "No errors were found.".to_owned(),
        Verdict::Failed => {
            format!("{} could not be read.", plural(report.check_errors, "structure", "structures"))
        }
        Verdict::Corrupt if repaired => format!(
            "{} and {} remain. Do not write to the image; restore it from a backup{}",
            plural(report.corruptions, "corruption", "corruptions"),
            plural(report.leaks, "leaked cluster", "leaked clusters"),
            saving(image).map_or(".".to_owned(), |command| format!(", or save what can be read: {command}")),
        ),
        Verdict::Corrupt => format!(
            "{} and {} were found. Do not write to the image. To repair it: qmerge check --repair all {file}",
            plural(report.corruptions, "corruption", "corruptions"),
            plural(report.leaks, "leaked cluster", "leaked clusters"),
        ),
        Verdict::Leaks => format!(
            "{}: space is lost, the data is sound. To give it back: qmerge check --repair leaks {file}",
            plural(report.leaks, "leaked cluster", "leaked clusters"),
        ),
    });
    lines.push(format!(
        "{} of {} clusters are allocated, {} of them compressed, {} fragmented; the image ends at {}.",
        report.allocated_clusters,
        report.total_clusters,
        report.compressed_clusters,
        report.fragmented_clusters,
        size::exact(report.image_end_offset),
    ));
    lines.join("\n")
}

/// The command that writes what can be read of the image into a new file; none if that would fail at a table.
fn saving(image: &Path) -> Option<Command> {
    let output = free_name(image).filter(|_| can_be_flattened(image))?;
    Some(Command::qmerge(["flatten"]).file(image).word("-o").file(output))
}

fn name(severity: Severity) -> &'static str {
    match severity {
        Severity::Corruption => "corruption",
        Severity::Error => "error",
        Severity::Leak => "leak",
    }
}

/// The object of `qemu-img check --output=json`, which leaves zeros out, the findings, and the plan of a
/// repair.
fn json(image: &Path, outcome: &CheckOutcome) -> Value {
    let report = outcome.report();
    let mut out = Map::new();
    out.insert("filename".into(), path(image));
    out.insert("format".into(), ImageFormat::Qcow2.name().into());
    out.insert("check-errors".into(), report.check_errors.into());
    out.insert("image-end-offset".into(), report.image_end_offset.into());
    out.insert("total-clusters".into(), report.total_clusters.into());
    for (key, number) in [
        ("allocated-clusters", report.allocated_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
        ("corruptions", report.corruptions),
        ("leaks", report.leaks),
    ] {
        if number > 0 {
            out.insert(key.into(), number.into());
        }
    }
    let findings = report.findings.iter().map(|finding| {
        let mut object = json!({
            "severity": name(finding.severity),
            "host-offset": finding.host.get(),
            "clusters": finding.clusters,
            "message": finding.to_string(),
        });
        if let Some(guest) = finding.guest {
            object["guest-offset"] = guest.get().into();
        }
        object
    });
    out.insert("findings".into(), findings.collect());
    let (key, plan) = match outcome {
        CheckOutcome::Checked(_) => return Value::Object(out),
        CheckOutcome::Planned(plan) => ("plan", plan),
        CheckOutcome::Repaired(plan) => {
            for (key, number) in
                [("corruptions-fixed", plan.corruptions_fixed()), ("leaks-fixed", plan.leaks_fixed())]
            {
                if number > 0 {
                    out.insert(key.into(), number.into());
                }
            }
            ("repair", plan)
        }
    };
    out.insert(
        key.into(),
        json!({
            "refcounts-raised": plan.raised,
            "refcounts-lowered": plan.lowered,
            "clusters-freed": plan.freed,
            "flags-corrected": plan.flags,
            "refcounts-rebuilt": plan.rebuilt.is_some(),
            "dirty-bit-cleared": plan.clears_dirty(),
            "corrupt-bit-cleared": plan.clears_corrupt(),
            "corruptions-left": plan.after.corruptions,
            "leaks-left": plan.after.leaks,
            "steps": plan.steps(),
        }),
    );
    Value::Object(out)
}
