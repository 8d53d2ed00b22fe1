//! `qmerge pull`: moves what the layers below show up into an image.

use std::sync::Arc;

use qcow2::chain::Chain;
use qcow2::error::shown;
use qcow2::merge::{PreparedPull, Pull, PullOptions, PullPlan};
use qcow2::storage::OsHost;

use super::shown_plan::ShownPlan;
use super::{interrupted, open, stopped, up};
use crate::call::Call;
use crate::cli::PullArgs;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Console;
use crate::output::human::{Fields, list};
use crate::output::json::value;
use crate::output::progress::Meter;
use crate::signals::Stop;

/// Plans, and carries the plan out unless it is a dry run.
pub(super) fn run(args: &PullArgs, call: &Call, console: &Console) -> Result<Exit, Failure> {
    interrupted::refuse(&args.active, call, console)?;
    let stop = Stop::on_signals(call)?;
    let options = options(args);
    if !args.up.dry_run {
        up::heal(&args.active, &options.up, call, console)?;
    }
    let prepared = Pull::prepare(Arc::new(OsHost), &args.active, &options, stop.flag())
        .map_err(|e| stopped::unchanged(&e, &stop, call))?;
    open::warn_unlocked(&prepared.chain().map(Chain::unlocked).unwrap_or_default(), console);
    let plan = prepared.plan().clone();
    let is_nothing = matches!(prepared, PreparedPull::Nothing(_));
    let words = if is_nothing { format!("nothing to do: {}", afterwards(&plan)) } else { plan_words(&plan) };
    let planned = ShownPlan { plan: value(&plan), words, is_nothing };
    if !planned.tell(args.up.dry_run, console)? {
        return Ok(Exit::DONE);
    }
    let meter = Meter::new(console, "pulling");
    let kept = "in the middle; what was taken in stays";
    let report =
        prepared.execute(&meter, stop.flag()).map_err(|e| stopped::halfway(&e, &stop, &meter, call, kept))?;
    drop(meter);
    planned.tell_result(value(&report), up::result(&afterwards(&plan), &report), "the pull is done", console)
}

fn options(args: &PullArgs) -> PullOptions {
    let mut options = PullOptions::default();
    options.base.clone_from(&args.base);
    options.up = up::options(&args.up);
    options
}

/// The chain as it will be.
fn afterwards(plan: &PullPlan) -> String {
    match &plan.base {
        Some(base) => format!("{} reads through {}", shown(&plan.active), shown(base)),
        None => format!("{} has no backing file, and needs no other image", shown(&plan.active)),
    }
}

fn plan_words(plan: &PullPlan) -> String {
    let mut fields = Fields::default();
    let pulled = list(&plan.pulled);
    let from = if pulled.is_empty() { "nothing more".to_owned() } else { pulled.clone() };
    fields.add("pull", format!("{from} into {}", shown(&plan.active)));
    if plan.is_resumed {
        fields.add("continues", "where the same pull was stopped");
    }
    up::add_cost(&mut fields, plan.totals, plan.file_size_after, plan.is_room_unknown);
    fields.add("afterwards", afterwards(plan));
    if !pulled.is_empty() {
        fields.add("not needed by it", format!("{pulled}; other images may use what is there"));
    }
    fields.render()
}
