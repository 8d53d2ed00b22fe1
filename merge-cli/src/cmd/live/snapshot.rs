//! `qmerge live snapshot`: new overlays.

use std::path::{self, Path, PathBuf};

use qmp_client::{Connection, Disk, Error, Graph, Phase};

use super::files::Files;
use super::left::Left;
use super::tidy::Wishes;
use super::trouble::Session;
use super::{find, guard, look, states};
use crate::cli::Overlay;
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::hint::folder_word;
use crate::output::Console;
use crate::output::human::{printable, shell_word};

/// Makes the overlays; relative names are those of this folder, not of QEMU's.
pub(super) fn run(
    session: &Session<'_>,
    monitor: &Connection,
    graph: &Graph,
    overlays: &[Overlay],
    allow_plaintext: bool,
    console: &Console,
) -> Result<(), Failure> {
    let mut wanted: Vec<(&Disk, PathBuf)> = Vec::new();
    for overlay in overlays {
        let disk = find(graph, &overlay.disk, session)?;
        guard::disk(session, disk)?;
        // It fails only where there is no current folder; the library then says that the path is not absolute.
        wanted.push((disk, path::absolute(&overlay.file).unwrap_or_else(|_| overlay.file.clone())));
    }
    let mut encrypted = wanted.iter().filter(|(disk, _)| disk.active().encrypted);
    if !allow_plaintext && let Some((disk, file)) = encrypted.next() {
        return Err(plaintext(session, disk, file));
    }
    for (disk, _) in &wanted {
        end_open_merge(session, monitor, graph, disk, console)?;
    }
    let pairs: Vec<_> = wanted.iter().map(|(disk, file)| (*disk, file.as_path())).collect();
    let disks = qmp_client::snapshot(monitor, &pairs).map_err(|error| match &error {
        Error::Refused { .. } => match wanted.iter().find(|(_, file)| file.symlink_metadata().is_ok()) {
            Some((_, file)) => session.failure_with(
                &error,
                format!("choose another name; those are taken: ls -l {}", folder_word(file)),
            ),
            None => match wanted.iter().find(|(disk, _)| is_relative(&disk.active().file)) {
                Some((disk, _)) => session.failure_with(&error, relative(disk)),
                None => session.failure(&error),
            },
        },
        Error::Command { .. } => match busy(monitor, graph, &pairs) {
            Some(disk) => session.failure_with(&error, end_first(session, disk)),
            None => session.failure(&error),
        },
        _ => session.failure(&error),
    })?;
    if console.is_json() {
        return console.document(&disks.iter().map(look::in_list).collect());
    }
    let lines = wanted.iter().map(|(disk, file)| {
        let (name, old) = (printable(disk.name()), printable(&disk.active().file));
        format!("{name}: {} is active now, on top of {old}", file.display())
    });
    console.result(&lines.collect::<Vec<_>>().join("\n"))?;
    console.note("what starts the virtual machine must name the new files the next time");
    Ok(())
}

/// Ends what is left of an earlier merge of the disk, so that its state does not speak of a chain that has grown since. It
/// is refused where that cannot be done now.
fn end_open_merge(
    session: &Session<'_>,
    monitor: &Connection,
    graph: &Graph,
    disk: &Disk,
    console: &Console,
) -> Result<(), Failure> {
    let disks = std::slice::from_ref(disk);
    states::sweep(session, disks, None);
    let known = states::of(session, disks, None)?;
    let files = Files::of(monitor);
    let left = Left { session, monitor, graph, disk, files: &files, known: &known, console };
    if let Some(open) = left.switched(&|_| true)
        && !left.finish(open, Wishes::default())?.is_complete()
    {
        return Err(states::recover_first(session, &open.0, &open.1));
    }
    let jobs = graph.jobs(monitor).map_err(|e| session.failure(&e))?;
    for (file, state) in &known {
        let of_disk = state.disk_before(graph).or_else(|| state.disk_after(graph));
        if of_disk.is_none_or(|of| of.name() != disk.name()) || state.phase == Phase::Switched {
            continue;
        }
        if jobs.iter().any(|(job, _)| job.id == state.job) {
            return Err(Report {
                kind: "job-exists",
                message: format!("the merge of {} is under way", printable(disk.name())),
                hint: end_first(session, disk).into(),
                exit: Exit::REFUSED,
            }
            .into());
        }
        if state.phase == Phase::Switching {
            return Err(states::recover_first(session, file, state));
        }
        // The job is gone, and nothing was switched: there is nothing left to know.
        file.forget(state).map_err(|e| session.failure(&e))?;
    }
    Ok(())
}

/// The overlay would take what the guest writes in plain text.
fn plaintext(session: &Session<'_>, disk: &Disk, file: &Path) -> Failure {
    Report {
        kind: "plaintext",
        message: format!(
            "{} is encrypted, and {} would not be: what the guest writes from now on would lie there in plain text",
            printable(&disk.active().file),
            file.display()
        ),
        hint: format!("if that is meant: {}", session.again_with("--allow-plaintext")).into(),
        exit: Exit::REFUSED,
    }
    .into()
}

/// Whether only QEMU knows which file is meant: the name is relative to its folder, and none of its open files is seen
/// to have it.
fn is_relative(file: &str) -> bool {
    !file.starts_with('/') && !file.contains(':')
}

fn relative(disk: &Disk) -> String {
    format!(
        "QEMU opened {} by a name of its own folder, and its open files do not show which file that is: run this as root, or \
         start QEMU with absolute names",
        printable(&disk.active().file)
    )
}

/// The first of these disks on which a job works: QEMU lets nothing change its chain meanwhile.
fn busy<'d>(monitor: &Connection, graph: &Graph, wanted: &[(&'d Disk, &Path)]) -> Option<&'d Disk> {
    let jobs = graph.jobs(monitor).ok()?;
    let works = |disk: &Disk| jobs.iter().any(|(_, of)| of.is_some_and(|of| of.name() == disk.name()));
    wanted.iter().map(|(disk, _)| *disk).find(|disk| works(disk))
}

fn end_first(session: &Session<'_>, disk: &Disk) -> String {
    let word = shell_word(disk.name());
    format!(
        "a job works on {}; let it end, or end it: {}; {}",
        printable(disk.name()),
        session.other(&format!("pivot {word}")),
        session.other(&format!("cancel {word}"))
    )
}
