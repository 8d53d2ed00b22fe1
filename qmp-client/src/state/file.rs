//! The state file itself: written as a whole, read with suspicion.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::identity::if_there;
use super::{State, failed, litter, now_ns, pointer, unreadable};
use crate::error::Result;
use crate::qmp::address::Address;

const SUFFIX: &str = ".qmerge-live";
/// The permission of the group, or of everybody, to write.
const BY_OTHERS: u32 = 0o022;
/// A state takes some hundred bytes for each layer; nothing longer is one.
const LONGEST: u64 = 16 << 20;

/// The place of a state file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateFile {
    path: PathBuf,
}

impl StateFile {
    /// The one beside an active image: `.NAME.qmerge-live` in the image's folder, links followed. `None` if there
    /// is no such image here, or the path is relative.
    pub fn beside(active: &Path) -> Option<Self> {
        let image = active.is_absolute().then(|| fs::canonicalize(active).ok())??;
        Some(Self::named(image.parent()?, &image))
    }

    /// The one for an active image in another folder. The image may be no file here.
    pub fn in_folder(folder: &Path, active: &Path) -> Self {
        Self::named(folder, active)
    }

    /// The one at this path.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    fn named(folder: &Path, image: &Path) -> Self {
        let mut name = OsString::from(".");
        match image.file_name().filter(|_| image.is_absolute()) {
            Some(last) => name.push(last),
            // An address of what is no file: its letters, but no slashes.
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
    /// [`crate::Error::File`] if it cannot be read; [`crate::Error::State`] if it holds no state, or was perhaps written by
    /// anybody but root and the caller: it names files to be written and removed, and what it says may then be somebody's
    /// trap.
    pub fn load(&self) -> Result<Option<State>> {
        let fail = |why: &dyn ToString| failed(&self.path, why.to_string());
        // Merely opening a device can have effects; a link that is laid behind this look is not followed.
        match fs::symlink_metadata(&self.path) {
            Ok(meta) if meta.is_file() => {}
            Ok(_) => return Err(fail(&"it is no plain file")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(unreadable(&self.path, error)),
        }
        let io = |error| unreadable(&self.path, error);
        let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
        let file = File::options()
            .read(true)
            .custom_flags(flags.bits().cast_signed())
            .open(&self.path)
            .map_err(io)?;
        let opened = file.metadata().map_err(io)?;
        if !opened.is_file() {
            return Err(fail(&"it is no plain file"));
        }
        if ![0, rustix::process::geteuid().as_raw()].contains(&opened.uid()) {
            let whose = opened.uid();
            return Err(fail(&format!(
                "it belongs to the user {whose}, who is not trusted here: run the command as that user, or remove it"
            )));
        }
        if opened.mode() & BY_OTHERS != 0 {
            return Err(fail(
                &"others may write it, so it is not trusted: take that right away, or remove it",
            ));
        }
        let mut text = Vec::new();
        file.take(LONGEST).read_to_end(&mut text).map_err(io)?;
        State::parse(&text).map(Some).map_err(|why| fail(&why))
    }

    /// Replaces what the file says, durably: once this returns, a power cut does not bring the old text back.
    ///
    /// # Errors
    /// [`crate::Error::File`] if the file or its folder cannot be written or synced. The old text may stand, or the
    /// new one.
    pub fn save(&self, state: &mut State) -> Result<()> {
        state.changed_ns = now_ns();
        self.save_as_it_is(state)
    }

    /// The same, with the time that the state names.
    pub(crate) fn save_as_it_is(&self, state: &State) -> Result<()> {
        let text = serde_json::to_vec_pretty(state).map_err(|e| failed(&self.path, e))?;
        replace(&self.path, &text).map_err(|e| unreadable(&self.path, e))
    }

    /// Removes the file, durably; it is no error if there is none.
    ///
    /// # Errors
    /// [`crate::Error::File`] if it cannot be removed.
    pub fn remove(&self) -> Result<()> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done.and_then(|()| sync_folder(self.folder())).map_err(|e| unreadable(&self.path, e)),
        }
    }

    /// Removes the file of a merge that is done with, and its line in the list beside the monitor's socket.
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

    fn folder(&self) -> &Path {
        folder_of(&self.path)
    }
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Puts a file with this text in the place of another: it is whole whenever somebody looks.
pub(super) fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    let folder = folder_of(path);
    let mut new = litter::new_file(folder)?;
    new.write_all(text)?;
    new.as_file().sync_all()?;
    new.persist(path)?;
    sync_folder(folder)
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// All states in a folder, by the names of their files.
///
/// # Errors
/// [`crate::Error::File`] for the folder or a file that cannot be read; [`crate::Error::State`] for a file that says nothing.
pub fn states_in(folder: &Path) -> Result<Vec<(StateFile, State)>> {
    let fail = |error: io::Error| unreadable(folder, error);
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        let name = entry.file_name();
        if name.as_bytes().starts_with(b".") && name.as_bytes().ends_with(SUFFIX.as_bytes()) {
            paths.push(entry.path());
        }
    }
    paths.sort();
    load_all(paths)
}

/// Loads those that are there.
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

/// All states that a monitor's pointer names and that lie in these folders, each once. Folders that do not exist
/// here are passed over.
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
