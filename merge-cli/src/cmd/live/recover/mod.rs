//! `qmerge live recover`: recovers from a merge whose QEMU, client or host went away. The library decides; this
//! module finds the words.

mod doubt;
mod find;
pub(in crate::cmd) mod tell;

use std::ffi::OsString;
use std::time::Duration;

use qmp_client::{Address, Connection, Options, Owner, Recovery};

use self::tell::Told;
use super::unfinished_snapshot;
use crate::call::{Call, VerbName};
use crate::cli::RecoverArgs;
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::hint::{Hint, HintKind};
use crate::output::Console;
use crate::output::progress::Meter;
use crate::signals::Stop;

pub(in crate::cmd) use self::find::damaged;

/// Recovers the merge of every state file that is found.
pub(super) fn run(
    args: &RecoverArgs,
    qmp: Option<&Address>,
    words: &[OsString],
    console: &Console,
) -> Result<Exit, Failure> {
    let image = args.what.clone().unwrap_or_else(|| ".".to_owned()).into();
    let call = Call { verb: VerbName::Recover, image, words: words.to_vec() };
    let stop = Stop::on_signals(&call)?;
    let merges = find::merges(args, qmp, &call)?;
    if !args.dry_run {
        find::sweep(args, qmp);
        snapshots(qmp, &call, console)?;
    }
    let meter = Meter::without_events(console, "comparing");
    let mut all = Vec::new();
    for merge in &merges {
        let mut how = Recovery::new(&meter, stop.flag());
        (how.dry_run, how.no_lock, how.address) = (args.dry_run, args.no_lock, qmp);
        let finding = merge.recover(how);
        meter.clear();
        all.push(Told::of(&finding, &call, &stop));
    }
    if console.is_json() {
        console.document(&all.iter().map(Told::json).collect())?;
    } else if all.is_empty() {
        console.result(&format!("nothing to recover: {}", find::searched(args, qmp)))?;
    }
    let mut first: Option<Report> = None;
    for told in all {
        console.result(&told.human(args.dry_run))?;
        match (told.trouble, &first) {
            (None, _) => {}
            (Some(trouble), None) => first = Some(trouble),
            (Some(trouble), Some(_)) => console.note(&trouble.to_string()),
        }
    }
    first.map_or(Ok(Exit::DONE), |report| Err(report.into()))
}

/// Undoes unfinished snapshots in a QEMU that is still running, and that no manager owns.
fn snapshots(qmp: Option<&Address>, call: &Call, console: &Console) -> Result<(), Failure> {
    let Some(address) = qmp.filter(|address| Owner::of(address, None).is_none()) else { return Ok(()) };
    let mut options = Options::default();
    options.allow_tcp = true;
    options.greeting_timeout = Duration::from_secs(2);
    let Ok(monitor) = Connection::connect(address, &options) else { return Ok(()) };
    if Owner::of(address, monitor.peer()).is_some() {
        return Ok(());
    }
    unfinished_snapshot::undo_all(&monitor, &[], console).map_err(|error| {
        Report {
            kind: "qemu-refused",
            message: format!("what a snapshot has left stays: {error}"),
            hint: Hint::command(HintKind::Again, "then again", call.again()).into(),
            exit: Exit::FAILED,
        }
        .into()
    })
}
