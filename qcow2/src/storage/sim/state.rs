//! The files of a disk at one moment.

use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::record::Op;
use crate::storage::MemHost;
use crate::storage::mem::FileImage;

/// All files of a disk with their names and identities. Clones share what does not change.
#[derive(Clone, Debug, Default)]
pub struct State {
    files: BTreeMap<u64, Arc<FileImage>>,
    names: BTreeMap<PathBuf, u64>,
}

impl State {
    /// The files of a host as they are.
    pub fn of(host: &MemHost) -> Self {
        let mut state = Self::default();
        for (path, inode, image) in host.images() {
            state.names.insert(path, inode);
            state.files.insert(inode, Arc::new(image));
        }
        state
    }

    /// A host with these files, which are the same files: inode and time of change stay.
    ///
    /// # Errors
    /// A file that is too large for memory.
    pub fn host(&self) -> io::Result<MemHost> {
        let host = MemHost::new();
        for (path, inode) in &self.names {
            match self.files.get(inode) {
                Some(image) => host.restore(path, *inode, image)?,
                None => host.restore(path, *inode, &FileImage::default())?,
            }
        }
        Ok(host)
    }

    /// The names of all files.
    pub fn names(&self) -> impl Iterator<Item = &Path> {
        self.names.keys().map(PathBuf::as_path)
    }

    /// The inode behind a name.
    pub fn inode(&self, path: &Path) -> Option<u64> {
        self.names.get(path).copied()
    }

    /// A name of a file, for messages.
    pub fn name_of(&self, file: u64) -> Option<&Path> {
        self.names.iter().find(|(_, inode)| **inode == file).map(|(path, _)| path.as_path())
    }

    /// The content of a file.
    pub fn content(&self, path: &Path) -> Option<&[u8]> {
        Some(&self.files.get(self.names.get(path)?)?.bytes)
    }

    /// The length of a file in bytes; zero if there is none.
    pub(super) fn len_of(&self, file: u64) -> u64 {
        self.files.get(&file).map_or(0, |image| image.bytes.len() as u64)
    }

    /// Changes the length of a file.
    pub(super) fn set_len_of(&mut self, file: u64, len: u64) {
        Arc::make_mut(self.files.entry(file).or_default()).bytes.resize(len as usize, 0);
    }

    /// What a file holds in a range.
    pub(super) fn bytes_of(&self, file: u64, offset: u64, len: usize) -> Option<&[u8]> {
        self.files.get(&file)?.bytes.get(offset as usize..offset as usize + len)
    }

    /// The bytes of a file in a range, as far as the file reaches, to be overwritten.
    pub(super) fn bytes_of_mut(&mut self, file: u64, offset: u64, len: u64) -> Option<&mut [u8]> {
        let bytes = &mut Arc::make_mut(self.files.get_mut(&file)?).bytes;
        let end = bytes.len().min((offset + len) as usize);
        bytes.get_mut(offset as usize..end)
    }

    /// Does what a log's entry says.
    pub fn apply(&mut self, op: &Op) {
        match op {
            Op::Write { file, offset, bytes, .. } => {
                let image = Arc::make_mut(self.files.entry(*file).or_default());
                let (from, to) = (*offset as usize, *offset as usize + bytes.len());
                if image.bytes.len() < to {
                    image.bytes.resize(to, 0);
                }
                if let Some(there) = image.bytes.get_mut(from..to) {
                    there.copy_from_slice(bytes);
                }
                image.changes += 1;
            }
            Op::SetLen { file, len } => {
                self.set_len_of(*file, *len);
                Arc::make_mut(self.files.entry(*file).or_default()).changes += 1;
            }
            Op::Create { path, file } => {
                self.files.entry(*file).or_default();
                self.names.insert(path.clone(), *file);
            }
            Op::Rename { from, to, file } => {
                self.names.remove(from);
                self.names.insert(to.clone(), *file);
            }
            Op::Unlink { path } => {
                self.names.remove(path);
            }
            Op::Sync { .. } | Op::SyncDir { .. } | Op::Note(_) => {}
        }
    }

    /// A number that differs for states that differ in names or content.
    pub(super) fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        for (path, inode) in &self.names {
            (path, inode).hash(&mut hasher);
            self.files.get(inode).map(|image| &image.bytes).hash(&mut hasher);
        }
        hasher.finish()
    }
}
