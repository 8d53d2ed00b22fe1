//! New overlays above the image that a merge has left as the disk's top: somebody took a snapshot behind the switch, and what
//! the guest wrote last is there.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use qcow2::chain::find_users;
use qcow2::error::FileOp;
use qcow2::storage::{Access, FileId, Host, OsHost};
use qcow2::{Error, Result};

use super::Case;
use super::look;
use super::tell::Finding;
use crate::exit::Exit;
use crate::failure::Report;
use crate::hint::word;

/// Where the disk is.
enum Above {
    /// In this image, the uppermost of the only chain that there is.
    In(PathBuf),
    /// More than one image has this one as its backing file.
    Forks(PathBuf, Vec<PathBuf>),
}

impl Case<'_> {
    /// Corrects what a finding says of the top. `live` are the files of the disk in a QEMU that runs,
    /// from the active one down.
    pub(super) fn look_above(&self, finding: &mut Finding, live: &[String]) {
        let Some(top) = finding.valid_top.clone() else { return };
        let above = match live.first().filter(|_| live.contains(&top)) {
            Some(live) => Ok(Above::In(live.into())),
            None => self.above(Path::new(&top)),
        };
        match above {
            Ok(Above::In(above)) if above == Path::new(&top) => {}
            Ok(Above::In(above)) => {
                let above = above.to_string_lossy().into_owned();
                finding.facts.push(format!("{above} lies above {top}, and is the disk now"));
                if finding.next == Some(self.offline()) {
                    finding.next = Some(self.offline_below(&above));
                }
                finding.valid_top = Some(above);
            }
            Ok(Above::Forks(image, users)) => self.say_fork(finding, &image, &users),
            Err(error) => {
                finding.facts.push(format!("whether another image lies above {top} cannot be seen: {error}"));
            }
        }
    }

    fn say_fork(&self, finding: &mut Finding, image: &Path, users: &[PathBuf]) {
        finding.valid_top = None;
        let names: Vec<_> = users.iter().map(|user| user.display().to_string()).collect();
        let message = format!(
            "{} is the backing file of {}: which of them is the disk cannot be told",
            image.display(),
            names.join(" and of ")
        );
        if finding.trouble.is_some() {
            finding.facts.push(message);
            return;
        }
        let looks: Vec<_> = users.iter().map(|user| format!("qmerge info --chain {}", word(user))).collect();
        let hint =
            format!("what starts the virtual machine names it; see their chains: {}", looks.join("; "));
        finding.trouble = Some(Report { kind: "unclear", message, hint: hint.into(), exit: Exit::REFUSED });
    }

    fn above(&self, top: &Path) -> Result<Above> {
        let mut at = top.to_owned();
        let mut ours = Vec::new();
        for layer in &self.state.layers {
            ours.extend(look::id(Path::new(&layer.file))?);
        }
        let mut folders: BTreeSet<PathBuf> =
            self.state.layers.iter().flat_map(|layer| look::folders_of(Path::new(&layer.file))).collect();
        folders.extend(self.state.scan.iter().filter(|folder| folder.is_dir()).cloned());
        folders.extend(look::folders_of(self.file.path()));
        while let Some(below) = look::id(&at)? {
            let all: Vec<PathBuf> = folders.iter().cloned().collect();
            let users_of = |file: FileId| -> Result<Vec<PathBuf>> {
                let found = find_users(&OsHost, &all, &[file], &ours)?.users;
                Ok(found.into_iter().map(|user| user.path).collect())
            };
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
            // Files that name each other in a circle end here.
            ours.extend(look::id(&at)?);
            folders.extend(look::folders_of(&at));
        }
        Ok(Above::In(at))
    }
}

/// Whether an overlay holds nothing, and nobody has it open: it shows what the image below it shows.
fn is_idle(overlay: &Path, below: FileId) -> Result<bool> {
    if !look::is_empty_on(overlay, below)? {
        return Ok(false);
    }
    let file = OsHost.open(overlay, Access::Read).map_err(|e| Error::io(overlay, FileOp::Open, None, e))?;
    let used = file.used_by_others().map_err(|e| Error::io(overlay, FileOp::ReadLocks, None, e))?;
    Ok(used.is_none())
}
