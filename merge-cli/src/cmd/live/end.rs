//! `qmerge live finish` and `pivot`: end a merge that an earlier call or another client has started.

use qmp_client::{Connection, Driver, End, Kind, Outline, Run, TidyOptions};

use super::follow::Follow;
use super::outcome::Outcome;
use super::trouble::{self, Session};
use super::{find, foreign, guard, look};
use crate::cli::EndArgs;
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::hint::{Hint, HintKind};
use crate::output::Console;
use crate::output::human::printable;
use crate::output::progress::Meter;
use crate::signals::Stop;

/// Waits until everything is copied, and switches.
pub(super) fn run(
    session: &Session<'_>,
    monitor: Connection,
    args: &EndArgs,
    end: End,
    console: &Console,
) -> Result<Exit, Failure> {
    let machine = look(session, &monitor)?;
    let disk = find(&machine, &args.disk, session)?;
    guard::disk(session, disk)?;
    let mut options = TidyOptions::new(args.delete, &args.scan);
    options.no_lock = args.no_lock;
    let state_dir = args.state_dir.as_deref();
    let found = machine.attach(disk, state_dir).map_err(|e| session.failure(&e))?;
    let Some(mut merge) = found else {
        let left = machine.left_by(disk, end == End::Pivot, state_dir).map_err(|e| session.failure(&e))?;
        let Some(left) = left else { return foreign::end(session, &machine, disk, end, console) };
        Outcome::of_left(session, &machine, disk, &left, &options, console)?.tell(console)?;
        return Ok(Exit::DONE);
    };
    let outline = merge.outline();
    fits(session, &outline, end)?;
    if end == End::Pivot {
        machine.may_pivot(disk, &mut merge, args.allow_stale, &options).map_err(|e| session.failure(&e))?;
    }
    let mut run = Run::new(session.address, &args.disk, end);
    run.timeout = args.timeout;
    run.tidy = options;
    run.state_dir.clone_from(&args.state_dir);
    let what = if outline.kind == Kind::Pull { "pulling" } else { "merging" };
    let mut follow = Follow {
        session,
        console,
        meter: Meter::new(console, what),
        stop: Stop::watch().map_err(|e| trouble::no_signals(session, &e))?,
        run,
        can_converge: false,
    };
    let step = follow.step(&mut merge)?;
    drop(merge);
    drop(machine);
    drop(monitor);
    follow.until_over(step)
}

/// Whether this verb ends such a merge.
fn fits(session: &Session<'_>, merge: &Outline, end: End) -> Result<(), Failure> {
    let (is, other) = match (merge.kind, end) {
        (Kind::ActiveCommit, End::Finish) => ("merges the active layer, so it ends with a pivot", "pivot"),
        (Kind::Commit | Kind::Pull, End::Pivot) => {
            ("leaves the active layer where it is, so there is no pivot", "finish")
        }
        _ => return Ok(()),
    };
    Err(Report {
        kind: "usage",
        message: format!("the job {} of {} {is}", printable(&merge.job), printable(&merge.disk)),
        hint: Hint::command(HintKind::LiveEnd, "", session.other(&[other, &merge.disk])).into(),
        exit: Exit::USAGE,
    }
    .into())
}
