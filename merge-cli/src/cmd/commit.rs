//! `qmerge commit`: merges the layers above base, up to top, down into base.

mod human;
mod json;
mod libvirt;
mod live;

use std::sync::Arc;

use qcow2::merge::{self, BaseChoice, Commit, CommitOptions, Pending, Plan};
use qcow2::storage::OsHost;
use qcow2::{Error, ErrorKind};

use super::open;
use crate::call::Call;
use crate::cli::CommitArgs;
use crate::domains;
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::output::progress::Meter;
use crate::output::{Console, size};
use crate::signals::Stop;

/// Plans, and carries the plan out unless it is a dry run.
pub(super) fn run(args: &CommitArgs, call: &Call, console: &Console) -> Result<Exit, Failure> {
    merge(args, call, console, &Stop::on_signals(call)?)
}

/// As [`run`], where signals are watched already.
pub(super) fn merge(args: &CommitArgs, call: &Call, console: &Console, stop: &Stop) -> Result<Exit, Failure> {
    live::refuse_interrupted(args, call)?;
    let prepared = Commit::prepare(Arc::new(OsHost), &args.active, &options(args), stop.flag());
    if let Err(Error::InUse { path, holders }) = &prepared {
        return Err(live::in_use(path, holders, args, call));
    }
    let commit = prepared.map_err(|e| unchanged(&e, stop, call))?;
    open::warn_unlocked(&commit.chain().unlocked(), console);
    let plan = commit.plan().clone();
    let definitions = domains::read();
    let (naming, unread) = libvirt::json(&definitions, &plan, args);
    let mut fields = json::plan(&plan);
    fields["libvirt"] = naming;
    fields["libvirt-unread"] = unread;
    console.event("plan", fields)?;
    let domains = libvirt::text(&definitions, &plan, args);
    if args.dry_run {
        console.result(&human::plan(&plan, args, &domains))?;
        console.note("dry run: nothing was changed");
        return Ok(Exit::DONE);
    }
    if plan.nothing_to_do.is_none() && !console.is_json() {
        console.note(&human::plan(&plan, args, &domains));
    }
    let meter = Meter::new(console, "merging");
    let report = commit
        .execute(&meter, stop.flag())
        .map_err(|e| halfway(&e, stop, &meter, call, &kept(&plan, args)))?;
    drop(meter);
    console.event("result", json::result(&plan, &report))?;
    console.result(&human::result(&plan, &report))?;
    Ok(Exit::DONE)
}

fn options(args: &CommitArgs) -> CommitOptions {
    let base = match &args.base {
        Some(layer) => BaseChoice::Named(layer.clone()),
        None if args.shallow => BaseChoice::Shallow,
        None => BaseChoice::Bottom,
    };
    CommitOptions {
        base,
        top: args.top.clone(),
        open: open::options(&args.open),
        delete: args.delete,
        keep_active: args.keep_active,
        verify: args.verify,
        drop_bitmaps: args.drop_bitmaps,
        allow_snapshot_change: args.allow_snapshot_change,
        allow_shared_base: args.allow_shared_base,
        restart: args.restart,
        journal_dir: args.journal_dir.clone(),
        scan: args.scan.clone(),
    }
}

/// A failure before the first write.
fn unchanged(error: &Error, stop: &Stop, call: &Call) -> Failure {
    match (error.kind(), stop.exit()) {
        (ErrorKind::Cancelled, Some(exit)) => Failure::interrupted("before the first write", exit, call),
        _ => Failure::engine(error, call),
    }
}

/// How far a merge that was stopped is, of the whole merge and as `info` tells it: what is durable counts, and what was
/// done before it went on.
fn kept(plan: &Plan, args: &CommitArgs) -> String {
    // Where it cannot be read, nothing is said.
    match merge::pending(&OsHost, &plan.base, args.journal_dir.as_deref()) {
        Ok(Some(Pending { is_removing: true, .. })) => {
            "behind the merge, while layers were removed".to_owned()
        }
        Ok(Some(Pending { is_switching: true, .. })) => {
            "when all was merged, before the chain was changed".to_owned()
        }
        Ok(Some(Pending { done, total, percent, .. })) if done > 0 => {
            format!("at {percent} %, {} of {} are done for good", size::short(done), size::short(total))
        }
        _ => "before anything was done for good".to_owned(),
    }
}

/// A failure while the plan was carried out: the guest's view is what it was, and what is `kept` need not be
/// done again.
fn halfway(error: &Error, stop: &Stop, meter: &Meter<'_>, call: &Call, kept: &str) -> Failure {
    meter.clear();
    if let (ErrorKind::Cancelled, Some(exit)) = (error.kind(), stop.exit()) {
        return Failure::interrupted(kept, exit, call);
    }
    match Failure::engine(error, call) {
        Failure::Reported(report) => {
            let exit = if error.kind() == ErrorKind::Io { Exit::HALFWAY } else { report.exit };
            let message = format!("{}\nstopped {kept}; nothing is lost", report.message);
            Report { exit, message, ..report }.into()
        }
        failure => failure,
    }
}
