//! Where the merge of a stopped machine meets one that runs: the same merge, as its QEMU or its libvirt does it.

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

/// The failure of a merge whose images a process holds; where that is a domain of libvirt's or shows a monitor, with the command
/// that does the same merge as it runs.
pub(super) fn in_use(path: &Path, holders: &[Holder], args: &CommitArgs, call: &Call) -> Failure {
    let error = Error::InUse { path: path.to_owned(), holders: holders.to_vec() };
    let Failure::Reported(report) = Failure::engine(&error, call) else { return Failure::PipeClosed };
    let options = super::options(args);
    if let Some(domain) = running_domain(&domains::read(), path, holders, &args.active, &options) {
        let name = shell_word(&printable(&domain.name));
        let message = format!("{}; it is the disk of libvirt's domain {name}", report.message);
        return Report { message, hint: as_domain(&domain, call), ..report }.into();
    }
    let monitor = holders.iter().find_map(monitor_of);
    let found = monitor.and_then(|at| Some((RunningMerge::find(&at, &args.active, &options)?, at)));
    let Some((merge, address)) = found else { return report.into() };
    let live = Hint::command(HintKind::LiveMerge, "merge it as it runs", same(&merge, &address, args));
    Report { hint: report.hint.first(live), ..report }.into()
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
    let mut line = Command::qmerge(["live", "commit", &merge.disk]);
    if let Some(base) = merge.base {
        line = line.option("--base", format!("[{base}]"));
    } else if args.shallow {
        line = line.word("--shallow");
    }
    line = match merge.top {
        Some(top) => line.option("--top", format!("[{top}]")),
        None => line.word(if args.keep_active { "--keep-overlay" } else { "--pivot" }),
    };
    for (given, option) in [
        (args.delete, "--delete"),
        (args.drop_bitmaps, "--drop-bitmaps"),
        (args.allow_shared_base, "--allow-shared-base"),
        (args.dry_run, "--dry-run"),
    ] {
        if given {
            line = line.word(option);
        }
    }
    let line = args.scan.iter().fold(line, |line, dir| line.option("--scan", dir));
    line.option("--qmp", address.to_string())
}
