//! Finds the merges that the user means.

use std::path::{Path, PathBuf};

use qmp_client::{Address, Error, Unfinished, folders_of_image, sweep_folders};

use crate::call::Call;
use crate::cli::RecoverArgs;
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::hint::{Command, Hint, HintKind, Hints, limit, moved_away, word};

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

/// The merges that are meant.
pub(super) fn merges(
    args: &RecoverArgs,
    qmp: Option<&Address>,
    call: &Call,
) -> Result<Vec<Unfinished>, Failure> {
    let all = Unfinished::find(qmp, &folders(args)).map_err(|e| damaged(&e, call))?;
    let what = What::of(args);
    Ok(all.into_iter().filter(|merge| is_meant(&what, merge)).collect())
}

/// Removes temporary files of clients that were killed while they wrote a state.
pub(super) fn sweep(args: &RecoverArgs, qmp: Option<&Address>) {
    sweep_folders(qmp, &folders(args));
}

/// The searched places, in words.
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

fn folders(args: &RecoverArgs) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    match What::of(args) {
        What::Folder(folder) => folders.push(absolute(folder)),
        What::File(file) => folders.extend(folders_of_image(file)),
        What::All | What::Disk(_) => folders.push(absolute(Path::new("."))),
    }
    folders.extend(args.state_dir.as_deref().map(absolute));
    folders.sort();
    folders.dedup();
    folders
}

fn is_meant(what: &What<'_>, merge: &Unfinished) -> bool {
    match what {
        What::All | What::Folder(_) => true,
        What::Disk(disk) => merge.outline().disk == *disk,
        What::File(path) => merge.is_about(path),
    }
}

/// The failure for a state file that holds no state or must not be trusted, and for a file or folder that
/// cannot be read.
pub(in crate::cmd) fn damaged(error: &Error, call: &Call) -> Failure {
    if let Error::State { path, why } = error
        && why.is_disbelief()
    {
        // It may be a folder, which `rm` does not remove.
        let away = moved_away(path).map(|command| {
            Hint::command(HintKind::Advice, "if no merge of yours needs it there, move it away", command)
        });
        let hint = away.unwrap_or_else(|| Hint::advice("move it away"));
        let hint = Hints::from(hint).or(Hint::command(HintKind::Again, "then", call.again()));
        let message = format!("{error}; nothing was changed");
        return Report { kind: "state", message, hint, exit: Exit::REFUSED }.into();
    }
    if let Error::File { file: path, source } = error {
        if let Some(words) = limit(source) {
            let hint = Hint::command(HintKind::Again, words, call.again());
            return Report { kind: "io", message: error.to_string(), hint: hint.into(), exit: Exit::FAILED }
                .into();
        }
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
            let look = format!("a merge of {} was under way; see its chain", word(&image));
            let chain = Command::qmerge(["info", "--chain"]).file(&image);
            let remove = Command::of("rm").file(path);
            Hints::from(Hint::command(HintKind::InfoChain, look, chain)).or(Hint::command(
                HintKind::Forget,
                "when it is right",
                remove,
            ))
        }
        _ => Hint::command(HintKind::Help, "", Command::qmerge(["live", "recover", "--help"])).into(),
    };
    Report { kind: "state", message: error.to_string(), hint, exit: Exit::DAMAGED }.into()
}
