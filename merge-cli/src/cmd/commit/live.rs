//! If the machine of an offline merge is running: the same merge, done by its QEMU or its libvirt.

use std::ffi::OsString;
use std::path::Path;

use qcow2::Error;
use qcow2::error::Holder;
use qmp_client::libvirt::{RunningDomain, running_domain};
use qmp_client::{Address, RunningMerge, monitor_of};

use crate::call::Call;
use crate::cli::CommitArgs;
use crate::domains::{self, command};
use crate::failure::{Failure, Report};
use crate::hint::{Command, Hint, HintKind, Hints};
use crate::output::human::{printable, shell_word};

/// The failure of a merge whose images are in use. If the user is a domain of libvirt or shows a monitor, it
/// has the command that does the same merge live.
pub(super) fn in_use(path: &Path, holders: &[Holder], args: &CommitArgs, call: &Call) -> Failure {
    let error = Error::InUse { path: path.to_owned(), holders: holders.to_vec() };
    let Failure(report) = Failure::engine(&error, call);
    let options = super::options(args);
    if let Some(domain) = running_domain(&domains::read(), path, holders, &args.active, &options) {
        let name = shell_word(&printable(&domain.name));
        let message = format!("{}; it is the disk of libvirt's domain {name}", report.message);
        return Report { message, hint: as_domain(&domain, call), ..report }.into();
    }
    let Some(address) = holders.iter().find_map(monitor_of) else { return report.into() };
    let live = |words: &str, line| Hint::command(HintKind::LiveMerge, words, line);
    let hint = match RunningMerge::find(&address, &args.active, &options) {
        Some(merge) => report.hint.first(live("merge it as it runs", same(&merge, &address, args))),
        None => report.hint.or(live("or merge as it runs", as_named(&address, args))),
    };
    Report { hint, ..report }.into()
}

fn as_domain(domain: &RunningDomain, call: &Call) -> Hints {
    let merge = domain.merge.as_ref().map(|words| command(words));
    let merge = merge.map(|merge| Hint::command(HintKind::LiveMerge, "merge it as it runs", merge));
    Hints::default()
        .or(merge)
        .or(Hint::command(HintKind::Virsh, "or shut it down", command(&domain.shut_down)))
        .or(Hint::command(HintKind::Again, "when it has ended, again", call.again()))
}

/// The same merge as a live one.
fn same(merge: &RunningMerge, address: &Address, args: &CommitArgs) -> Command {
    let index = |index: Option<usize>| index.map(|index| format!("[{index}]").into());
    live(merge.disk.as_ref(), index(merge.base), index(merge.top), address, args)
}

/// The same where nobody could be asked what the disk is called: it answers to its active image, too.
fn as_named(address: &Address, args: &CommitArgs) -> Command {
    live(&args.active, args.base.clone(), args.top.clone(), address, args)
}

fn live(
    disk: &Path,
    base: Option<OsString>,
    top: Option<OsString>,
    address: &Address,
    args: &CommitArgs,
) -> Command {
    let mut line = Command::qmerge(["live", "commit"]).file(disk);
    if let Some(base) = base {
        line = line.option("--base", base);
    } else if args.shallow {
        line = line.word("--shallow");
    }
    line = match top {
        Some(top) => line.option("--top", top),
        None => line.word(if args.keep_active { "--keep-overlay" } else { "--pivot" }),
    };
    for (given, option) in [
        (args.delete, "--delete"),
        (args.safety.drop_bitmaps, "--drop-bitmaps"),
        (args.safety.allow_shared_base, "--allow-shared-base"),
        (args.dry_run, "--dry-run"),
    ] {
        if given {
            line = line.word(option);
        }
    }
    let line = args.safety.scan.iter().fold(line, |line, dir| line.option("--scan", dir));
    line.option("--qmp", address.to_string())
}
