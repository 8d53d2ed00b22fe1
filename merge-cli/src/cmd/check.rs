//! `qmerge check`: is an image consistent?

mod restore;

use std::path::Path;

use qcow2::by_name::{CheckRequest, Checked, check_named};
use qcow2::check::{DataReport, UnreadableData, Verdict};
use qcow2::error::shown;
use qcow2::image::ImageFormat;
use qcow2::merge::{self, DirtyReason};
use qcow2::repair::RepairMode;
use qcow2::storage::OsHost;
use qcow2::ways::{can_be_flattened, free_name};
use qcow2::{Error, ErrorKind};
use serde_json::json;

use super::open;
use crate::call::Call;
use crate::cli::{CheckArgs, RepairWhat};
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::hint::{Command, Hint, word};
use crate::output::Console;
use crate::output::human::plural;
use crate::output::json::{merged, path, value};
use crate::output::size;

/// Checks the image and its external data file, and repairs the image if asked to; other files are not
/// opened.
pub(super) fn run(args: &CheckArgs, call: &Call, console: &Console) -> Result<Exit, Failure> {
    if let Some(from) = &args.restore {
        return restore::run(args, from, call, console);
    }
    let options = open::image_options(&args.open).locked();
    let repair = args.repair.map(|what| match what {
        RepairWhat::Leaks => RepairMode::Leaks,
        RepairWhat::All => RepairMode::All,
    });
    let mut request = CheckRequest::default();
    request.repair = repair;
    request.dry_run = args.dry_run;
    request.data = args.data;
    request.backup = args.backup.as_deref();
    let outcome =
        check_named(&OsHost, &args.image, &options, &request).map_err(|e| failure(&e, args, call))?;
    let Some(outcome) = outcome else { return Err(nothing_to_check(&args.image)) };
    // Where the journal cannot be read, nothing explains the dirty bit.
    let reason = match outcome.report().dirty {
        true => merge::dirty_reason(&OsHost, &args.image, None).ok().flatten(),
        false => None,
    };
    let printed = if console.is_json() {
        let mut file = json!({ "filename": path(&args.image), "format": ImageFormat::Qcow2.name() });
        if let Some(DirtyReason::Emptying { into }) = &reason {
            file["emptying-into"] = path(into);
        }
        console.document(&merged(value(&outcome), file))
    } else {
        console.result(&human(&args.image, &outcome, reason.as_ref()))
    };
    let has_done = matches!(outcome, Checked::Repaired(_));
    printed.map_err(|e| if has_done { e.behind("the repair is done") } else { e })?;
    Ok(match outcome.report().verdict() {
        Verdict::Clean => Exit::DONE,
        Verdict::Failed => Exit::CHECK_FAILED,
        Verdict::Corrupt => Exit::CHECK_CORRUPT,
        Verdict::Leaks => Exit::CHECK_LEAKS,
    })
}

/// If a repair was asked for, an image in use has its own exit code: it is not a failed check.
fn failure(error: &Error, args: &CheckArgs, call: &Call) -> Failure {
    let failure = Failure::engine(error, call);
    match error.kind() {
        ErrorKind::InUse if args.repair.is_some() => failure.with_exit(Exit::IN_USE),
        _ => failure,
    }
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

/// Why the image is marked dirty, in words.
fn why_dirty(reason: Option<&DirtyReason>) -> String {
    match reason {
        Some(DirtyReason::Filling) => "a merge into it has not ended; the same command goes on".to_owned(),
        Some(DirtyReason::Emptying { into }) => {
            format!("a merge is emptying it, and all of it is in {}; the same commit goes on", shown(into))
        }
        _ => "it was not closed cleanly".to_owned(),
    }
}

/// Tells what was done, what was found (the worst first), and what it means.
fn human(image: &Path, outcome: &Checked, reason: Option<&DirtyReason>) -> String {
    let report = outcome.report();
    let (mut lines, repaired) = match outcome {
        Checked::Planned(plan) => return format!("This would be done:\n{plan}"),
        Checked::Repaired(plan) => (plan.steps(), true),
        _ => (Vec::new(), false),
    };
    for finding in &report.findings {
        lines.push(format!("{}: {finding}", finding.severity));
    }
    lines.extend(report.data.iter().flat_map(data));
    let counted = report.corruptions + report.check_errors + report.leaks;
    let told: u64 = report.findings.iter().map(|finding| finding.clusters).sum();
    if counted > told {
        lines.push(format!("... and {} more", counted - told));
    }
    if report.marked_corrupt {
        lines.push("The image is marked corrupt.".to_owned());
    }
    if report.dirty {
        lines.push(format!("The image is marked dirty: {}.", why_dirty(reason)));
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
        Verdict::Corrupt if report.corruptions == 0 && report.check_errors == 0 => format!(
            "The tables are sound, but data is lost.{}",
            salvage(image).map_or(String::new(), |command| format!(" To save the rest: {command}")),
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

/// How many ranges are named to people.
const NAMED: usize = 20;

/// What of the data cannot be read.
fn data(report: &DataReport) -> Vec<String> {
    let line = |lost: &UnreadableData| {
        let of = lost.snapshot.as_ref().map(|name| format!(" of the snapshot {}", shown(name)));
        let (bytes, at) = (size::exact(lost.length), lost.start);
        format!("ERROR: data: {bytes} at guest offset {at:#x}{} cannot be read", of.unwrap_or_default())
    };
    let mut lines: Vec<String> = report.unreadable.iter().take(NAMED).map(line).collect();
    let more = report.unreadable.len().saturating_sub(NAMED);
    if more > 0 || !report.lists_all {
        lines.push(format!("... and {} more, which --json lists", plural(more as u64, "range", "ranges")));
    }
    if lines.is_empty() {
        lines.push("All data can be read.".to_owned());
    }
    lines
}

/// The command that saves the data that can be read.
fn salvage(image: &Path) -> Option<Command> {
    let output = free_name(image)?;
    Some(Command::qmerge(["flatten"]).file(image).word("--salvage").word("-o").file(output))
}

/// The command that writes the readable data of the image into a new file; `None` if a table cannot be read.
fn saving(image: &Path) -> Option<Command> {
    let output = free_name(image).filter(|_| can_be_flattened(image))?;
    Some(Command::qmerge(["flatten"]).file(image).word("-o").file(output))
}
