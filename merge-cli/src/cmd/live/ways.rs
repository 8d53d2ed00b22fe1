//! The ways that the library finds, as they are typed, and its reasons in words.

use std::path::Path;

use qmp_client::ways::{LiveAct, LiveWay, LiveWhy, Value, Wish};

use super::guard;
use super::trouble::{Session, offline};
use crate::call::without;
use crate::hint::{Command, Hint, HintKind, Hints, word};
use crate::output::human::printable;

/// Each of them as a hint.
pub(super) fn hints(ways: &[LiveWay], session: &Session<'_>) -> Hints {
    ways.iter().fold(Hints::default(), |hints, way| hints.or(hint(way, session)))
}

fn hint(way: &LiveWay, session: &Session<'_>) -> Hint {
    let words = words(&way.why, session);
    match &way.act {
        LiveAct::AskOwner(owner) if words.is_empty() => guard::look_instead(session, *owner),
        LiveAct::AskOwner(owner) => guard::look_instead(session, *owner).with_words(&words),
        // What only the user knows stands there in capitals.
        LiveAct::Give(values) => Hint::advice(format!("{words}: {}", given(values, session))),
        act => match command(act, session) {
            Some((kind, command)) => Hint::command(kind, words, command),
            None => Hint::advice(words),
        },
    }
}

/// What is typed for it, if anything is.
fn command(act: &LiveAct, session: &Session<'_>) -> Option<(HintKind, Command)> {
    let ls = |option: &str| Command::of("ls").word(option);
    Some(match act {
        LiveAct::Again => (HintKind::Again, session.again()),
        LiveAct::AgainAsRoot => (HintKind::AgainAsRoot, session.again().with_sudo()),
        LiveAct::With(wish) => with(*wish, session),
        LiveAct::BelowActive(top) => {
            (HintKind::BelowActive, session.again_with(&["--top", &format!("[{top}]")]))
        }
        LiveAct::WithoutName => (HintKind::Again, Command::qmerge(without(session.words, "--backing-file"))),
        LiveAct::Help => (HintKind::Help, Command::qmerge(["live", session.verb.as_str()]).word("--help")),
        LiveAct::List => (HintKind::LiveLook, session.other(&["list"])),
        LiveAct::Chain(disk) => (HintKind::LiveLook, session.other(&["chain", disk])),
        LiveAct::Jobs => (HintKind::LiveLook, session.other(&["jobs"])),
        LiveAct::End { disk, pivots } => {
            (HintKind::LiveEnd, session.other(&[if *pivots { "pivot" } else { "finish" }, disk]))
        }
        LiveAct::Cancel(disk) => (HintKind::LiveCancel, session.other(&["cancel", disk])),
        LiveAct::Pull(disk) => (HintKind::LivePull, session.other(&["pull", disk])),
        LiveAct::Recover(disk) => {
            let words: Vec<_> = ["recover"].into_iter().chain(disk.as_deref()).collect();
            (HintKind::Recover, session.other(&words))
        }
        LiveAct::Offline(merge) => (HintKind::Offline, offline(merge)),
        LiveAct::Snapshots(file) => {
            let list = Command::of("qemu-img").options(["snapshot", "-U", "-l"]);
            (HintKind::Info, list.file(Path::new(file)))
        }
        LiveAct::ListFolder(folder) => (HintKind::Advice, ls("-l").file(folder)),
        LiveAct::ListAll(folder) => (HintKind::Advice, ls("-la").file(folder)),
        LiveAct::ListRights(file) => (HintKind::Advice, ls("-ld").file(file)),
        LiveAct::ListFiles(files) => (HintKind::Advice, files.iter().fold(ls("-l"), Command::file)),
        _ => return None,
    })
}

/// The same call with an option more.
fn with(wish: Wish, session: &Session<'_>) -> (HintKind, Command) {
    let (kind, options): (_, &[&str]) = match wish {
        Wish::BitmapLoss => (HintKind::DropBitmaps, &["--drop-bitmaps"]),
        Wish::SnapshotChange => (HintKind::AllowSnapshotChange, &["--allow-snapshot-change"]),
        Wish::Plaintext => (HintKind::AllowPlaintext, &["--allow-plaintext"]),
        Wish::Stale => (HintKind::AllowStale, &["--allow-stale"]),
        Wish::SharedBase => (HintKind::AllowSharedBase, &["--allow-shared-base"]),
        Wish::Removal => (HintKind::Delete, &["--delete"]),
        _ => (HintKind::Active, &["--active", "--pivot"]),
    };
    (kind, session.again_with(options))
}

/// The same call with values that only the user knows.
fn given(values: &[Value], session: &Session<'_>) -> Command {
    let options = values.iter().map(|value| match value {
        Value::NbdSocket => ("--nbd-socket", "PATH"),
        Value::BackingName => ("--backing-file", "NAME"),
        _ => ("--state-dir", "DIR"),
    });
    session.again_with_values(&options.collect::<Vec<_>>())
}

/// A reason in words.
fn words(why: &LiveWhy, session: &Session<'_>) -> String {
    let text = match why {
        LiveWhy::Then => "then again",
        LiveWhy::QemuMakesSocket => {
            "QEMU makes a socket with its option -qmp unix:PATH,server=on,wait=off; see what is here"
        }
        LiveWhy::AsRoot => "as root",
        LiveWhy::WhoListens => {
            "see what listens: ss -xlp; a QEMU that has ended leaves its socket behind, and its images can be merged with \
             qmerge commit"
        }
        LiveWhy::OtherClient => "end the other client, or give QEMU a second monitor; then again",
        LiveWhy::JobsGoOn => "if QEMU still runs, its jobs go on",
        LiveWhy::WhichImage => "if it has ended, this says which image holds the disk",
        LiveWhy::WritableFolders => {
            "every disk is as it was; QEMU must be able to write the new files' folders"
        }
        LiveWhy::HowItStands => "see how it stands",
        LiveWhy::HowThingsStand => "see how things stand",
        LiveWhy::WhoMay => "see who may",
        LiveWhy::OpenFiles(limit) => return crate::hint::reason(limit),
        LiveWhy::SystemsReason => "look for the system's reason: dmesg",
        LiveWhy::NotesMerge => "that file notes how far a merge is; see what is there and who may write it",
        LiveWhy::NbdServer => "name the socket of its NBD server",
        LiveWhy::MergeWhole => "merge it as a whole with --active, or with qmerge commit when nobody uses it",
        LiveWhy::NameOfBase => "say what base is called there",
        LiveWhy::WithoutName => "without that name",
        LiveWhy::FolderOfMerge => "name the folder that the merge was begun with",
        LiveWhy::StateLost => "or, if that file is lost, end the job without its effect",
        LiveWhy::NoBackupNeedsBitmaps => "if no backup needs them",
        LiveWhy::NobodyNeedsSnapshots => "if nobody needs them",
        LiveWhy::SnapshotNames => "their names",
        LiveWhy::Meant => "if that is meant",
        LiveWhy::Removed => "or have it removed",
        LiveWhy::QemuElsewhere => {
            "run qmerge where QEMU runs (nsenter -t PID -m); or, if the files cannot be looked at, say what base is called there"
        }
        LiveWhy::WithoutEffect => "or end it without its effect",
        LiveWhy::TakeUp => "take the data up instead, which changes no layer below",
        LiveWhy::NobodyNeedsImages => "or, if nobody needs those images any more",
        LiveWhy::NobodyNeedsNode => "or, if nobody needs what that node shows",
        LiveWhy::SearchFolders => "name folders that exist with --scan, then again",
        LiveWhy::LastingFolder => "name another folder that lasts",
        LiveWhy::LeaveOut => "or leave that layer out",
        LiveWhy::NotSlowed => "leave --converge out; the merge gets ready when the guest writes less",
        LiveWhy::LayerNames => "name layers as this prints them",
        LiveWhy::ShutDown => "shut the virtual machine down, then",
        LiveWhy::WritableFiles => "nothing was changed; QEMU must be able to write these",
        LiveWhy::PicksUp => "if QEMU still runs, the job goes on, and the same command picks it up again",
        LiveWhy::AsItWas => "the chain is as it was; look for the reason (dmesg, QEMU's log), then again",
        LiveWhy::ValidImage => "which image is valid, and what to do",
        LiveWhy::JobWaits => "nothing is switched, and the job waits; again",
        LiveWhy::GiveUp => "or give it up",
        LiveWhy::ChainAsItIs => "see the chain as it is",
        LiveWhy::StartWithPort(port) => {
            return format!("start QEMU with -qmp tcp:127.0.0.1:{port},server=on,wait=off, then again");
        }
        LiveWhy::HeldBy(owner) => return format!("ask {}, which holds it", owner.name()),
        LiveWhy::NothingStarts(file) => {
            return format!("if nothing will start from {} again", printable(file));
        }
        LiveWhy::JobWorks(disk) => {
            return format!("a job works on {}; let it end, see how far it is", printable(disk));
        }
        LiveWhy::JobMayEnd(disk) => return format!("a job works on {}; let it end", printable(disk)),
        LiveWhy::MakeRoom(folder) => return format!("make room there (df -h {}), then again", word(folder)),
        LiveWhy::OnlyForActive => {
            return format!("leave {} out, or leave --top out; the chain", session.option_for_active());
        }
        _ => "",
    };
    text.to_owned()
}
