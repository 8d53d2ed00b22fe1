//! A list of a monitor's state files beside its socket, for when QEMU can no longer be asked.
//!
//! Nothing depends on the list, so it is no error if the socket's folder cannot be written.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use super::file::load_all;
use super::{State, StateFile, folder};
use crate::error::Result;
use crate::qmp::address::Address;

/// The list of one monitor.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pointer {
    /// `None` for a monitor without a socket file.
    path: Option<PathBuf>,
}

impl Pointer {
    pub(crate) fn of(address: &Address) -> Self {
        let beside = |socket: &Path| {
            let mut name = socket.as_os_str().to_owned();
            name.push(".qmerge");
            PathBuf::from(name)
        };
        Self { path: if let Address::Unix(socket) = address { Some(beside(socket)) } else { None } }
    }

    /// Adds a file, if that is possible.
    pub(crate) fn add(&self, file: &StateFile) {
        let path = std::path::absolute(file.path()).unwrap_or_else(|_| file.path().to_owned());
        let mut paths = self.read();
        if !paths.contains(&path) && !path.as_os_str().as_bytes().contains(&b'\n') {
            paths.push(path);
            self.write(&paths);
        }
    }

    /// Takes a file out of the list, and removes the list with the last one.
    pub(crate) fn remove(&self, file: &StateFile) {
        let path = std::path::absolute(file.path()).unwrap_or_else(|_| file.path().to_owned());
        let mut paths = self.read();
        paths.retain(|other| *other != path && other.exists());
        self.write(&paths);
    }

    fn read(&self) -> Vec<PathBuf> {
        // A list that somebody else has written counts as empty.
        let place = self.path.as_deref().and_then(|path| folder::place(path).ok().flatten());
        let text = place.and_then(|place| folder::read(&place).ok().flatten()).unwrap_or_default();
        let lines = text.split(|byte| *byte == b'\n').filter(|line| line.starts_with(b"/"));
        lines.map(|line| OsString::from_vec(line.to_vec()).into()).collect()
    }

    fn write(&self, paths: &[PathBuf]) {
        let Some(Ok(Some(place))) = self.path.as_deref().map(folder::place) else { return };
        // Errors are ignored: only the state files themselves matter.
        let _ = if paths.is_empty() {
            folder::remove(&place)
        } else {
            let lines = paths.iter().flat_map(|p| [p.as_os_str().as_bytes(), b"\n"]).flatten();
            folder::replace(&place, &lines.copied().collect::<Vec<u8>>())
        };
    }
}

/// The states of a monitor's merges, from the list beside its socket; QEMU need not run any more.
///
/// # Errors
/// [`crate::Error::File`], [`crate::Error::State`] for one that cannot be read.
pub fn states_of(address: &Address) -> Result<Vec<(StateFile, State)>> {
    load_all(Pointer::of(address).read())
}
