//! `qmerge live finish` and `pivot`: the end of a merge that an earlier call has started, or another client.

use std::cell::Cell;
use std::time::Instant;

use qmp_client::{Connection, Graph, Kind, Merge, State};

use super::drive::Drive;
use super::files::Files;
use super::left::Left;
use super::plan::End;
use super::tidy::Wishes;
use super::trouble::{self, Session};
use super::{find, foreign, guard, states};
use crate::cli::EndArgs;
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::output::Console;
use crate::output::human::{printable, shell_word};
use crate::output::progress::Meter;
use crate::signals::Stop;

/// Waits until all is copied, and switches.
pub(super) fn run(
    session: &Session<'_>,
    monitor: Connection,
    graph: &Graph,
    args: &EndArgs,
    end: End,
    console: &Console,
) -> Result<Exit, Failure> {
    let disk = find(graph, &args.disk, session)?;
    guard::disk(session, disk)?;
    let known = states::of(session, std::slice::from_ref(disk), None)?;
    let files = Files::of(&monitor);
    let left = Left { session, monitor: &monitor, graph, disk, files: &files, known: &known, console };
    let fitting = |state: &State| (state.kind == Kind::ActiveCommit) == (end == End::Pivot);
    let mut merge = match Merge::attach(&monitor, graph, disk, &known).map_err(|e| session.failure(&e))? {
        Some(merge) => merge,
        None if left.switched(&fitting).is_some() => {
            let wishes = wishes(args, args.delete);
            return left.finish_meant(&fitting, wishes, false).map(|exit| exit.unwrap_or(Exit::DONE));
        }
        None => return foreign::end(session, &monitor, graph, disk, end, console),
    };
    let state = merge.state();
    fits(session, state, end)?;
    let drive = Drive {
        session,
        console,
        meter: Meter::new(console, if state.kind == Kind::Pull { "pulling" } else { "merging" }),
        stop: Stop::watch().map_err(|e| trouble::no_signals(session, &e))?,
        began: Instant::now(),
        timeout: args.timeout,
        disk: &args.disk,
        state_dir: None,
        end,
        owns: false,
        wishes: wishes(args, args.delete || state.delete),
        throttle: None,
        said_stalled: Cell::new(false),
    };
    let step = drive.follow(&monitor, &mut merge)?;
    drop(merge);
    drop(monitor);
    drive.take_turns(step)
}

fn wishes(args: &EndArgs, delete: bool) -> Wishes {
    Wishes { delete, scan: args.scan.clone(), no_lock: args.no_lock }
}

/// Whether this verb ends such a merge.
fn fits(session: &Session<'_>, state: &State, end: End) -> Result<(), Failure> {
    let (is, other) = match (state.kind, end) {
        (Kind::ActiveCommit, End::Finish) => ("merges the active layer, so it ends with a pivot", "pivot"),
        (Kind::Commit | Kind::Pull, End::Pivot) => {
            ("leaves the active layer where it is, so there is no pivot", "finish")
        }
        _ => return Ok(()),
    };
    Err(Report {
        kind: "usage",
        message: format!("the job {} of {} {is}", printable(&state.job), printable(&state.disk)),
        hint: session.other(&format!("{other} {}", shell_word(&state.disk))).into(),
        exit: Exit::USAGE,
    }
    .into())
}
