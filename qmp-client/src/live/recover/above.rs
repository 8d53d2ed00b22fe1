//! Finds overlays above the image that a merge has left as the disk's top. If somebody took a snapshot after
//! the switch, the guest's last writes are in such an overlay.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use qcow2::chain::find_users;
use qcow2::error::FileOp;
use qcow2::storage::{Access, FileId, Host, OsHost};
use qcow2::{Error, Result};

use super::finding::{Fact, Finding, Found, Next, Trouble};
use super::look;
use crate::live::discover::Unfinished;

/// What was found above an image.
enum Above {
    /// The disk is this image, the uppermost of the only chain.
    In(PathBuf),
    /// More than one image has this one as its backing file.
    Forks(PathBuf, Vec<PathBuf>),
}

/// Corrects the top in a finding. `live` are the files of the disk in a running QEMU, from the active one down.
pub(super) fn look_above(merge: &Unfinished, finding: &mut Finding, live: &[String]) {
    let Some(top) = finding.valid_top.clone() else { return };
    let shown = live.first().filter(|_| live.contains(&top));
    let mut searched = BTreeSet::new();
    let above = match shown {
        Some(live) => Ok(Above::In(live.into())),
        None => find_above(merge, Path::new(&top), &mut searched),
    };
    match above {
        Ok(Above::In(above)) if above == Path::new(&top) => {}
        Ok(Above::In(above)) => {
            let above = above.to_string_lossy().into_owned();
            finding.facts.push(Fact::LiesAbove { above: above.clone(), top });
            if let Some(Next::Offline { active }) = &mut finding.next {
                active.clone_from(&above);
            }
            finding.valid_top = Some(above);
        }
        Ok(Above::Forks(image, users)) => {
            finding.valid_top = None;
            if finding.trouble.is_some() {
                finding.facts.push(Fact::Fork { image, users });
            } else {
                finding.trouble = Some(Trouble::Fork { image, users });
            }
        }
        Err(error) => finding.facts.push(Fact::AboveNotSeen { top, error }),
    }
    let is_settled = matches!(finding.outcome, Found::Completed | Found::NotSwitched | Found::RelinkedBack);
    if let (true, Found::Completed, Some(top)) =
        (finding.merge.merges_active(), finding.outcome, finding.valid_top.clone())
    {
        finding.facts.push(Fact::ShouldBeNamed { top, certain: shown.is_some() });
    }
    if is_settled && !searched.is_empty() {
        finding.facts.push(Fact::Searched(searched.into_iter().collect()));
    }
}

/// Follows the users of `top` upwards. `searched` receives the folders that were searched.
fn find_above(merge: &Unfinished, top: &Path, searched: &mut BTreeSet<PathBuf>) -> Result<Above> {
    let state = &merge.state;
    let mut at = top.to_owned();
    let mut ours = Vec::new();
    for layer in &state.layers {
        ours.extend(look::id(Path::new(&layer.file))?);
    }
    let folders = searched;
    folders.extend(state.layers.iter().flat_map(|layer| look::folders_of(Path::new(&layer.file))));
    folders.extend(state.scan.iter().filter(|folder| folder.is_dir()).cloned());
    folders.extend(look::folders_of(merge.file.path()));
    while let Some(below) = look::id(&at)? {
        let all: Vec<PathBuf> = folders.iter().cloned().collect();
        let users_of = |file: FileId| -> Result<Vec<PathBuf>> {
            let found = find_users(&OsHost, &all, &[file], &ours)?.users;
            Ok(found.into_iter().map(|user| user.path).collect())
        };
        // An empty overlay that nobody uses shows the same disk: it may be a remainder of a clean-up, and is no
        // fork.
        let mut users = Vec::new();
        for user in users_of(below)? {
            let has_users = || -> Result<bool> {
                let Some(file) = look::id(&user)? else { return Ok(false) };
                Ok(!users_of(file)?.is_empty())
            };
            if !is_idle(&user, below)? || has_users()? {
                users.push(user);
            }
        }
        match users.as_slice() {
            [] => break,
            [user] => at = user.clone(),
            _ => return Ok(Above::Forks(at, users)),
        }
        // The search skips our own images from now on. This also ends a circle of images that name each other.
        ours.extend(look::id(&at)?);
        folders.extend(look::folders_of(&at));
    }
    Ok(Above::In(at))
}

/// Whether an overlay is empty and nobody has it open. Then it shows what the image below it shows.
fn is_idle(overlay: &Path, below: FileId) -> Result<bool> {
    if !look::is_empty_on(overlay, below)? {
        return Ok(false);
    }
    let file = OsHost.open(overlay, Access::Read).map_err(|e| Error::io(overlay, FileOp::Open, None, e))?;
    let used = file.used_by_others().map_err(|e| Error::io(overlay, FileOp::ReadLocks, None, e))?;
    Ok(used.is_none())
}
