//! Marks or removes images that are obsolete after somebody else's merge. A virtual machine still runs on base,
//! so only images that it has closed may be touched.
//!
//! Nothing here opens base for writing, or locks it. Every image that is changed is first locked for writing,
//! then compared with the caller's stamp of it.

use std::path::{Path, PathBuf};

use crate::chain::{Search, find_users_in};
use crate::error::{Error, FileOp, Refusal, Result};
use crate::merge::switch::mark::{mark, open, require_unchanged, unlink};
use crate::stamp::{Difference, Stamp};
use crate::storage::{FileId, FileKind, Host, LockMode, Place};

/// What was done with obsolete images.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RetireReport {
    /// Images that are marked as merged into base.
    pub marked: Vec<PathBuf>,
    /// Images whose header has no room for a mark, and raw ones; they stay as they were.
    pub unmarked: Vec<PathBuf>,
    /// Files that were removed.
    pub deleted: Vec<PathBuf>,
}

/// Marks images as merged into `base`, so that they are never merged again. Each is locked for it. An error
/// ends the call; the images before stay marked.
///
/// # Errors
/// [`Error::InUse`]; [`Refusal::NotAsKnown`]; an I/O error; an image that is damaged.
pub fn mark_merged(host: &dyn Host, images: &[Stamp], base: &Path, no_locks: bool) -> Result<RetireReport> {
    let base = host.canonicalize(base).unwrap_or_else(|_| base.to_owned());
    let mut retired = RetireReport::default();
    for image in images {
        let file = open(host, image, LockMode::Write, no_locks)?;
        require_unchanged(host, image, &*file)?;
        let marked = mark(&image.path, file, &base)?;
        if marked { &mut retired.marked } else { &mut retired.unmarked }.push(image.path.clone());
    }
    Ok(retired)
}

/// Removes obsolete images in the given order, the uppermost first. Each must be a regular file that no process
/// holds, and that no image in the same folders or in `scan` uses. The images of `chain` may use them: they
/// will be removed or changed, too. External data files stay. An error ends the call; the images before are
/// removed by then.
///
/// # Errors
/// [`Error::InUse`]; [`Refusal::NotAsKnown`]; [`Refusal::SharedBase`]; an I/O error.
pub fn remove(
    host: &dyn Host,
    images: &[Stamp],
    chain: &[FileId],
    scan: &[PathBuf],
    no_locks: bool,
) -> Result<RetireReport> {
    let mut retired = RetireReport::default();
    for image in images {
        let io = |op| move |e| Error::io(&image.path, op, None, e);
        let file = open(host, image, LockMode::Write, no_locks)?;
        require_unchanged(host, image, &*file)?;
        let place = Place::of_file(host, &image.path, &*file)?;
        let stat = place.stat(host).map_err(io(FileOp::Stat))?;
        if stat.id != file.stat().map_err(io(FileOp::Stat))?.id {
            let what = Difference::OtherFile.to_string();
            return Err(Error::refused(&image.path, Refusal::NotAsKnown { what }));
        }
        if stat.kind != FileKind::Regular {
            return Err(Error::refused(&image.path, Refusal::NotRegular));
        }
        let users = users_of(host, image, images, chain, scan)?;
        if !users.is_empty() {
            return Err(Error::refused(&image.path, Refusal::SharedBase { users }));
        }
        unlink(host, &place)?;
        drop(file);
        retired.deleted.push(image.path.clone());
    }
    Ok(retired)
}

/// How many of the `images`, from the uppermost down, have no other user; and the users of the next one, if
/// there is one. That one and those below it must stay: its users read through them. Nothing is changed;
/// `chain` and `scan` are those of [`remove`].
///
/// # Errors
/// An I/O error.
pub fn unused(
    host: &dyn Host,
    images: &[Stamp],
    chain: &[FileId],
    scan: &[PathBuf],
) -> Result<(usize, Vec<PathBuf>)> {
    for (at, image) in images.iter().enumerate() {
        let users = users_of(host, image, images, chain, scan)?;
        if !users.is_empty() {
            return Ok((at, users));
        }
    }
    Ok((images.len(), Vec::new()))
}

/// The images in the same folders or in `scan` that use an image, except those of `images` and `chain`.
fn users_of(
    host: &dyn Host,
    image: &Stamp,
    images: &[Stamp],
    chain: &[FileId],
    scan: &[PathBuf],
) -> Result<Vec<PathBuf>> {
    let real =
        host.canonicalize(&image.path).map_err(|e| Error::io(&image.path, FileOp::Resolve, None, e))?;
    let parents = [real.as_path(), &image.path].map(Path::parent).into_iter().flatten();
    let folders = parents.filter(|p| !p.as_os_str().is_empty()).map(Path::to_owned).collect();
    let search = Search { folders, deep: scan.to_vec(), ..Search::default() };
    let theirs: Vec<_> = chain.iter().copied().chain(images.iter().map(|image| image.id)).collect();
    let users = find_users_in(host, &search, &[image.id], &theirs)?.users;
    Ok(users.into_iter().map(|user| user.path).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Qcow2;
    use crate::image::{CreateOptions, create, create_raw};
    use crate::storage::Access;
    use crate::storage::MemHost;

    /// `/0` to `/2`, each on the one before.
    fn chain() -> MemHost {
        let host = MemHost::new();
        for n in 0..3 {
            let below = (n > 0).then(|| (format!("/{}", n - 1).into_bytes(), "qcow2".to_owned()));
            let kind = CreateOptions { backing: below, ..CreateOptions::new(1 << 20) };
            create(&host, &PathBuf::from(format!("/{n}")), &kind).unwrap();
        }
        host
    }

    fn stamp(host: &MemHost, path: &str) -> Stamp {
        Stamp::now(host, Path::new(path)).unwrap().unwrap()
    }

    fn mark_of(host: &MemHost, path: &str) -> Option<PathBuf> {
        let file = host.open(Path::new(path), Access::Read).unwrap();
        Qcow2::read_cluster0(Path::new(path), &*file).unwrap().merged_into()
    }

    #[test]
    fn merged_images_are_marked_beside_a_base_in_use() {
        let host = chain();
        create_raw(&host, Path::new("/raw"), 1 << 20).unwrap();
        let held = host.open(Path::new("/0"), Access::ReadWrite).unwrap();
        held.lock(LockMode::Write).unwrap();
        let images = [stamp(&host, "/2"), stamp(&host, "/raw"), stamp(&host, "/1")];
        let retired = mark_merged(&host, &images, Path::new("/0"), false).unwrap();
        assert_eq!(retired.marked, [Path::new("/2"), Path::new("/1")]);
        assert_eq!(retired.unmarked, [Path::new("/raw")]);
        assert_eq!(mark_of(&host, "/1").as_deref(), Some("/0".as_ref()));
        assert_eq!(mark_of(&host, "/2").as_deref(), Some("/0".as_ref()));
        assert_eq!(mark_of(&host, "/0"), None);
    }

    #[test]
    fn an_image_in_use_or_changed_is_not_marked() {
        let host = chain();
        let image = stamp(&host, "/1");
        let held = host.open(Path::new("/1"), Access::Read).unwrap();
        held.lock(LockMode::Read).unwrap();
        let result = mark_merged(&host, std::slice::from_ref(&image), Path::new("/0"), false);
        assert!(matches!(result, Err(Error::InUse { .. })), "{result:?}");
        drop(held);
        let file = host.open(Path::new("/1"), Access::ReadWrite).unwrap();
        file.write_all_at(&[0; 512], 1 << 16).unwrap();
        drop(file);
        let result = mark_merged(&host, &[image], Path::new("/0"), false);
        let changed = matches!(&result, Err(Error::Refused { reason: Refusal::NotAsKnown { .. }, .. }));
        assert!(changed && mark_of(&host, "/1").is_none(), "{result:?}");
    }

    #[test]
    fn only_what_nobody_uses_is_removed() {
        let host = chain();
        let refused = remove(&host, &[stamp(&host, "/1")], &[], &[], false).unwrap_err();
        let Error::Refused { reason: Refusal::SharedBase { users }, .. } = &refused else {
            panic!("{refused}")
        };
        assert_eq!(users[..], [Path::new("/2")]);
        let images = [stamp(&host, "/2"), stamp(&host, "/1")];
        assert_eq!(unused(&host, &images, &[], &[]).unwrap(), (2, vec![]));
        assert_eq!(unused(&host, &images[1..], &[], &[]).unwrap(), (0, vec!["/2".into()]));
        let retired = remove(&host, &images, &[], &[], false).unwrap();
        assert_eq!(retired.deleted, [Path::new("/2"), Path::new("/1")]);
        assert_eq!(host.list(Path::new("/")).unwrap(), [Path::new("/0")]);
        // The overlay above is about to be relinked, or was.
        let host = chain();
        let above = stamp(&host, "/2").id;
        remove(&host, &[stamp(&host, "/1")], &[above], &[], false).unwrap();
        assert!(host.stat(Path::new("/1")).is_err() && host.stat(Path::new("/2")).is_ok());
    }

    #[test]
    fn a_file_that_took_the_place_of_a_layer_is_not_removed() {
        let host = chain();
        let was = stamp(&host, "/2");
        host.add("/2", b"somebody else's").unwrap();
        let result = remove(&host, &[was], &[], &[], false);
        let changed = matches!(&result, Err(Error::Refused { reason: Refusal::NotAsKnown { .. }, .. }));
        assert!(changed && host.content("/2").unwrap() == b"somebody else's", "{result:?}");
    }
}
