//! Lists the files among which images may use a file of a chain.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::policy::KERNEL_FILES;
use crate::error::{Error, FileOp, Result};
use crate::storage::{Host, NameKind, if_there};

/// How many levels of folders are searched below a folder of [`Search::deep`].
const MAX_DEPTH: usize = 32;
/// How many names are looked at.
const MAX_NAMES: usize = 1_000_000;
/// How long folders are listed.
const MAX_TIME: Duration = Duration::from_secs(120);
/// How many folders, and names in them, are looked at in one folder of [`Search::nearby`].
const NEAR_FOLDERS: usize = 256;
const NEAR_NAMES: usize = 4096;

/// Where images are looked for.
#[derive(Clone, Debug, Default)]
pub struct Search {
    /// Folders to search, without their sub-folders.
    pub folders: Vec<PathBuf>,
    /// Folders to search with everything below them. Links to other folders are not followed.
    pub deep: Vec<PathBuf>,
    /// Folders whose direct sub-folders are likely to hold users. Folders there that the caller may not list
    /// are skipped.
    pub nearby: Vec<PathBuf>,
}

/// The files that were found, and what could not be searched.
#[derive(Debug, Default)]
pub(super) struct Walked {
    /// The files, under each of their names.
    pub(super) files: Vec<PathBuf>,
    /// The ones among `files` that were found only through [`Search::nearby`].
    pub(super) near: BTreeSet<PathBuf>,
    /// Files and folders that could not be looked at.
    pub(super) unreadable: Vec<(PathBuf, io::Error)>,
    /// Folders that were skipped because a limit was reached.
    pub(super) left_out: Vec<PathBuf>,
}

struct Walk<'a> {
    host: &'a dyn Host,
    listed: BTreeSet<PathBuf>,
    files: BTreeSet<PathBuf>,
    end: Instant,
    out: Walked,
}

impl Search {
    /// Searches these folders only, without their sub-folders.
    pub(crate) fn of_folders(folders: &[PathBuf]) -> Self {
        Self { folders: folders.to_vec(), ..Self::default() }
    }

    /// Lists the folders.
    ///
    /// # Errors
    /// [`Error::Io`] for a folder that does not exist.
    pub(super) fn walk(&self, host: &dyn Host) -> Result<Walked> {
        let (listed, files) = (BTreeSet::new(), BTreeSet::new());
        let mut walk = Walk { host, listed, files, end: Instant::now() + MAX_TIME, out: Walked::default() };
        for dir in &self.deep {
            walk.below(dir)?;
        }
        for dir in &self.folders {
            walk.only(dir)?;
        }
        for dir in &self.nearby {
            walk.beside(dir);
        }
        for (path, _) in &walk.out.unreadable {
            walk.files.remove(path);
        }
        let mut out = walk.out;
        out.files = walk.files.into_iter().collect();
        Ok(out)
    }
}

impl Walk<'_> {
    /// Notes that a folder is listed, by its real name; false if it was listed before under any name.
    fn first_time(&mut self, dir: &Path) -> io::Result<bool> {
        Ok(self.listed.insert(self.host.canonicalize(dir)?))
    }

    /// As [`Walk::first_time`], for a folder that the search came upon: false if it is gone. If that cannot be
    /// told, it is noted as unreadable.
    fn is_new(&mut self, dir: &Path) -> bool {
        match if_there(self.first_time(dir)) {
            Ok(is_new) => is_new.unwrap_or(false),
            Err(e) => {
                self.out.unreadable.push((dir.to_owned(), e));
                false
            }
        }
    }

    /// Whether a name that was found is that of a folder: false if it is gone. If that cannot be told, it is
    /// noted as unreadable.
    fn is_folder(&mut self, path: &Path) -> bool {
        match if_there(self.host.name_kind(path)) {
            Ok(kind) => kind == Some(NameKind::Folder),
            Err(e) => {
                self.out.unreadable.push((path.to_owned(), e));
                false
            }
        }
    }

    fn only(&mut self, dir: &Path) -> Result<()> {
        if self.first_time(dir).map_err(|e| Error::io(dir, FileOp::List, None, e))? {
            match self.host.list(dir) {
                Ok(names) => self.files.extend(names),
                Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                    self.out.unreadable.push((dir.to_owned(), e));
                }
                Err(e) => return Err(Error::io(dir, FileOp::List, None, e)),
            }
        }
        Ok(())
    }

    fn below(&mut self, dir: &Path) -> Result<()> {
        if !self.first_time(dir).map_err(|e| Error::io(dir, FileOp::List, None, e))? {
            return Ok(());
        }
        let names = self.host.list(dir).map_err(|e| Error::io(dir, FileOp::List, None, e))?;
        let mut open = self.sort(names, 1);
        while let Some((dir, depth)) = open.pop() {
            let is_kernel = KERNEL_FILES.iter().any(|kernel| dir.starts_with(kernel));
            if is_kernel || !self.is_new(&dir) {
                continue;
            }
            if depth > MAX_DEPTH || self.files.len() > MAX_NAMES || Instant::now() > self.end {
                self.out.left_out.push(dir);
                continue;
            }
            match self.host.list(&dir) {
                Ok(names) => open.extend(self.sort(names, depth + 1)),
                // It was removed meanwhile.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => self.out.unreadable.push((dir, e)),
            }
        }
        Ok(())
    }

    /// Keeps the files among the names of a folder, and returns its sub-folders.
    fn sort(&mut self, names: Vec<PathBuf>, depth: usize) -> Vec<(PathBuf, usize)> {
        let (folders, files): (Vec<_>, Vec<_>) = names.into_iter().partition(|path| self.is_folder(path));
        self.files.extend(files);
        folders.into_iter().map(|folder| (folder, depth)).collect()
    }

    /// Lists each sub-folder of `dir` that the caller may list, without going deeper.
    fn beside(&mut self, dir: &Path) {
        let names = self.list_nearby(dir);
        let folders: Vec<_> =
            names.into_iter().filter(|path| self.is_folder(path)).take(NEAR_FOLDERS).collect();
        let mut left = NEAR_NAMES;
        for folder in folders {
            if !self.is_new(&folder) {
                continue;
            }
            let names = self.list_nearby(&folder);
            for name in names.into_iter().take(left) {
                left -= 1;
                if self.files.insert(name.clone()) {
                    self.out.near.insert(name);
                }
            }
        }
    }

    /// The names in a folder that is only nearby; none if the caller may not list it, or it is gone.
    fn list_nearby(&mut self, dir: &Path) -> Vec<PathBuf> {
        match if_there(self.host.list(dir)) {
            Ok(names) => names.unwrap_or_default(),
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Vec::new(),
            Err(e) => {
                self.out.unreadable.push((dir.to_owned(), e));
                Vec::new()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::OsHost;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn names(search: &Search, root: &Path) -> Vec<String> {
        let walked = search.walk(&OsHost).unwrap();
        assert!(walked.unreadable.is_empty() && walked.left_out.is_empty());
        let name = |path: &PathBuf| path.strip_prefix(root).unwrap().display().to_string();
        walked.files.iter().map(name).collect()
    }

    #[test]
    fn a_deep_search_goes_down_and_follows_no_link_out() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        for folder in ["in/a/b", "in/c", "out"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        for file in ["in/1", "in/a/2", "in/a/b/3", "in/c/4", "out/5"] {
            fs::write(root.join(file), "").unwrap();
        }
        symlink(root.join("out"), root.join("in/link")).unwrap();
        symlink(root.join("in"), root.join("in/a/loop")).unwrap();
        let deep = Search { deep: vec![root.join("in")], ..Search::default() };
        let all = ["in/1", "in/a/2", "in/a/b/3", "in/a/loop", "in/c/4", "in/link"];
        assert_eq!(names(&deep, &root), all);
        let flat = Search::of_folders(&[root.join("in"), root.join("in/link/../in"), root.join("in/c")]);
        assert_eq!(names(&flat, &root), ["in/1", "in/a", "in/c", "in/c/4", "in/link"]);
        let near = Search { nearby: vec![root.join("in")], ..Search::of_folders(&[root.join("in/c")]) };
        assert_eq!(names(&near, &root), ["in/a/2", "in/a/b", "in/a/loop", "in/c/4"]);
        let gone = Search { deep: vec![root.join("gone")], ..Search::default() };
        assert!(gone.walk(&OsHost).is_err());
    }

    #[test]
    fn what_lies_too_deep_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let deep = (0..MAX_DEPTH + 2).fold(dir.path().to_owned(), |path, _| path.join("d"));
        fs::create_dir_all(&deep).unwrap();
        let walked = Search { deep: vec![dir.path().to_owned()], ..Search::default() }.walk(&OsHost).unwrap();
        assert_eq!(walked.left_out.len(), 1);
    }
}
