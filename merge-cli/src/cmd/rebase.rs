//! `qmerge rebase`: an image gets another backing file, whatever that holds, or none.

use std::sync::Arc;

use qcow2::error::shown;
use qcow2::image::ImageFormat;
use qcow2::merge::{PreparedRebase, Rebase, RebaseOptions, RebasePlan};
use qcow2::storage::OsHost;

use super::shown_plan::ShownPlan;
use super::{interrupted, open, stopped, up};
use crate::call::Call;
use crate::cli::RebaseArgs;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Console;
use crate::output::human::{Fields, list};
use crate::output::json::value;
use crate::output::progress::Meter;
use crate::signals::Stop;

/// Compares and plans, and carries the plan out unless it is a dry run.
pub(super) fn run(args: &RebaseArgs, call: &Call, console: &Console) -> Result<Exit, Failure> {
    for image in [Some(&args.image), args.onto.as_ref()].into_iter().flatten() {
        interrupted::refuse(image, call, console)?;
    }
    let stop = Stop::on_signals(call)?;
    let options = options(args);
    if !args.up.dry_run {
        up::heal(&args.image, &options.up, call, console)?;
    }
    let meter = Meter::without_events(console, "comparing");
    let prepared = Rebase::prepare(Arc::new(OsHost), &args.image, &options, &meter, stop.flag());
    meter.clear();
    drop(meter);
    let prepared = prepared.map_err(|e| stopped::unchanged(&e, &stop, call))?;
    open::warn_unlocked(&prepared.unlocked(), console);
    let plan = prepared.plan().clone();
    let is_nothing = matches!(prepared, PreparedRebase::Nothing(_));
    let words = if is_nothing { format!("nothing to do: {}", afterwards(&plan)) } else { plan_words(&plan) };
    let planned = ShownPlan { plan: value(&plan), words, is_nothing };
    if !planned.tell(args.up.dry_run, console)? {
        return Ok(Exit::DONE);
    }
    let meter = Meter::new(console, "rebasing");
    let kept = "in the middle; what was taken in stays";
    let report =
        prepared.execute(&meter, stop.flag()).map_err(|e| stopped::halfway(&e, &stop, &meter, call, kept))?;
    drop(meter);
    planned.tell_result(
        value(&report),
        up::result(&afterwards(&plan), &report),
        "the rebase is done",
        console,
    )
}

fn options(args: &RebaseArgs) -> RebaseOptions {
    let mut options = RebaseOptions::default();
    options.onto.clone_from(&args.onto);
    options.onto_format = args.onto_format.map(ImageFormat::from);
    options.up = up::options(&args.up);
    options
}

/// The chain as it will be.
fn afterwards(plan: &RebasePlan) -> String {
    match (&plan.onto, plan.format) {
        (Some(onto), Some(format)) => {
            format!("{} reads through {} ({format})", shown(&plan.image), shown(onto))
        }
        _ => format!("{} has no backing file, and needs no other image", shown(&plan.image)),
    }
}

fn plan_words(plan: &RebasePlan) -> String {
    let mut fields = Fields::default();
    let onto = plan.onto.as_ref().map_or_else(|| "nothing".to_owned(), shown);
    fields.add("rebase", format!("{} onto {onto}", shown(&plan.image)));
    if plan.is_resumed {
        fields.add("continues", "where a rebase or a pull was stopped");
    }
    up::add_cost(&mut fields, plan.totals, plan.file_size_after, plan.is_room_unknown);
    fields.add("afterwards", afterwards(plan));
    if plan.onto.is_some() {
        fields.add("from then on", format!("nobody may write to {onto}, or to what it reads through"));
    }
    if !plan.unneeded.is_empty() {
        let unneeded = list(&plan.unneeded);
        fields.add("not needed by it", format!("{unneeded}; other images may use what is there"));
    }
    fields.render()
}
