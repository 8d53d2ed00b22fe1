//! `qmerge commit`: merges the layers above base, up to top, down into base.

mod human;
mod libvirt;
mod live;

use std::path::Path;
use std::sync::Arc;

use qcow2::Error;
use qcow2::chain::Chain;
use qcow2::merge::{
    self, BaseChoice, Commit, CommitOptions, Plan, Prepared, Report, Settled, UnfinishedMerge,
};
use qcow2::storage::OsHost;
use qmp_client::libvirt::{Images, Naming};
use serde_json::Value;

use super::{interrupted, open, stopped};
use crate::call::Call;
use crate::cli::CommitArgs;
use crate::domains;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::json::{merged, value};
use crate::output::progress::Meter;
use crate::output::{Console, size};
use crate::signals::Stop;

/// Plans, and carries the plan out unless it is a dry run.
pub(super) fn run(args: &CommitArgs, call: &Call, console: &Console) -> Result<Exit, Failure> {
    merge(args, call, console, &Stop::on_signals(call)?)
}

/// As [`run`], where signals are watched already.
pub(super) fn merge(args: &CommitArgs, call: &Call, console: &Console, stop: &Stop) -> Result<Exit, Failure> {
    interrupted::refuse_with(&args.active, call, console, |holders| {
        live::in_use(&args.active, holders, args, call)
    })?;
    let options = options(args);
    let healed = if args.dry_run { Ok(Vec::new()) } else { merge::heal(&OsHost, &args.active, &options) };
    let prepared = healed.and_then(|healed| {
        open::tell_healed(&healed, console);
        Commit::prepare(Arc::new(OsHost), &args.active, &options, stop.flag())
    });
    if let Err(Error::InUse { path, holders }) = &prepared {
        return Err(live::in_use(path, holders, args, call));
    }
    let prepared = prepared.map_err(|e| stopped::unchanged(&e, stop, call))?;
    open::warn_unlocked(&prepared.chain().map(Chain::unlocked).unwrap_or_default(), console);
    let planned = Planned::of(&prepared);
    let definitions = domains::read();
    let images = planned.images();
    let naming = value(&Naming::of(&images, &definitions));
    console.event("plan", merged(planned.json(), naming))?;
    let domains = libvirt::text(&definitions, &images);
    let words = planned.words(args, &domains);
    if args.dry_run {
        console.result(&words)?;
        console.note("dry run: nothing was changed");
        return Ok(Exit::DONE);
    }
    if matches!(planned, Planned::Merge(_)) && !console.is_json() {
        console.note(&words);
    }
    let is_nothing = matches!(prepared, Prepared::Nothing(_));
    let meter = Meter::new(console, "merging");
    let report = prepared
        .execute(&meter, stop.flag())
        .map_err(|e| stopped::halfway(&e, stop, &meter, call, &kept(planned.base(), args)))?;
    drop(meter);
    let words = match &planned {
        Planned::Merge(plan) => human::result(plan, &report),
        Planned::Settled(settled) => human::settled_result(settled, &report),
    };
    let printed = console.event("result", came_out(planned.json(), &report));
    let printed = printed.and_then(|()| console.result(&words));
    printed.map(|()| Exit::DONE).map_err(|e| if is_nothing { e } else { e.behind("the merge is done") })
}

/// What is shown before anything is done.
enum Planned {
    Merge(Box<Plan>),
    /// Nothing is merged, and why.
    Settled(Settled),
}

impl Planned {
    fn of(prepared: &Prepared) -> Self {
        match prepared {
            Prepared::Merge(commit) => Self::Merge(Box::new(commit.plan().clone())),
            Prepared::Finish(finish) => Self::Settled(finish.settled().clone()),
            Prepared::Nothing(nothing) => Self::Settled(nothing.settled().clone()),
        }
    }

    fn base(&self) -> &Path {
        match self {
            Self::Merge(plan) => &plan.base,
            Self::Settled(settled) => &settled.base,
        }
    }

    fn images(&self) -> Images<'_> {
        match self {
            Self::Merge(plan) => Images::of(plan),
            Self::Settled(settled) => Images::settled(settled),
        }
    }

    fn json(&self) -> Value {
        match self {
            Self::Merge(plan) => value(&**plan),
            Self::Settled(settled) => value(settled),
        }
    }

    fn words(&self, args: &CommitArgs, domains: &[(&'static str, String)]) -> String {
        match self {
            Self::Merge(plan) => human::plan(plan, args, domains),
            Self::Settled(settled) => human::settled(settled, args),
        }
    }
}

/// What a plan says that a result does not.
const OF_PLANS: [&str; 9] = [
    "restore-points-lost",
    "searched",
    "unreadable",
    "room-unknown",
    "signs",
    "data-files",
    "strangers",
    "resumed",
    "begins-anew",
];

/// The fields of the result: what stays true of the plan, as it came out.
fn came_out(mut plan: Value, report: &Report) -> Value {
    if let Value::Object(fields) = &mut plan {
        fields.retain(|key, _| !OF_PLANS.contains(&key.as_str()));
    }
    merged(plan, value(report))
}

fn options(args: &CommitArgs) -> CommitOptions {
    let base = match &args.base {
        Some(layer) => BaseChoice::Named(layer.clone()),
        None if args.shallow => BaseChoice::Shallow,
        None => BaseChoice::Bottom,
    };
    let mut options = CommitOptions::new(open::options(&args.open));
    options.base = base;
    options.top.clone_from(&args.top);
    options.delete = args.delete;
    options.keep_active = args.keep_active;
    options.verify = args.verify;
    options.drop_bitmaps = args.safety.drop_bitmaps;
    options.allow_snapshot_change = args.safety.allow_snapshot_change;
    options.allow_shared_base = args.safety.allow_shared_base;
    options.restart = args.restart;
    options.journal_dir.clone_from(&args.journal_dir);
    options.scan.clone_from(&args.safety.scan);
    options
}

/// The progress of a merge that was stopped, as `info` tells it: durable data counts, also what was done before
/// it was continued.
fn kept(base: &Path, args: &CommitArgs) -> String {
    // If it cannot be read, say nothing about it.
    match merge::unfinished_merge(&OsHost, base, args.journal_dir.as_deref()) {
        Ok(Some(UnfinishedMerge { is_removing: true, .. })) => {
            "behind the merge, while layers were removed".to_owned()
        }
        Ok(Some(UnfinishedMerge { is_switching: true, .. })) => {
            "when all was merged, before the chain was changed".to_owned()
        }
        Ok(Some(UnfinishedMerge { done, total, percent, .. })) if done > 0 => {
            format!("at {percent} %, {} of {} are done for good", size::short(done), size::short(total))
        }
        _ => "before anything was done for good".to_owned(),
    }
}
