//! What to type next, for everything that can go wrong.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use qcow2::error::Holder;
use qcow2::journal::has_edit;
use qcow2::merge::{self, Pending};
use qcow2::storage::OsHost;
use qcow2::{Error, FileOp, Refusal};

use crate::call::{Call, VerbName};
use crate::monitors;
use crate::output::human::shell_word;

/// The hint for an error met by `call`.
pub(crate) fn hint(error: &Error, call: &Call) -> String {
    match error {
        Error::Io { path, op, source, .. } => io_hint(path, *op, source, call),
        Error::Format { path, .. } if is_torn(path) => format!(
            "a power cut has torn its header while it was changed; the same qmerge commit, or qmerge abort {}, makes it whole",
            word(path)
        ),
        Error::Format { path, source } | Error::Mapping { path, source, .. } => {
            let file = word(path);
            if source.is_unsupported() {
                format!("qemu-img info {file} names the feature; QEMU itself may still read the image")
            } else if call.verb == VerbName::Check {
                format!(
                    "restore {file} from a backup, or see whether QEMU can mend it: qemu-img check -r all {file}"
                )
            } else {
                format!("qmerge check {file} shows the extent of the damage; restore the image from a backup")
            }
        }
        Error::MissingLayer { image, resolved, .. } => format!(
            "put {resolved} back, or if it has moved, name its new place: qemu-img rebase -u -F FMT -b NEWNAME {image}",
            resolved = word(resolved),
            image = word(image)
        ),
        Error::Refused { path, reason } => refusal_hint(path, reason, call),
        Error::InUse { path, holders } => in_use_hint(path, holders, call),
        Error::NoSpace { path, .. } => no_space_hint(path, call),
        Error::Cancelled => format!("nothing is lost; to go on: {}", call.again()),
        Error::Usage(_) if call.verb == VerbName::Demo => call.help(),
        Error::Usage(_) => format!("qmerge info --chain {} lists the layers", word(&call.image)),
        Error::Verify { path, .. } => format!(
            "nothing was switched or deleted, the overlays still hold everything; look for disk errors (dmesg), then: qmerge check {}",
            word(path)
        ),
        _ => call.help(),
    }
}

/// Whether a record lies beside an image from which its header can be made whole.
fn is_torn(path: &Path) -> bool {
    let is_written = |pending: Pending| !pending.is_removing;
    has_edit(&OsHost, path)
        || merge::pending(&OsHost, path, None).is_ok_and(|left| left.is_some_and(is_written))
}

fn io_hint(path: &Path, op: FileOp, source: &io::Error, call: &Call) -> String {
    let file = word(path);
    match source.kind() {
        io::ErrorKind::NotFound => format!("see which files there are: ls -l {}", word(&folder(path))),
        io::ErrorKind::PermissionDenied => format!("as root: sudo {}", call.again()),
        io::ErrorKind::ReadOnlyFilesystem => {
            format!("make the file system writable, then again: {}", call.again())
        }
        io::ErrorKind::AlreadyExists => {
            format!("choose another name, or move {file} away: mv {file} {file}.old")
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => no_space_hint(path, call),
        io::ErrorKind::InvalidInput | io::ErrorKind::IsADirectory => {
            format!("name a regular file or a block device: ls -ld {file}")
        }
        _ => format!(
            "the system could not {op} {file}: look for its reason with dmesg, then again: {}",
            call.again()
        ),
    }
}

fn refusal_hint(path: &Path, reason: &Refusal, call: &Call) -> String {
    let file = word(path);
    match reason {
        Refusal::SharedBase { .. } => format!(
            "make a file of its own: qmerge flatten {} -o NEW.qcow2; or, if nobody needs those images any more: {}",
            word(&call.image),
            call.again_with(&["--allow-shared-base"])
        ),
        Refusal::MissingFormat { name } => format!(
            "say what it is: {}",
            call.again_with(&["--backing-format", &format!("{name}=FMT")]) + " (FMT is raw or qcow2)"
        ),
        Refusal::FormatMismatch { name, found, .. } => format!(
            "find out who wrote those bytes (a guest can); only if {name} really is {found}: qemu-img rebase -u -F {found} -b {} {file}",
            shell_word(name)
        ),
        Refusal::NotLocal { role, .. } | Refusal::NotAFile { role, .. } => format!(
            "copy what it names to a local file, and name that as the {role}: qemu-img {} {file}",
            if *role == "data file" { "amend -o data_file=FILE" } else { "rebase -u -F FMT -b FILE" }
        ),
        Refusal::OutsideAllowed { file } => {
            format!("if you trust it: {}", call.again_with(&["--allow-dir", &folder(file).to_string_lossy()]))
        }
        Refusal::Loop { .. } => {
            format!(
                "qmerge info {file} shows the name that is wrong; to correct it: qemu-img rebase -u -F FMT -b NAME {file}"
            )
        }
        Refusal::TooDeep { .. } => {
            "merge the lower part first, from a layer that lies deeper: qmerge commit LOWER_LAYER".to_owned()
        }
        Refusal::Snapshots { .. } => format!(
            "delete them (qemu-img snapshot -l {file}; qemu-img snapshot -d NAME {file}), or accept it: {}",
            call.again_with(&["--allow-snapshot-change"])
        ),
        Refusal::Bitmaps { .. } => {
            format!("if no backup needs them: {}", call.again_with(&["--drop-bitmaps"]))
        }
        Refusal::Dirty | Refusal::CorruptBit | Refusal::Inconsistent { .. } => {
            format!("repair it first: qmerge check --repair all {file}")
        }
        Refusal::HeaderRoom { .. } => format!(
            "give base a shorter name, or make a new file: qmerge flatten {} -o NEW.qcow2",
            word(&call.image)
        ),
        Refusal::NotWritable { why } if why.contains("Read-only file system") => {
            format!("make its file system writable (mount -o remount,rw), then again: {}", call.again())
        }
        Refusal::NotWritable { .. } => {
            format!("see who may write it: ls -l {file}; then again, as root: sudo {}", call.again())
        }
        Refusal::JournalPlace { .. } => format!(
            "name a folder on a disk that survives a power cut, and the same one again if the merge is stopped: {}",
            call.again_with_value("--journal-dir", "DIR")
        ),
        Refusal::WrittenSince { .. } => format!(
            "if {file} was only opened, or what was written there may be merged over, begin again: {}; or give the merge up: qmerge abort {file}",
            call.again_with(&["--restart"])
        ),
        Refusal::MergeDone { top, active, removes } => {
            let top = if top == active { String::new() } else { format!(" --top {}", word(top)) };
            let delete = if *removes { " --delete" } else { "" };
            format!("finish it: qmerge commit {} --base {file}{top}{delete}", word(active))
        }
        Refusal::BackupDamaged { .. } => {
            format!(
                "the image was not touched; take a whole copy of {file}, or: qmerge check {}",
                word(&call.image)
            )
        }
        Refusal::OtherImage { .. } => format!(
            "name that image; or, if {file} is a copy of it, made since the repair: {}",
            call.again_with(&["--allow-copy"])
        ),
        Refusal::WrittenSinceRepair { .. } => format!(
            "what was written since would be lost, so the backup is of no use for {file} any more; see how it is: qmerge check {file}"
        ),
        Refusal::Other(_) if call.verb == VerbName::Flatten && path != call.image => {
            format!("choose another name for the new file, or move that one away: mv {file} {file}.old")
        }
        _ => format!("qmerge info --chain {} shows the layers", word(&call.image)),
    }
}

fn in_use_hint(path: &Path, holders: &[Holder], call: &Call) -> String {
    let again = call.again();
    if holders.is_empty() {
        // Other users' processes are visible to root only.
        return format!(
            "see who holds it, as root: sudo lsof {}; shut that down, then again: {again}",
            word(path)
        );
    }
    if holders.iter().any(|holder| holder.name.starts_with("qemu-system") || holder.name == "kvm") {
        return format!("shut the virtual machine down, then again: {again}{}", live_hint(holders, call));
    }
    let pids: Vec<_> = holders.iter().map(|holder| holder.pid.to_string()).collect();
    format!(
        "let it finish or end it (kill {}), then again: {again}{}",
        pids.join(" "),
        live_hint(holders, call)
    )
}

/// How to do the same to the images as QEMU runs, where one of the holders shows a monitor.
fn live_hint(holders: &[Holder], call: &Call) -> String {
    let Some(address) = holders.iter().find_map(monitors::of) else { return String::new() };
    let address = shell_word(&address.to_string());
    match call.verb {
        VerbName::Commit => {
            format!("; or merge as it runs: qmerge live {} --qmp {address}", live_words(call))
        }
        _ => format!("; its disks, as it runs: qmerge live list --qmp {address}"),
    }
}

/// The words of a commit as `live commit` takes them: a disk answers to its active image too.
fn live_words(call: &Call) -> String {
    let mut line = format!("commit {}", word(&call.image));
    let mut words = call.words.iter().map(String::as_str);
    let mut whole = true;
    while let Some(option) = words.next() {
        let (name, value) =
            option.split_once('=').map_or((option, None), |(name, value)| (name, Some(value)));
        match name {
            "--base" | "--top" | "--scan" => {
                whole &= name != "--top";
                let value = value.or_else(|| words.next()).unwrap_or_default();
                line += &format!(" {name} {}", shell_word(value));
            }
            "--shallow" | "--delete" | "--drop-bitmaps" | "--allow-shared-base" | "--dry-run" => {
                line += &format!(" {name}");
            }
            _ => {}
        }
    }
    if whole && call.words.iter().any(|word| word == "--keep-active") {
        line + " --keep-overlay"
    } else if whole {
        line + " --active --pivot"
    } else {
        line
    }
}

fn no_space_hint(path: &Path, call: &Call) -> String {
    if std::fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device()) {
        return format!("enlarge the device (lvextend, for a logical volume), then again: {}", call.again());
    }
    format!("free some space (df -h {}), then again: {}", word(&folder(path)), call.again())
}

/// The folder that a file lies in, as one can type it.
fn folder(path: &Path) -> std::path::PathBuf {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => ".".into(),
        Some(parent) => parent.to_owned(),
        None => path.to_owned(),
    }
}

/// The folder of a file, as one types it in a shell.
pub(crate) fn folder_word(file: &Path) -> String {
    word(&folder(file))
}

/// A path as one types it in a shell.
pub(crate) fn word(path: &Path) -> String {
    shell_word(&path.to_string_lossy())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn commit() -> Call {
        let words = ["commit", "my disk.qcow2", "--shallow"].map(str::to_owned).to_vec();
        Call { verb: VerbName::Commit, image: PathBuf::from("my disk.qcow2"), words }
    }

    fn refused(reason: Refusal) -> String {
        hint(&Error::refused(Path::new("b.qcow2"), reason), &commit())
    }

    #[test]
    fn refusals_name_the_option_that_allows_them() {
        for (reason, option) in [
            (Refusal::SharedBase { users: vec!["d.qcow2".into()] }, "--allow-shared-base"),
            (Refusal::Snapshots { count: 1 }, "--allow-snapshot-change"),
            (Refusal::Bitmaps { names: vec!["b0".into()] }, "--drop-bitmaps"),
            (Refusal::MissingFormat { name: "base.raw".into() }, "--backing-format base.raw=FMT"),
            (Refusal::OutsideAllowed { file: "/srv/x.raw".into() }, "--allow-dir /srv"),
        ] {
            let text = refused(reason);
            assert!(text.contains(&format!("qmerge commit 'my disk.qcow2' --shallow {option}")), "{text}");
        }
    }

    #[test]
    fn holders_decide_what_to_do() {
        let holder = |name: &str| Holder { pid: 42, name: name.into(), command_line: Vec::new() };
        let used = |holders| hint(&Error::InUse { path: "b.qcow2".into(), holders }, &commit());
        assert!(used(vec![]).contains("as root: sudo lsof b.qcow2"));
        assert!(used(vec![holder("qemu-system-x86")]).starts_with("shut the virtual machine down"));
        assert!(used(vec![holder("qemu-nbd")]).contains("kill 42"));
    }

    #[test]
    fn a_commit_is_told_as_it_is_typed_for_a_running_qemu() {
        let live = |words: &[&str]| {
            let words = words.iter().map(|&word| word.to_owned()).collect();
            live_words(&Call { verb: VerbName::Commit, image: PathBuf::from("c.img"), words })
        };
        assert_eq!(live(&["commit", "c.img"]), "commit c.img --active --pivot");
        assert_eq!(
            live(&["commit", "--verify", "c.img", "--base=[1]", "--top", "b.img", "--delete"]),
            "commit c.img --base '[1]' --top b.img --delete"
        );
        assert_eq!(
            live(&["commit", "c.img", "--keep-active", "--shallow"]),
            "commit c.img --shallow --keep-overlay"
        );
    }

    #[test]
    fn a_missing_file_points_at_its_folder() {
        let error = Error::io(Path::new("x.qcow2"), FileOp::Open, None, io::ErrorKind::NotFound.into());
        assert!(hint(&error, &commit()).ends_with("ls -l ."));
    }
}
