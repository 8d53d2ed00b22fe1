//! Finds images outside a chain that read through its files. A merge would change what they show.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::Chain;
use super::name::{possible_data_file_paths, possible_paths};
use super::search::Search;
use crate::error::{Error, FileOp, Result, Role};
use crate::format::{Cluster0, Header, V2_HEADER_LENGTH, is_qcow2};
use crate::image::Qcow2;
use crate::storage::{Access, FileId, FileKind, Host, Storage, if_there};
use crate::units::GuestOffset;

/// How many bytes of every file are read at first: enough for the header, the extensions and the names of
/// nearly every image.
const HEAD: usize = 4096;

/// An image outside a chain that uses one of the chain's files.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Sibling {
    /// The image.
    pub path: PathBuf,
    /// The file that it uses.
    pub uses: FileId,
    /// What it uses the file as.
    pub role: Role,
}

/// What a search for users found.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Siblings {
    /// The images outside the chain that use one of the files, by path.
    pub users: Vec<Sibling>,
    /// Files and folders that could not be read. They may be users.
    pub unreadable: Vec<(PathBuf, io::Error)>,
    /// Folders that were skipped because a limit of the search was reached.
    pub left_out: Vec<PathBuf>,
    /// All files that were looked at, without those in `unreadable`.
    pub files: Vec<PathBuf>,
}

impl Chain {
    /// The folders in which the layers and their data files lie, as named and with symbolic links
    /// followed: where a search for their users starts.
    ///
    /// # Errors
    /// [`Error::Io`] where a name cannot be followed, though it leads to something.
    pub(crate) fn folders(&self, host: &dyn Host) -> Result<Vec<PathBuf>> {
        let data = self.layers.iter().filter_map(|layer| layer.data_file.as_ref());
        let paths = self.layers.iter().map(|layer| &layer.path).chain(data.map(|file| &file.path));
        let real = |path: &Path| {
            if_there(host.canonicalize(path)).map_err(|e| Error::io(path, FileOp::Resolve, None, e))
        };
        let mut folders = BTreeSet::new();
        for path in paths {
            for name in [Some(path.clone()), real(path)?].into_iter().flatten() {
                let folder = match name.parent() {
                    Some(folder) if !folder.as_os_str().is_empty() => folder,
                    _ => Path::new("."),
                };
                folders.insert(real(folder)?.unwrap_or_else(|| folder.to_owned()));
            }
        }
        Ok(folders.into_iter().collect())
    }
}

/// Searches the folders `dirs` (not their sub-folders) for qcow2 images whose backing file or data file is one
/// of `targets`. Files of `chain` are skipped under every name.
///
/// Only headers are read, and the tables of images that a merge has emptied; no file that an image names is
/// opened. Images with a damaged header are skipped: nothing can be read through them. Two kinds of images are
/// no users themselves: layers that an earlier merge has marked as merged, and active images that a merge has
/// emptied and nobody has written to since. But an image that uses one of them reads through it, and counts as
/// a user of the target. Images of an unknown version are listed as unreadable. Names that depend on a
/// process's working directory, or that this engine would not open, count if they may lead to a target.
///
/// # Errors
/// An I/O error for a folder that does not exist.
pub fn find_users(
    host: &dyn Host,
    dirs: &[PathBuf],
    targets: &[FileId],
    chain: &[FileId],
) -> Result<Siblings> {
    find_users_in(host, &Search::of_folders(dirs), targets, chain)
}

/// As [`find_users`], in the folders of `search`.
///
/// # Errors
/// As [`find_users`].
pub fn find_users_in(
    host: &dyn Host,
    search: &Search,
    targets: &[FileId],
    chain: &[FileId],
) -> Result<Siblings> {
    let walked = search.walk(host)?;
    let mut found = Siblings::default();
    (found.unreadable, found.left_out) = (walked.unreadable, walked.left_out);
    let looked: Vec<_> = walked.files.par_iter().map(|path| look(host, path, chain)).collect();
    let mut images = Vec::new();
    for (path, result) in walked.files.into_iter().zip(looked) {
        match result {
            Ok(image) => {
                images.extend(image);
                found.files.push(path);
            }
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied && walked.near.contains(&path) => {}
            Err(e) => found.unreadable.push((path, e)),
        }
    }
    // Maps each file through which a target can be read to that target: the target itself, and obsolete images
    // above it. Each round may find more of those, so rounds go on until no new user appears.
    let mut roots: BTreeMap<FileId, FileId> = targets.iter().map(|target| (*target, *target)).collect();
    loop {
        let is_user = |image: &OutsideImage| image.uses.iter().any(|(id, _)| roots.contains_key(id));
        let (users, rest): (Vec<_>, _) = images.into_iter().partition(is_user);
        if users.is_empty() {
            break;
        }
        images = rest;
        for image in users {
            let used = image.uses.iter().find_map(|(id, role)| Some((*roots.get(id)?, *role)));
            let Some((uses, role)) = used else { continue };
            if image.is_kept || (image.was_empty && is_empty(host, &image.path)?) {
                roots.entry(image.id).or_insert(uses);
            } else {
                found.users.push(Sibling { path: image.path, uses, role });
            }
        }
    }
    found.users.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

/// An image outside a chain.
struct OutsideImage {
    path: PathBuf,
    id: FileId,
    /// The files that it may use, and what it uses them as.
    uses: Vec<(FileId, Role)>,
    /// See [`is_kept`].
    is_kept: bool,
    /// See [`was_empty`].
    was_empty: bool,
}

/// Whether the image at `path` has nothing allocated and no internal snapshot. A damaged image counts as not
/// empty.
///
/// # Errors
/// It cannot be read.
pub(super) fn is_empty(host: &dyn Host, path: &Path) -> Result<bool> {
    let file = host.open(path, Access::Read).map_err(|e| Error::io(path, FileOp::Open, None, e))?;
    // The tables alone tell this. The image stands in for its own data file, which need not be opened then.
    match Qcow2::open(path, file.clone(), Some(file)).and_then(|image| {
        Ok(image.header().snapshots == 0 && image.next_allocated(GuestOffset::ZERO)?.is_none())
    }) {
        Err(e @ Error::Io { .. }) => Err(e),
        empty => Ok(empty.unwrap_or(false)),
    }
}

/// Whether a mark says that an earlier merge made this image obsolete and let it keep its old data, or was
/// about to.
pub(super) fn is_kept(cluster0: &Cluster0) -> bool {
    cluster0.keeps_merged_data() || cluster0.merging_into().is_some()
}

/// Whether a mark says that an earlier merge made this image an empty overlay. It may have been written to
/// since: then it is an image like any other.
pub(super) fn was_empty(cluster0: &Cluster0) -> bool {
    cluster0.was_empty_when_merged() || cluster0.emptied_onto().is_some()
}

/// The image at `path`, if it lies outside `chain` and uses some file.
fn look(host: &dyn Host, path: &Path, chain: &[FileId]) -> io::Result<Option<OutsideImage>> {
    let stat = match host.stat(path) {
        Ok(stat) => stat,
        // A link that leads nowhere, or a file that was removed meanwhile.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    if stat.kind != FileKind::Regular || chain.contains(&stat.id) {
        return Ok(None);
    }
    let file = match host.open(path, Access::Read) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let Some(cluster0) = read_names(&*file)? else { return Ok(None) };
    let (is_kept, was_empty) = (is_kept(&cluster0), was_empty(&cluster0));
    let backing = cluster0.backing_name.as_deref().map(|name| possible_paths(name, path));
    let data = cluster0
        .data_file_name()
        .filter(|_| cluster0.header.has_data_file())
        .map(|name| possible_data_file_paths(name, path));
    let mut uses = Vec::new();
    for (paths, role) in [(backing, Role::BackingFile), (data, Role::DataFile)] {
        for named in paths.into_iter().flatten() {
            // A name that cannot be looked up may lead to a target, so the error is kept.
            uses.extend(if_there(host.stat(&named))?.map(|stat| (stat.id, role)));
        }
    }
    Ok((!uses.is_empty()).then(|| OutsideImage {
        path: path.to_owned(),
        id: stat.id,
        uses,
        is_kept,
        was_empty,
    }))
}

/// Reads as much of cluster 0 of a qcow2 image as holds names; `None` if the file is not qcow2, or its header
/// is damaged.
pub(super) fn read_names(file: &dyn Storage) -> io::Result<Option<Cluster0>> {
    let mut bytes = vec![0; HEAD];
    let n = file.read_at(&mut bytes, 0)?;
    bytes.truncate(n);
    if !is_qcow2(&bytes) || n < V2_HEADER_LENGTH as usize {
        return Ok(None);
    }
    let header = match Header::decode(&bytes) {
        Ok(header) => header,
        // Another program may understand this version, and read a target through it.
        Err(e) if e.is_unsupported() => return Err(io::Error::new(io::ErrorKind::Unsupported, e)),
        Err(_) => return Ok(None),
    };
    let whole = header.geometry().cluster_size() as usize;
    let name_end = header.backing_offset.saturating_add(u64::from(header.backing_len));
    let decoded = Cluster0::decode(&bytes).ok();
    let complete = |cluster0: &Cluster0| name_end.max(cluster0.extensions_end) <= n as u64;
    if n < HEAD || whole <= HEAD || decoded.as_ref().is_some_and(complete) {
        return Ok(decoded);
    }
    bytes.resize(whole, 0);
    let n = file.read_at(&mut bytes, 0)?;
    bytes.truncate(n);
    Ok(Cluster0::decode(&bytes).ok())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{overlay, with_data_file};
    use super::*;
    use crate::format::extensions::{EXT_MERGED_INTO, Extension};
    use crate::format::{Mark, plan_mark};
    use crate::image::{CreateOptions, create};
    use crate::storage::{MemHost, OsHost};
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn id(host: &dyn Host, path: &str) -> FileId {
        host.stat(Path::new(path)).unwrap().id
    }

    fn users(host: &MemHost, dirs: &[&str], targets: &[&str], chain: &[&str]) -> Vec<String> {
        let ids = |paths: &[&str]| paths.iter().map(|p| id(host, p)).collect::<Vec<_>>();
        let dirs: Vec<PathBuf> = dirs.iter().map(PathBuf::from).collect();
        let found = find_users(host, &dirs, &ids(targets), &ids(chain)).unwrap();
        assert!(found.unreadable.is_empty());
        found.users.iter().map(|s| format!("{} {}", s.path.display(), s.role)).collect()
    }

    #[test]
    fn images_that_read_through_a_target_are_found_however_they_name_it() {
        let host = MemHost::new();
        host.add("/vm/base", b"x").unwrap();
        host.add("/vm/top", &overlay("base", "raw")).unwrap();
        for (path, name) in [
            ("/vm/s1", "base"),
            ("/vm/s2", "/vm/base"),
            ("/vm/s3", "file:/vm/base"),
            ("/vm/s4", r#"json:{"driver":"raw","offset":0,"file":{"driver":"file","filename":"/vm/base"}}"#),
            ("/vm/s5", "file:base"),
            ("/vm/no1", "other"),
            ("/vm/no2", "nbd://h/base"),
            ("/vm/sub/no3", "/vm/base"),
            ("/scan/s6", "../vm/base"),
            ("/scan/no4", "base"),
        ] {
            host.add(path, &overlay(name, "raw")).unwrap();
        }
        host.add("/vm/s7", &with_data_file("/vm/base")).unwrap();
        host.add("/vm/noise", b"QFI\xfb").unwrap();
        host.add("/vm/empty", b"").unwrap();
        let found = users(&host, &["/vm", "/scan", "/vm/"], &["/vm/base"], &["/vm/base", "/vm/top"]);
        let expected = [
            "/scan/s6 backing file",
            "/vm/s1 backing file",
            "/vm/s2 backing file",
            "/vm/s3 backing file",
            "/vm/s4 backing file",
            "/vm/s5 backing file",
            "/vm/s7 data file",
        ];
        assert_eq!(found, expected);
        assert_eq!(users(&host, &["/vm"], &["/vm/top"], &["/vm/base", "/vm/top"]), [""; 0]);
    }

    #[test]
    fn a_name_behind_the_first_pages_of_the_header_is_found() {
        let host = MemHost::new();
        host.add("/base", b"x").unwrap();
        let mut cluster0 = Cluster0::parse(&overlay("base", "raw")).unwrap();
        cluster0.set_extension(Extension::new(0x1234_5678, vec![1; 9000]));
        let mut bytes = cluster0.encode().unwrap();
        host.add("/short", &bytes).unwrap();
        bytes.resize(0x40000, 0);
        host.add("/far", &bytes).unwrap();
        assert_eq!(
            users(&host, &["/"], &["/base"], &["/base"]),
            ["/far backing file", "/short backing file"]
        );
    }

    #[test]
    fn damaged_headers_are_passed_over() {
        let host = MemHost::new();
        host.add("/base", b"x").unwrap();
        let good = overlay("base", "raw");
        for at in 8..24 {
            let mut bad = good.clone();
            bad[at] ^= 0xff;
            host.add(format!("/bad{at:02}"), &bad).unwrap();
        }
        for cut in 0..120 {
            host.add(format!("/cut{cut}"), &good[..cut]).unwrap();
        }
        // A name that is longer only by zero bytes still leads QEMU to the file.
        assert_eq!(users(&host, &["/"], &["/base"], &["/base"]), ["/bad19 backing file"]);
    }

    #[test]
    fn images_of_an_unknown_version_may_be_users() {
        let host = MemHost::new();
        host.add("/base", b"x").unwrap();
        let mut newer = overlay("base", "raw");
        newer[7] = 4;
        host.add("/newer", &newer).unwrap();
        let target = [id(&host, "/base")];
        let found = find_users(&host, &["/".into()], &target, &target).unwrap();
        assert!(found.users.is_empty());
        assert_eq!(found.unreadable[0].0, Path::new("/newer"));
    }

    #[test]
    fn layers_that_an_earlier_merge_marked_are_no_users() {
        let host = MemHost::new();
        host.add("/base", b"x").unwrap();
        let mut cluster0 = Cluster0::parse(&overlay("base", "raw")).unwrap();
        host.add("/user", &cluster0.encode().unwrap()).unwrap();
        cluster0.set_extension(Extension::new(EXT_MERGED_INTO, "/base"));
        host.add("/marked", &cluster0.encode().unwrap()).unwrap();
        assert_eq!(users(&host, &["/"], &["/base"], &["/base"]), ["/user backing file"]);
    }

    /// Has an image that was made by `create` hold a cluster.
    fn hold(host: &MemHost, path: &str) {
        let file = host.open(Path::new(path), Access::ReadWrite).unwrap();
        let header = Qcow2::read_cluster0(Path::new(path), &*file).unwrap().header;
        let (l2, cluster) = (file.size().unwrap().next_multiple_of(1 << 16), 1u64 << 16);
        file.write_all_at(&vec![1; 1 << 16], l2 + cluster).unwrap();
        file.write_all_at(&((l2 + cluster) | 1 << 63).to_be_bytes(), l2).unwrap();
        file.write_all_at(&vec![0; (1 << 16) - 8], l2 + 8).unwrap();
        file.write_all_at(&(l2 | 1 << 63).to_be_bytes(), header.l1_offset.get()).unwrap();
    }

    #[test]
    fn who_uses_a_marked_or_an_emptied_image_uses_what_that_uses() {
        let host = MemHost::new();
        let on = |below: &str| Some((below.as_bytes().to_vec(), "qcow2".to_owned()));
        let new = |path: &str, below| {
            let options = CreateOptions { backing: below, ..CreateOptions::new(1 << 20) };
            create(&host, Path::new(path), &options).unwrap();
        };
        new("/base", None);
        for (path, mark, holds) in [
            ("/merged", Some(Mark::Merged), true),
            ("/gone", Some(Mark::MergedEmpty), false),
            ("/branch", Some(Mark::MergedEmpty), true),
            ("/emptied", Some(Mark::Emptied), false),
            ("/written", Some(Mark::Emptied), true),
            ("/fresh", None, false),
        ] {
            new(path, on("base"));
            if holds {
                hold(&host, path);
            }
            let Some(mark) = mark else { continue };
            let file = host.open(Path::new(path), Access::ReadWrite).unwrap();
            let mut cluster = vec![0; 1 << 16];
            file.read_exact_or_zero(&mut cluster, 0).unwrap();
            for write in plan_mark(&cluster, "/base", mark).unwrap().writes {
                file.write_all_at(&write.bytes, write.offset).unwrap();
            }
        }
        let found = || users(&host, &["/"], &["/base"], &["/base"]);
        // An overlay that somebody has just made may be the disk of another machine.
        assert_eq!(found(), ["/branch backing file", "/fresh backing file", "/written backing file"]);
        for below in ["merged", "emptied", "fresh"] {
            new(&format!("/on-{below}"), on(below));
        }
        let expected = ["/branch", "/fresh", "/on-emptied", "/on-merged", "/written"]
            .map(|p| format!("{p} backing file"));
        assert_eq!(found(), expected);
    }

    #[test]
    fn real_folders_with_links_fifos_and_locked_files() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("sub")).unwrap();
        fs::write(at("base"), "x").unwrap();
        fs::write(at("top"), overlay("base", "raw")).unwrap();
        symlink("top", at("alias-of-top")).unwrap();
        symlink("nowhere", at("dangling")).unwrap();
        symlink("base", at("alias-of-base")).unwrap();
        fs::hard_link(at("base"), at("sub/link")).unwrap();
        fs::write(at("sibling1"), overlay("alias-of-base", "raw")).unwrap();
        fs::write(at("sibling2"), overlay("sub/link", "raw")).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(at("fifo")).status().unwrap().success());
        fs::write(at("secret"), overlay("base", "raw")).unwrap();
        fs::set_permissions(at("secret"), fs::Permissions::from_mode(0o000)).unwrap();
        let target = [OsHost.stat(&at("base")).unwrap().id];
        let chain = [target[0], OsHost.stat(&at("top")).unwrap().id];
        let found = find_users(&OsHost, &[dir.path().to_owned()], &target, &chain).unwrap();
        let mut names: Vec<_> = found.users.iter().map(|s| s.path.clone()).collect();
        // Root may read what nobody may read; everybody else must be told that it was not looked at.
        names.extend(found.unreadable.into_iter().map(|(path, _)| path));
        names.sort();
        assert_eq!(names, [at("secret"), at("sibling1"), at("sibling2")]);
        assert!(find_users(&OsHost, &[at("gone")], &target, &chain).is_err());
    }

    #[test]
    fn thousands_of_files_are_looked_through_quickly() {
        let host = MemHost::new();
        host.add("/base", b"x").unwrap();
        host.add("/other", b"x").unwrap();
        let other = overlay("other", "raw");
        for n in 0..5000 {
            host.add(format!("/f{n}"), &other[..0x1000]).unwrap();
        }
        host.add("/user", &overlay("base", "raw")).unwrap();
        let start = std::time::Instant::now();
        assert_eq!(users(&host, &["/"], &["/base"], &["/base"]), ["/user backing file"]);
        assert!(start.elapsed().as_secs() < 10);
    }
}
