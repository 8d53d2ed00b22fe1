//! `qmerge live recover`: what a merge left whose QEMU, client or host has gone, put right. The library decides; here are the
//! words.

mod doubt;
mod find;
pub(in crate::cmd) mod tell;

use std::ffi::OsString;

use qmp_client::{Address, Recovery};

use self::tell::Told;
use crate::call::{Call, VerbName};
use crate::cli::RecoverArgs;
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::output::Console;
use crate::output::progress::Meter;
use crate::signals::Stop;

pub(in crate::cmd) use self::find::of_image;

/// Deals with every state file that is found.
pub(super) fn run(
    args: &RecoverArgs,
    qmp: Option<&Address>,
    words: &[OsString],
    console: &Console,
) -> Result<Exit, Failure> {
    let image = args.what.clone().unwrap_or_else(|| ".".to_owned()).into();
    let call = Call { verb: VerbName::Recover, image, words: words.to_vec() };
    let stop = Stop::on_signals(&call)?;
    let merges = find::merges(args, qmp)?;
    if !args.dry_run {
        find::sweep(args, qmp);
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
