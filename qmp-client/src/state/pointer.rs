//! Where a monitor's state files lie: a list beside its socket, for when QEMU can no longer be asked.
//!
//! It is a convenience. Nothing relies on it being there, so a socket's folder that cannot be written is no error.

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
    /// None for a monitor without a socket file.
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

    /// Adds a file, as far as that is possible.
    pub(crate) fn add(&self, file: &StateFile) {
        let path = std::path::absolute(file.path()).unwrap_or_else(|_| file.path().to_owned());
        let mut paths = self.read();
        if !paths.contains(&path) && !path.as_os_str().as_bytes().contains(&b'\n') {
            paths.push(path);
            self.write(&paths);
        }
    }

    /// Takes a file out, and with the last one the list.
    pub(crate) fn remove(&self, file: &StateFile) {
        let path = std::path::absolute(file.path()).unwrap_or_else(|_| file.path().to_owned());
        let mut paths = self.read();
        paths.retain(|other| *other != path && other.exists());
        self.write(&paths);
    }

    fn read(&self) -> Vec<PathBuf> {
        // What somebody else has written there counts as nothing.
        let place = self.path.as_deref().and_then(|path| folder::place(path).ok().flatten());
        let text = place.and_then(|place| folder::read(&place).ok().flatten()).unwrap_or_default();
        let lines = text.split(|byte| *byte == b'\n').filter(|line| line.starts_with(b"/"));
        lines.map(|line| OsString::from_vec(line.to_vec()).into()).collect()
    }

    fn write(&self, paths: &[PathBuf]) {
        let Some(Ok(Some(place))) = self.path.as_deref().map(folder::place) else { return };
        // Best effort, as said above: the state files themselves are what counts.
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
