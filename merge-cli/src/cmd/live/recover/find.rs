//! Which state files are meant.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use qmp_client::{Address, Error, State, StateFile, find_states};

use crate::cli::RecoverArgs;
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::hint::{Command, Hint, HintKind, word};

/// What the first argument names.
enum What<'a> {
    /// Nothing was named: everything that is found.
    All,
    /// A folder, in which everything counts.
    Folder(&'a Path),
    /// An image, or a state file.
    File(&'a Path),
    /// A disk.
    Disk(&'a str),
}

impl<'a> What<'a> {
    fn of(args: &'a RecoverArgs) -> Self {
        let Some(text) = &args.what else { return Self::All };
        let path = Path::new(text);
        match std::fs::metadata(path) {
            Ok(meta) if meta.is_dir() => Self::Folder(path),
            Ok(_) => Self::File(path),
            Err(_) if text.contains('/') => Self::File(path),
            Err(_) => Self::Disk(text),
        }
    }
}

/// The states that are meant.
pub(super) fn states(args: &RecoverArgs, qmp: Option<&Address>) -> Result<Vec<(StateFile, State)>, Failure> {
    let folders = folders(args);
    let all = find_states(qmp, folders.iter().map(PathBuf::as_path)).map_err(|e| damaged(&e))?;
    let what = What::of(args);
    Ok(all.into_iter().filter(|(file, state)| is_meant(&what, file, state)).collect())
}

/// The states that lie beside an image, and speak of it.
pub(in crate::cmd) fn of_image(image: &Path) -> Result<Vec<(StateFile, State)>, Failure> {
    let folders = folders_of(image);
    let all = find_states(None, folders.iter().map(PathBuf::as_path)).map_err(|e| damaged(&e))?;
    Ok(all.into_iter().filter(|(file, state)| is_meant(&What::File(image), file, state)).collect())
}

/// Removes the files that clients have left there which were killed while they wrote a state.
pub(super) fn sweep(args: &RecoverArgs, qmp: Option<&Address>) {
    let socket = match qmp {
        Some(Address::Unix(path)) => absolute(path).parent().map(Path::to_owned),
        _ => None,
    };
    let all: BTreeSet<PathBuf> = folders(args).into_iter().chain(socket).collect();
    for folder in all {
        qmp_client::sweep(&folder);
    }
}

/// Where was looked, in words.
pub(super) fn searched(args: &RecoverArgs, qmp: Option<&Address>) -> String {
    let beside = qmp.map(|address| format!("beside the socket {address}"));
    let folders = folders(args).into_iter().map(|folder| format!("in {}", folder.display()));
    let places: Vec<_> = beside.into_iter().chain(folders).collect();
    let of = args.what.as_deref().map_or(String::new(), |what| format!(" of {what}"));
    format!("no state of a live merge{of} lies {}", places.join(", "))
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// The state lies in the folder of the image itself; the name may be a link from elsewhere.
fn folders_of(image: &Path) -> BTreeSet<PathBuf> {
    let names = [std::fs::canonicalize(image).ok(), Some(absolute(image))];
    names.into_iter().flatten().filter_map(|path| Some(path.parent()?.to_owned())).collect()
}

fn folders(args: &RecoverArgs) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    match What::of(args) {
        What::Folder(folder) => folders.push(absolute(folder)),
        What::File(file) => folders.extend(folders_of(file)),
        What::All | What::Disk(_) => folders.push(absolute(Path::new("."))),
    }
    folders.extend(args.state_dir.as_deref().map(absolute));
    folders.sort();
    folders.dedup();
    folders
}

fn is_meant(what: &What<'_>, file: &StateFile, state: &State) -> bool {
    match what {
        What::All | What::Folder(_) => true,
        What::Disk(disk) => state.disk == *disk,
        What::File(path) => {
            let real = |path: &Path| std::fs::canonicalize(path).ok();
            let meant = real(path);
            let is = |other: &Path| other == *path || (meant.is_some() && real(other) == meant);
            is(file.path()) || state.layers.iter().any(|layer| is(Path::new(&layer.file)))
        }
    }
}

/// A state file that says nothing, or that is not to be trusted; or a file or a folder that cannot be read, which says
/// nothing about any image.
fn damaged(error: &Error) -> Failure {
    if let Error::File { file: path, .. } = error {
        let command = Command::of("ls").word("-ld").file(path);
        let hint = Hint::command(
            HintKind::Advice,
            "look for the system's reason (dmesg), and who may read it",
            command,
        );
        return Report { kind: "io", message: error.to_string(), hint: hint.into(), exit: Exit::FAILED }
            .into();
    }
    let hint = match error {
        Error::State { path, .. } => {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let image = name.strip_prefix('.').and_then(|n| n.strip_suffix(".qmerge-live"));
            let image = image.map_or_else(|| path.clone(), |image| path.with_file_name(image));
            format!(
                "a merge of {image} was under way; see its chain (qmerge info --chain {image}), and when it is right: rm {}",
                word(path),
                image = word(&image)
            )
        }
        _ => "qmerge live recover --help".to_owned(),
    };
    Report { kind: "state", message: error.to_string(), hint: hint.into(), exit: Exit::DAMAGED }.into()
}
