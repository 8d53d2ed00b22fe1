//! Where the merge of a stopped machine meets one that runs: the same merge, as its QEMU does it; and the
//! traces of one that was interrupted.

use qcow2::error::shown;
use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::time::Duration;

use qcow2::Error;
use qcow2::error::Holder;
use qcow2::storage::{Access, FileId, Host, OsHost};
use qmp_client::{Address, Connection, Disk, Graph, Layer, Options};

use super::libvirt;
use crate::call::Call;
use crate::cli::CommitArgs;
use crate::cmd::live::recover::{of_image, tell};
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::hint::{Command, Hint, HintKind};
use crate::monitors;

/// Refuses where a live merge of the image has not come to its end: which image is the right one is to be
/// settled first. Where somebody holds it, the merge may well be under way.
pub(super) fn refuse_interrupted(args: &CommitArgs, call: &Call) -> Result<(), Failure> {
    let active = &args.active;
    let found = of_image(active)?;
    let Some(merge) = found.first().map(qmp_client::Unfinished::outline) else { return Ok(()) };
    let used = OsHost.open(active, Access::Read).and_then(|image| image.used_by_others());
    if let (Ok(Some(_)), Some(id)) = (used, id(active)) {
        return Err(in_use(active, &OsHost.holders(id), args, call));
    }
    Err(Report {
        kind: "recover-first",
        message: format!(
            "{}: {} was interrupted, as {} says; nothing was changed",
            shown(active),
            tell::what(&merge),
            shown(merge.state_file())
        ),
        hint: Hint::command(HintKind::Recover, "", Command::qmerge(["live", "recover"]).file(active)).into(),
        exit: Exit::REFUSED,
    }
    .into())
}

/// The failure of a merge whose images a process holds; where that shows a monitor, with the command that does the
/// same merge as it runs.
pub(super) fn in_use(path: &Path, holders: &[Holder], args: &CommitArgs, call: &Call) -> Failure {
    let error = Error::InUse { path: path.to_owned(), holders: holders.to_vec() };
    let failure = Failure::engine(&error, call);
    if let (Some((domain, hint)), Failure::Reported(report)) =
        (libvirt::in_use(path, holders, args, call), &failure)
    {
        let message = format!("{}; {}", report.message, libvirt::belongs_to(&domain));
        return Report { kind: report.kind, message, hint, exit: report.exit }.into();
    }
    let Some(command) = holders.iter().find_map(monitors::of).and_then(|address| same(&address, args)) else {
        return failure;
    };
    match failure {
        Failure::Reported(report) => {
            let live = Hint::command(HintKind::LiveMerge, "merge it as it runs", command);
            Report { hint: report.hint.first(live), ..report }.into()
        }
        failure => failure,
    }
}

/// The same merge as a live one. The monitor is only asked for its disks.
fn same(address: &Address, args: &CommitArgs) -> Option<Command> {
    let options = Options { allow_tcp: true, greeting_timeout: Duration::from_secs(1), ..Options::default() };
    let monitor = Connection::connect(address, &options).ok()?;
    let folder = monitor.peer().and_then(|pid| fs::read_link(format!("/proc/{pid}/cwd")).ok());
    let absolute = |name: &str| Some(folder.as_ref()?.join(name).to_string_lossy().into_owned());
    let is_plain = |name: &str| !name.starts_with('/') && !name.contains(':');
    let rename = |name: &str| is_plain(name).then(|| absolute(name)).flatten();
    let graph = Graph::ask(&monitor).ok()?.with_files(&rename);
    let named = id(&args.active)?;
    let (disk, layer) = graph.disks().iter().find_map(|disk| Some((disk, find(disk, named)?)))?;
    let mut line = Command::qmerge(["live", "commit", disk.name()]);
    if let Some(base) = &args.base {
        line = line.option("--base", place(disk, base)?);
    } else if args.shallow {
        line = line.word("--shallow");
    }
    line = match &args.top {
        Some(top) => line.option("--top", place(disk, top)?),
        None if layer.index < disk.active().index => line.option("--top", format!("[{}]", layer.index)),
        None if args.keep_active => line.word("--keep-overlay"),
        None => line.word("--pivot"),
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
    for dir in &args.scan {
        line = line.option("--scan", dir);
    }
    Some(line.option("--qmp", address.to_string()))
}

/// The index of a layer that the user named for the stopped chain.
fn place(disk: &Disk, name: &OsStr) -> Option<String> {
    if let Some(layer) = id(Path::new(name)).and_then(|id| find(disk, id)) {
        return Some(format!("[{}]", layer.index));
    }
    // Indexes are counted alike: from the bottom.
    let index = name.to_str()?.strip_suffix(']').and_then(|rest| rest.split_once('['))?.1;
    index.parse::<usize>().ok().map(|index| format!("[{index}]"))
}

fn find(disk: &Disk, file: FileId) -> Option<&Layer> {
    disk.layers().iter().find(|layer| id(Path::new(&layer.file)) == Some(file))
}

fn id(path: &Path) -> Option<FileId> {
    OsHost.stat(path).ok().map(|stat| stat.id)
}
