//! Removes journal files that never got their name, because the process was killed while it made them.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;

use super::file::{NEW, sync_folder};
use super::place::{JOURNAL, is_beside};
use crate::error::{Error, FileOp, Result};
use crate::storage::{Access, FileKind, Host, Owner, Place, if_there};

/// Removes the file at a place if it is named like a journal that is being made, and no process holds its lock,
/// as its maker would. The file must belong to the caller, to root, or to somebody who may write the image
/// beside it. On file systems without locks nothing is removed, unless `no_locks`.
///
/// # Errors
/// The system's; but a file that may not be opened or removed stays without an error.
pub(super) fn sweep_unnamed(host: &dyn Host, place: &Place, no_locks: bool) -> Result<()> {
    let path = place.path();
    let failed = |op| {
        let path = path.clone();
        move |e| Error::io(&path, op, None, e)
    };
    let name = place.name().as_bytes().strip_suffix(NEW.as_bytes());
    let Some(journal) = name.filter(|name| name.ends_with(JOURNAL.as_bytes())).map(OsStr::from_bytes) else {
        return Ok(());
    };
    // Check before the file is opened: merely opening a device can have effects.
    let Some(stat) = if_there(place.stat(host)).map_err(failed(FileOp::Stat))? else { return Ok(()) };
    if stat.kind != FileKind::Regular || !is_ours(host, place, journal, &stat.owner)? {
        return Ok(());
    }
    let file = match place.open(host, Access::Read) {
        Err(e) if may_stay(&e) => return Ok(()),
        opened => opened.map_err(failed(FileOp::Open))?,
    };
    let held = file.used_by_others().map_err(failed(FileOp::ReadLocks))?;
    if held.is_some() || !(file.has_locks() || no_locks) {
        return Ok(());
    }
    match place.unlink_file(host, &*file) {
        Err(e) if may_stay(&e) => Ok(()),
        Ok(false) => Ok(()),
        removed => removed.map_err(failed(FileOp::Remove)).and_then(|_| sync_folder(host, place)),
    }
}

/// Whether the caller may take a file of `owner` for one of this program's.
fn is_ours(host: &dyn Host, place: &Place, journal: &OsStr, owner: &Owner) -> Result<bool> {
    if [0, host.user()].contains(&owner.user) {
        return Ok(true);
    }
    let bytes = journal.as_bytes().strip_prefix(b".").and_then(|name| name.strip_suffix(JOURNAL.as_bytes()));
    let Some(image) = bytes.map(OsStr::from_bytes).filter(|image| !image.is_empty()) else {
        return Ok(false);
    };
    if !is_beside(&place.beside(journal), image, JOURNAL) {
        return Ok(false);
    }
    let image = place.beside(image);
    let stat = if_there(image.stat(host)).map_err(|e| Error::io(&image.path(), FileOp::Stat, None, e))?;
    Ok(stat.is_some_and(|stat| owner.may_speak_for(&stat.owner, host.user())))
}

/// Whether this error only means that the file stays.
fn may_stay(error: &io::Error) -> bool {
    use io::ErrorKind::{NotFound, PermissionDenied, ReadOnlyFilesystem};
    matches!(error.kind(), NotFound | PermissionDenied | ReadOnlyFilesystem)
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use crate::storage::{Access, Host, LockMode, MemHost, Owner};

    #[test]
    fn what_a_kill_has_left_of_a_journal_is_swept() {
        let host = MemHost::new();
        let of = |user| Owner { user, group: user, mode: 0o600 };
        for image in ["/vm/root's", "/vm/theirs", "/vm/stranger's"] {
            host.add(image, b"disk").unwrap();
        }
        host.give("/vm/theirs", of(7)).unwrap();
        for (name, user) in
            [("root's", 0), ("gone", 0), ("theirs", 7), ("stranger's", 8), ("absent", 8), ("held", 0)]
        {
            let new = format!("/vm/.{name}.qmerge-journal.new");
            host.add(&new, b"qmerge").unwrap();
            host.give(&new, of(user)).unwrap();
        }
        host.add("/vm/mine.new", b"qmerge").unwrap();
        host.add("/j/keep", b"").unwrap();
        host.add("/j/.x-01234567.qmerge-journal.new", b"qmerge").unwrap();
        let held = host.open(Path::new("/vm/.held.qmerge-journal.new"), Access::ReadWrite).unwrap();
        held.lock(LockMode::Write).unwrap();

        crate::journal::sweep(&host, &[PathBuf::from("/vm")], Some(Path::new("/j")), false).unwrap();
        let left: Vec<String> = host
            .list(Path::new("/vm"))
            .unwrap()
            .iter()
            .filter(|path| path.extension().is_some_and(|ext| ext == "new"))
            .filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()))
            .collect();
        assert_eq!(
            left,
            [".absent", ".held", ".stranger's"]
                .map(|name| format!("{name}.qmerge-journal.new"))
                .into_iter()
                .chain(["mine.new".to_owned()])
                .collect::<Vec<_>>()
        );
        assert_eq!(host.list(Path::new("/j")).unwrap(), [PathBuf::from("/j/keep")]);
    }
}
