//! Removes or marks files of merged layers that an unfinished merge has listed as obsolete.
//!
//! The merge has listed the files with their stamps while the chain still needed them (see
//! [`crate::journal::record::Record::obsolete`]). A file is removed only if it is as listed: the same file
//! under the same name, with the mark of this merge, not written since, held by nobody, used by no image.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::emptied;
use crate::chain::{Chain, Search, find_users_in};
use crate::error::{Error, FileOp, Result};
use crate::image::Qcow2;
use crate::journal::Journal;
use crate::journal::record::{ObsoleteFile, ObsoleteKind, Phase, Purpose};
use crate::merge::options::CommitOptions;
use crate::merge::plan::Kept;
use crate::merge::reason::KeptReason;
use crate::merge::report::Report;
use crate::merge::switch::mark::mark;
use crate::stamp::Stamp;
use crate::storage::{
    Access, FileId, FileKind, FileStat, Host, LockMode, Owner, Place, Storage, if_there, leads_nowhere, lock,
    may_be_unlocked,
};

/// The obsolete layers of an unfinished merge, which are still to be marked or removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ObsoleteLayers {
    /// The image that the layers were merged into.
    base: PathBuf,
    /// The owner of the journal that lists them.
    owner: Owner,
    /// The files: the uppermost layer first, a data file behind its image.
    files: Vec<ObsoleteFile>,
    /// Layers that stay, but may lack the last mark and the name of base: the merge has made them empty
    /// overlays before it changed the chain.
    emptied: Vec<PathBuf>,
    /// Somebody has written to base before the merge had released it, so the merged layers may still be needed.
    is_doubtful: bool,
}

/// What can be done with a file.
enum Fate {
    /// It does not exist any more.
    Gone,
    /// It is as listed, and is held under lock.
    Certain(Place, Arc<dyn Storage>),
    /// It stays, and why.
    Kept(KeptReason),
}

/// The file of a layer, if it is there.
fn stat_of(host: &dyn Host, obsolete: &ObsoleteFile) -> Result<Option<FileStat>> {
    let path = &obsolete.file.path;
    if_there(host.stat(path)).map_err(|e| Error::io(path, FileOp::Stat, None, e))
}

impl ObsoleteLayers {
    /// The obsolete layers in a journal, if the merge has switched the chain: none of them is a layer of
    /// `chain`, if there still is a chain. `is_doubtful` says that somebody has written to base meanwhile.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn of(
        host: &dyn Host,
        journal: &Journal,
        chain: Option<&Chain>,
        is_doubtful: bool,
    ) -> Result<Option<Self>> {
        let header = journal.header();
        let layers = chain.map(Chain::files).unwrap_or_default();
        let base = header.base.clone();
        if journal.state().phase < Phase::Switching {
            return Ok(None);
        }
        let Some(files) = journal.obsolete() else {
            if header.purpose != Purpose::Merge {
                return Ok(None);
            }
            let owner = journal.owner()?;
            let is_believed = |stat: &FileStat| owner.may_speak_for(&stat.owner, host.user());
            let mut emptied = Vec::new();
            for layer in header.layers.iter().filter(|layer| layer.path != header.active) {
                let stat = if_there(host.stat(&layer.path))
                    .map_err(|e| Error::io(&layer.path, FileOp::Stat, None, e))?;
                if stat.is_some_and(|stat| !layers.contains(&stat.id) && is_believed(&stat)) {
                    emptied.push(layer.path.clone());
                }
            }
            let files = Vec::new();
            return Ok((!emptied.is_empty()).then_some(Self { base, owner, files, emptied, is_doubtful }));
        };
        for obsolete in &files {
            if stat_of(host, obsolete)?.is_some_and(|stat| layers.contains(&stat.id)) {
                return Ok(None);
            }
        }
        let owner = journal.owner()?;
        Ok(Some(Self { base, owner, files, emptied: Vec::new(), is_doubtful }))
    }

    /// The files that are there still.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn paths(&self, host: &dyn Host) -> Result<Vec<PathBuf>> {
        let mut paths = Vec::new();
        for obsolete in &self.files {
            if stat_of(host, obsolete)?.is_some() {
                paths.push(obsolete.file.path.clone());
            }
        }
        Ok(paths)
    }

    /// Removes the files that are certainly as listed, if this merge removes layers, too; otherwise marks them
    /// as merged. Reports which are kept, with the reason.
    ///
    /// # Errors
    /// [`Error::InUse`]; the system's.
    pub(crate) fn settle(
        &self,
        host: &dyn Host,
        chain: Option<&Chain>,
        options: &CommitOptions,
        report: &mut Report,
    ) -> Result<()> {
        for path in self.emptied.iter().filter(|_| !self.is_doubtful) {
            emptied::finish(host, path, &self.owner, &self.base, chain, options, report)?;
        }
        if self.files.is_empty() {
            return Ok(());
        }
        let shared = self.shared(host, chain, options)?;
        let mut keeps_layers = false;
        let mut keeps_image = false;
        for obsolete in &self.files {
            let path = &obsolete.file.path;
            let is_image = obsolete.kind != ObsoleteKind::DataFile;
            if !is_image && keeps_image {
                continue;
            }
            let verdict = match self.judge(host, obsolete, &shared, options)? {
                // Whoever uses the layer that is kept reads through those below it.
                Fate::Certain(..) if is_image && keeps_layers => Fate::Kept(KeptReason::BelowKept),
                verdict => verdict,
            };
            keeps_image = false;
            match verdict {
                Fate::Gone => {}
                Fate::Kept(why) => {
                    (keeps_layers, keeps_image) = (keeps_layers || is_image, is_image);
                    report.kept.push(Kept { path: path.clone(), why });
                }
                Fate::Certain(place, held) if options.delete => {
                    let removed = place.unlink_file(host, &*held).and_then(|_| place.sync(host));
                    removed.map_err(|e| Error::io(path, FileOp::Remove, None, e))?;
                    report.deleted.push(path.clone());
                }
                Fate::Certain(_, file) if is_image => {
                    let marked = mark(path, file, &self.base)?;
                    if marked { &mut report.marked } else { &mut report.unmarked }.push(path.clone());
                }
                Fate::Certain(..) => {}
            }
        }
        Ok(())
    }

    /// The files that images outside the list use.
    fn shared(&self, host: &dyn Host, chain: Option<&Chain>, options: &CommitOptions) -> Result<Vec<FileId>> {
        let mut there: Vec<(&Path, FileId)> = Vec::new();
        for obsolete in &self.files {
            there.extend(stat_of(host, obsolete)?.map(|stat| (&*obsolete.file.path, stat.id)));
        }
        let targets: Vec<FileId> = there.iter().map(|(_, id)| *id).collect();
        if targets.is_empty() {
            return Ok(targets);
        }
        let mut folders = chain.map(|chain| chain.folders(host)).transpose()?.unwrap_or_default();
        folders.extend(there.iter().filter_map(|(path, _)| Some(path.parent()?.to_owned())));
        let search = Search { folders, deep: options.scan.clone(), ..Search::default() };
        let mut theirs = chain.map(Chain::files).unwrap_or_default();
        theirs.extend(&targets);
        let found = find_users_in(host, &search, &targets, &theirs)?;
        Ok(found.users.iter().map(|user| user.uses).collect())
    }

    fn judge(
        &self,
        host: &dyn Host,
        obsolete: &ObsoleteFile,
        shared: &[FileId],
        options: &CommitOptions,
    ) -> Result<Fate> {
        let path = &obsolete.file.path;
        let kept = |why: KeptReason| Ok(Fate::Kept(why));
        let failed = |op| move |e| Error::io(path, op, None, e);
        let moved = || kept(KeptReason::OtherFile);
        // It was noted by a path without links.
        let place = match Place::at(host, path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Fate::Gone),
            // A link on the way makes it another name. Any other failure tells nothing about the name.
            Err(e) if leads_nowhere(&e) && host.canonicalize(path).is_ok() => return moved(),
            place => place.map_err(failed(FileOp::Resolve))?,
        };
        let stat = match place.stat(host) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Fate::Gone),
            stat => stat.map_err(failed(FileOp::Stat))?,
        };
        if shared.contains(&stat.id) {
            return kept(KeptReason::Used);
        }
        if stat.id.inode != obsolete.file.id.inode {
            return moved();
        }
        if stat.kind != FileKind::Regular {
            return kept(KeptReason::NotRegular);
        }
        // What is not removed is marked as merged.
        let (owner, user) = (self.owner, host.user());
        if options.delete && !owner.may_remove(&stat.owner, &place.folder().owner(), user) {
            return kept(KeptReason::MayNotRemove);
        }
        if !options.delete && !owner.may_speak_for(&stat.owner, user) {
            return kept(KeptReason::MayNotWrite);
        }
        if !options.open.policy.allows(host, path) {
            return kept(KeptReason::OutsideAllowed);
        }
        if self.is_doubtful {
            return kept(KeptReason::BaseWritten);
        }
        let file = place.open(host, Access::ReadWrite).map_err(failed(FileOp::Open))?;
        if file.stat().map_err(failed(FileOp::Stat))?.id != stat.id {
            return moved();
        }
        lock(host, path, &*file, LockMode::Write)?;
        may_be_unlocked(host, path, stat.id, &*file, Access::ReadWrite, options.open.no_locks)?;
        if !obsolete.file.is_unwritten(&Stamp::of(host, path, &*file)?) {
            return kept(KeptReason::Written);
        }
        if obsolete.kind == ObsoleteKind::Marked && !self.is_marked(path, &*file)? {
            return kept(KeptReason::NoMark);
        }
        Ok(Fate::Certain(place, file))
    }

    /// Whether an image bears the mark of a merge into base. Where there was no room for a name, it has none.
    fn is_marked(&self, path: &Path, file: &dyn Storage) -> Result<bool> {
        Ok(emptied::is_marked(&Qcow2::read_cluster0(path, file)?, &self.base))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::{OpenOptions, Policy};
    use crate::image::{CreateOptions, create, create_raw};
    use crate::journal::record::{Guard, Header, Purpose};
    use crate::retire::mark_merged;
    use crate::storage::MemHost;

    /// A base, a layer `/vm/1` with the mark of a merge into `into`, and a file `/vm/1.data`.
    fn merged(into: &str) -> MemHost {
        let host = MemHost::new();
        create(&host, Path::new("/vm/0"), &CreateOptions::new(1 << 20)).unwrap();
        let backing = Some((b"0".to_vec(), "qcow2".to_owned()));
        create(&host, Path::new("/vm/1"), &CreateOptions { backing, ..CreateOptions::new(1 << 20) }).unwrap();
        create_raw(&host, Path::new("/vm/1.data"), 512).unwrap();
        if !into.is_empty() {
            let image = Stamp::now(&host, Path::new("/vm/1")).unwrap().unwrap();
            mark_merged(&host, &[image], Path::new(into), false).unwrap();
        }
        host
    }

    fn obsolete(host: &MemHost, path: &str, kind: ObsoleteKind) -> ObsoleteFile {
        let file = host.open(Path::new(path), Access::Read).unwrap();
        ObsoleteFile { file: Stamp::of(host, Path::new(path), &*file).unwrap(), kind }
    }

    /// A layer and its data file, as a merge into `/vm/0` has left them.
    fn noted(host: &MemHost) -> Vec<ObsoleteFile> {
        vec![
            obsolete(host, "/vm/1", ObsoleteKind::Marked),
            obsolete(host, "/vm/1.data", ObsoleteKind::DataFile),
        ]
    }

    /// A journal of a merge into `/vm/0` that was stopped in `phase`.
    fn stopped(host: &MemHost, phase: Phase, files: Vec<ObsoleteFile>) -> Journal {
        let header = Header {
            nonce: 1,
            purpose: Purpose::Merge,
            max_blocks: 1,
            guard: Guard::Stamp,
            boot: None,
            targets: vec![obsolete(host, "/vm/0", ObsoleteKind::Unmarked).file],
            layers: Vec::new(),
            base: "/vm/0".into(),
            top: "/vm/1".into(),
            top_index: 2,
            active: "/vm/2".into(),
            new_size: 0,
            zero_until: 0,
            total: 0,
            restore_points_lost: Vec::new(),
            has_emptied: false,
            samples: Vec::new(),
        };
        let journal =
            Journal::create(host, &Place::of_new(host, Path::new("/vm/journal")).unwrap(), header).unwrap();
        journal.set_obsolete(Some(files));
        journal.note(phase, 0, 0).unwrap();
        journal
    }

    /// What is removed and what is kept, if `change` happens to the files in between.
    fn settle(host: &MemHost, files: Vec<ObsoleteFile>, policy: Policy, change: impl Fn(&MemHost)) -> Report {
        let journal = stopped(host, Phase::Removing, files);
        change(host);
        let options = OpenOptions { policy, ..OpenOptions::default() };
        let chain = Chain::open(host, Path::new("/vm/0"), &options).unwrap();
        let obsolete = ObsoleteLayers::of(host, &journal, Some(&chain), false).unwrap().unwrap();
        let options = CommitOptions { open: options, delete: true, ..CommitOptions::default() };
        let mut report = Report::default();
        obsolete.settle(host, Some(&chain), &options, &mut report).unwrap();
        assert!(obsolete.paths(host).unwrap().iter().all(|path| !report.deleted.contains(path)));
        report
    }

    fn why(report: &Report) -> KeptReason {
        assert!(report.deleted.is_empty(), "{report:?}");
        report.kept[0].why
    }

    #[test]
    fn what_is_as_it_was_noted_is_removed() {
        let host = merged("/vm/0");
        let report = settle(&host, noted(&host), Policy::local_files(), |_| {});
        assert_eq!(report.deleted, [Path::new("/vm/1"), Path::new("/vm/1.data")]);
        assert!(report.kept.is_empty() && host.stat(Path::new("/vm/1")).is_err());
        // The image went before; its data file is still of it.
        let host = merged("/vm/0");
        let report =
            settle(&host, noted(&host), Policy::local_files(), |host| host.unlink("/vm/1".as_ref()).unwrap());
        assert_eq!(report.deleted, [Path::new("/vm/1.data")]);
    }

    #[test]
    fn what_is_not_certain_is_kept_with_its_data_file() {
        let anywhere = Policy::local_files;
        for into in ["", "/vm/1.data"] {
            let host = merged(into);
            let report = settle(&host, noted(&host), anywhere(), |_| {});
            assert!(why(&report) == KeptReason::NoMark && report.kept.len() == 1, "{report:?}");
        }
        let host = merged("/vm/0");
        let report = settle(&host, noted(&host), anywhere(), |host| {
            let file = host.open(Path::new("/vm/1"), Access::ReadWrite).unwrap();
            file.write_all_at(&[7], 1 << 16).unwrap();
        });
        assert!(why(&report) == KeptReason::Written, "{report:?}");
        let host = merged("/vm/0");
        let report = settle(&host, noted(&host), anywhere(), |host| host.add("/vm/1", b"new").unwrap());
        assert!(why(&report) == KeptReason::OtherFile, "{report:?}");
        // A journal is no reason to leave the folders that are allowed.
        let host = merged("/vm/0");
        host.add("/else/where", b"").unwrap();
        let report = settle(&host, noted(&host), Policy::deny().allow_dir("/else"), |_| {});
        assert!(why(&report) == KeptReason::OutsideAllowed, "{report:?}");
    }

    /// Everybody may write a file, and not everybody may remove it: that takes a right to the folder.
    #[test]
    fn a_journal_removes_only_what_its_owner_may_remove() {
        let eve = Owner { user: 7, group: 7, mode: 0o600 };
        for (owner, removed) in [(eve, 0), (Owner { user: 0, group: 0, mode: 0o600 }, 2)] {
            let host = merged("/vm/0");
            for name in ["/vm/0", "/vm/1", "/vm/1.data"] {
                host.give(name, Owner { user: 0, group: 0, mode: 0o666 }).unwrap();
            }
            let report = settle(&host, noted(&host), Policy::local_files(), |host| {
                host.give("/vm/journal", owner).unwrap();
            });
            assert_eq!(report.deleted.len(), removed, "{report:?}");
            assert!(removed > 0 || why(&report) == KeptReason::MayNotRemove, "{report:?}");
        }
    }

    /// A journal that lists no files to remove names the layers that the merge has emptied: they get the last mark and
    /// the name of base, if its owner may write them.
    #[test]
    fn a_journal_finishes_only_layers_that_its_owner_may_write() {
        for (user, is_believed) in [(0, true), (7, false)] {
            let host = merged("/vm/0");
            let journal = {
                let journal = stopped(&host, Phase::Switching, Vec::new());
                let layers = vec![obsolete(&host, "/vm/1", ObsoleteKind::Marked).file];
                let header = Header { layers, ..journal.header().clone() };
                let place = Place::of_new(&host, Path::new("/vm/journal")).unwrap();
                let journal = Journal::create(&host, &place, header).unwrap();
                journal.note(Phase::Switching, 0, 0).unwrap();
                journal
            };
            host.give("/vm/journal", Owner { user, group: 7, mode: 0o600 }).unwrap();
            let options = OpenOptions { policy: Policy::local_files(), ..OpenOptions::default() };
            let chain = Chain::open(&host, Path::new("/vm/0"), &options).unwrap();
            let obsolete = ObsoleteLayers::of(&host, &journal, Some(&chain), false).unwrap();
            let emptied = obsolete.map_or_else(Vec::new, |obsolete| obsolete.emptied);
            assert_eq!(emptied == [Path::new("/vm/1")], is_believed, "{emptied:?}");
        }
    }

    #[test]
    fn nothing_is_left_over_before_the_switch() {
        let host = merged("/vm/0");
        let options = OpenOptions { policy: Policy::local_files(), ..OpenOptions::default() };
        let files = noted(&host);
        let chain = Chain::open(&host, Path::new("/vm/1"), &options).unwrap();
        let journal = stopped(&host, Phase::Switching, files.clone());
        assert_eq!(
            ObsoleteLayers::of(&host, &journal, Some(&chain), false).unwrap(),
            None,
            "it is a layer of the chain yet"
        );
        let chain = Chain::open(&host, Path::new("/vm/0"), &options).unwrap();
        let journal = stopped(&host, Phase::Moving, files);
        assert_eq!(ObsoleteLayers::of(&host, &journal, Some(&chain), false).unwrap(), None);
    }

    #[test]
    fn somebody_wrote_to_base_before_it_was_released() {
        let host = merged("/vm/0");
        let journal = stopped(&host, Phase::Switching, noted(&host));
        let options = OpenOptions { policy: Policy::local_files(), ..OpenOptions::default() };
        let chain = Chain::open(&host, Path::new("/vm/0"), &options).unwrap();
        let obsolete = ObsoleteLayers::of(&host, &journal, Some(&chain), true).unwrap().unwrap();
        let options = CommitOptions { open: options, delete: true, ..CommitOptions::default() };
        let mut report = Report::default();
        obsolete.settle(&host, Some(&chain), &options, &mut report).unwrap();
        assert!(why(&report) == KeptReason::BaseWritten, "{report:?}");
    }
}
