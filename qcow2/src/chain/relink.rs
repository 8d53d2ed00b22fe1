//! Finds the name by which an overlay calls its new backing file.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use super::name::{BackingName, Spelling, protocol};
use crate::error::{Error, FileOp, Refusal, Result};
use crate::storage::{FileId, Host};

/// The backing name to write into `overlay` so that it leads to `base`: relative if `old`, the name that
/// stands there, was relative; else absolute. The result is a plain path whatever `old` was, with `./` in
/// front where a colon would make it a protocol.
///
/// The name is resolved from `overlay`'s path as QEMU would, and leads to the same device and inode as
/// `base` at the time of the call. Where symbolic links make a relative name lead elsewhere, another
/// one is tried, and an absolute one in the end.
///
/// # Errors
/// [`Error::Io`] if `base` does not exist; [`Error::Refused`] if no name leads to it, because it would be
/// too long for the format.
pub fn new_backing_name(host: &dyn Host, old: &[u8], overlay: &Path, base: &Path) -> Result<Vec<u8>> {
    let id = host.stat(base).map_err(|e| Error::io(base, FileOp::Stat, None, e))?.id;
    let was_relative =
        BackingName::parse(old).is_ok_and(|name| name.spelling() == Spelling::Path && name.is_relative());
    let named = absolute(host, base)?;
    let real = host.canonicalize(base).map_err(|e| Error::io(base, FileOp::Resolve, None, e))?;
    let mut candidates = Vec::new();
    if was_relative {
        candidates.extend(relative_names(host, overlay, &named)?);
    }
    candidates.extend([normalised(&named), named, real]);
    let mut failed = None;
    for name in candidates.into_iter().map(written) {
        match leads_to(host, &name, overlay, id) {
            Ok(true) => return Ok(name),
            Ok(false) => {}
            Err(e) => failed = Some(e),
        }
    }
    let reason = Refusal::NoNameFor { base: base.to_owned() };
    // If a name could not be looked up, it may well lead to `base`: the I/O error is the honest answer.
    Err(failed.map_or_else(|| Error::refused(overlay, reason), |e| Error::io(base, FileOp::Stat, None, e)))
}

/// Relative names that may lead from `overlay` to `base`, an absolute path; the best first.
fn relative_names(host: &dyn Host, overlay: &Path, base: &Path) -> Result<Vec<PathBuf>> {
    let dir = match overlay.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => absolute(host, dir)?,
        _ => absolute(host, Path::new("."))?,
    };
    let real = |path: &Path| host.canonicalize(path).map_err(|e| Error::io(path, FileOp::Resolve, None, e));
    let mut names = vec![between(&normalised(&dir), &normalised(base)), between(&dir, base)];
    // Where directories are symbolic links, `..` leads to the parent of what they point to.
    if let (Some(base_dir), Some(name)) = (base.parent(), base.file_name()) {
        names.push(between(&real(&dir)?, &real(base_dir)?.join(name)));
    }
    names.push(between(&real(&dir)?, &real(base)?));
    Ok(names.into_iter().flatten().collect())
}

/// The relative path from the directory `from` to `to`, both absolute. `None` if the part of `from` that must
/// be climbed holds a `..` itself: the name of that directory is unknown.
fn between(from: &Path, to: &Path) -> Option<PathBuf> {
    let shared = from.components().zip(to.components()).take_while(|(a, b)| a == b).count();
    let mut way = PathBuf::new();
    for component in from.components().skip(shared) {
        match component {
            Component::Normal(_) => way.push(".."),
            _ => return None,
        }
    }
    way.extend(to.components().skip(shared));
    Some(way)
}

/// `path` from the root, without `.`; symbolic links and `..` stay.
pub(super) fn absolute(host: &dyn Host, path: &Path) -> Result<PathBuf> {
    let mut start = PathBuf::new();
    if path.is_relative() {
        let here = Path::new(".");
        start = host.canonicalize(here).map_err(|e| Error::io(here, FileOp::Resolve, None, e))?;
    }
    start.extend(path.components().filter(|c| *c != Component::CurDir));
    Ok(start)
}

/// `path` with every `x/..` left out, as if there were no symbolic links.
pub(super) fn normalised(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => {
                out.pop();
            }
            other => out.push(other),
        }
    }
    out
}

/// A path as it must be written to be read as a path.
fn written(path: PathBuf) -> Vec<u8> {
    let bytes = path.as_os_str().as_bytes();
    match protocol(bytes) {
        None => bytes.to_vec(),
        Some(_) => [b"./", bytes].concat(),
    }
}

/// Whether QEMU would find the file `id` by this name.
fn leads_to(host: &dyn Host, name: &[u8], overlay: &Path, id: FileId) -> io::Result<bool> {
    // QEMU would take the relative overlay name `a:b/overlay` for a protocol. Here it is a path, and so is
    // every name that is resolved from it.
    let overlay = match overlay.is_relative() {
        true => PathBuf::from(OsStr::from_bytes(&[b"./", overlay.as_os_str().as_bytes()].concat())),
        false => overlay.to_owned(),
    };
    let Ok(name) = BackingName::parse(name) else { return Ok(false) };
    match host.stat(&name.resolve(&overlay)) {
        Ok(stat) => Ok(stat.id == id),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(false),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::storage::sim::{Fault, FaultKind, SimHost};
    use crate::storage::{MemHost, OsHost};
    use std::fs;
    use std::os::unix::fs::symlink;

    fn name(host: &dyn Host, old: &str, overlay: &str, base: &str) -> String {
        let name = new_backing_name(host, old.as_bytes(), Path::new(overlay), Path::new(base)).unwrap();
        String::from_utf8(name).unwrap()
    }

    fn host(files: &[&str]) -> MemHost {
        let host = MemHost::new();
        for file in files {
            host.add(file, b"x").unwrap();
        }
        host
    }

    #[test]
    fn a_name_that_cannot_be_looked_at_is_no_name_that_leads_elsewhere() {
        let disk = SimHost::over(&host(&["/vm/base", "/vm/c"]));
        let find = || new_backing_name(&disk, b"b", Path::new("/vm/c"), Path::new("/vm/base"));
        let mut failures = 0;
        for nth in 1.. {
            disk.fail(Some(Fault { kind: FaultKind::Io, nth, for_ever: true }));
            match find() {
                Ok(name) => {
                    assert_eq!((name.as_slice(), disk.failed()), (&b"base"[..], 0));
                    break;
                }
                Err(e) => assert_eq!(e.kind(), ErrorKind::Io, "{e}"),
            }
            failures += 1;
        }
        assert!(failures > 2, "{failures}");
    }

    #[test]
    fn a_relative_name_stays_relative() {
        let host = host(&["/vm/base", "/vm/snap/c", "/vm/snap/base", "/other/base", "/c"]);
        assert_eq!(name(&host, "b", "/vm/c", "/vm/base"), "base");
        assert_eq!(name(&host, "../b", "/vm/snap/c", "/vm/base"), "../base");
        assert_eq!(name(&host, "b", "/vm/snap/c", "/other/base"), "../../other/base");
        assert_eq!(name(&host, "b", "/vm/c", "/vm/snap/base"), "snap/base");
        assert_eq!(name(&host, "b", "/c", "/vm/base"), "vm/base");
        assert_eq!(name(&host, "b", "vm/c", "vm/base"), "base");
        assert_eq!(name(&host, "b", "c", "vm/base"), "vm/base");
        assert_eq!(name(&host, "./b", "./vm/c", "./vm/./base"), "base");
    }

    #[test]
    fn an_absolute_name_stays_absolute() {
        let host = host(&["/vm/base"]);
        assert_eq!(name(&host, "/vm/b", "/vm/c", "/vm/base"), "/vm/base");
        assert_eq!(name(&host, "/vm/b", "vm/c", "vm/base"), "/vm/base");
    }

    #[test]
    fn prefixes_and_json_become_plain_paths() {
        let host = host(&["/vm/base"]);
        let json = r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"/vm/b"}}"#;
        for old in ["file:/vm/b", "file:b", json, "nbd://h/x"] {
            assert_eq!(name(&host, old, "/vm/c", "/vm/base"), "/vm/base", "{old}");
        }
    }

    #[test]
    fn a_colon_is_hidden_behind_a_slash() {
        let host = host(&["/vm/a:b", "/vm/json:{}", "/vm/d:x/base"]);
        assert_eq!(name(&host, "x", "/vm/c", "/vm/a:b"), "./a:b");
        assert_eq!(name(&host, "x", "/vm/c", "/vm/json:{}"), "./json:{}");
        assert_eq!(name(&host, "x", "/vm/c", "/vm/d:x/base"), "./d:x/base");
        assert_eq!(name(&host, "x", "/vm/d:x/c", "/vm/a:b"), "../a:b");
        assert_eq!(name(&host, "/x", "/vm/c", "/vm/a:b"), "/vm/a:b");
        assert_eq!(name(&host, "x", "vm/d:x/c", "/vm/d:x/base"), "base");
    }

    #[test]
    fn ways_through_a_directory_and_back_are_left_out() {
        let host = host(&["/vm/base", "/vm/snap/c"]);
        // In memory there are no directories to go through, so the base is named plainly here.
        assert_eq!(normalised(Path::new("/vm/snap/../base")), Path::new("/vm/base"));
        assert_eq!(name(&host, "b", "/vm/snap/../c", "/vm/base"), "base");
    }

    #[test]
    fn symbolic_links_in_the_overlays_directory_are_seen() {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        fs::create_dir_all(root.join("store/deep/snap")).unwrap();
        fs::create_dir(root.join("vm")).unwrap();
        fs::write(root.join("vm/base"), "x").unwrap();
        fs::write(root.join("store/deep/base"), "y").unwrap();
        symlink(root.join("store/deep/snap"), root.join("vm/snap")).unwrap();
        let overlay = root.join("vm/snap/c");
        fs::write(&overlay, "").unwrap();
        let new = |base: &str| {
            let base = root.join(base);
            let name = new_backing_name(&OsHost, b"b", &overlay, &base).unwrap();
            let path = BackingName::parse(&name).unwrap().resolve(&overlay);
            assert_eq!(OsHost.stat(&path).unwrap().id, OsHost.stat(&base).unwrap().id);
            String::from_utf8(name).unwrap()
        };
        // `../base` would be store/deep/base: the name must go round.
        assert_eq!(new("vm/base"), "../../../vm/base");
        assert_eq!(new("store/deep/base"), "../base");
        assert_eq!(new("vm/snap/../base"), "../base");
    }

    #[test]
    fn a_link_to_the_base_keeps_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        fs::create_dir(root.join("store")).unwrap();
        fs::write(root.join("store/x"), "x").unwrap();
        symlink("store/x", root.join("base")).unwrap();
        let name = new_backing_name(&OsHost, b"b", &root.join("c"), &root.join("base")).unwrap();
        assert_eq!(name, b"base");
    }

    #[test]
    fn a_name_that_would_be_too_long_is_refused() {
        let long = format!("/{}", "d/".repeat(600));
        let host = host(&[&format!("{long}base")]);
        let base = format!("{long}base");
        assert_eq!(name(&host, "b", &format!("{long}c"), &base), "base");
        let error = new_backing_name(&host, b"/b", Path::new("/c"), Path::new(&base)).unwrap_err();
        assert!(matches!(error, Error::Refused { .. }));
    }

    #[test]
    fn a_missing_base_is_an_error() {
        let error = new_backing_name(&host(&[]), b"b", Path::new("/c"), Path::new("/gone")).unwrap_err();
        assert!(matches!(error, Error::Io { .. }));
    }
}
