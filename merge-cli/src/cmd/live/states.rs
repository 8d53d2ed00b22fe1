//! State files of a disk's merges, and what they say when there is no job.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use qmp_client::{Disk, Phase, State, StateFile, find_states};

use super::files::{Files, Place};
use super::trouble::Session;
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::output::Console;
use crate::output::human::{printable, shell_word};

/// All states that may speak of these disks: beside their images, in the folder that the user named, and those that
/// are listed beside the monitor's socket.
pub(super) fn of(
    session: &Session<'_>,
    disks: &[Disk],
    state_dir: Option<&Path>,
) -> Result<Vec<(StateFile, State)>, Failure> {
    let images = disks.iter().flat_map(Disk::layers).map(|layer| Path::new(&layer.file));
    let mut folders: BTreeSet<PathBuf> =
        images.filter_map(|image| image.parent().map(Path::to_owned)).collect();
    folders.extend(state_dir.and_then(|dir| std::path::absolute(dir).ok()));
    find_states(Some(session.address), folders.iter().map(PathBuf::as_path)).map_err(|e| session.failure(&e))
}

/// Where the state file of a merge that begins now lies.
pub(super) fn place(
    session: &Session<'_>,
    files: &Files,
    disk: &Disk,
    state_dir: Option<&Path>,
) -> Result<StateFile, Failure> {
    let active = disk.active();
    if let Some(dir) = state_dir {
        let dir = std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
        return writable(session, StateFile::in_folder(&dir, Path::new(&active.file)));
    }
    let beside = match files.place(active) {
        Place::Here(path, _) => StateFile::beside(&path),
        _ => None,
    };
    match beside {
        Some(file) => writable(session, file),
        None => Err(no_folder(
            session,
            format!(
                "{} is no file here, so there is no folder beside it to note how far the merge is",
                printable(&active.file)
            ),
        )),
    }
}

fn writable(session: &Session<'_>, file: StateFile) -> Result<StateFile, Failure> {
    let folder = file.path().parent().unwrap_or(Path::new("."));
    // Nothing else tells what a file system allows than to do it; the file has no name that lasts.
    match tempfile::tempfile_in(folder) {
        Ok(_) => Ok(file),
        Err(error) => Err(no_folder(
            session,
            format!("{}: how far the merge is cannot be noted there: {error}", folder.display()),
        )),
    }
}

fn no_folder(session: &Session<'_>, message: String) -> Failure {
    Report {
        kind: "no-state-folder",
        message,
        hint: format!(
            "name another folder that lasts: {}",
            session.again_with_values(&[("--state-dir", "DIR")])
        )
        .into(),
        exit: Exit::REFUSED,
    }
    .into()
}

/// What an earlier merge of this disk, whose job is gone, has left: refused if it may have been switched.
pub(super) fn left_over(session: &Session<'_>, file: &StateFile, console: &Console) -> Result<(), Failure> {
    let Some(state) = file.load().map_err(|e| session.failure(&e))? else { return Ok(()) };
    let job = printable(&state.job);
    if state.phase == Phase::Copying {
        console.note(&format!(
            "an earlier merge (job {job}) ended without a switch; nothing is lost, it begins anew"
        ));
        return Ok(());
    }
    let disk = printable(&state.disk);
    let how = if state.phase == Phase::Switched {
        "switched, and not cleaned up after"
    } else {
        "about to switch when it was lost"
    };
    Err(Report {
        kind: "recover-first",
        message: format!(
            "{}: an earlier merge of {disk} (job {job}) was {how}; the image that holds the disk is {}",
            file.path().display(),
            printable(&state.valid_top)
        ),
        hint: session.other(&format!("recover {}", shell_word(&state.disk))).into(),
        exit: Exit::REFUSED,
    }
    .into())
}
