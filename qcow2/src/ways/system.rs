//! Which ways lead on after what the system refused.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use rustix::io::Errno;

use super::way::{Act, Asked, Task, Way, Why};
use super::{folder, free_name, is_immutable};
use crate::error::FileOp;
use crate::storage::{Host, OsHost};

/// What can be done after an operation that the system refused.
pub(super) fn after_failure(path: &Path, op: FileOp, source: &io::Error, asked: &Asked<'_>) -> Vec<Way> {
    let file = || path.to_owned();
    let way = match source.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::MFILE | Errno::NFILE) => Way::again(limit(source).unwrap_or(Why::SystemsReason)),
        Some(Errno::FBIG) => Way::again(Why::FileSize),
        Some(Errno::DQUOT) => Way::again(Why::Quota),
        Some(Errno::NOMEM) => Way::again(Why::Memory),
        Some(Errno::NAMETOOLONG) => Way::outside(Why::NameTooLong(file())),
        Some(Errno::LOOP) => Way::outside(Why::CircleOfLinks(file())),
        Some(Errno::NOTDIR) => Way::outside(Why::NoFolderInName(file())),
        _ => match source.kind() {
            ErrorKind::NotFound => not_found(path, op),
            ErrorKind::PermissionDenied => permission(path, is_root()),
            ErrorKind::ReadOnlyFilesystem => Way::again(Why::ReadOnlyMount),
            ErrorKind::AlreadyExists if matches!(asked.task, Task::Flatten | Task::Salvage) => {
                other_output(path)
            }
            ErrorKind::AlreadyExists => Way::outside(Why::Taken(file())),
            ErrorKind::QuotaExceeded => Way::again(Why::Quota),
            ErrorKind::StorageFull => full(path),
            ErrorKind::InvalidInput | ErrorKind::IsADirectory => Way::outside(Why::NoFileOrDevice(file())),
            _ => Way::again(Why::SystemsReason),
        },
    };
    vec![way]
}

/// Which limit of open files a failure has met, whatever was to be opened; `None` if it is another failure.
pub fn limit(source: &io::Error) -> Option<Why> {
    match source.raw_os_error().map(Errno::from_raw_os_error)? {
        Errno::MFILE => Some(Why::OpenFiles),
        Errno::NFILE => Some(Why::SystemFiles),
        _ => None,
    }
}

fn not_found(path: &Path, op: FileOp) -> Way {
    let folder = folder(path);
    match op {
        _ if !folder.is_dir() => Way::outside(Why::NoFolder(folder)),
        FileOp::Create | FileOp::Rename => Way::outside(Why::FolderChanges(folder)),
        _ => Way::to(Act::ListFolder(folder), Why::FilesThere),
    }
}

/// What may not be done. Root is told what stands in even its way.
fn permission(path: &Path, is_root: bool) -> Way {
    if is_immutable(path) {
        return Way::to(Act::Unmark(path.to_owned()), Why::Immutable);
    }
    match is_root {
        true => Way::again(Why::NotEvenRoot(path.to_owned())),
        false => Way::to(Act::AgainAsRoot, Why::AsRoot),
    }
}

/// What can be done where the room does not suffice.
pub(super) fn full(path: &Path) -> Way {
    let is_device = fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device());
    Way::again(if is_device { Why::DeviceFull } else { Why::FolderFull(folder(path)) })
}

/// Another name for a file that is to be written.
pub(super) fn other_output(taken: &Path) -> Way {
    let act = free_name(taken).map_or(Act::Outside, Act::Into);
    Way::to(act, Why::OtherName)
}

/// Whether this process is root, whom the system refuses little.
pub(super) fn is_root() -> bool {
    OsHost.user() == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_others_are_told_to_be_root() {
        let file = Path::new("no such file");
        assert_eq!(permission(file, false).act, Act::AgainAsRoot);
        assert_eq!(permission(file, true), Way::again(Why::NotEvenRoot(file.into())));
    }

    #[test]
    fn each_limit_has_a_reason_of_its_own() {
        let (image, task) = (Path::new("c.qcow2"), Task::Commit);
        let (states_format, states_backing_format, states_new_format) = (false, false, false);
        let asked = Asked { task, image, states_format, states_backing_format, states_new_format };
        for (errno, why) in [
            (Errno::MFILE, Why::OpenFiles),
            (Errno::FBIG, Why::FileSize),
            (Errno::DQUOT, Why::Quota),
            (Errno::NOSPC, Why::FolderFull(".".into())),
            (Errno::IO, Why::SystemsReason),
            (Errno::ROFS, Why::ReadOnlyMount),
            (Errno::NOMEM, Why::Memory),
        ] {
            assert_eq!(
                after_failure(image, FileOp::Write, &errno.into(), &asked),
                [Way::again(why)],
                "{errno:?}"
            );
        }
    }
}
