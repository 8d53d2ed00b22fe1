//! Reads and writes a state file. It is always written as a whole, and believed only if it can come from nobody
//! but root and the caller.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qcow2::storage::{Host, OsHost, Place};

use super::stamp::if_there;
use super::{State, StateTrouble, failed, folder, now_ns, pointer, unreadable};
use crate::error::{Result, StateFault};
use crate::qmp::address::Address;

const SUFFIX: &str = ".qmerge-live";

/// The place of a state file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateFile {
    path: PathBuf,
}

impl StateFile {
    /// The state file beside an active image: `.NAME.qmerge-live` in the image's folder, with links followed.
    /// `None` if there is no such image here, or the path is relative.
    pub fn beside(active: &Path) -> Option<Self> {
        let image = active.is_absolute().then(|| fs::canonicalize(active).ok())??;
        Some(Self::named(image.parent()?, &image))
    }

    /// The state file for an active image in another folder. The image need not be a file on this host.
    pub fn in_folder(folder: &Path, active: &Path) -> Self {
        Self::named(folder, active)
    }

    /// The state file at this path.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    fn named(folder: &Path, image: &Path) -> Self {
        let mut name = OsString::from(".");
        match image.file_name().filter(|_| image.is_absolute()) {
            Some(last) => name.push(last),
            // The image is an address, not a file: use its text without slashes.
            None => name.push(image.to_string_lossy().replace('/', "_")),
        }
        name.push(SUFFIX);
        Self { path: folder.join(name) }
    }

    /// The path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the state; `None` if there is no such file.
    ///
    /// # Errors
    /// [`crate::Error::File`] if it cannot be read; [`crate::Error::State`] if it holds no state, or if anybody
    /// but root and the caller may have written it. A state file names files to be written and removed, so a
    /// foreign one could be a trap.
    pub fn load(&self) -> Result<Option<State>> {
        let load = || match folder::place(&self.path)? {
            Some(place) => load_at(&place),
            None => Ok(None),
        };
        load().map_err(|why| failed(&self.path, why))
    }

    /// Replaces the content of the file durably: after this returns, a power cut does not bring the old content
    /// back.
    ///
    /// # Errors
    /// [`crate::Error::File`] if the file or its folder cannot be written or synced. The file has the old or
    /// the new content then.
    pub fn save(&self, state: &mut State) -> Result<()> {
        state.changed_ns = now_ns();
        self.save_as_it_is(state)
    }

    /// As [`StateFile::save`], with the time that the state names.
    pub(crate) fn save_as_it_is(&self, state: &State) -> Result<()> {
        let save = || {
            let text = serde_json::to_vec_pretty(state).map_err(StateFault::Unwritable)?;
            let place = folder::place(&self.path)?;
            let place = place.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
            folder::replace(&place, &text)
        };
        save().map_err(|why| failed(&self.path, why))
    }

    /// Removes the file, durably; it is no error if there is none.
    ///
    /// # Errors
    /// [`crate::Error::File`] if it cannot be removed; [`crate::Error::State`] if it belongs to somebody else.
    pub fn remove(&self) -> Result<()> {
        let remove = || folder::place(&self.path)?.map_or(Ok(()), |place| folder::remove(&place));
        remove().map_err(|why| failed(&self.path, why))
    }

    /// Removes the state file of a finished merge, and its line in the list beside the monitor's socket.
    ///
    /// # Errors
    /// As [`StateFile::remove`].
    pub fn forget(&self, state: &State) -> Result<()> {
        self.remove()?;
        if let Ok(address) = state.address.parse() {
            pointer::Pointer::of(&address).remove(self);
        }
        Ok(())
    }
}

fn load_at(place: &Place) -> std::result::Result<Option<State>, StateTrouble> {
    Ok(folder::read(place)?.map(|text| State::parse(&text)).transpose()?)
}

/// All states in a folder, by the names of their files.
///
/// # Errors
/// [`crate::Error::File`] for the folder or a file that cannot be read; [`crate::Error::State`] for a file
/// without a state.
pub fn states_in(path: &Path) -> Result<Vec<(StateFile, State)>> {
    let mut found = Vec::new();
    for place in places_in(path)? {
        let file = StateFile::at(path.join(place.name()));
        if let Some(state) = load_at(&place).map_err(|why| failed(file.path(), why))? {
            found.push((file, state));
        }
    }
    Ok(found)
}

/// All states in the folder of an image, as [`states_in`] finds them, without those of strangers.
///
/// # Errors
/// As [`states_in`].
pub(crate) fn states_beside(path: &Path) -> Result<Vec<(StateFile, State)>> {
    let mut found = Vec::new();
    for place in places_in(path)? {
        let file = StateFile::at(path.join(place.name()));
        if stranger_at(&place).map_err(|e| unreadable(file.path(), e))?.is_some() {
            continue;
        }
        if let Some(state) = load_at(&place).map_err(|why| failed(file.path(), why))? {
            found.push((file, state));
        }
    }
    Ok(found)
}

/// The files of strangers in a folder that have names of state files, and the number of each owner. A file that
/// cannot be looked at is left out.
pub(crate) fn strangers_in(path: &Path) -> Vec<(PathBuf, u32)> {
    let places = places_in(path).unwrap_or_default();
    let of = |place: Place| Some((path.join(place.name()), stranger_at(&place).ok()??));
    places.into_iter().filter_map(of).collect()
}

fn places_in(path: &Path) -> Result<Vec<Place>> {
    let opened = folder::open(path).map_err(|e| unreadable(path, e))?;
    let names = folder::names(&opened, ".", SUFFIX).map_err(|e| unreadable(path, e))?;
    Ok(names.into_iter().map(|name| Place::within(Arc::clone(&opened), name)).collect())
}

/// The owner of the file at a place, if that user may not write the image beside it, or if there is no such image.
/// Such a file does not count: anybody can put one into a shared folder.
fn stranger_at(place: &Place) -> io::Result<Option<u32>> {
    let Some(stat) = if_there(place.stat(&OsHost))? else { return Ok(None) };
    let name = place.name().as_bytes();
    let name =
        name.strip_prefix(b".").and_then(|name| name.strip_suffix(SUFFIX.as_bytes())).unwrap_or_default();
    let image = match name {
        b"" => None,
        name => if_there(place.beside(OsStr::from_bytes(name)).stat(&OsHost))?,
    };
    let caller = OsHost.user();
    let counts = [0, caller].contains(&stat.owner.user)
        || image.is_some_and(|image| stat.owner.may_speak_for(&image.owner, caller));
    Ok((!counts).then_some(stat.owner.user))
}

/// Loads the states of the files that exist.
pub(super) fn load_all(paths: impl IntoIterator<Item = PathBuf>) -> Result<Vec<(StateFile, State)>> {
    let mut found = Vec::new();
    for path in paths {
        let file = StateFile::at(path);
        if let Some(state) = file.load()? {
            found.push((file, state));
        }
    }
    Ok(found)
}

/// All states that a monitor's pointer names and that lie in these folders, each once. Folders that do not
/// exist here are skipped.
///
/// # Errors
/// As [`states_in`].
pub fn find_states<'a>(
    address: Option<&Address>,
    folders: impl IntoIterator<Item = &'a Path>,
) -> Result<Vec<(StateFile, State)>> {
    let mut found = address.map_or(Ok(Vec::new()), pointer::states_of)?;
    for folder in folders {
        let there = if_there(fs::metadata(folder)).map_err(|e| unreadable(folder, e))?;
        if !folder.is_absolute() || !there.is_some_and(|meta| meta.is_dir()) {
            continue;
        }
        let real = |path: &Path| fs::canonicalize(path).map_err(|e| unreadable(path, e));
        for (file, state) in states_in(folder)? {
            let path = real(file.path())?;
            let mut is_known = false;
            for (other, _) in &found {
                is_known |= real(other.path())? == path;
            }
            if !is_known {
                found.push((file, state));
            }
        }
    }
    Ok(found)
}
