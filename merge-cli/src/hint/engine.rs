//! The hints for errors of the engine.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use qcow2::error::{Role, shown};
use qcow2::image::Container;
use qcow2::image::ImageFormat;
use qcow2::merge;
use qcow2::storage::OsHost;
use qcow2::ways::{self, NamedBacking, free_name};
use qcow2::{Error, FileOp, Refusal};

use super::io::{io_hints, no_space};
use super::{Command, Hint, HintKind, Hints, in_use};
use crate::call::{Call, VerbName};

/// The hints for an error met by `call`.
pub(crate) fn hints(error: &Error, call: &Call) -> Hints {
    match error {
        Error::Io { path, op, source, .. } => io_hints(path, *op, source, call),
        Error::Barrier { path, source } => io_hints(path, FileOp::Write, source, call),
        Error::Unreadable { path, source, .. } => io_hints(path, FileOp::Read, source, call),
        Error::Format { path, .. } if merge::can_be_healed(&OsHost, path) => torn(path, call),
        Error::Format { path, source } | Error::Mapping { path, source, .. } => {
            if source.is_unsupported() { unsupported(path, call) } else { malformed(path, call) }
        }
        Error::Foreign { path, container } => foreign(path, *container, call),
        Error::MissingLayer { image, role, resolved, source, .. } => {
            if source.kind() == io::ErrorKind::NotFound {
                missing(image, *role, resolved, call)
            } else {
                io_hints(resolved, FileOp::Open, source, call)
            }
        }
        Error::Refused { path, reason } => refusal(path, reason, call),
        Error::InUse { path, holders } => in_use::hints(path, holders, call),
        Error::NoSpace { path, .. } => no_space(path, call),
        Error::Cancelled => Hint::command(HintKind::GoOn, "nothing is lost; to go on", call.again()).into(),
        Error::Usage(_) if call.verb == VerbName::Demo => help(call),
        Error::Usage(_) => info_chain("its layers", call),
        Error::Verify { path, .. } => Hints::from(Hint::advice(
            "nothing was switched or deleted, the overlays still hold everything; look for disk errors (dmesg)",
        ))
        .or(check("then see how base is", path)),
        Error::Broken { .. } => Hint::advice("report it with the command line and what it printed; nothing was written behind it").into(),
        _ => help(call),
    }
}

fn help(call: &Call) -> Hints {
    Hint::command(HintKind::Help, "", call.help()).into()
}

fn info_chain(why: &str, call: &Call) -> Hints {
    if matches!(call.verb, VerbName::Info | VerbName::Map) {
        // It would answer with the same error.
        return info(why, &call.image).into();
    }
    Hint::command(HintKind::InfoChain, why, Command::qmerge(["info", "--chain"]).file(&call.image)).into()
}

fn info(why: &str, image: &Path) -> Hint {
    Hint::command(HintKind::Info, why, Command::qmerge(["info"]).file(image))
}

fn check(why: &str, image: &Path) -> Hint {
    Hint::command(HintKind::Check, why, Command::qmerge(["check"]).file(image))
}

/// The chain of the named image as a new file, in words that say why.
fn flatten(why: &str, call: &Call) -> Option<Hint> {
    let command = Command::qmerge(["flatten"]).file(&call.image).word("-o").file(free_name(&call.image)?);
    Some(Hint::command(HintKind::Flatten, why, command))
}

fn allowed<W: AsRef<OsStr>>(kind: HintKind, why: &str, call: &Call, options: &[W]) -> Hint {
    Hint::command(kind, why, call.again_with(options))
}

fn torn(path: &Path, call: &Call) -> Hints {
    let why = "the same qmerge commit makes it whole";
    let abort = Hint::command(HintKind::Abort, "to give the merge up", Command::qmerge(["abort"]).file(path));
    match call.verb {
        VerbName::Commit | VerbName::Pull => {
            Hints::from(abort).first(Hint::command(HintKind::Again, why, call.in_earnest()))
        }
        _ => Hints::from(abort).first(Hint::advice(why)),
    }
}

/// A merge that was stopped keeps another verb from its images.
fn unfinished(path: &Path) -> Hints {
    let stopped = merge::unfinished_merge(&OsHost, path, None).ok().flatten();
    let finish = stopped.map(|merge| {
        let command = Command::qmerge(["commit"]).file(&merge.active).word("--base").file(&merge.base);
        let command =
            if merge.top == merge.active { command } else { command.word("--top").file(&merge.top) };
        let command = if merge.removes { command.word("--delete") } else { command };
        Hint::command(HintKind::Finish, "finish it", command)
    });
    Hints::from(info("what was stopped", path)).or(finish).or(Hint::command(
        HintKind::Abort,
        "to give it up",
        Command::qmerge(["abort"]).file(path),
    ))
}

fn unsupported(path: &Path, call: &Call) -> Hints {
    let qemu = Hint::advice(format!("QEMU itself may still read {}", shown(path)));
    match call.verb {
        VerbName::Info => qemu.into(),
        _ => Hints::from(info("what it is", path)).or(qemu),
    }
}

/// A damaged image. What is damaged above cluster 0 can be repaired in part, and read as QEMU does.
fn malformed(path: &Path, call: &Call) -> Hints {
    let restore = Hint::advice(format!("restore {} from a backup", shown(path)));
    match call.verb {
        VerbName::Check | VerbName::Restore => restore.into(),
        VerbName::Info => Hints::from(check("the extent of the damage", path)).or(restore),
        _ => Hints::from(restore).or(check("the extent of the damage", path)),
    }
}

/// An image that must be repaired before it is written. What a repair cannot mend may still be read.
fn damaged(path: &Path, call: &Call) -> Hints {
    if ways::can_be_repaired(path) {
        let command = Command::qmerge(["check", "--repair", "all"]).file(path);
        return Hint::command(HintKind::Repair, "repair it first", command).into();
    }
    let restore = Hint::advice(format!("a repair cannot mend it: restore {} from a backup", shown(path)));
    let save = match ways::can_be_flattened(&call.image) {
        true => flatten("or save what can be read", call),
        false => None,
    };
    Hints::from(restore).or(check("the extent of the damage", path)).or(save)
}

/// A file of a format that is not read here.
fn foreign(path: &Path, container: Container, call: &Call) -> Hints {
    let elsewhere = match (container.packer(), ImageFormat::from_name(container.name())) {
        (Some(packer), _) => format!("unpack it with {packer} first"),
        _ if container.is_machine_state() => {
            "it holds a machine's memory and no disk: name the disk's image".to_owned()
        }
        (None, Some(_)) => "convert it with qemu-img, which reads it".to_owned(),
        (None, None) => "unpack it first".to_owned(),
    };
    let hints = Hints::from(Hint::advice(elsewhere));
    let stated = |word: &OsString| word == "-f" || word.as_bytes().starts_with(b"--format");
    if path == call.image && !call.words.iter().any(stated) {
        let why = "or, if these bytes are the disk itself";
        return hints.or(allowed(HintKind::Format, why, call, &["-f", "raw"]));
    }
    match call.verb {
        VerbName::Commit => hints.or(info_above(call)),
        _ => hints,
    }
}

fn info_above(call: &Call) -> Hint {
    let why = "layers above it can be merged into one another, with --base; which there are";
    Hint::command(HintKind::InfoChain, why, Command::qmerge(["info", "--chain"]).file(&call.image))
}

/// When the users of a layer are no reason to refuse. An empty overlay may be a new disk of another machine, or what a merge
/// of QEMU's has left: only the user can tell.
fn needless(users: &[PathBuf]) -> String {
    match users.iter().all(|user| ways::holds_nothing(user)) {
        true => "or, if nobody needs those images any more (they hold nothing: new disks, or left by a merge of QEMU's)",
        false => "or, if nobody needs those images any more",
    }
    .to_owned()
}

/// A plain backing name for the named image, whose `json:` name repeats what lies below: that stays true in its header.
fn plain_name(call: &Call) -> Option<Hint> {
    let backing = NamedBacking::of(&call.image)?;
    let format = backing
        .detected()
        .filter(|_| backing.states_more())
        .filter(|found| matches!(found, ImageFormat::Qcow2))?;
    let command = Command::of("qemu-img")
        .options(["rebase", "-u", "-f", "qcow2", "-F", format.name(), "-b"])
        .word(std::fs::canonicalize(&backing.path).ok()?)
        .file(&call.image);
    let why = "besides, its json: name says what lies below its backing file, too, and is wrong once that changes; a plain one";
    Some(Hint::command(HintKind::NewName, why, command))
}

/// A file that an image names is not there.
fn missing(image: &Path, role: Role, resolved: &Path, call: &Call) -> Hints {
    let put = |what| Hint::advice(format!("put {} back where the image names it{what}", shown(resolved)));
    if role == Role::DataFile {
        return put("; it holds the guest's data").into();
    }
    let again = Hint::command(HintKind::Again, "when it is there again", call.again());
    let Some(backing) = NamedBacking::of(image) else { return put("").into() };
    match backing.moved(image) {
        Some(found) => {
            let command = Command::of("qemu-img")
                .options(["rebase", "-u", "-f", "qcow2", "-F", &found.format, "-b"])
                .word(&found.name)
                .file(image);
            let why = format!("or, if {} is the same file, name its new place", shown(&found.path));
            Hints::from(put("")).or(Hint::command(HintKind::NewName, why, command))
        }
        None => Hints::from(put("; or search for it, it may have been moved")).or(again),
    }
}

fn refusal(path: &Path, reason: &Refusal, call: &Call) -> Hints {
    match reason {
        Refusal::SharedBase { users } | Refusal::PossiblyShared { users } => Hints::default()
            .or(flatten("make a file of its own", call))
            .or(allowed(HintKind::AllowSharedBase, &needless(users), call, &["--allow-shared-base"]))
            .or(plain_name(call)),
        Refusal::MissingFormat { .. } => missing_format(path, call),
        Refusal::FormatMismatch { .. } => mismatch(path, call),
        Refusal::NotLocal { role, .. } | Refusal::NotAFile { role, .. } => {
            Hint::advice(format!("copy what it names to a local file, and name that as its {role}")).into()
        }
        Refusal::OutsideAllowed { file } => {
            let folder = ways::folder(file);
            allowed(
                HintKind::AllowDir,
                "if you trust it",
                call,
                &["--allow-dir".as_ref(), folder.as_os_str()],
            )
            .into()
        }
        Refusal::Loop { .. } => info("the name that is wrong", path).into(),
        Refusal::Snapshots { .. } => {
            Hints::from(Hint::advice("delete them with qemu-img snapshot -d, if nobody needs them"))
                .or(info("their names", path))
                .or(allowed(
                    HintKind::AllowSnapshotChange,
                    "or accept it",
                    call,
                    &["--allow-snapshot-change"],
                ))
        }
        Refusal::Bitmaps { .. } => {
            allowed(HintKind::DropBitmaps, "if no backup needs them", call, &["--drop-bitmaps"]).into()
        }
        Refusal::TornHeader | Refusal::TornTables => torn(path, call),
        Refusal::UnfinishedMerge { .. } => unfinished(path),
        Refusal::Dirty | Refusal::CorruptBit | Refusal::Inconsistent { .. } => damaged(path, call),
        Refusal::HeaderRoom { .. } => {
            Hints::from(Hint::advice("give base a shorter name")).or(flatten("or make a new file", call))
        }
        Refusal::NotWritable { kind, .. } => io_hints(path, FileOp::Open, &io::Error::from(*kind), call),
        Refusal::NoLocks => {
            let why = "if it is certain that no virtual machine uses these images";
            allowed(HintKind::NoLock, why, call, &["--no-lock"]).into()
        }
        Refusal::JournalPlace { .. } => Hint::advice(
            "name a folder on a disk that survives a power cut with --journal-dir, and the same one again if the merge is stopped",
        )
        .into(),
        Refusal::Stranger { file, .. } => Hints::from(Hint::advice(format!(
            "ask its owner, or if no merge of theirs needs it, remove {}",
            shown(file)
        )))
        .or(Hint::command(HintKind::Again, "then", call.again()))
        .or(Hint::advice("or keep the journal in a folder of your own, with --journal-dir")),
        Refusal::InTheWay { file, .. } => {
            let away = ways::free_name_behind(file).map(|free| Command::of("mv").word("-T").file(file).file(free));
            let away = away.map(|command| Hint::command(HintKind::Advice, "if nothing needs it there, move it away", command));
            Hints::from(away.unwrap_or_else(|| Hint::advice("move it away")))
                .or(Hint::command(HintKind::Again, "then", call.again()))
                .or(Hint::advice("or keep the journal elsewhere, with --journal-dir"))
        }
        Refusal::MergedDataLost => Hint::advice(format!(
            "put {} back as it was when the merge was stopped, and type the same command again; without that file, restore the \
             whole chain from a backup, and remove the journals beside it",
            shown(path)
        ))
        .into(),
        Refusal::DataFileOwner { file } => {
            let folders = [ways::folder(path), ways::folder(file)];
            let [image, data] = folders.each_ref().map(|folder| folder.as_os_str());
            let options = ["--allow-dir".as_ref(), image, "--allow-dir".as_ref(), data];
            allowed(HintKind::AllowDir, "if it is the data of that image", call, &options).into()
        }
        Refusal::BackupOwner { file, .. } => Hint::advice(format!(
            "if you trust whoever made it, restore from a copy of your own of {}, which nobody else may write",
            shown(file)
        ))
        .into(),
        Refusal::WrittenSince { .. } => Hints::from(allowed(
            HintKind::Restart,
            &format!(
                "if {} was only opened, or what was written there may be merged over, begin again",
                shown(path)
            ),
            call,
            &["--restart"],
        ))
        .or(Hint::command(
            HintKind::Abort,
            "or give the merge up",
            Command::qmerge(["abort"]).file(path),
        )),
        Refusal::JournalVersion { .. } => {
            Hint::advice("use the version of qmerge that began the merge, to end it or to give it up").into()
        }
        Refusal::JournalOfAnother { .. } => Hint::advice(
            "put the images back as they were when the machine stopped, with the times of the files and with what lies beside \
             them, and type the same command again",
        )
        .into(),
        Refusal::JournalOfRenamed { journal, image, wanted } => Hints::from(Hint::command(
            HintKind::Advice,
            format!("have it go with {}, and type the same command again", shown(image)),
            Command::of("mv").word("-n").file(journal).file(wanted),
        ))
        .or((call.verb == VerbName::Commit).then(|| {
            let why = "or, if the merge that was stopped is not to go on";
            allowed(HintKind::Restart, why, call, &["--restart"])
        })),
        Refusal::MergedBefore { .. } => {
            info_chain("its layers", call).or(flatten("what the chain shows, as a new file", call))
        }
        Refusal::TwoChains { real, .. } => {
            Hint::command(HintKind::Info, "which one is meant: the chain of the file itself", Command::qmerge(["info", "--chain"]).file(real)).into()
        }
        Refusal::MergeDone { top, active, removes } => {
            let command = Command::qmerge(["commit"]).file(active).word("--base").file(path);
            let command = if top == active { command } else { command.word("--top").file(top) };
            let command = if *removes { command.word("--delete") } else { command };
            Hint::command(HintKind::Finish, "finish it", command).into()
        }
        Refusal::BackupDamaged { .. } => Hints::from(Hint::advice(format!(
            "the image was not touched; take a whole copy of {}",
            shown(path)
        )))
        .or(check("how the image is", &call.image)),
        Refusal::OtherImage { .. } => Hints::from(Hint::advice("name that image")).or(allowed(
            HintKind::AllowCopy,
            &format!("or, if {} is a copy of it, made since the repair", shown(path)),
            call,
            &["--allow-copy"],
        )),
        Refusal::WrittenSinceRepair { .. } => check(
            "what was written since would be lost, so the backup is of no use any more; see how the image is",
            path,
        )
        .into(),
        Refusal::TooDeep { limit } => too_deep(*limit, call),
        Refusal::Exists => other_output(path, call),
        _ => info_chain("its layers", call),
    }
}

/// A backing name without a format: what the file's first bytes say can only be offered.
fn missing_format(image: &Path, call: &Call) -> Hints {
    let found = NamedBacking::of(image).and_then(|backing| Some((backing.detected()?, backing)));
    let Some((format, backing)) = found else {
        return Hint::advice("say what it is, with --backing-format").into();
    };
    let why = match format.name() {
        "raw" => "if it is a plain disk, which any bytes may be".to_owned(),
        name => format!("if it is {name}, as its first bytes say (a guest could have written them)"),
    };
    let mut value = backing.written.clone();
    value.push("=");
    value.push(format.name());
    let option = ["--backing-format".into(), value];
    allowed(HintKind::BackingFormat, &why, call, &option).into()
}

/// A stated format that the file contradicts.
fn mismatch(image: &Path, call: &Call) -> Hints {
    let Some(backing) = NamedBacking::of(image) else { return info_chain("its layers", call) };
    let file = shown(&backing.path);
    if std::fs::metadata(&backing.path).is_ok_and(|meta| meta.is_file() && meta.len() == 0) {
        return Hints::from(Hint::advice(format!(
            "{file} is empty, as a copy that failed leaves it: put it back from a backup"
        )))
        .or(Hint::command(HintKind::Again, "then", call.again()));
    }
    let is_named = |found: &ImageFormat| ImageFormat::from_name(found.name()).is_some();
    let Some(found) = backing.detected().filter(|found| *found != ImageFormat::Raw && is_named(found)) else {
        return Hint::advice(format!(
            "{file} has lost its header or is another file: put the right one there, from a backup"
        ))
        .into();
    };
    let command = Command::of("qemu-img")
        .options(["rebase", "-u", "-f", "qcow2", "-F", found.name(), "-b"])
        .word(backing.written.clone())
        .file(image);
    let why =
        format!("find out who wrote those bytes (a guest can); only if {file} really is {}", found.name());
    let rename = Hint::command(HintKind::NewName, why, command);
    // A word that was given already has not helped: the image itself must say it.
    let given = call.words.iter().any(|word| word.as_bytes().starts_with(b"--backing-format"));
    if backing.declared.as_deref() != Some("raw") || given {
        return rename.into();
    }
    let mut value = backing.written.clone();
    value.push("=raw");
    let why = "if it is a raw disk, and a guest wrote those bytes";
    Hints::from(rename).first(allowed(
        HintKind::BackingFormat,
        why,
        call,
        &["--backing-format".into(), value],
    ))
}

fn too_deep(limit: usize, call: &Call) -> Hints {
    match ways::layer_down(&call.image, limit / 2).filter(|_| call.verb == VerbName::Commit) {
        Some(layer) => {
            let command = Command::qmerge(["commit"]).file(layer);
            Hint::command(HintKind::MergeLower, "merge the lower part first", command).into()
        }
        None => info("merge the lower part first, from a layer that lies deeper; the one below", &call.image)
            .into(),
    }
}

pub(super) fn other_output(taken: &Path, call: &Call) -> Hints {
    let words = "choose another name for the new file";
    match free_name(taken) {
        Some(name) => {
            let command = call.again_with_file("-o", "--output", &name);
            Hint::command(HintKind::OtherOutput, words, command).into()
        }
        None => Hint::advice(words).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn commit() -> Call {
        let words = ["commit", "my disk.qcow2", "--shallow"].map(Into::into).to_vec();
        Call { verb: VerbName::Commit, image: PathBuf::from("my disk.qcow2"), words }
    }

    fn refused(reason: Refusal) -> String {
        hints(&Error::refused(Path::new("b.qcow2"), reason), &commit()).to_string()
    }

    #[test]
    fn refusals_name_the_option_that_allows_them() {
        for (reason, option) in [
            (Refusal::SharedBase { users: vec!["d.qcow2".into()] }, "--allow-shared-base"),
            (Refusal::Snapshots { count: 1 }, "--allow-snapshot-change"),
            (Refusal::Bitmaps { names: vec!["b0".into()] }, "--drop-bitmaps"),
            (Refusal::OutsideAllowed { file: "/srv/x.raw".into() }, "--allow-dir /srv"),
        ] {
            let text = refused(reason);
            assert!(text.contains(&format!("qmerge commit 'my disk.qcow2' --shallow {option}")), "{text}");
        }
    }

    #[test]
    fn what_is_no_lost_name_advises_no_new_one() {
        let missing = |role, code| Error::MissingLayer {
            image: "c.qcow2".into(),
            role,
            name: "b.qcow2".into(),
            resolved: "b.qcow2".into(),
            source: io::Error::from_raw_os_error(code),
        };
        for (role, errno) in [
            (Role::BackingFile, rustix::io::Errno::MFILE),
            (Role::BackingFile, rustix::io::Errno::ACCESS),
            (Role::BackingFile, rustix::io::Errno::NOSPC),
            (Role::BackingFile, rustix::io::Errno::IO),
            (Role::DataFile, rustix::io::Errno::NOENT),
        ] {
            let text = hints(&missing(role, errno.raw_os_error()), &commit()).to_string();
            assert!(!text.is_empty() && !text.contains("rebase"), "{role} {errno}: {text}");
        }
    }

    #[test]
    fn a_missing_file_points_at_its_folder() {
        let error = Error::io(Path::new("x.qcow2"), FileOp::Open, None, io::ErrorKind::NotFound.into());
        assert!(hints(&error, &commit()).to_string().ends_with("ls -l ."));
    }
}
