//! `qmerge live snapshot`: new overlays.

use std::path::{self, Path, PathBuf};

use qcow2::ways::folder;
use qmp_client::ways::end_first;
use qmp_client::{Disk, Error, Machine, Refusal};

use super::outcome::say_left;
use super::trouble::Session;
use super::{find, guard, unfinished_snapshot};
use crate::cli::Overlay;
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::hint::{Command, Hint, HintKind};
use crate::output::Console;
use crate::output::human::printable;
use crate::output::json::value;

/// Makes the overlays. Relative names are relative to the user's folder, not to QEMU's.
pub(super) fn run(
    session: &Session<'_>,
    machine: &Machine<'_>,
    overlays: &[Overlay],
    allow_plaintext: bool,
    console: &Console,
) -> Result<(), Failure> {
    let mut wanted: Vec<(&Disk, PathBuf)> = Vec::new();
    for overlay in overlays {
        let disk = find(machine, &overlay.disk, session)?;
        guard::disk(session, disk)?;
        // This fails only if there is no current folder. Then the library reports that the path is not
        // absolute.
        wanted.push((disk, path::absolute(&overlay.file).unwrap_or_else(|_| overlay.file.clone())));
    }
    let mut encrypted = wanted.iter().filter(|(disk, _)| disk.active().encrypted);
    if !allow_plaintext && let Some((disk, file)) = encrypted.next() {
        return Err(plaintext(session, disk, file));
    }
    if let Some((disk, file)) = wanted.iter().find(|(disk, file)| is_there(disk, file)) {
        return Err(taken(session, disk, file));
    }
    let folders: Vec<_> = wanted.iter().filter_map(|(_, file)| Some(file.parent()?.to_owned())).collect();
    unfinished_snapshot::undo(session, machine.monitor(), &folders, console)?;
    for (disk, _) in &wanted {
        if machine.settle(disk).map_err(|e| session.failure(&e))?.is_some() {
            say_left(disk, console);
        }
    }
    let pairs: Vec<_> = wanted.iter().map(|(disk, file)| (*disk, file.as_path())).collect();
    let disks = qmp_client::snapshot(machine.monitor(), &pairs).map_err(|error| match &error {
        Error::Refused { reason: Refusal::NotUtf8 { .. } } => {
            session.report(&error, Hint::advice("give the files, and their folders, names in UTF-8").into())
        }
        Error::Refused { .. } => match wanted.iter().find(|(_, file)| file.symlink_metadata().is_ok()) {
            Some((_, file)) => session.report(
                &error,
                Hint::command(
                    HintKind::Advice,
                    "choose another name; those are taken",
                    Command::of("ls").word("-l").file(folder(file)),
                )
                .into(),
            ),
            None => match wanted.iter().find(|(disk, _)| is_relative(&disk.active().file)) {
                Some((disk, _)) => session.report(&error, Hint::advice(relative(disk)).into()),
                None => session.failure(&error),
            },
        },
        Error::Command { .. } => match busy(machine, &pairs) {
            Some(disk) => session.failure_with(&error, &end_first(disk.name())),
            None => session.failure(&error),
        },
        _ => session.failure(&error),
    })?;
    if console.is_json() {
        return console.document(&value(&disks)).map_err(|e| e.behind(TAKEN));
    }
    let lines = wanted.iter().map(|(disk, file)| {
        let (name, old) = (printable(disk.name()), printable(&disk.active().file));
        format!("{name}: {} is active now, on top of {old}", file.display())
    });
    console.result(&lines.collect::<Vec<_>>().join("\n")).map_err(|e| e.behind(TAKEN))?;
    console.note("what starts the virtual machine must name the new files the next time");
    Ok(())
}

/// What is said if the result cannot be printed.
const TAKEN: &str = "the snapshot is taken";

/// Whether a snapshot has already made this file the disk's active image. An earlier call may have taken it,
/// and was killed before it said so.
fn is_there(disk: &Disk, file: &Path) -> bool {
    Path::new(&disk.active().file) == file && qmp_client::is_of_a_snapshot(disk.active())
}

/// A snapshot shows one moment, so a snapshot of an earlier moment does not count as a success.
fn taken(session: &Session<'_>, disk: &Disk, file: &Path) -> Failure {
    let (name, file) = (printable(disk.name()), file.display());
    Report {
        kind: "snapshot-taken",
        message: format!("{name} writes to {file} already: an earlier call has taken that snapshot"),
        hint: Hint::command(
            HintKind::LiveLook,
            "for another snapshot, choose another name; the chain",
            session.other(&["chain", disk.name()]),
        )
        .into(),
        exit: Exit::REFUSED,
    }
    .into()
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
        hint: Hint::command(
            HintKind::AllowPlaintext,
            "if that is meant",
            session.again_with(&["--allow-plaintext"]),
        )
        .into(),
        exit: Exit::REFUSED,
    }
    .into()
}

/// Whether only QEMU knows which file is meant: the name is relative to its folder, and matches none of its
/// visible open files.
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
fn busy<'d>(machine: &Machine<'_>, wanted: &[(&'d Disk, &Path)]) -> Option<&'d Disk> {
    let jobs = machine.graph().jobs(machine.monitor()).ok()?;
    let works = |disk: &Disk| jobs.iter().any(|(_, of)| of.is_some_and(|of| of.name() == disk.name()));
    wanted.iter().map(|(disk, _)| *disk).find(|disk| works(disk))
}
