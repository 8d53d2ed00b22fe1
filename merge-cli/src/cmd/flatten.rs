//! `qmerge flatten`: a chain, or its upper part, as one new file.

use std::cell::Cell;
use std::sync::Arc;

use qcow2::ErrorKind;
use qcow2::convert::{Flatten, FlattenOptions, FlattenPlan, FlattenReport};
use qcow2::error::shown;
use qcow2::storage::OsHost;

use super::open;
use crate::call::Call;
use crate::cli::FlattenArgs;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Console;
use crate::output::human::plural;
use crate::output::json::{merged, paths, value};
use crate::output::progress::Meter;
use crate::output::size;
use crate::signals::Stop;

/// Plans, and writes the new file. If it fails, no file stays behind.
pub(super) fn run(args: &FlattenArgs, call: &Call, console: &Console) -> Result<Exit, Failure> {
    let open = open::options(&args.open);
    let mut options = FlattenOptions::new(open, args.output.clone(), args.to.into());
    options.snapshot.clone_from(&args.snapshot);
    options.base.clone_from(&args.base);
    options.keep_zeros = args.keep_zeros;
    options.salvage = args.salvage;
    options.onto_device = args.onto_device;
    let stop = Stop::on_signals(call)?;
    let meter = Meter::new(console, "writing");
    let begun = Cell::new(false);
    let failed = |error: qcow2::Error| {
        meter.clear();
        let when = match begun.get() && args.onto_device {
            true => "in the middle of the device, which holds no disk now",
            false => "and left no file behind",
        };
        match (error.kind(), stop.exit()) {
            (ErrorKind::Cancelled, Some(exit)) => Failure::interrupted(when, exit, call),
            _ => Failure::engine(&error, call),
        }
    };
    let flatten = Flatten::prepare(Arc::new(OsHost), &args.active, &options, stop.flag()).map_err(&failed)?;
    open::warn_unlocked(&flatten.chain().unlocked(), console);
    let plan = flatten.plan().clone();
    console.event("plan", value(&plan))?;
    if plan.is_room_unknown {
        console.warn(&format!(
            "warning: the file system of {} does not say how much is free; when it is full, no file is left behind",
            shown(&plan.output)
        ));
    }
    let cut_short = flatten.cut_short();
    for file in &cut_short {
        console.warn(&format!(
            "warning: {} is cut short: what its tables place behind the end of the file is written as zeros, as QEMU reads it",
            shown(file)
        ));
    }
    begun.set(true);
    let report = flatten.execute(&meter, stop.flag()).map_err(&failed)?;
    drop(meter);
    let mut fields = merged(value(&plan), value(&report));
    fields["cut-short"] = paths(&cut_short);
    let printed = console.event("result", fields).and_then(|()| console.result(&human(&plan, &report)));
    printed.map_err(|e| e.behind("the new image is written"))?;
    if report.lost.is_empty() {
        return Ok(Exit::DONE);
    }
    console.warn(&lost(&report));
    Ok(Exit::DAMAGED)
}

/// How many lost ranges are named to people.
const NAMED: usize = 20;

/// What could not be read and is zeros now.
fn lost(report: &FlattenReport) -> String {
    let bytes: u64 = report.lost.iter().map(|range| range.len).sum();
    let least = if report.lists_all_lost { "" } else { "at least " };
    let mut lines =
        vec![format!("warning: {least}{} could not be read; zeros are in their place:", size::exact(bytes))];
    let named = report.lost.iter().take(NAMED);
    lines.extend(named.map(|range| format!("  {} at guest offset {}", size::exact(range.len), range.start)));
    let more = report.lost.len().saturating_sub(NAMED);
    if more > 0 {
        lines.push(format!("  and {} more, which --json lists", plural(more as u64, "range", "ranges")));
    }
    lines.join("\n")
}

fn human(plan: &FlattenPlan, report: &FlattenReport) -> String {
    let below = match (&plan.base, &plan.backing_name) {
        (Some(_), Some(name)) => format!("; its backing file is {}", shown(name)),
        _ => String::new(),
    };
    let of = plan.snapshot.as_ref().map(|name| format!(" from the snapshot {}", shown(name)));
    format!(
        "wrote {}{} ({}, {}{below}): {} copied in {}",
        shown(&plan.output),
        of.unwrap_or_default(),
        plan.to.name(),
        size::short(plan.virtual_size),
        size::short(report.totals.bytes_to_copy),
        size::duration(report.elapsed.as_secs_f64())
    )
}
