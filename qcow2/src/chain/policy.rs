//! Which files may be opened because an image names them.
//!
//! An image's bytes are untrusted: whoever wrote them chose the names. So the library opens no file that an
//! image names unless the caller allows it, and then only regular files and block devices.

use crate::error::shown;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::name::BackingName;
use crate::error::{Error, FileOp, Refusal, Result, Role};
use crate::storage::{Access, FileId, Host, Place, Storage};

/// How many layers a chain may have unless the caller sets a limit: any number. A chain never holds a file
/// twice, so an attacker needs a file for every layer.
pub(crate) const DEFAULT_MAX_DEPTH: usize = usize::MAX;

/// Folders whose files claim to be regular but are not: reading some of them blocks, or changes the system.
pub(super) const KERNEL_FILES: &[&str] = &["/proc", "/sys"];

/// Which files may be opened because an image names them. The default allows none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    scope: PolicyScope,
    max_depth: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum PolicyScope {
    Nothing,
    Anywhere,
    Inside(Vec<PathBuf>),
}

impl Default for Policy {
    fn default() -> Self {
        Self::deny()
    }
}

impl Policy {
    /// Allows no image to name other files.
    pub fn deny() -> Self {
        Self { scope: PolicyScope::Nothing, max_depth: DEFAULT_MAX_DEPTH }
    }

    /// Allows regular files and block devices anywhere.
    pub fn local_files() -> Self {
        Self { scope: PolicyScope::Anywhere, ..Self::deny() }
    }

    /// Allows files in `dir` and below it, and in directories allowed by earlier calls, and no others.
    /// Symbolic links are followed before files and directories are compared.
    pub fn allow_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        match &mut self.scope {
            PolicyScope::Inside(dirs) => dirs.push(dir.into()),
            scope => *scope = PolicyScope::Inside(vec![dir.into()]),
        }
        self
    }

    /// Sets the most layers that a chain may have; there is no limit unless set.
    pub fn with_max_depth(mut self, layers: usize) -> Self {
        self.max_depth = layers;
        self
    }

    /// The most layers that a chain may have.
    pub fn max_depth(&self) -> usize {
        self.max_depth
    }

    /// Opens the file that `image` names, if it may be opened.
    ///
    /// # Errors
    /// [`Error::MissingLayer`] if there is no such file or it cannot be opened; [`Error::Refused`] if
    /// the policy forbids it, or if the name means different files to different programs.
    pub(super) fn open(
        &self,
        host: &dyn Host,
        named: &Named<'_>,
        access: impl FnOnce(FileId) -> Access,
    ) -> Result<Opened> {
        let Named { image, role, written, name } = *named;
        let text = || String::from_utf8_lossy(written).into_owned();
        if self.scope == PolicyScope::Nothing {
            return Err(Error::refused(image, Refusal::NamesDenied { role, name: text() }));
        }
        let path = name.resolve(image);
        let missing = |source: io::Error| Error::MissingLayer {
            image: image.to_owned(),
            role,
            name: text(),
            resolved: path.clone(),
            source,
        };
        let stat = host.stat(&path);
        refuse_ambiguous(host, named, stat.as_ref().ok().map(|stat| stat.id))?;
        let stat = stat.map_err(missing)?;
        let not_a_file = |what| Error::refused(image, Refusal::NotAFile { role, name: text(), what });
        name.check_kind(stat.kind).map_err(not_a_file)?;
        let file = host.canonicalize(&path).map_err(|e| Error::io(&path, FileOp::Resolve, None, e))?;
        if KERNEL_FILES.iter().any(|dir| file.starts_with(dir)) {
            return Err(not_a_file(format!("a window into the kernel ({})", shown(&file))));
        }
        self.check_scope(host, image, file.clone())?;
        let access = access(stat.id);
        // Open the resolved path, which is the one that was checked, and follow no link that was made
        // meanwhile.
        let opened = Place::at(host, &file).and_then(|place| place.open(host, access));
        let storage = opened.map_err(|e| not_writable(&path, access, e, missing))?;
        let opened = storage.stat().map_err(|e| Error::io(&path, FileOp::Stat, None, e))?;
        if opened.id != stat.id {
            return Err(Error::refused(&path, Refusal::NameMoved));
        }
        Ok(Opened { path, id: opened.id, storage })
    }

    /// Whether an image may name this file. The path must have no symbolic links.
    pub(crate) fn allows(&self, host: &dyn Host, file: &Path) -> bool {
        let is_denied =
            self.scope == PolicyScope::Nothing || KERNEL_FILES.iter().any(|dir| file.starts_with(dir));
        !is_denied && self.check_scope(host, file, file.to_owned()).is_ok()
    }

    /// Whether the caller has allowed the folder of a file by name.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn vouches(&self, host: &dyn Host, file: &Path) -> Result<bool> {
        if !matches!(self.scope, PolicyScope::Inside(_)) {
            return Ok(false);
        }
        let real = host.canonicalize(file).map_err(|e| Error::io(file, FileOp::Resolve, None, e))?;
        match self.check_scope(host, &real, real.clone()) {
            Err(Error::Refused { .. }) => Ok(false),
            checked => checked.map(|()| true),
        }
    }

    fn check_scope(&self, host: &dyn Host, image: &Path, file: PathBuf) -> Result<()> {
        let PolicyScope::Inside(dirs) = &self.scope else { return Ok(()) };
        for dir in dirs {
            let real = host.canonicalize(dir).map_err(|e| Error::io(dir, FileOp::Resolve, None, e))?;
            if file.starts_with(real) {
                return Ok(());
            }
        }
        Err(Error::refused(image, Refusal::OutsideAllowed { file }))
    }
}

/// A name that stands in an image, with what it means.
#[derive(Clone, Copy, Debug)]
pub(super) struct Named<'a> {
    /// The image, as named.
    pub(super) image: &'a Path,
    /// What the image names it as.
    pub(super) role: Role,
    /// The name as it stands in the image.
    pub(super) written: &'a [u8],
    /// What it means.
    pub(super) name: &'a BackingName,
}

/// A file that was opened.
#[derive(Clone, Debug)]
pub(super) struct Opened {
    /// Its path as QEMU would show it.
    pub(super) path: PathBuf,
    /// Its identity.
    pub(super) id: FileId,
    /// Its bytes.
    pub(super) storage: Arc<dyn Storage>,
}

/// The error for a file that could not be opened: a typed refusal if only the right to write is missing, else
/// `otherwise`.
pub(super) fn not_writable(
    path: &Path,
    access: Access,
    source: io::Error,
    otherwise: impl FnOnce(io::Error) -> Error,
) -> Error {
    use io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem};
    if access == Access::ReadWrite && matches!(source.kind(), PermissionDenied | ReadOnlyFilesystem) {
        return Error::refused(path, Refusal::NotWritable { why: source.to_string(), kind: source.kind() });
    }
    otherwise(source)
}

/// Refuses a name that probably meant another file to the VM. A name that starts at the working directory leads
/// to the same file only if both processes run in the same directory. If a file of that name lies beside the
/// image, and it is not the one that was `found`, they probably do not.
fn refuse_ambiguous(host: &dyn Host, named: &Named<'_>, found: Option<FileId>) -> Result<()> {
    if !named.name.depends_on_working_dir() {
        return Ok(());
    }
    let beside = named.name.resolve_beside(named.image);
    match host.stat(&beside) {
        Ok(other) if Some(other.id) != found => {
            let name = String::from_utf8_lossy(named.written).into_owned();
            let reason = Refusal::WorkingDirectory { role: named.role, name, beside };
            Err(Error::refused(named.image, reason))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{MemHost, OsHost};
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    fn try_open(host: &dyn Host, policy: &Policy, image: &Path, name: &str) -> Result<Opened> {
        let parsed = BackingName::parse(name.as_bytes()).unwrap();
        let named = Named { image, role: Role::BackingFile, written: name.as_bytes(), name: &parsed };
        policy.open(host, &named, |_| Access::Read)
    }

    fn reason(result: Result<Opened>) -> Refusal {
        match result {
            Err(Error::Refused { reason, .. }) => reason,
            other => panic!("not refused: {other:?}"),
        }
    }

    #[test]
    fn the_default_opens_nothing_that_an_image_names() {
        let host = MemHost::new();
        host.add("/d/base", b"x").unwrap();
        let result = try_open(&host, &Policy::default(), Path::new("/d/top"), "base");
        assert!(matches!(reason(result), Refusal::NamesDenied { .. }));
        assert!(try_open(&host, &Policy::local_files(), Path::new("/d/top"), "base").is_ok());
    }

    #[test]
    fn allowed_folders_confine() {
        let host = MemHost::new();
        for file in ["/d/base", "/d2/base", "/e/f/base"] {
            host.add(file, b"x").unwrap();
        }
        let policy = Policy::local_files().allow_dir("/d").allow_dir("/e");
        let top = Path::new("/d/top");
        assert!(try_open(&host, &policy, top, "base").is_ok());
        assert!(try_open(&host, &policy, top, "/e/f/base").is_ok());
        for outside in ["/d2/base", "../d2/base", "/d/../d2/base"] {
            let refusal = reason(try_open(&host, &policy, top, outside));
            assert_eq!(refusal, Refusal::OutsideAllowed { file: "/d2/base".into() });
        }
    }

    #[test]
    fn a_symbolic_link_does_not_lead_out_of_an_allowed_folder() {
        let dir = tempfile::tempdir().unwrap();
        let inside = dir.path().join("in");
        std::fs::create_dir(&inside).unwrap();
        std::fs::write(dir.path().join("secret"), "x").unwrap();
        symlink("../secret", inside.join("base")).unwrap();
        symlink("in", dir.path().join("alias")).unwrap();
        std::fs::write(inside.join("own"), "x").unwrap();
        let policy = Policy::deny().allow_dir(dir.path().join("alias"));
        let top = inside.join("top");
        let refusal = reason(try_open(&OsHost, &policy, &top, "base"));
        assert!(matches!(refusal, Refusal::OutsideAllowed { file } if file.ends_with("secret")));
        assert!(try_open(&OsHost, &policy, &top, "own").is_ok());
    }

    #[test]
    fn what_is_neither_a_regular_file_nor_a_block_device_is_refused_without_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        let _socket = UnixListener::bind(dir.path().join("socket")).unwrap();
        for name in ["fifo", "socket", "/dev/zero", "/dev/null", "/proc", "/proc/version", "."] {
            let result = try_open(&OsHost, &Policy::local_files(), &dir.path().join("top"), name);
            assert!(matches!(reason(result), Refusal::NotAFile { .. }), "{name}");
        }
    }

    #[test]
    fn a_missing_file_is_reported_with_name_and_path() {
        let host = MemHost::new();
        let error = try_open(&host, &Policy::local_files(), Path::new("/d/top"), "gone").unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::MissingLayer { .. }));
        assert!(text.contains("'gone'") && text.contains("/d/gone") && text.contains("/d/top"), "{text}");
    }

    #[test]
    fn a_name_that_means_two_files_is_refused() {
        let host = MemHost::new();
        host.add("/base", b"x").unwrap();
        let policy = Policy::local_files();
        assert!(try_open(&host, &policy, Path::new("/d/top"), "file:base").is_ok());
        host.add("/d/base", b"x").unwrap();
        let refusal = reason(try_open(&host, &policy, Path::new("/d/top"), "file:base"));
        assert!(refusal.to_string().contains("working directory"));
        assert!(try_open(&host, &policy, Path::new("/top"), "file:base").is_ok());
        host.add("/d/only", b"x").unwrap();
        let refusal = reason(try_open(&host, &policy, Path::new("/d/top"), "file:only"));
        assert!(refusal.to_string().contains("/d/only"));
    }

    #[test]
    fn a_file_that_cannot_be_written_is_told_from_one_that_is_missing() {
        let error = |access, kind: io::ErrorKind| {
            not_writable(Path::new("/x"), access, kind.into(), |e| {
                Error::io(Path::new("/x"), FileOp::Open, None, e)
            })
        };
        let read_only = error(Access::ReadWrite, io::ErrorKind::ReadOnlyFilesystem);
        assert!(matches!(read_only, Error::Refused { reason: Refusal::NotWritable { .. }, .. }));
        let denied = error(Access::ReadWrite, io::ErrorKind::PermissionDenied);
        assert!(matches!(denied, Error::Refused { reason: Refusal::NotWritable { .. }, .. }));
        assert!(matches!(error(Access::Read, io::ErrorKind::PermissionDenied), Error::Io { .. }));
        assert!(matches!(error(Access::ReadWrite, io::ErrorKind::NotFound), Error::Io { .. }));
    }
}
