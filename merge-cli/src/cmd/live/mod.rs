//! `qmerge live`: what a running QEMU has, and what can be asked of it.

mod end;
mod follow;
mod foreign;
mod guard;
mod jobs;
mod look;
mod merge;
mod outcome;
mod plan;
pub(super) mod recover;
mod refused;
mod snapshot;
mod stall;
mod trouble;
mod unfinished_snapshot;
mod ways;

use std::ffi::OsString;

use qmp_client::{Connection, Disk, End, Machine, Options};

use self::trouble::Session;
use crate::cli::{LiveArgs, LiveVerb};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Console;

/// Connects and does it. A monitor that belongs to somebody else is only looked at.
pub(super) fn run(args: &LiveArgs, words: &[OsString], console: &Console) -> Result<Exit, Failure> {
    if let LiveVerb::Recover(recover) = &args.verb {
        return recover::run(recover, args.qmp.as_ref(), words, console);
    }
    let Some(address) = &args.qmp else { return Err(trouble::no_address(&args.verb)) };
    let session = Session { address, verb: &args.verb, words };
    guard::place(&session)?;
    let monitor = Connection::connect(address, &connection_options()).map_err(|e| session.failure(&e))?;
    guard::process(&session, &monitor)?;
    match &args.verb {
        LiveVerb::Commit(args) => return merge::commit(&session, monitor, args, console),
        LiveVerb::Pull(args) => return merge::pull(&session, monitor, args, console),
        LiveVerb::Finish(args) => return end::run(&session, monitor, args, End::Finish, console),
        LiveVerb::Pivot(args) => return end::run(&session, monitor, args, End::Pivot, console),
        _ => {}
    }
    let machine = look(&session, &monitor)?;
    match &args.verb {
        LiveVerb::List => look::list(machine.graph(), console),
        LiveVerb::Chain { disk } => look::chain(find(&machine, disk, &session)?, console),
        LiveVerb::Snapshot { overlays, allow_plaintext } => {
            snapshot::run(&session, &machine, overlays, *allow_plaintext, console)
        }
        LiveVerb::Jobs => {
            jobs::list(&session, &machine, console)?;
            unfinished_snapshot::tell(&session, machine.monitor(), console)
        }
        LiveVerb::Pause { disk }
        | LiveVerb::Resume { disk }
        | LiveVerb::Cancel { disk, .. }
        | LiveVerb::Speed { disk, .. } => {
            let disk = find(&machine, disk, &session)?;
            guard::disk(&session, disk)?;
            jobs::steer(&session, &machine, disk, console)
        }
        // These were dealt with before.
        LiveVerb::Commit(_)
        | LiveVerb::Pull(_)
        | LiveVerb::Finish(_)
        | LiveVerb::Pivot(_)
        | LiveVerb::Recover(_) => Ok(()),
    }?;
    Ok(Exit::DONE)
}

fn connection_options() -> Options {
    let mut options = Options::default();
    options.allow_tcp = true;
    options
}

/// QEMU as it is now.
fn look<'m>(session: &Session<'m>, monitor: &'m Connection) -> Result<Machine<'m>, Failure> {
    Machine::look(monitor, session.address).map_err(|e| session.failure(&e))
}

fn find<'a>(machine: &'a Machine<'_>, name: &str, session: &Session<'_>) -> Result<&'a Disk, Failure> {
    machine.graph().disk(name).map_err(|e| session.failure(&e))
}
