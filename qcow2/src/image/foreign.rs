//! Images of formats that are not read here, as the lowest layer of a chain.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::Error;
use crate::format::Container;
use crate::storage::Storage;

/// An image of another format: held open and locked like any layer, so that nobody changes it, and never read.
/// Whatever needs its bytes gets an error.
#[derive(Debug)]
pub struct Foreign {
    path: PathBuf,
    file: Arc<dyn Storage>,
    container: Container,
}

impl Foreign {
    /// What counts as the size of its disk, in bytes, as nobody knows it: larger than every disk, so that something
    /// of it may show through every layer above.
    pub(crate) const SIZE: u64 = 1 << 62;

    pub(super) fn new(path: &Path, file: Arc<dyn Storage>, container: Container) -> Self {
        Self { path: path.to_owned(), file, container }
    }

    /// The image's path, as it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The image file.
    pub(crate) fn file(&self) -> &Arc<dyn Storage> {
        &self.file
    }

    /// The format.
    pub fn container(&self) -> Container {
        self.container
    }

    /// The error of whoever needs its bytes.
    pub(crate) fn refuse(&self) -> Error {
        Error::Foreign { path: self.path.clone(), container: self.container }
    }
}
