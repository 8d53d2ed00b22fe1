//! `qmerge pull`: moves what the layers below show up into an image.

use std::sync::Arc;

use qcow2::Error;
use qcow2::chain::Chain;
use qcow2::error::shown;
use qcow2::merge::{PreparedPull, Pull, PullOptions, PullPlan};
use qcow2::storage::OsHost;

use super::{interrupted, open, stopped, up};
use crate::call::Call;
use crate::cli::PullArgs;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::human::{Fields, list, plural};
use crate::output::json::{merged, value};
use crate::output::progress::Meter;
use crate::output::{Console, size};
use crate::signals::Stop;

/// Plans, and carries the plan out unless it is a dry run.
pub(super) fn run(args: &PullArgs, call: &Call, console: &Console) -> Result<Exit, Failure> {
    interrupted::refuse(&args.active, call, console, |holders| {
        let error = Error::InUse { path: args.active.clone(), holders: holders.to_vec() };
        Failure::engine(&error, call)
    })?;
    let stop = Stop::on_signals(call)?;
    let options = options(args);
    if !args.dry_run {
        up::heal(&args.active, &options.open, options.journal_dir.as_deref(), call, console)?;
    }
    let prepared = Pull::prepare(Arc::new(OsHost), &args.active, &options, stop.flag())
        .map_err(|e| stopped::unchanged(&e, &stop, call))?;
    open::warn_unlocked(&prepared.chain().map(Chain::unlocked).unwrap_or_default(), console);
    let plan = prepared.plan().clone();
    let is_nothing = matches!(prepared, PreparedPull::Nothing(_));
    console.event("plan", value(&plan))?;
    let words = if is_nothing { nothing(&plan) } else { plan_words(&plan) };
    if args.dry_run {
        console.result(&words)?;
        console.note("dry run: nothing was changed");
        return Ok(Exit::DONE);
    }
    if !is_nothing && !console.is_json() {
        console.note(&words);
    }
    let meter = Meter::new(console, "pulling");
    let kept = "in the middle; what was taken in stays";
    let report =
        prepared.execute(&meter, stop.flag()).map_err(|e| stopped::halfway(&e, &stop, &meter, call, kept))?;
    drop(meter);
    let words = if is_nothing { words } else { up::result(&afterwards(&plan), &report) };
    let printed = console.event("result", merged(value(&plan), value(&report)));
    let printed = printed.and_then(|()| console.result(&words));
    printed.map(|()| Exit::DONE).map_err(|e| if is_nothing { e } else { e.behind("the pull is done") })
}

fn options(args: &PullArgs) -> PullOptions {
    let mut options = PullOptions::new(open::options(&args.open));
    options.base.clone_from(&args.base);
    options.verify = args.verify;
    options.allow_snapshot_change = args.allow_snapshot_change;
    options.journal_dir.clone_from(&args.journal_dir);
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
    fields.add("to copy", size::exact(plan.totals.bytes_to_copy));
    fields.add("to zero", size::exact(plan.totals.bytes_to_zero));
    if plan.totals.clusters_to_allocate > 0 {
        fields.add("to allocate", plural(plan.totals.clusters_to_allocate, "cluster", "clusters"));
    }
    fields.add("its file", format!("at most {} afterwards", size::exact(plan.file_size_after)));
    if plan.is_room_unknown {
        fields.add("not known", "whether there is room");
    }
    fields.add("afterwards", afterwards(plan));
    if !pulled.is_empty() {
        fields.add("not needed by it", format!("{pulled}; other images may use what is there"));
    }
    fields.render()
}

fn nothing(plan: &PullPlan) -> String {
    format!("nothing to do: {}", afterwards(plan))
}
