//! Other images that read through base or a merged layer: what a merge would corrupt.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use qcow2::chain::{Search, find_users_in};
use qcow2::error::FileOp;
use qcow2::storage::{FileId, OsHost};
use qcow2::{Error, Refusal};
use qmp_client::{Disk, Layer};

use super::files::{Files, Place};
use super::trouble::Session;
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::output::human::shell_word;

/// Where other users were looked for, and what stays unknown.
#[derive(Debug, Default)]
pub(super) struct Searched {
    /// The folders.
    pub(super) folders: Vec<PathBuf>,
    /// Files and folders that could not be read.
    pub(super) unreadable: Vec<PathBuf>,
    /// Images that will break, because the user allowed it.
    pub(super) broken: Vec<PathBuf>,
    /// The same, each with the index of the layer that it uses.
    pub(super) users: Vec<(usize, PathBuf)>,
}

/// Looks through the folders of the chain, and those of `scan`, for images outside the chain that use one of the
/// `touched` layers, and refuses if there is one, unless that is `allowed`.
pub(super) fn search(
    session: &Session<'_>,
    files: &Files,
    disk: &Disk,
    touched: &[&Layer],
    scan: &[PathBuf],
    allowed: bool,
) -> Result<Searched, Failure> {
    let here = |layer: &Layer| match files.place(layer) {
        Place::Here(path, id) => Some((path, id)),
        _ => None,
    };
    let chain: Vec<(PathBuf, FileId)> = disk.layers().iter().filter_map(here).collect();
    let targets: Vec<(PathBuf, FileId)> = touched.iter().filter_map(|layer| here(layer)).collect();
    let ids = |files: &[(PathBuf, FileId)]| files.iter().map(|(_, id)| *id).collect::<Vec<_>>();
    let folders = folders(&chain).map_err(|e| unsearched(session, &e))?;
    let folders: Vec<PathBuf> = folders.into_iter().collect();
    let search = Search { folders: folders.clone(), deep: scan.to_vec(), ..Search::default() };
    let folders = [folders, scan.to_vec()].concat();
    let found =
        find_users_in(&OsHost, &search, &ids(&targets), &ids(&chain)).map_err(|e| unsearched(session, &e))?;
    let broken: Vec<PathBuf> = found.users.iter().map(|user| user.path.clone()).collect();
    if let (Some(first), false) = (found.users.first(), allowed) {
        let used = targets.iter().find(|(_, id)| *id == first.uses).map(|(path, _)| path.clone());
        return Err(shared(session, disk, used.as_deref().unwrap_or(&first.path), broken));
    }
    let index = |id: FileId| {
        let is_it = |layer: &&&Layer| here(layer).is_some_and(|(_, other)| other == id);
        touched.iter().find(is_it).map(|layer| layer.index)
    };
    let users = found.users.iter().filter_map(|user| Some((index(user.uses)?, user.path.clone()))).collect();
    let unreadable = found.unreadable.into_iter().map(|(path, _)| path).chain(found.left_out).collect();
    Ok(Searched { folders, unreadable, broken, users })
}

/// Folders by names that mean the same in another working directory.
pub(super) fn absolute(folders: &[PathBuf]) -> Vec<PathBuf> {
    folders.iter().map(|folder| std::path::absolute(folder).unwrap_or_else(|_| folder.clone())).collect()
}

/// The folders of files, as named and with links followed.
fn folders(files: &[(PathBuf, FileId)]) -> Result<BTreeSet<PathBuf>, Error> {
    let real = |path: &Path| path.canonicalize().map_err(|e| Error::io(path, FileOp::Resolve, None, e));
    let mut folders = BTreeSet::new();
    for (path, _) in files {
        for name in [path.clone(), real(path)?] {
            folders.extend(name.parent().map(real).transpose()?);
        }
    }
    Ok(folders)
}

fn shared(session: &Session<'_>, disk: &Disk, used: &Path, users: Vec<PathBuf>) -> Failure {
    let own = session.other(&format!("pull {}", shell_word(disk.name())));
    let anyway = session.again_with("--allow-shared-base");
    Report {
        kind: "shared-base",
        message: Error::refused(used, Refusal::SharedBase { users }).to_string(),
        hint: format!(
            "take the data up instead, which changes no layer below: {own}; or, if nobody needs those images any \
             more: {anyway}"
        ).into(),
        exit: Exit::REFUSED,
    }
    .into()
}

fn unsearched(session: &Session<'_>, error: &Error) -> Failure {
    Report {
        kind: "io",
        message: error.to_string(),
        hint: format!("name folders that exist with --scan, then again: {}", session.again()).into(),
        exit: Exit::FAILED,
    }
    .into()
}
