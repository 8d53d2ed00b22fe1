//! Chains of images: how names in images lead to files, safely, and which layer supplies each range of the
//! disk.
//!
//! Invariants: a file that the user did not name is opened only if the [`Policy`] allows it; the format of a
//! file that an image names is never guessed; a [`Chain`] holds every file at most once.

mod data_file;
pub(crate) mod differ;
pub(crate) mod differences;
mod digest;
mod find;
mod json;
mod moved;
mod name;
mod open;
mod policy;
mod read;
mod reader;
mod relink;
mod search;
mod siblings;
mod signs;
pub mod view;
mod walk;

use std::path::PathBuf;

use crate::error::{Error, Result};
use crate::image::Image;
use crate::storage::{Access, FileId, Host, Place};

pub use data_file::{DataFile, DataFileKept};
pub use digest::digest;
pub(crate) use find::index;
pub use moved::{MovedFolder, RenamedImage, RenamedImages, find_renamed};
pub use name::BackingName;
pub(crate) use open::Rename;
pub use open::{OpenOptions, open_data_file};
pub use policy::Policy;
pub use reader::Reader;
pub use relink::new_backing_name;
pub use search::Search;
pub use siblings::{Sibling, Siblings, find_users, find_users_in};
pub use signs::Lookalike;
pub(crate) use signs::{Looked, find_lookalikes, other_names};
pub use view::{Supplied, Supply, View};
pub use walk::{MapEntry, Mapper};

/// An opened chain, the bottom first, the active image last. It has at least one layer.
#[derive(Debug)]
pub struct Chain {
    layers: Vec<Layer>,
}

/// One image of a chain.
#[derive(Debug)]
pub struct Layer {
    /// Its number, from 1 at the bottom.
    pub index: usize,
    /// Its path as QEMU would show it: resolved, but not normalised.
    pub path: PathBuf,
    /// Its name as written in the layer above; `None` for the active image.
    pub written_name: Option<Vec<u8>>,
    /// Its identity.
    pub id: FileId,
    /// How it was opened.
    pub access: Access,
    /// Its external data file, if it has one.
    pub data_file: Option<DataFile>,
    /// The opened image.
    pub image: Image,
}

impl Chain {
    /// The layers, the bottom first.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The images of the layers, the bottom first.
    pub fn images(&self) -> Vec<&Image> {
        self.layers.iter().map(|layer| &layer.image).collect()
    }

    /// A layer by its position.
    ///
    /// # Errors
    /// [`Error::Broken`]: positions come from the chain itself.
    pub(crate) fn layer(&self, at: usize) -> Result<&Layer> {
        self.layers.get(at).ok_or(Error::Broken { invariant: "a chain has the layers that were found in it" })
    }

    /// The image of a layer, to be changed.
    ///
    /// # Errors
    /// As [`Chain::layer`].
    pub(crate) fn image_at(&mut self, at: usize) -> Result<&mut Image> {
        let broken = Error::Broken { invariant: "a chain has the layers that were found in it" };
        self.layers.get_mut(at).map(|layer| &mut layer.image).ok_or(broken)
    }

    /// The layers whose file systems have no locks, though locks were asked for.
    pub fn unlocked(&self) -> Vec<PathBuf> {
        let is_unlocked =
            |layer: &&Layer| !layer.image.file().has_locks() || !layer.image.data_file().has_locks();
        self.layers.iter().filter(is_unlocked).map(|layer| layer.path.clone()).collect()
    }

    /// The position of the active image: that of the last layer.
    pub fn active(&self) -> usize {
        self.layers.len().saturating_sub(1)
    }

    /// Checks that the names of the layers from `base` up still lead to the open files. If one does not, a reader of the
    /// chain would find another base than the one that was merged with.
    ///
    /// # Errors
    /// [`Refusal::NotAsKnown`](crate::Refusal::NotAsKnown); the system's.
    pub(crate) fn names_are_the_same(&self, host: &dyn Host, base: usize) -> Result<()> {
        for layer in self.layers.iter().skip(base) {
            Place::of_file(host, &layer.path, &**layer.image.file())?;
            if let (Some(data), Some(image)) = (&layer.data_file, layer.image.as_qcow2()) {
                Place::of_file(host, &data.path, &**image.data_file())?;
            }
        }
        Ok(())
    }

    /// The identities of all files of the chain: images and external data files.
    pub(crate) fn files(&self) -> Vec<FileId> {
        let data = |layer: &Layer| layer.data_file.as_ref().map(|file| file.id);
        self.layers.iter().flat_map(|layer| [Some(layer.id), data(layer)]).flatten().collect()
    }
}

#[cfg(test)]
mod tests;
