//! `qmerge live snapshot`: new overlays.

use std::path::{self, Path, PathBuf};

use qmp_client::{Connection, Disk, Error, Graph};

use super::trouble::Session;
use super::{find, guard, look};
use crate::cli::Overlay;
use crate::failure::Failure;
use crate::hint::folder_word;
use crate::output::Console;
use crate::output::human::{printable, shell_word};

/// Makes the overlays; relative names are those of this folder, not of QEMU's.
pub(super) fn run(
    session: &Session<'_>,
    monitor: &Connection,
    graph: &Graph,
    overlays: &[Overlay],
    console: &Console,
) -> Result<(), Failure> {
    let mut wanted: Vec<(&Disk, PathBuf)> = Vec::new();
    for overlay in overlays {
        let disk = find(graph, &overlay.disk, session)?;
        guard::disk(session, disk)?;
        // It fails only where there is no current folder; the library then says that the path is not absolute.
        wanted.push((disk, path::absolute(&overlay.file).unwrap_or_else(|_| overlay.file.clone())));
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
