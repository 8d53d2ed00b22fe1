//! The files of a disk at one moment.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::record::DiskOp;
use crate::storage::MemHost;
use crate::storage::mem_content::{FileContent, MemoryPage};

/// All files of a disk with their names and identities. Clones share what does not change.
#[derive(Clone, Debug, Default)]
pub struct State {
    files: BTreeMap<u64, FileContent>,
    names: BTreeMap<PathBuf, u64>,
}

impl State {
    /// The files of a host as they are.
    pub fn of(host: &MemHost) -> Self {
        let mut state = Self::default();
        for (path, inode, content) in host.contents() {
            state.names.insert(path, inode);
            state.files.insert(inode, content);
        }
        state
    }

    /// A host with these files, which are the same files: inode and time of change stay.
    pub fn host(&self) -> MemHost {
        let host = MemHost::new();
        for (path, inode) in &self.names {
            host.restore(path, *inode, self.files.get(inode).cloned().unwrap_or_default());
        }
        host
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
    pub fn content(&self, path: &Path) -> Option<Vec<u8>> {
        let content = self.files.get(self.names.get(path)?)?;
        let mut bytes = vec![0; content.len as usize];
        content.read(&mut bytes, 0);
        Some(bytes)
    }

    /// Whether a name leads to the same bytes in another state; false where it is not there.
    pub fn has_same(&self, path: &Path, other: &Self) -> bool {
        let of = |state: &Self| state.files.get(state.names.get(path)?).cloned();
        let (Some(a), Some(b)) = (of(self), of(other)) else { return false };
        let pages = a.pages.iter().zip(&b.pages);
        let same = |(a, b): (&Arc<MemoryPage>, &Arc<MemoryPage>)| Arc::ptr_eq(a, b) || a == b;
        a.len == b.len
            && a.pages.len() == b.pages.len()
            && pages.into_iter().all(|((n, a), (m, b))| n == m && same((a, b)))
    }

    /// The length of a file in bytes; zero if there is none.
    pub(super) fn len_of(&self, file: u64) -> u64 {
        self.files.get(&file).map_or(0, |content| content.len)
    }

    /// Changes the length of a file.
    pub(super) fn set_len_of(&mut self, file: u64, len: u64) {
        self.files.entry(file).or_default().set_len(len);
    }

    /// What a file holds in a range, as far as it reaches.
    pub(super) fn bytes_of(&self, file: u64, offset: u64, len: u64) -> Vec<u8> {
        let Some(content) = self.files.get(&file) else { return Vec::new() };
        let mut bytes = vec![0; len.min(content.len.saturating_sub(offset)) as usize];
        content.read(&mut bytes, offset);
        bytes
    }

    /// Puts bytes into a file.
    pub(super) fn put(&mut self, file: u64, offset: u64, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.files.entry(file).or_default().write(bytes, offset);
        }
    }

    /// Changes the time of a file: programs see the time of its last change.
    fn touch(&mut self, file: u64, at: u64) {
        let content = self.files.entry(file).or_default();
        (content.changed, content.set) = (content.changed.max(at), None);
    }

    /// Does what a log's entry says.
    pub fn apply(&mut self, op: &DiskOp) {
        match op {
            DiskOp::Write { file, call, offset, bytes } => {
                self.put(*file, *offset, bytes);
                self.touch(*file, *call);
            }
            DiskOp::SetLen { file, len, at } => {
                self.set_len_of(*file, *len);
                self.touch(*file, *at);
            }
            DiskOp::Create { path, file, at } => {
                self.files.entry(*file).or_default().born = *at;
                self.touch(*file, *at);
                self.names.insert(path.clone(), *file);
            }
            DiskOp::Rename { from, to, file } => {
                self.names.remove(from);
                self.names.insert(to.clone(), *file);
            }
            DiskOp::Unlink { path } => {
                self.names.remove(path);
            }
            DiskOp::Sync { .. } | DiskOp::SyncDir { .. } | DiskOp::Note(_) => {}
        }
    }

    /// A number that differs for states that differ in names or content.
    pub(super) fn digest(&self, known: &Digests) -> u64 {
        let mut hasher = DefaultHasher::new();
        for (path, inode) in &self.names {
            (path, inode).hash(&mut hasher);
            let Some(content) = self.files.get(inode) else { continue };
            content.len.hash(&mut hasher);
            for (number, page) in &content.pages {
                (number, known.of(page)).hash(&mut hasher);
            }
        }
        hasher.finish()
    }
}

/// The digests of pages that many states share.
#[derive(Debug, Default)]
pub(super) struct Digests(HashMap<usize, (Arc<MemoryPage>, u64)>);

impl Digests {
    /// Computes those of a state that are not known yet.
    pub(super) fn learn(&mut self, state: &State) {
        for page in state.files.values().flat_map(|content| content.pages.values()) {
            // The page is kept, so that no other one gets its address.
            self.0.entry(Arc::as_ptr(page) as usize).or_insert_with(|| (Arc::clone(page), hash(page)));
        }
    }

    fn of(&self, page: &Arc<MemoryPage>) -> u64 {
        self.0.get(&(Arc::as_ptr(page) as usize)).map_or_else(|| hash(page), |(_, digest)| *digest)
    }
}

fn hash(page: &Arc<MemoryPage>) -> u64 {
    BuildHasherDefault::<DefaultHasher>::default().hash_one(&page[..])
}
