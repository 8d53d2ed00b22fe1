//! Turns the ways that the engine finds into commands, and its reasons into words.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use qcow2::Error;
use qcow2::error::shown;
use qcow2::ways::{self, Act, Allow, Way, Why, after};

use super::{Command, Hint, HintKind, Hints, in_use, word};
use crate::call::Call;

/// The hints for an error met by `call`.
pub(crate) fn hints(error: &Error, call: &Call) -> Hints {
    match error {
        Error::InUse { holders, .. } if !holders.is_empty() => in_use::hints(holders, call),
        _ => {
            after(error, &call.asked()).iter().fold(Hints::default(), |hints, way| hints.or(hint(way, call)))
        }
    }
}

/// What to do where too many files are open, whatever was to be opened.
pub(crate) fn limit(source: &io::Error) -> Option<String> {
    ways::limit(source).map(|why| words(&why))
}

fn hint(way: &Way, call: &Call) -> Hint {
    let words = words(&way.why);
    match command(&way.act, call) {
        Some((kind, command)) => Hint::command(kind, words, command),
        None => Hint::advice(words),
    }
}

/// What is typed for it, if anything is.
fn command(act: &Act, call: &Call) -> Option<(HintKind, Command)> {
    let qmerge = |words: &[&str]| Command::qmerge(words);
    Some(match act {
        Act::Again => (HintKind::Again, call.again()),
        Act::AgainAsRoot => (HintKind::AgainAsRoot, call.again().with_sudo()),
        Act::GoOn => (HintKind::GoOn, call.again()),
        Act::InEarnest => (HintKind::Again, call.in_earnest()),
        Act::Into(file) => (HintKind::OtherOutput, call.again_with_file("-o", "--output", file)),
        Act::Allow(allow) => allowed(allow, call),
        Act::Info(image) => (HintKind::Info, qmerge(&["info"]).file(image)),
        Act::InfoChain(image) => (HintKind::InfoChain, qmerge(&["info", "--chain"]).file(image)),
        Act::Check(image) => (HintKind::Check, qmerge(&["check"]).file(image)),
        Act::Repair(image) => (HintKind::Repair, qmerge(&["check", "--repair", "all"]).file(image)),
        Act::Flatten { image, output } => {
            (HintKind::Flatten, qmerge(&["flatten"]).file(image).word("-o").file(output))
        }
        Act::Abort(base) => (HintKind::Abort, qmerge(&["abort"]).file(base)),
        Act::Finish { active, base, top, removes } => {
            let commit = qmerge(&["commit"]).file(active).word("--base").file(base);
            let commit = top.iter().fold(commit, |commit, top| commit.word("--top").file(top));
            (HintKind::Finish, if *removes { commit.word("--delete") } else { commit })
        }
        Act::MergeLower(layer) => (HintKind::MergeLower, qmerge(&["commit"]).file(layer)),
        Act::Relink { image, name, format, trust } => {
            (HintKind::NewName, relink(image, name, format.name(), *trust))
        }
        Act::ListFolder(folder) => (HintKind::Advice, Command::of("ls").word("-l").file(folder)),
        Act::Unmark(file) => (HintKind::Advice, Command::of("chattr").word("-i").file(file)),
        Act::FindHolders(file) => (HintKind::Advice, Command::of("lsof").file(file).with_sudo()),
        Act::MoveAway { file, to } => (HintKind::Advice, Command::of("mv").word("-T").file(file).file(to)),
        Act::RenameJournal { journal, to } => {
            (HintKind::Advice, Command::of("mv").word("-n").file(journal).file(to))
        }
        _ => return None,
    })
}

/// Another backing name in the header of an image.
pub(crate) fn relink(image: &Path, name: &OsStr, format: &str, trust: bool) -> Command {
    let command = Command::qmerge(["relink"]).file(image);
    let command = match name.as_bytes().starts_with(b"-") {
        // It would be taken for an option.
        true => command.word([OsStr::new("--backing="), name].into_iter().collect::<OsString>()),
        false => command.word("--backing").word(name),
    };
    let command = command.word("--backing-format").word(format);
    if trust { command.word("--trust") } else { command }
}

/// The same call with an option more.
fn allowed(allow: &Allow, call: &Call) -> (HintKind, Command) {
    let with = |option: &str| call.again_with(&[option]);
    match allow {
        Allow::SharedBase => (HintKind::AllowSharedBase, with("--allow-shared-base")),
        Allow::SnapshotChange => (HintKind::AllowSnapshotChange, with("--allow-snapshot-change")),
        Allow::BitmapLoss => (HintKind::DropBitmaps, with("--drop-bitmaps")),
        Allow::Folders(folders) => {
            let again = call.again();
            (HintKind::AllowDir, folders.iter().fold(again, |again, dir| again.option("--allow-dir", dir)))
        }
        Allow::Raw => (HintKind::Format, call.again_with(&["-f", "raw"])),
        Allow::NewRaw => (HintKind::Format, call.again_with(&["-F", "raw"])),
        Allow::BackingFormat { name, format } => {
            let value: OsString =
                [name.as_os_str(), "=".as_ref(), format.name().as_ref()].into_iter().collect();
            (HintKind::BackingFormat, call.again().option("--backing-format", value))
        }
        Allow::DataLoss => (HintKind::Salvage, with("--salvage")),
        Allow::OverDevice => (HintKind::OntoDevice, with("--onto-device")),
        Allow::NoLocks => (HintKind::NoLock, with("--no-lock")),
        Allow::Restart => (HintKind::Restart, with("--restart")),
        Allow::Copy => (HintKind::AllowCopy, with("--allow-copy")),
        Allow::Unproved => (HintKind::Trust, with("--trust")),
        // The tests type all that there are.
        _ => (HintKind::Help, call.help()),
    }
}

/// A reason in words.
pub(crate) fn words(why: &Why) -> String {
    let text = match why {
        Why::Then => "then",
        Why::NothingLost => "nothing is lost; to go on",
        Why::OpenFiles => {
            "this process may not open more files: raise the limit of its shell (ulimit -n), then again"
        }
        Why::SystemFiles => "the system has too many open files (sysctl fs.file-max): close some, then again",
        Why::FileSize => {
            "the file may not become so large: raise the limit of the shell (ulimit -f), or use a file system for larger files, then again"
        }
        Why::Quota => "a quota is used up (quota -s): free some space or raise it, then again",
        Why::Memory => "the system is out of memory: free some, then again",
        Why::ReadOnlyMount => "make its file system writable (mount -o remount,rw), then again",
        Why::SystemsReason => "look for the system's reason (dmesg), then again",
        Why::AsRoot => "as root",
        Why::DeviceFull => "enlarge the device (lvextend, for a logical volume), then again",
        Why::FilesThere => "which files there are",
        Why::Immutable => "it is marked immutable, as templates are; if it may be changed",
        Why::OtherName => "choose another name for the new file",
        Why::VerifyFailed => {
            "nothing was switched or deleted, the overlays still hold everything; look for disk errors (dmesg)"
        }
        Why::BaseAfterwards => "then see how base is",
        Why::Broken => "report it with the command line and what it printed; nothing was written behind it",
        Why::Layers => "its layers",
        Why::WhatItIs => "what it is",
        Why::WhatWasStopped => "what was stopped",
        Why::WrongName => "the name that is wrong",
        Why::NewNameReadsThrough => "name another file: this one is the image itself, or reads through it",
        Why::IsRightFile => "if you know that it is the right file",
        Why::OtherFormatOfNewName => {
            "name a file of the format that the header says; or, if the file is right and the header is not, say its format with --backing-format, and --trust"
        }
        Why::SameMakesWhole => "the same command makes it whole",
        Why::ReadsThrough => "what it reads through",
        Why::SnapshotNames => "their names",
        Why::LayerBelow => "merge the lower part first, from a layer that lies deeper; the one below",
        Why::TooDeep => "merge the lower part first",
        Why::LayersAbove => "layers above it can be merged into one another, with --base; which there are",
        Why::ChainOfFile => "which one is meant: the chain of the file itself",
        Why::Damage => "the extent of the damage",
        Why::HowImageIs => "how the image is",
        Why::BackupOutdated => {
            "what was written since would be lost, so the backup is of no use any more; see how the image is"
        }
        Why::RepairFirst => "repair it first",
        Why::OwnFile => "make a file of its own",
        Why::SaveReadable => "or save what can be read",
        Why::NewFile => "or make a new file",
        Why::ShownByChain => "what the chain shows, as a new file",
        Why::NobodyNeedsDevice => "if nobody needs what the device holds",
        Why::ZerosForTheRest => "to save what can be read, with zeros for the rest",
        Why::GiveMergeUp => "to give the merge up",
        Why::GiveUp => "to give it up",
        Why::OrGiveUp => "or give the merge up",
        Why::Unfinished => "finish it",
        Why::MadeWhole => "the same qmerge commit makes it whole",
        Why::MadeWholeByPull => "the same qmerge pull makes it whole",
        Why::MadeWholeByRebase => "the same qmerge rebase makes it whole",
        Why::Packed(None) => "unpack it first",
        Why::MachineState => "it holds a machine's memory and no disk: name the disk's image",
        Why::OtherFormat => "convert it with qemu-img, which reads it",
        Why::PerhapsRaw => "or, if these bytes are the disk itself",
        Why::ThereAgain => "when it is there again",
        Why::NameSaysMore => {
            "besides, its json: name says what lies below its backing file, too, and is wrong once that changes; a plain one, as qemu-img rebase -u would write it"
        }
        Why::NobodyNeedsUsers { hold_nothing: true } => {
            "or, if nobody needs those images any more (they hold nothing: new disks, or left by a merge of QEMU's)"
        }
        Why::NobodyNeedsUsers { hold_nothing: false } => "or, if nobody needs those images any more",
        Why::Trusted => "if you trust it",
        Why::IsItsData => "if it is the data of that image",
        Why::DeleteSnapshots => "delete them with qemu-img snapshot -d, if nobody needs them",
        Why::AcceptChange => "or accept it",
        Why::NoBackupNeedsBitmaps => "if no backup needs them",
        Why::ShorterName => "give base a shorter name",
        Why::NobodyUsesImages => "if it is certain that no virtual machine uses these images",
        Why::LastingFolder => {
            "name a folder on a disk that survives a power cut with --journal-dir, and the same one again if the merge is stopped"
        }
        Why::OwnJournalFolder => "or keep the journal in a folder of your own, with --journal-dir",
        Why::MoveAway => "move it away",
        Why::NothingNeedsIt => "if nothing needs it there, move it away",
        Why::OtherJournalFolder => "or keep the journal elsewhere, with --journal-dir",
        Why::OtherVersion => "use the version of qmerge that began the merge, to end it or to give it up",
        Why::AllAsItWas => {
            "put the images back as they were when the machine stopped, with the times of the files and with what lies beside them, and type the same command again"
        }
        Why::NotToGoOn => "or, if the merge that was stopped is not to go on",
        Why::NameThatImage => "name that image",
        Why::SayFormat => "say what it is, with --backing-format",
        Why::PlainDisk => "if it is a plain disk, which any bytes may be",
        Why::GuestWrote => "if it is a raw disk, and a guest wrote those bytes",
        Why::WhoHolds => "who holds it, as root",
        _ => return words_about(why),
    };
    text.to_owned()
}

/// A reason that speaks of a file, or of something else that it names.
fn words_about(why: &Why) -> String {
    match why {
        Why::NotEvenRoot(file) => format!(
            "root may not do it either: see the file's marks, its labels and its mount (lsattr, ls -lZ, findmnt) for {}; then again",
            shown(file)
        ),
        Why::FolderFull(folder) => format!("free some space (df -h {}), then again", word(folder)),
        Why::NoFileOfNewName(file) => format!(
            "there is no file {}; a relative name of a backing file begins at the folder of the image",
            shown(file)
        ),
        Why::NoDataFileThere(file) => {
            format!("there is no file {}: name the place of its data file with --data-file", shown(file))
        }
        Why::NameTooLong(file) => format!("give {} a shorter name", shown(file)),
        Why::CircleOfLinks(file) => format!("its name leads in a circle of links: {}", shown(file)),
        Why::NoFolderInName(file) => format!("a part of the name is no folder: {}", shown(file)),
        Why::NoFolder(folder) => format!("there is no folder {}", shown(folder)),
        Why::FolderChanges(folder) => format!("somebody changes the folder {}", shown(folder)),
        Why::Taken(file) => format!("choose another name: {} is there already", shown(file)),
        Why::NoFileOrDevice(file) => {
            format!("name a regular file or a block device; {} is neither", shown(file))
        }
        Why::QemuReads(image) => format!("QEMU itself may still read {}", shown(image)),
        Why::Restore(image) => format!("restore {} from a backup", shown(image)),
        Why::Unmendable(image) => {
            format!("a repair cannot mend it: restore {} from a backup", shown(image))
        }
        Why::Packed(Some(packer)) => format!("unpack it with {packer} first"),
        Why::Missing(file) => format!("put {} back where the image names it", shown(file)),
        Why::MissingOrMoved(file) => format!(
            "put {} back where the image names it; or search for it, it may have been moved",
            shown(file)
        ),
        Why::DataMissing(file) => {
            format!("put {} back where the image names it; it holds the guest's data", shown(file))
        }
        Why::Moved(file) => format!("or, if {} is the same file, name its new place", shown(file)),
        Why::CopyHere(role) => format!("copy what it names to a local file, and name that as its {role}"),
        Why::AskOwner(file) => {
            format!("ask its owner, or if no merge of theirs needs it, remove {}", shown(file))
        }
        Why::OnlyAsItWas(base) => format!(
            "put {} back as it was when the merge was stopped, and type the same command again; without that file, restore the \
             whole chain from a backup, and remove the journals beside it",
            shown(base)
        ),
        Why::CopyOfBackup(file) => format!(
            "if you trust whoever made it, restore from a copy of your own of {}, which nobody else may write",
            shown(file)
        ),
        Why::OnlyOpened(base) => format!(
            "if {} was only opened, or what was written there may be merged over, begin again",
            shown(base)
        ),
        Why::JournalIsOf(image) => {
            format!("have it go with {}, and type the same command again", shown(image))
        }
        Why::TakeCopy(image) => format!("the image was not touched; take a whole copy of {}", shown(image)),
        Why::IsCopy(image) => format!("or, if {} is a copy of it, made since the repair", shown(image)),
        Why::FirstBytesSay(format) => {
            format!("if it is {}, as its first bytes say (a guest could have written them)", format.name())
        }
        Why::EmptyFile(file) => {
            format!("{} is empty, as a copy that failed leaves it: put it back from a backup", shown(file))
        }
        Why::LostHeader(file) => format!(
            "{} has lost its header or is another file: put the right one there, from a backup",
            shown(file)
        ),
        Why::FindOutWhoWrote(file, format) => format!(
            "find out who wrote those bytes (a guest can); only if {} really is {}",
            shown(file),
            format.name()
        ),
        Why::HolderNotSeen(file) => format!(
            "no process here shows who holds it: look on other hosts and in containers that use {}; when it is free, again",
            shown(file)
        ),
        _ => String::new(),
    }
}
