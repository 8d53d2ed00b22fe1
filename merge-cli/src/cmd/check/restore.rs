//! `qmerge check --restore`: an image's metadata as it was before a repair.

use std::path::Path;

use qcow2::by_name::restore_named;
use qcow2::repair::{RestoreOptions, RestorePlan};
use qcow2::storage::OsHost;
use serde_json::json;

use crate::call::{Call, VerbName};
use crate::cli::{CheckArgs, ImageFormat};
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::hint::word;
use crate::output::human::plural;
use crate::output::json::{path, value};
use crate::output::{Console, size};

/// How many places a plan lists for people.
const LISTED: usize = 20;

/// Restores the metadata from the backup `from`, or shows what that would do.
pub(super) fn run(args: &CheckArgs, from: &Path, call: &Call, console: &Console) -> Result<Exit, Failure> {
    if args.open.format == Some(ImageFormat::Raw) {
        return Err(super::nothing_to_check(&args.image));
    }
    let call = Call { verb: VerbName::Restore, ..call.clone() };
    let done = carry_out(args, from, &call)?;
    let printed = match console.is_json() {
        true => console.document(&json(args, from, &done)),
        false => console.result(&human(args, &done)),
    };
    match args.dry_run {
        true => printed?,
        false => printed.map_err(|e| e.behind("the backup is put back"))?,
    }
    Ok(Exit::DONE)
}

fn carry_out(args: &CheckArgs, from: &Path, call: &Call) -> Result<RestorePlan, Failure> {
    let mut options = RestoreOptions::default();
    options.allow_copy = args.allow_copy;
    restore_named(&OsHost, &args.image, from, &options, args.dry_run, args.open.no_lock).map_err(|failed| {
        let Failure(report) = Failure::engine(&failed.error, call);
        if !failed.has_begun {
            return report.into();
        }
        let message = format!("{}\nstopped half-way; the same command goes on", report.message);
        Report { exit: Exit::HALFWAY, message, ..report }.into()
    })
}

fn human(args: &CheckArgs, plan: &RestorePlan) -> String {
    let file = word(&args.image);
    if plan.is_empty() {
        return format!("nothing to restore: the metadata of {file} is as it was before the repair");
    }
    let mut lines = Vec::new();
    if plan.continues {
        lines.push("continues a restore that was stopped".to_owned());
    }
    let cut = (plan.len > plan.len_after)
        .then(|| format!("{} to {}", size::exact(plan.len), size::exact(plan.len_after)));
    if args.dry_run {
        lines.push("This would be done:".to_owned());
        lines.push(format!("written as before the repair: {} bytes", plan.bytes));
        for range in plan.ranges.iter().take(LISTED) {
            lines.push(format!("  {:#x}: {} bytes", range.start, range.end - range.start));
        }
        if plan.ranges.len() > LISTED {
            lines.push("  ...".to_owned());
        }
        lines.extend(cut.map(|cut| format!("shortened: {cut}")));
    } else {
        let places = plural(plan.ranges.len() as u64, "place", "places");
        lines.push(format!("restored: {} bytes in {places} are as they were before the repair", plan.bytes));
        lines.extend(cut.map(|cut| format!("shortened: {cut}")));
        lines.push(format!("What was wrong before is wrong again: qmerge check {file}"));
    }
    lines.join("\n")
}

fn json(args: &CheckArgs, from: &Path, plan: &RestorePlan) -> serde_json::Value {
    let done = if args.dry_run { "plan" } else { "restore" };
    json!({ "filename": path(&args.image), "backup": path(from), done: value(plan) })
}
