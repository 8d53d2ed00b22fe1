//! The verbs that start a merge, step by step.

use std::cell::Cell;
use std::path::PathBuf;
use std::time::Instant;

use qcow2::error::shown;
use qmp_client::{Connection, Disk, Graph, Kind, Merge, Procedure, State, StateFile, Throttle};

use super::drive::Drive;
use super::files::Files;
use super::left::{self, Left};
use super::outcome::Outcome;
use super::plan::{End, Plan, fields, show, text};
use super::tidy::Wishes;
use super::trouble::{self, Session};
use super::{checks, commit, find, guard, pull, siblings, states};
use crate::cli::{JobArgs, LiveCommitArgs, PullArgs};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Console;
use crate::output::human::{printable, shell_word};
use crate::output::progress::Meter;
use crate::signals::Stop;

/// `live commit`.
pub(super) fn commit(
    session: &Session<'_>,
    monitor: Connection,
    graph: &Graph,
    args: &LiveCommitArgs,
    console: &Console,
) -> Result<Exit, Failure> {
    let files = Files::of(&monitor);
    let disk = find(graph, &args.disk, session)?;
    guard::disk(session, disk)?;
    let (disks, state_dir) = (std::slice::from_ref(disk), args.job.state_dir.as_deref());
    if !args.job.dry_run {
        states::sweep(session, disks, state_dir);
    }
    let known = states::of(session, disks, state_dir)?;
    let is_meant = |state: &State| left::is_this_commit(state, disk, args);
    let left = Left { session, monitor: &monitor, graph, disk, files: &files, known: &known, console };
    let of_state = |state: &State| Wanted {
        kind: state.kind,
        end: commit::end(state.kind == Kind::ActiveCommit, args),
        delete: args.delete || state.delete,
        converge: args.converge,
        no_lock: args.no_lock,
    };
    // Before the chain is looked at: it may be the one that the merge has left.
    if let Some(state) = under_way(session, &monitor, graph, disk, &known)?.filter(is_meant) {
        let (job, wanted) = (&args.job, of_state(&state));
        let start = Start {
            session,
            graph,
            disk,
            files: &files,
            job,
            scan: &args.scan,
            console,
            known: &known,
            wanted,
        };
        return start.pick_up(monitor);
    }
    let wishes = Wishes { delete: args.delete, scan: siblings::absolute(&args.scan), no_lock: args.no_lock };
    if let Some(exit) = left.finish_meant(&is_meant, wishes, args.job.dry_run)? {
        return Ok(exit);
    }
    if let Some(base) = args.top.as_ref().and_then(|top| commit::merged_before(disk, top)) {
        let why =
            format!("{} was already merged into {}", args.top.as_deref().unwrap_or_default(), shown(base));
        return nothing_to_do(console, disk.name(), &why);
    }
    let Some(range) = commit::range(session, disk, args)? else {
        return match left.switched(&|_| true) {
            Some((file, state)) => Err(states::recover_first(session, file, state)),
            None => nothing_to_do(console, disk.name(), "its chain has one layer"),
        };
    };
    let wanted = Wanted {
        kind: if range.above.is_none() { Kind::ActiveCommit } else { Kind::Commit },
        end: commit::end(range.above.is_none(), args),
        delete: args.delete,
        converge: args.converge,
        no_lock: args.no_lock,
    };
    let job = &args.job;
    let start =
        Start { session, graph, disk, files: &files, job, scan: &args.scan, console, known: &known, wanted };
    start.no_other_job(&monitor)?;
    let (commit, plan) = commit::plan(session, &files, disk, &range, args)?;
    start.carry_out(monitor, commit, &plan)
}

/// `live pull`.
pub(super) fn pull(
    session: &Session<'_>,
    monitor: Connection,
    graph: &Graph,
    args: &PullArgs,
    console: &Console,
) -> Result<Exit, Failure> {
    let files = Files::of(&monitor);
    let disk = find(graph, &args.disk, session)?;
    guard::disk(session, disk)?;
    let (disks, state_dir) = (std::slice::from_ref(disk), args.job.state_dir.as_deref());
    if !args.job.dry_run {
        states::sweep(session, disks, state_dir);
    }
    let known = states::of(session, disks, state_dir)?;
    let is_meant = |state: &State| left::is_this_pull(state, disk, args);
    let wanted = || Wanted {
        kind: Kind::Pull,
        end: if args.job.async_ { End::WaitForFinish } else { End::Finish },
        delete: false,
        converge: false,
        no_lock: false,
    };
    let start = |wanted: Wanted| {
        let job = &args.job;
        Start { session, graph, disk, files: &files, job, scan: &[], console, known: &known, wanted }
    };
    if under_way(session, &monitor, graph, disk, &known)?.is_some_and(|state| is_meant(&state)) {
        return start(wanted()).pick_up(monitor);
    }
    let left = Left { session, monitor: &monitor, graph, disk, files: &files, known: &known, console };
    if let Some(exit) = left.finish_meant(&is_meant, Wishes::default(), args.job.dry_run)? {
        return Ok(exit);
    }
    let Some(base) = pull::base(session, disk, args)? else {
        return match left.switched(&|_| true) {
            Some((file, state)) => Err(states::recover_first(session, file, state)),
            None => nothing_to_do(console, disk.name(), "no layer lies between"),
        };
    };
    let start = start(wanted());
    start.no_other_job(&monitor)?;
    let (pull, plan) = pull::plan(session, &files, disk, base, args)?;
    start.carry_out(monitor, pull, &plan)
}

/// What the user asks for, in the words of a state file.
struct Wanted {
    kind: Kind,
    end: End,
    delete: bool,
    converge: bool,
    no_lock: bool,
}

/// A merge that is about to start, or has been started by an earlier call.
struct Start<'a> {
    session: &'a Session<'a>,
    graph: &'a Graph,
    disk: &'a Disk,
    files: &'a Files,
    job: &'a JobArgs,
    scan: &'a [PathBuf],
    console: &'a Console,
    /// All states that may speak of the disk.
    known: &'a [(StateFile, State)],
    wanted: Wanted,
}

/// The state of the merge of this disk whose job QEMU has, or of which only the end is not noted.
fn under_way(
    session: &Session<'_>,
    monitor: &Connection,
    graph: &Graph,
    disk: &Disk,
    known: &[(StateFile, State)],
) -> Result<Option<State>, Failure> {
    let found = Merge::attach(monitor, graph, disk, known).map_err(|e| session.failure(&e))?;
    Ok(found.map(|merge| merge.state().clone()))
}

impl Start<'_> {
    /// Refuses another job on the disk.
    fn no_other_job(&self, monitor: &Connection) -> Result<(), Failure> {
        let jobs = self.graph.jobs(monitor).map_err(|e| self.session.failure(&e))?;
        checks::no_other_job(self.session, self.disk, &jobs)
    }

    /// Goes on with a merge that is under way.
    fn pick_up(&self, monitor: Connection) -> Result<Exit, Failure> {
        let found = Merge::attach(&monitor, self.graph, self.disk, self.known);
        let merge = found.map_err(|e| self.session.failure(&e))?;
        let mut merge = merge.ok_or_else(|| trouble::no_job(self.session, self.disk))?;
        if self.job.dry_run || self.job.async_ {
            Outcome::started(self.session, merge.state()).tell(self.console)?;
            return Ok(Exit::DONE);
        }
        self.console
            .note(&format!("picked up again: the merge of {} is under way", printable(self.disk.name())));
        let drive = self.drive(self.throttle(&monitor)?)?;
        let step = drive.follow(&monitor, &mut merge)?;
        drop(merge);
        drop(monitor);
        drive.take_turns(step)
    }

    /// Shows the plan, and does what it says.
    fn carry_out(&self, monitor: Connection, mut procedure: Procedure, plan: &Plan) -> Result<Exit, Failure> {
        let warning = checks::room(self.session, plan)?;
        let throttle = self.throttle(&monitor)?;
        let file = states::place(self.session, self.files, self.disk, self.job.state_dir.as_deref())?;
        states::left_over(self.session, self.graph, self.disk, self.known, &file, self.console)?;
        announce(plan, self.job, self.console)?;
        if let Some(warning) = warning {
            self.console.note(&warning);
        }
        if self.job.dry_run {
            self.console.note("dry run: nothing was changed");
            return Ok(Exit::DONE);
        }
        procedure.preflight(&monitor).map_err(|e| self.not_begun(&e, plan))?;
        let wishes = qmp_client::Wishes {
            delete: self.wanted.delete,
            allow_stale: plan.stale().next().is_some(),
            scan: siblings::absolute(self.scan),
            pivot: self.wanted.end == End::Pivot,
            keep_overlay: self.wanted.end == End::KeepOverlay,
            files_are_elsewhere: !self.files.strangers(self.disk).is_empty(),
        };
        let drive = self.drive(throttle)?;
        let merge = Merge::begin(&monitor, procedure, file, self.session.address, &wishes);
        let mut merge = merge.map_err(|e| self.not_begun(&e, plan))?;
        if self.job.async_ {
            Outcome::started(self.session, merge.state()).tell(self.console)?;
            return Ok(Exit::DONE);
        }
        let step = drive.follow(&monitor, &mut merge)?;
        drop(merge);
        drop(monitor);
        drive.take_turns(step)
    }

    /// QEMU refused what the merge needs, before anything was changed.
    fn not_begun(&self, error: &qmp_client::Error, plan: &Plan) -> Failure {
        if !matches!(error, qmp_client::Error::Command { .. }) {
            return self.session.failure(error);
        }
        let written = plan.relink.iter().map(|(overlay, _)| overlay).chain([plan.receiver()]);
        let files: Vec<_> = written.map(|layer| shell_word(&layer.file)).collect();
        let hint = format!(
            "nothing was changed; QEMU must be able to write these: ls -l {}; then again: {}",
            files.join(" "),
            self.session.again()
        );
        self.session.failure_with(error, hint)
    }

    /// What can slow the guest down, if the user allows that.
    fn throttle(&self, monitor: &Connection) -> Result<Option<Throttle>, Failure> {
        if !self.wanted.converge {
            return Ok(None);
        }
        Throttle::of(monitor, self.disk).map(Some).map_err(|e| {
            let hint = "leave --converge out; the merge gets ready when the guest writes less";
            self.session.failure_with(&e, hint.to_owned())
        })
    }

    fn drive(&self, throttle: Option<Throttle>) -> Result<Drive<'_>, Failure> {
        Ok(Drive {
            session: self.session,
            console: self.console,
            meter: Meter::new(
                self.console,
                if self.wanted.kind == Kind::Pull { "pulling" } else { "merging" },
            ),
            stop: Stop::watch().map_err(|e| trouble::no_signals(self.session, &e))?,
            began: Instant::now(),
            timeout: self.job.timeout,
            disk: self.disk.name(),
            state_dir: self.job.state_dir.as_deref(),
            end: self.wanted.end,
            owns: true,
            wishes: Wishes {
                delete: self.wanted.delete,
                scan: self.scan.to_vec(),
                no_lock: self.wanted.no_lock,
            },
            throttle,
            said_stalled: Cell::new(false),
        })
    }
}

fn nothing_to_do(console: &Console, disk: &str, why: &str) -> Result<Exit, Failure> {
    console.event(
        "result",
        serde_json::json!({ "disk": disk, "status": "nothing-to-do", "nothing-to-do": why }),
    )?;
    console.result(&format!("nothing to do for {}: {why}", printable(disk)))?;
    Ok(Exit::DONE)
}

/// Shows the plan, to people on standard error unless it is all that is asked for.
fn announce(plan: &Plan, args: &JobArgs, console: &Console) -> Result<(), Failure> {
    console.event("plan", fields(plan))?;
    if args.dry_run {
        // An active commit makes base durable itself.
        let flush = match &plan.relink {
            Some(_) => format!(" ({} is flushed before job-finalize)", show(plan.receiver())),
            None => String::new(),
        };
        let commands = plan.commands.iter().map(|(name, arguments)| {
            format!("  {}\n", printable(&format!(r#"{{"execute": "{name}", "arguments": {arguments}}}"#)))
        });
        let commands: String = commands.collect();
        console.result(&format!("{}\n\ncommands for QEMU{flush}:\n{commands}", text(plan)))?;
    } else if !console.is_json() {
        console.note(&text(plan));
    }
    Ok(())
}
