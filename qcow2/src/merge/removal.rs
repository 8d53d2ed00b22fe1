//! Marks obsolete layers, or removes them from the top down.
//!
//! Base's journal lists the layers to be removed, from before the switch of the chain until they are removed. A
//! merged active image is removed last, after that journal. Its own journal stays until then, so that the same
//! command knows why the image is missing.

use std::io;
use std::path::{Path, PathBuf};

use super::commit::Commit;
use super::emptying;
use super::options::CommitOptions;
use super::plan::Afterwards;
use super::plan::Kept;
use super::reason::KeptReason;
use super::report::Report;
use super::resume::describe::obsolete;
use super::resume::obsolete::ObsoleteLayers;
use super::switch::mark::unlink;
use super::switch::relink;
use crate::chain::Layer;
use crate::error::{Error, FileOp, Result};
use crate::journal::Journal;
use crate::storage::{FileId, FileKind, Host, Place};

/// An active image that an unfinished merge has removed.
#[derive(Debug)]
pub(super) struct Gone {
    /// Its journal.
    pub(super) journal: Journal,
    /// The name that the caller gave, perhaps a symbolic link.
    pub(super) asked: PathBuf,
}

/// A file that was removed.
struct Removed {
    /// Its name in the plan.
    path: PathBuf,
    /// Its real path.
    real: PathBuf,
}

impl Commit {
    /// Whether the active image is removed.
    pub(super) fn removes_active(&self) -> bool {
        self.options.delete && !self.options.keep_active && self.top == self.chain.active()
    }

    /// Lists the layers to be removed in base's journal, with stamps of their present state. `marked` says for
    /// each whether it has a mark.
    pub(super) fn note_obsolete(&self, journal: &Journal, marked: &[(PathBuf, bool)]) -> Result<()> {
        let had = journal.obsolete().is_some();
        if !self.options.delete && !had {
            return Ok(());
        }
        let is_marked = |layer: &Layer| marked.iter().any(|(path, marked)| *path == layer.path && *marked);
        let layers: Vec<_> = self.obsolete().map(|layer| (layer, is_marked(layer))).collect();
        let files = self.options.delete.then(|| obsolete(&*self.host, &layers)).transpose()?;
        journal.set_obsolete(files);
        let state = journal.state();
        journal.note(state.phase, state.watermark, state.done)
    }

    /// The obsolete layers between base and the active image, the top first.
    fn obsolete(&self) -> impl Iterator<Item = &Layer> {
        let active = self.chain.active();
        let layers = self.chain.layers().iter().take(active).rev();
        layers.filter(|layer| self.plan.obsolete.contains(&layer.path))
    }

    /// Marks obsolete layers as merged; empty ones get base as their backing file.
    pub(super) fn mark_merged(&self, report: &mut Report) -> Result<()> {
        self.mark(&self.obsolete().collect::<Vec<_>>(), report)
    }

    /// Removes obsolete layers from the top down, except for the active image.
    pub(super) fn remove_layers(&self, report: &mut Report) -> Result<()> {
        let mut keeps = false;
        for layer in self.obsolete() {
            if keeps {
                // The users of the kept layer read through this one.
                report.kept.push(Kept { path: layer.path.clone(), why: KeptReason::BelowKept });
            } else {
                match self.delete(layer, report)? {
                    Some(removed) => self.delete_links(removed, report)?,
                    None => keeps = true,
                }
            }
            if keeps {
                self.mark(&[layer], report)?;
            }
        }
        Ok(())
    }

    /// Removes the active image, which is an empty overlay by now, if the plan says so; then its journal.
    pub(super) fn remove_active(&self, report: &mut Report) -> Result<()> {
        let Some(journal) = &self.removing else { return Ok(()) };
        let active = self.stack()?.active;
        let removed = self.delete(active, report)?;
        journal.remove(&*self.host)?;
        self.delete_links(removed.unwrap_or_default(), report)
    }

    pub(super) fn base_name(&self) -> Result<PathBuf> {
        let base = self.stack()?.base;
        Ok(self.host.canonicalize(&base.path).unwrap_or_else(|_| base.path.clone()))
    }

    /// Marks the obsolete layers between base and the active image as being merged. Returns for each, the top
    /// first, whether its header had room. The active image never gets such a mark: until it is removed, a
    /// guest may go on writing to it.
    pub(super) fn mark_obsolete(&self) -> Result<Vec<(PathBuf, bool)>> {
        let base = self.base_name()?;
        let layers: Vec<&Layer> = self.obsolete().collect();
        relink::mark_merging(&*self.host, &layers, &base, self.options.journal_dir.as_deref())
    }

    /// The merged layers that are empty overlays now.
    pub(super) fn emptied(&self) -> Vec<PathBuf> {
        let is_active = |at: usize| {
            at == self.top && at == self.chain.active() && !matches!(self.plan.afterwards, Afterwards::Keep)
        };
        let is_emptied = |at: usize| self.empties.contains(&at) || is_active(at);
        let layers = self.chain.layers().iter().enumerate();
        layers.filter(|(at, _)| is_emptied(*at)).map(|(_, layer)| layer.path.clone()).collect()
    }

    /// The bytes on disk that the merged layers hold.
    pub(super) fn held_above(&self) -> Result<u64> {
        self.stack()?.merged.iter().map(emptying::held).sum()
    }

    /// Removes a layer, then its data file. A file is removed only if its name still leads to the file of the
    /// plan, and it is a regular file. `None` if the layer is kept; its data file is kept then, too.
    fn delete(&self, layer: &Layer, report: &mut Report) -> Result<Option<Vec<Removed>>> {
        let host = &*self.host;
        let mut removed = Vec::new();
        let data_file = layer.data_file.as_ref().map(|file| (&file.path, file.id, file.kept));
        for (path, id, kept) in [(&layer.path, layer.id, None)].into_iter().chain(data_file) {
            let found = Place::of(host, path).and_then(|place| Ok((place.stat(host)?, place)));
            let why = match (found, kept) {
                (_, Some(why)) => KeptReason::DataFile(why),
                (Ok((stat, place)), None)
                    if stat.id == id && stat.kind == FileKind::Regular && !self.is_shared(id) =>
                {
                    unlink(host, &place)?;
                    report.deleted.push(path.clone());
                    removed.push(Removed { path: path.clone(), real: place.path() });
                    continue;
                }
                (Ok((stat, _)), None) if stat.id != id => KeptReason::OtherFile,
                (Ok(_), None) if self.is_shared(id) => KeptReason::Used,
                (Ok(_), None) => KeptReason::NotRegular,
                (Err(e), None) if e.kind() == io::ErrorKind::NotFound => KeptReason::NoFile,
                (Err(e), None) => return Err(Error::io(path, FileOp::Stat, None, e)),
            };
            report.kept.push(Kept { path: path.clone(), why });
            if id == layer.id {
                return Ok(None);
            }
        }
        Ok(Some(removed))
    }

    /// Removes the symbolic links that named removed files and now lead nowhere. The link of the active image
    /// is removed after its journal, because the same command finds the journal through it.
    fn delete_links(&self, removed: Vec<Removed>, report: &mut Report) -> Result<()> {
        for Removed { path, real } in removed {
            if unlink_dangling(&*self.host, &path, &real)? {
                report.deleted.push(real);
            }
        }
        Ok(())
    }

    fn is_shared(&self, id: FileId) -> bool {
        self.shared.contains(&id)
    }

    /// Marks layers as merged. Empty ones get base as their backing file. The others keep theirs: their users
    /// read through the layers below.
    fn mark(&self, layers: &[&Layer], report: &mut Report) -> Result<()> {
        let (dir, base) = (self.options.journal_dir.as_deref(), self.stack()?.base);
        let emptied = self.emptied();
        let mut named = Vec::new();
        for layer in layers {
            let image = layer.image.as_qcow2().filter(|_| emptied.contains(&layer.path));
            let name = match image {
                Some(image) => relink::name_of_base(&*self.host, (&layer.path, image.cluster0()), base)?,
                None => None,
            };
            named.push((*layer, name));
        }
        let layers = named;
        for (path, marked) in relink::mark_merged(&*self.host, &layers, &self.base_name()?, dir)? {
            if marked { &mut report.marked } else { &mut report.unmarked }.push(path);
        }
        Ok(())
    }
}

/// Finishes a merge that was stopped after it had removed the active image.
///
/// # Errors
/// [`Error::InUse`]; the system's.
pub(super) fn finish_removed(
    host: &dyn Host,
    gone: &Gone,
    options: &CommitOptions,
    report: &mut Report,
) -> Result<()> {
    let journal = &gone.journal;
    if let Some(unremoved) = ObsoleteLayers::of(host, journal, None, false)? {
        unremoved.settle(host, None, options, report)?;
    }
    journal.remove(host)?;
    if unlink_dangling(host, &gone.asked, &journal.header().active)? {
        report.deleted.push(gone.asked.clone());
    }
    Ok(())
}

/// Removes the symbolic link at `path` that led to the removed file `real`. False if there is none; a link that
/// leads to a file stays.
fn unlink_dangling(host: &dyn Host, path: &Path, real: &Path) -> Result<bool> {
    let io = |op| move |e| Error::io(path, op, None, e);
    let link = Place::named(host, path).map_err(io(FileOp::Resolve))?;
    if link.path() == real || host.stat(&link.path()).is_ok() {
        return Ok(false);
    }
    match link.stat(host) {
        Ok(stat) if matches!(stat.kind, FileKind::Other(_)) => {}
        Ok(_) => return Ok(false),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(Error::io(path, FileOp::Stat, None, e)),
    }
    host.unlink_in(link.folder(), link.name()).map_err(io(FileOp::Remove))?;
    host.sync_folder(link.folder()).map_err(|e| Error::barrier(path, e))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use kit::ok;

    use super::*;
    use crate::image::bitmaps::tests::qemu;
    use crate::merge::CommitOptions;
    use crate::storage::OsHost;
    use crate::testing::{Silent, local};

    fn delete(active: &Path, allow_shared_base: bool) -> Report {
        let options = CommitOptions { open: local(), delete: true, allow_shared_base, ..Default::default() };
        let never = AtomicBool::new(false);
        let commit = Commit::prepare(Arc::new(OsHost), active, &options, &never).unwrap();
        commit.execute(&Silent, &never).unwrap()
    }

    fn create(dir: &Path, args: &str) {
        let in_dir = args.split(' ').map(|arg| match arg.strip_prefix('@') {
            Some(name) => dir.join(name).to_str().unwrap().to_owned(),
            None => arg.to_owned(),
        });
        let args: Vec<String> =
            ["create", "-q", "-f", "qcow2"].map(str::to_owned).into_iter().chain(in_dir).collect();
        ok("qemu-img", &args.iter().map(String::as_str).collect::<Vec<_>>());
    }

    #[test]
    fn a_layer_behind_a_symbolic_link_is_removed_itself() {
        if !qemu() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        std::fs::create_dir(dir.join("store")).unwrap();
        create(dir, "@base 1M");
        create(dir, "-b @base -F qcow2 @store/mid");
        symlink("store/mid", dir.join("mid")).unwrap();
        create(dir, "-b @mid -F qcow2 @top");
        let report = delete(&dir.join("top"), false);
        let real = std::fs::canonicalize(dir).unwrap().join("store/mid");
        assert_eq!(report.deleted, [dir.join("mid"), real, dir.join("top")]);
        assert!(!dir.join("store/mid").exists() && !dir.join("top").exists());
        assert!(dir.join("mid").symlink_metadata().is_err(), "a link is left that leads nowhere");
    }

    #[test]
    fn a_layer_that_is_kept_is_marked_and_keeps_its_data_file() {
        if !qemu() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        create(dir, "@base 1M");
        let data = dir.join("data");
        create(dir, &format!("-o data_file={} -b @base -F qcow2 @mid 1M", data.display()));
        create(dir, "-b @mid -F qcow2 @top");
        create(dir, "-b @mid -F qcow2 @other");
        let report = delete(&dir.join("top"), true);
        assert_eq!(report.deleted, [dir.join("top")]);
        assert_eq!(report.kept, [Kept { path: dir.join("mid"), why: KeptReason::Used }]);
        assert_eq!(report.marked, [dir.join("mid")]);
        assert!(data.exists());
    }
}
