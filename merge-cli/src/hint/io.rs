//! The hints for what the system refused.

use std::io::{self, ErrorKind};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use qcow2::FileOp;
use qcow2::error::shown;
use qcow2::ways;
use rustix::io::Errno;

use super::{Command, Hint, HintKind, Hints};
use crate::call::{Call, VerbName};

/// The hints for an operation that the system refused.
pub(super) fn io_hints(path: &Path, op: FileOp, source: &io::Error, call: &Call) -> Hints {
    let again = |why: &str| Hints::from(Hint::command(HintKind::Again, why, call.again()));
    let file = shown(path);
    match source.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::MFILE) => {
            return again(
                "this process may not open more files: raise the limit of its shell (ulimit -n), then again",
            );
        }
        Some(Errno::NFILE) => {
            return again("the system has too many open files (sysctl fs.file-max): close some, then again");
        }
        Some(Errno::FBIG) => {
            return again(
                "the file may not become so large: raise the limit of the shell (ulimit -f), or use a file system for larger files, then again",
            );
        }
        Some(Errno::DQUOT) => {
            return again("a quota is used up (quota -s): free some space or raise it, then again");
        }
        Some(Errno::NOMEM) => return again("the system is out of memory: free some, then again"),
        Some(Errno::NAMETOOLONG) => return Hint::advice(format!("give {file} a shorter name")).into(),
        Some(Errno::LOOP) => {
            return Hint::advice(format!("its name leads in a circle of links: {file}")).into();
        }
        Some(Errno::NOTDIR) => {
            return Hint::advice(format!("a part of the name is no folder: {file}")).into();
        }
        _ => {}
    }
    match source.kind() {
        ErrorKind::NotFound => not_found(path, op),
        ErrorKind::PermissionDenied => permission(path, rustix::process::geteuid().is_root(), call),
        ErrorKind::ReadOnlyFilesystem => {
            again("make its file system writable (mount -o remount,rw), then again")
        }
        ErrorKind::AlreadyExists if call.verb == VerbName::Flatten => super::engine::other_output(path, call),
        ErrorKind::AlreadyExists => {
            Hint::advice(format!("choose another name: {file} is there already")).into()
        }
        ErrorKind::QuotaExceeded => {
            again("a quota is used up (quota -s): free some space or raise it, then again")
        }
        ErrorKind::StorageFull => no_space(path, call),
        ErrorKind::InvalidInput | ErrorKind::IsADirectory => {
            Hint::advice(format!("name a regular file or a block device; {file} is neither")).into()
        }
        _ => again("look for the system's reason (dmesg), then again"),
    }
}

fn not_found(path: &Path, op: FileOp) -> Hints {
    let folder = ways::folder(path);
    if !folder.is_dir() {
        return Hint::advice(format!("there is no folder {}", shown(folder))).into();
    }
    match op {
        FileOp::Create | FileOp::Rename => {
            Hint::advice(format!("somebody changes the folder {}", shown(folder)))
        }
        _ => Hint::command(
            HintKind::Advice,
            "which files there are",
            Command::of("ls").word("-l").file(folder),
        ),
    }
    .into()
}

/// What may not be done. Root is told what stands in even its way.
fn permission(path: &Path, is_root: bool, call: &Call) -> Hints {
    if ways::is_immutable(path) {
        let command = Command::of("chattr").word("-i").file(path);
        let words = "it is marked immutable, as templates are; if it may be changed";
        return Hint::command(HintKind::Advice, words, command).into();
    }
    if !is_root {
        return Hint::command(HintKind::AgainAsRoot, "as root", call.again().with_sudo()).into();
    }
    Hint::command(
        HintKind::Again,
        format!(
            "root may not do it either: see the file's marks, its labels and its mount (lsattr, ls -lZ, findmnt) for {}; then again",
            shown(path)
        ),
        call.again(),
    )
    .into()
}

/// The hints where the room does not suffice.
pub(super) fn no_space(path: &Path, call: &Call) -> Hints {
    let is_device = std::fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device());
    let words = if is_device {
        "enlarge the device (lvextend, for a logical volume), then again".to_owned()
    } else {
        format!(
            "free some space (df -h {}), then again",
            super::quoted(super::file_word(&ways::folder(path)).as_ref())
        )
    };
    Hint::command(HintKind::Again, words, call.again()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn commit() -> Call {
        Call {
            verb: VerbName::Commit,
            image: "c.qcow2".into(),
            words: ["commit", "c.qcow2"].map(Into::into).to_vec(),
        }
    }

    #[test]
    fn only_others_are_told_to_be_root() {
        let hints = |is_root| permission(Path::new("no such file"), is_root, &commit()).to_string();
        assert_eq!(hints(false), "as root: sudo qmerge commit c.qcow2");
        assert!(
            !hints(true).contains("sudo") && hints(true).ends_with(": qmerge commit c.qcow2"),
            "{}",
            hints(true)
        );
    }

    #[test]
    fn each_limit_is_told_by_its_own_words() {
        for (errno, words) in [
            (Errno::MFILE, "ulimit -n"),
            (Errno::FBIG, "ulimit -f"),
            (Errno::DQUOT, "quota"),
            (Errno::NOSPC, "df -h"),
            (Errno::IO, "dmesg"),
            (Errno::ROFS, "remount"),
            (Errno::NOMEM, "memory"),
        ] {
            let source = io::Error::from(errno);
            let text = io_hints(Path::new("c.qcow2"), FileOp::Write, &source, &commit()).to_string();
            assert!(text.contains(words) && text.ends_with(": qmerge commit c.qcow2"), "{errno:?}: {text}");
        }
    }
}
