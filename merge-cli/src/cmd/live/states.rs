//! State files of a disk's merges, and what they say when there is no job.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use qmp_client::{Address, Disk, Graph, Phase, State, StateFile, find_states};

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
    let folders = folders(disks, state_dir);
    find_states(Some(session.address), folders.iter().map(PathBuf::as_path)).map_err(|e| session.failure(&e))
}

/// The folders in which states may lie: those of the images, links followed, and the one that the user named.
fn folders(disks: &[Disk], state_dir: Option<&Path>) -> BTreeSet<PathBuf> {
    let images = disks.iter().flat_map(Disk::layers).map(|layer| PathBuf::from(&layer.file));
    let images = images.filter(|image| image.is_absolute());
    let both = images.flat_map(|image| [image.canonicalize().ok(), Some(image)]).flatten();
    let mut folders: BTreeSet<PathBuf> =
        both.filter_map(|image| image.parent().map(Path::to_owned)).collect();
    folders.extend(state_dir.and_then(|dir| std::path::absolute(dir).ok()));
    folders
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
pub(super) fn left_over(
    session: &Session<'_>,
    graph: &Graph,
    disk: &Disk,
    known: &[(StateFile, State)],
    file: &StateFile,
    console: &Console,
) -> Result<(), Failure> {
    let here = file.load().map_err(|e| session.failure(&e))?.map(|state| (file.clone(), state));
    let shown = |state: &State| {
        let on = state.disk_after(graph).or_else(|| state.disk_before(graph));
        on.is_some_and(|on| on.name() == disk.name())
    };
    let of_disk = known.iter().filter(|(other, state)| other != file && shown(state));
    for (file, state) in here.iter().chain(of_disk) {
        if state.phase != Phase::Copying {
            return Err(recover_first(session, file, state));
        }
        let job = printable(&state.job);
        console.note(&format!(
            "an earlier merge (job {job}) ended without a switch; nothing is lost, it begins anew"
        ));
    }
    Ok(())
}

/// The failure of a call that must not begin before an earlier merge is put right.
pub(super) fn recover_first(session: &Session<'_>, file: &StateFile, state: &State) -> Failure {
    let (disk, job) = (printable(&state.disk), printable(&state.job));
    let how = if state.phase == Phase::Switched {
        "switched, and not cleaned up after"
    } else {
        "about to switch when it was lost"
    };
    Report {
        kind: "recover-first",
        message: format!(
            "{}: an earlier merge of {disk} (job {job}) was {how}; the image that holds the disk is {}",
            file.path().display(),
            printable(&state.valid_top)
        ),
        hint: session.other(&format!("recover {}", shell_word(&state.disk))).into(),
        exit: Exit::REFUSED,
    }
    .into()
}

/// Removes the files that clients have left there which were killed while they wrote a state.
pub(super) fn sweep(session: &Session<'_>, disks: &[Disk], state_dir: Option<&Path>) {
    let socket = match session.address {
        Address::Unix(path) => {
            std::path::absolute(path).ok().and_then(|path| path.parent().map(Path::to_owned))
        }
        Address::Tcp { .. } => None,
    };
    let folders = folders(disks, state_dir).into_iter().chain(socket);
    for folder in folders.collect::<BTreeSet<_>>() {
        qmp_client::sweep(&folder);
    }
}
