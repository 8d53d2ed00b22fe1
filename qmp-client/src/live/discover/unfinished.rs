//! Finds unfinished merges by their state files.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use qcow2::error::Holder;
use qcow2::storage::{Access, Host, OsHost};

use crate::block::graph::{Disk, Graph};
use crate::error::{Error, Result};
use crate::live::outline::Outline;
use crate::qmp::address::Address;
use crate::state::{State, StateFile, find_states, states_beside, strangers_in, sweep};

/// An unfinished merge: its job runs, or was interrupted, or its obsolete files are not tidied up yet.
#[derive(Clone, Debug)]
pub struct Unfinished {
    pub(crate) file: StateFile,
    pub(crate) state: State,
}

impl Unfinished {
    /// All unfinished merges with a state file in these folders or beside this monitor's socket, each once.
    /// Folders that do not exist are skipped.
    ///
    /// # Errors
    /// [`crate::Error::State`], which names the folder or the state file that cannot be read or may not be
    /// believed.
    pub fn find(address: Option<&Address>, folders: &[PathBuf]) -> Result<Vec<Self>> {
        let found = find_states(address, folders.iter().map(PathBuf::as_path))?;
        Ok(found.into_iter().map(|(file, state)| Self { file, state }).collect())
    }

    /// The unfinished merges that may concern these disks: with state files beside their images, in
    /// `state_dir`, or beside the monitor's socket.
    ///
    /// # Errors
    /// As [`Unfinished::find`].
    pub(crate) fn of_disks(address: &Address, disks: &[Disk], state_dir: Option<&Path>) -> Result<Vec<Self>> {
        Self::find(Some(address), &folders_of_disks(disks, state_dir))
    }

    /// The unfinished merges with a state file beside an image, and with the image as a part. A state file of
    /// somebody who may not write the image does not count; see [`unbelieved_states`].
    ///
    /// # Errors
    /// As [`Unfinished::find`].
    pub fn of_image(image: &Path) -> Result<Vec<Self>> {
        let mut all: Vec<Self> = Vec::new();
        let mut folders: BTreeSet<PathBuf> = BTreeSet::new();
        for folder in folders_of_image(image) {
            // Two names may lead to the same folder.
            match std::fs::canonicalize(&folder) {
                Ok(real) => {
                    folders.insert(real);
                }
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(source) => return Err(Error::File { file: folder, source }),
            }
        }
        for folder in folders {
            let found = states_beside(&folder)?.into_iter().map(|(file, state)| Self { file, state });
            all.extend(found.filter(|merge| merge.is_about(image)));
        }
        Ok(all)
    }

    /// The unfinished merge with its state file beside an active image; `None` if there is no such file.
    ///
    /// # Errors
    /// As [`Unfinished::find`].
    pub fn beside(active: &Path) -> Result<Option<Self>> {
        let active = std::path::absolute(active).unwrap_or_else(|_| active.to_owned());
        let Some(file) = StateFile::beside(&active) else { return Ok(None) };
        Ok(file.load()?.map(|state| Self { file, state }))
    }

    /// Its outline.
    pub fn outline(&self) -> Outline {
        Outline::of(&self.file, &self.state)
    }

    /// Whether this file is its state file or one of its layers. Links are followed.
    pub fn is_about(&self, path: &Path) -> bool {
        let real = |path: &Path| std::fs::canonicalize(path).ok();
        let meant = real(path);
        let is = |other: &Path| other == path || (meant.is_some() && real(other) == meant);
        is(self.file.path()) || self.state.layers.iter().any(|layer| is(Path::new(&layer.file)))
    }

    /// The disk in a present graph that shows the chain from before the merge, or the one that the merge
    /// leaves.
    pub(crate) fn disk<'g>(&self, graph: &'g Graph) -> Option<&'g Disk> {
        self.state.disk_after(graph).or_else(|| self.state.disk_before(graph))
    }
}

/// Whether a live merge stands in the way of an offline merge.
#[derive(Clone, Debug)]
pub enum Interrupted {
    /// None does.
    No,
    /// One may be under way: somebody holds the image.
    InUse(Vec<Holder>),
    /// One was interrupted, and must be recovered first.
    Yes(Box<Outline>),
}

impl Interrupted {
    /// Looks beside an active image.
    ///
    /// # Errors
    /// As [`Unfinished::find`].
    pub fn of_image(active: &Path) -> Result<Self> {
        let found = Unfinished::of_image(active)?;
        let Some(merge) = found.first().map(Unfinished::outline) else { return Ok(Self::No) };
        let used = OsHost.open(active, Access::Read).and_then(|image| image.used_by_others());
        Ok(match (used, OsHost.stat(active)) {
            (Ok(Some(_)), Ok(stat)) => Self::InUse(OsHost.holders(stat.id)),
            _ => Self::Yes(Box::new(merge)),
        })
    }
}

/// The state files beside an image that do not count, as they belong to users who may not write the image; and the
/// number of each user.
pub fn unbelieved_states(image: &Path) -> Vec<(PathBuf, u32)> {
    let own = std::path::absolute(image).ok().and_then(|image| StateFile::beside(&image));
    let Some(own) = own else { return Vec::new() };
    let all = own.path().parent().map(strangers_in).unwrap_or_default();
    all.into_iter().filter(|(file, _)| file == own.path()).collect()
}

/// Removes the files of clients that were killed while they wrote a state file, in these folders and beside the
/// monitor's socket. Errors are ignored: the files do no harm.
pub fn sweep_folders(address: Option<&Address>, folders: &[PathBuf]) {
    let socket = match address {
        Some(Address::Unix(path)) => {
            std::path::absolute(path).ok().and_then(|path| path.parent().map(Path::to_owned))
        }
        _ => None,
    };
    let all: BTreeSet<PathBuf> = folders.iter().cloned().chain(socket).collect();
    for folder in all {
        sweep(&folder);
    }
}

/// The folders in which state files of these disks may lie: those of their images, with links followed, and the
/// user's.
pub fn folders_of_disks(disks: &[Disk], state_dir: Option<&Path>) -> Vec<PathBuf> {
    let images = disks.iter().flat_map(Disk::layers).map(|layer| PathBuf::from(&layer.file));
    let images = images.filter(|image| image.is_absolute());
    let both = images.flat_map(|image| [image.canonicalize().ok(), Some(image)]).flatten();
    let mut folders: BTreeSet<PathBuf> =
        both.filter_map(|image| image.parent().map(Path::to_owned)).collect();
    folders.extend(state_dir.and_then(|dir| std::path::absolute(dir).ok()));
    folders.into_iter().collect()
}

/// The folders in which a state file of this image may lie: its own, by its given name and with links followed.
pub fn folders_of_image(image: &Path) -> Vec<PathBuf> {
    let absolute = std::path::absolute(image).unwrap_or_else(|_| image.to_owned());
    let names = [std::fs::canonicalize(image).ok(), Some(absolute)];
    let folders: BTreeSet<PathBuf> =
        names.into_iter().flatten().filter_map(|path| Some(path.parent()?.to_owned())).collect();
    folders.into_iter().collect()
}

/// The state files of these merges, each with its state.
pub(crate) fn states(all: &[Unfinished]) -> Vec<(StateFile, State)> {
    all.iter().map(|merge| (merge.file.clone(), merge.state.clone())).collect()
}
