//! Finds the place of a journal, and checks to whom it belongs.

use std::ffi::{OsStr, OsString};
use std::io;
use std::io::ErrorKind;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::sync::Arc;

use super::file::{Journal, NEW};
use super::record::{Phase, Purpose, Record};
use crate::error::{Error, FileOp, Refusal, Result};
use crate::stamp::{SameFile, Stamp};
use crate::storage::{Access, FileKind, FileStat, Folder, Host, Owner, Place, Storage, if_there};

/// The ending of the names of journals.
pub(crate) const JOURNAL: &str = ".qmerge-journal";
/// The ending of the names of records of single edits of a header.
pub(crate) const SWITCH: &str = ".qmerge-switch";
/// The longest file name that file systems allow, in bytes.
const LONGEST: usize = 255;

/// The name of a file about the image: `.NAME` and an ending, shortened if it would be too long.
fn named(image: &Path, ending: &str) -> OsString {
    let name = image.file_name().unwrap_or_default().as_bytes();
    let mut all = vec![b'.'];
    // A journal is made under its name with NEW appended.
    if 1 + name.len() + ending.len() + NEW.len() <= LONGEST {
        all.extend_from_slice(name);
    } else {
        // Some file systems accept only valid text, so do not cut inside a character.
        let is_inside = |at: &usize| name.get(*at).is_some_and(|byte| byte & 0xc0 == 0x80);
        let cut = (LONGEST / 2 - 3..=LONGEST / 2).rev().find(|at| !is_inside(at)).unwrap_or(LONGEST / 2);
        all.extend(name.get(..cut).unwrap_or_default());
        all.extend(format!("-{:08x}", crc32fast::hash(name)).bytes());
    }
    all.extend(ending.bytes());
    OsString::from_vec(all)
}

/// The name of such a file in a folder for many images, some of which may have the same name.
fn named_apart(image: &Path, ending: &str) -> OsString {
    let crc = crc32fast::hash(image.as_os_str().as_bytes());
    named(image, &format!("-{crc:08x}{ending}"))
}

/// The places of files about the image at `image`: beside it and in `dir`.
///
/// # Errors
/// The system's.
pub(super) fn places(host: &dyn Host, image: &Place, dir: Option<&Path>, ending: &str) -> Result<Vec<Place>> {
    let real = image.path();
    let mut all = vec![image.beside(named(&real, ending))];
    if let Some(folder) = dir.map(|dir| folder_of_journals(host, dir)).transpose()?.flatten() {
        all.push(Place::within(Arc::new(folder), named_apart(&real, ending)));
    }
    Ok(all)
}

/// The caller's folder for journals; `None` if it does not exist.
fn folder_of_journals(host: &dyn Host, dir: &Path) -> Result<Option<Folder>> {
    // Use the real name, as in `place`, so that a journal has only one path.
    match host.canonicalize(dir).and_then(|dir| host.folder(&dir)) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        folder => folder.map(Some).map_err(|e| Error::io(dir, FileOp::Resolve, None, e)),
    }
}

/// Whether `place` is the place of a record beside an image of this name.
pub(super) fn is_beside(place: &Place, image: &OsStr, ending: &str) -> bool {
    named(Path::new(image), ending) == place.name()
}

/// The place for a new journal about the image in `file`, which was opened by `path`: in `dir` if given, else
/// beside the image, with symbolic links followed.
///
/// # Errors
/// [`Refusal::JournalPlace`] if `dir` cannot be written; or if it was not given, and the image is a block
/// device or its folder cannot be written. [`Refusal::Stranger`] if somebody else has put a file there;
/// [`Refusal::InTheWay`] if something other than a file is there.
pub(crate) fn place(
    host: &dyn Host,
    path: &Path,
    file: &dyn Storage,
    dir: Option<&Path>,
    ending: &str,
) -> Result<Place> {
    let stat = file.stat().map_err(|e| Error::io(path, FileOp::Stat, None, e))?;
    let refused = |why: String| Error::refused(path, Refusal::JournalPlace { why });
    let image = Place::of_file(host, path, file)?;
    let place = match dir {
        Some(dir) => {
            let no_folder = |e: std::io::Error| match e.kind() {
                ErrorKind::NotFound | ErrorKind::NotADirectory | ErrorKind::PermissionDenied => {
                    refused(format!("{}: {e}", dir.display()))
                }
                _ => Error::io(dir, FileOp::Resolve, None, e),
            };
            let folder = host.canonicalize(dir).and_then(|dir| host.folder(&dir)).map_err(no_folder)?;
            Place::within(Arc::new(folder), named_apart(&image.path(), ending))
        }
        None if stat.kind == FileKind::Block => return Err(refused("it is a block device".to_owned())),
        None => image.beside(named(&image.path(), ending)),
    };
    let folder = place.folder();
    host.may_create_in(folder)
        .map_err(|e| refused(format!("{} cannot be written: {e}", folder.path().display())))?;
    let mut fresh = place.name().to_owned();
    fresh.push(NEW);
    for place in [&place, &place.beside(fresh)] {
        refuse_what_is_in_the_way(host, path, place, stat.owner)?;
    }
    let there = if_there(place.stat(host)).map_err(|e| Error::io(&place.path(), FileOp::Stat, None, e))?;
    if dir.is_none() || there.is_none() {
        return Ok(place);
    }
    // Two images may have had the same path, for instance on file systems that were mounted there in turn.
    let taken = Journal::open(host, &place, Access::Read)?;
    let now = Stamp::of(host, path, file)?;
    match taken.as_ref().and_then(|(journal, _)| journal.header().targets.first()) {
        Some(target) if !has_followed(target, &now) && !target.is_same_file(&now) => {
            let apart =
                format!("-{:016x}-{:016x}{ending}", now.file_system.unwrap_or(now.id.device), now.id.inode);
            Ok(place.beside(named_apart(&image.path(), &apart)))
        }
        _ => Ok(place),
    }
}

/// Whether `now` has taken the place of another file: it has the same path in the same file system.
fn has_followed(then: &Stamp, now: &Stamp) -> bool {
    let file_system = then.file_system.zip(now.file_system).map(|(then, now)| then == now);
    then.path == now.path && file_system.unwrap_or(then.id.device == now.id.device)
}

/// A journal that was found, and the image as it is now.
#[derive(Debug)]
pub(crate) struct FoundJournal {
    pub(crate) journal: Journal,
    pub(crate) last: Option<Record>,
    /// The image.
    pub(crate) now: Stamp,
}

impl FoundJournal {
    /// Whether the journal belongs to this very file, and not to another one that had its name.
    pub(crate) fn is_same_file(&self) -> bool {
        self.journal.header().targets.first().is_some_and(|target| target.is_same_file(&self.now))
    }
}

/// Refuses a place for a journal of an image with this owner, if a file of somebody who may not write the image
/// is there, or something other than a file.
///
/// # Errors
/// [`Refusal::Stranger`]; [`Refusal::InTheWay`]; the system's.
fn refuse_what_is_in_the_way(host: &dyn Host, path: &Path, place: &Place, image: Owner) -> Result<()> {
    match place.stat(host) {
        Ok(FileStat { kind: FileKind::Other(what), .. }) => {
            Err(Error::refused(path, Refusal::InTheWay { file: place.path(), what }))
        }
        Ok(FileStat { kind: FileKind::Block, .. }) => {
            Err(Error::refused(path, Refusal::InTheWay { file: place.path(), what: "a block device" }))
        }
        Ok(stat) if !stat.owner.may_speak_for(&image, host.user()) => {
            let reason = Refusal::Stranger { file: place.path(), user: stat.owner.user };
            Err(Error::refused(path, reason))
        }
        Err(e) if e.kind() != ErrorKind::NotFound => Err(Error::io(&place.path(), FileOp::Stat, None, e)),
        _ => Ok(()),
    }
}

/// Refuses an image if somebody who may not write it has put a file where our journal would lie, or if
/// something other than a file is there. Otherwise a user who wants to abort a merge would be told that there
/// is none.
///
/// # Errors
/// [`Refusal::Stranger`]; [`Refusal::InTheWay`]; the system's.
pub(crate) fn refuse_strangers(
    host: &dyn Host,
    path: &Path,
    file: &dyn Storage,
    dir: Option<&Path>,
    ending: &str,
) -> Result<()> {
    let owner = file.stat().map_err(|e| Error::io(path, FileOp::Stat, None, e))?.owner;
    let image = Place::of_file(host, path, file)?;
    let places = places(host, &image, dir, ending)?;
    places.iter().try_for_each(|place| refuse_what_is_in_the_way(host, path, place, owner))
}

/// Finds the journal about the image in `file`, in `dir` or beside it: one about this very file, or else one
/// about its name. The latter was made for a file that this one has replaced, or for one whose folder was
/// copied. A journal counts only if its owner may write the image.
///
/// # Errors
/// The system's; [`Refusal::JournalVersion`].
pub(crate) fn find(
    host: &dyn Host,
    path: &Path,
    file: &dyn Storage,
    dir: Option<&Path>,
    access: Access,
    ending: &str,
) -> Result<Option<FoundJournal>> {
    let image = Place::of_file(host, path, file)?;
    let mut candidates = vec![(image.beside(named(&image.path(), ending)), true)];
    if let Some(folder) = dir.map(|dir| folder_of_journals(host, dir)).transpose()?.flatten() {
        // A device may have had another name, so look into every journal there.
        let folder = Arc::new(folder);
        let names = host.list_in(&folder).map_err(|e| Error::io(folder.path(), FileOp::List, None, e))?;
        let ours = names.into_iter().filter(|name| name.as_bytes().ends_with(ending.as_bytes()));
        candidates.extend(ours.map(|name| (Place::within(Arc::clone(&folder), name), false)));
    }
    let mut now = None;
    let mut by_name = None;
    for (candidate, is_beside) in candidates {
        // Most images have no journal, and need no further questions.
        let stat = match candidate.stat(host) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            stat => stat.map_err(|e| Error::io(&candidate.path(), FileOp::Stat, None, e))?,
        };
        let owner = file.stat().map_err(|e| Error::io(path, FileOp::Stat, None, e))?.owner;
        // Do not even open it: a journal that does not count need not be readable.
        if !stat.owner.may_speak_for(&owner, host.user()) {
            continue;
        }
        let opened = match Journal::open(host, &candidate, access) {
            // A journal of an unknown version does not tell which image it belongs to.
            Err(Error::Refused { reason: Refusal::JournalVersion { .. }, .. }) if !is_beside => continue,
            opened => opened?,
        };
        let Some((journal, last)) = opened else { continue };
        if !journal.owner()?.may_speak_for(&owner, host.user()) {
            continue;
        }
        let stamp = match &now {
            Some(now) => now,
            None => now.insert(Stamp::of(host, path, file)?),
        };
        let Some(target) = journal.header().targets.first() else { continue };
        let same = target.same_file(stamp);
        let is_named = target.path.file_name() == stamp.path.file_name() && !stamp.is_device;
        let follows = if is_beside { is_named } else { has_followed(target, stamp) };
        let found = FoundJournal { now: stamp.clone(), journal, last };
        match same {
            SameFile::Yes => return Ok(Some(found)),
            SameFile::Unsure if is_beside => return Ok(Some(found)),
            _ if follows && by_name.is_none() => by_name = Some(found),
            _ => {}
        }
    }
    Ok(by_name)
}

/// Refuses if the image that a journal belongs to was renamed, and now lies beside `image`. That image needs
/// the journal, and would be left without it if the journal were taken for the one of `image`.
///
/// # Errors
/// [`Refusal::JournalOfRenamed`]; the system's.
pub(crate) fn refuse_renamed(host: &dyn Host, image: &Path, journal: &Journal) -> Result<()> {
    let real = host.canonicalize(image).map_err(|e| Error::io(image, FileOp::Resolve, None, e))?;
    // If the folder was copied, the original image has the original journal.
    let target = journal.header().targets.first().filter(|target| target.path == real);
    let (Some(target), Some(dir)) = (target, real.parent()) else { return Ok(()) };
    let failed = |e| Error::io(dir, FileOp::List, None, e);
    let Some(folder) = if_there(host.folder(dir)).map_err(failed)?.map(Arc::new) else { return Ok(()) };
    for name in host.list_in(&folder).map_err(failed)? {
        let other = Place::within(Arc::clone(&folder), name);
        let failed = |e| Error::io(&other.path(), FileOp::Stat, None, e);
        let stat = if_there(other.stat(host)).map_err(failed)?;
        if !stat.is_some_and(|stat| stat.kind == FileKind::Regular && stat.id == target.id) {
            continue;
        }
        let Some(file) = if_there(other.open(host, Access::Read)).map_err(failed)? else { continue };
        if target.is_same_file(&Stamp::of(host, &other.path(), &*file)?) {
            let wanted = match journal.place().folder().path() == dir {
                true => dir.join(named(&other.path(), JOURNAL)),
                false => journal.place().folder().path().join(named_apart(&other.path(), JOURNAL)),
            };
            let (journal, of) = (journal.path().to_owned(), other.path());
            return Err(Error::refused(image, Refusal::JournalOfRenamed { journal, image: of, wanted }));
        }
    }
    Ok(())
}

/// Finds the journal about a removed image, in `dir` or beside `path`, where the image was. Its last record
/// says that the image was about to be removed. It counts only if its owner may remove files in the image's
/// folder.
///
/// # Errors
/// The system's.
pub(crate) fn find_removed(host: &dyn Host, path: &Path, dir: Option<&Path>) -> Result<Option<Journal>> {
    // A folder that does not exist holds no journal.
    let image = if_there(Place::of_new(host, path)).map_err(|e| Error::io(path, FileOp::Resolve, None, e))?;
    let Some(image) = image else { return Ok(None) };
    for candidate in places(host, &image, dir, JOURNAL)? {
        let Some((journal, Some(last))) = Journal::open(host, &candidate, Access::Read)? else { continue };
        let header = journal.header();
        let folder = Owner { mode: 0o700, ..image.folder().owner() };
        if header.purpose == Purpose::Empty
            && last.phase == Phase::Removing
            && header.targets.first().is_some_and(|target| target.path == image.path())
            && journal.owner()?.may_speak_for(&folder, host.user())
        {
            return Ok(Some(journal));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemHost;

    #[test]
    fn names_are_hidden_and_never_too_long() {
        assert_eq!(named(Path::new("/vm/base.raw"), JOURNAL), ".base.raw.qmerge-journal");
        let long = "b".repeat(255);
        let other = format!("{}c", "b".repeat(254));
        let (a, b) = (named(Path::new(&long), JOURNAL), named(Path::new(&other), JOURNAL));
        assert!(a != b && a.len() <= LONGEST);
    }

    #[test]
    fn a_folder_of_journals_tells_images_of_one_name_apart() {
        let host = MemHost::new();
        host.add("/a/x", b"").unwrap();
        host.add("/b/x", b"").unwrap();
        host.add("/j/keep", b"").unwrap();
        let of = |path: &str| {
            let file = host.open(Path::new(path), Access::Read).unwrap();
            place(&host, Path::new(path), &*file, Some(Path::new("/j")), JOURNAL).unwrap().path()
        };
        assert_ne!(of("/a/x"), of("/b/x"));
        assert!(of("/a/x").starts_with("/j"));
    }
}
