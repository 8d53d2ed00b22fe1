//! Which ways lead on after a failure. Nothing here reads the text of one.

use std::io::ErrorKind;

use qcow2::ways::folder;

use super::{LiveAct as Act, LiveTask, LiveWay, LiveWhy as Why, Value, Wanted, Wish};
use crate::block::graph::Disk;
use crate::error::{Error, Refusal};
use crate::live::Hindrance;
use crate::live::counterpart::StoppedMerge;
use crate::live::plan::Request;
use crate::live::run::{AfterFailure, Stopped};
use crate::qmp::address::Address;
use crate::qmp::owner::Owner;

fn one(act: Act, why: Why) -> Vec<LiveWay> {
    vec![LiveWay::to(act, why)]
}

/// What can be done after a failure, the best first.
pub fn after(error: &Error, wanted: &Wanted<'_>) -> Vec<LiveWay> {
    let is_merge = matches!(wanted.task, LiveTask::Commit(_) | LiveTask::Pull(_) | LiveTask::End(_));
    match error {
        Error::Connect { source, .. } => unreachable(source.kind(), wanted.address),
        Error::NoGreeting { .. } => match Owner::of(wanted.address, None) {
            Some(owner) => one(Act::AskOwner(owner), Why::HeldBy(owner)),
            None => one(Act::Again, Why::OtherClient),
        },
        Error::NoSuchDisk { .. } | Error::Layer { .. } => one(Act::List, Why::Plain),
        Error::Disconnected { .. } => {
            let mut ways = one(Act::Jobs, Why::JobsGoOn);
            ways.extend(is_merge.then(|| LiveWay::to(Act::Recover(None), Why::WhichImage)));
            ways
        }
        Error::Command { .. } if wanted.task == LiveTask::Snapshot => one(Act::List, Why::WritableFolders),
        Error::Job { .. } | Error::TimedOut { .. } | Error::Unreadable { .. } | Error::Command { .. } => {
            one(Act::Jobs, Why::HowItStands)
        }
        Error::File { file, source } => match (source.kind(), qcow2::ways::limit(source)) {
            (_, Some(limit)) => one(Act::Again, Why::OpenFiles(limit)),
            (ErrorKind::PermissionDenied, _) => one(Act::ListRights(file.clone()), Why::WhoMay),
            _ => one(Act::Outside, Why::SystemsReason),
        },
        Error::State { path, .. } => one(Act::ListAll(folder(path)), Why::NotesMerge),
        Error::Managed { .. } => one(Act::AskOwner(Owner::Libvirt), Why::Plain),
        Error::NotFlushed { exports: true, .. } => one(Act::Give(&[Value::NbdSocket]), Why::NbdServer),
        Error::NotFlushed { exports: false, .. } => one(Act::Outside, Why::MergeWhole),
        Error::BackingName { takes_another: true, .. } => {
            one(Act::Give(&[Value::BackingName]), Why::NameOfBase)
        }
        Error::BackingName { takes_another: false, .. } => one(Act::WithoutName, Why::WithoutName),
        Error::Refused { reason: Refusal::NoStateFound { .. } } => {
            let mut ways = one(Act::Give(&[Value::StateFolder]), Why::FolderOfMerge);
            if let LiveTask::End(disk) = wanted.task {
                ways.push(LiveWay::to(Act::Cancel(disk.to_owned()), Why::StateLost));
            }
            ways
        }
        Error::Refused { .. } if is_merge => one(Act::Jobs, Why::HowThingsStand),
        Error::Hindered(hindrance) => hindered(hindrance, wanted),
        _ => one(Act::Help, Why::Plain),
    }
}

fn unreachable(kind: ErrorKind, address: &Address) -> Vec<LiveWay> {
    match (address, kind) {
        (Address::Tcp { port, .. }, _) => one(Act::Again, Why::StartWithPort(*port)),
        (Address::Unix(path), ErrorKind::NotFound) => {
            one(Act::ListFolder(folder(path)), Why::QemuMakesSocket)
        }
        (_, ErrorKind::PermissionDenied) => one(Act::AgainAsRoot, Why::AsRoot),
        _ => one(Act::Outside, Why::WhoListens),
    }
}

fn hindered(hindrance: &Hindrance, wanted: &Wanted<'_>) -> Vec<LiveWay> {
    let with = |wish, why| LiveWay::to(Act::With(wish), why);
    match hindrance {
        Hindrance::Bitmaps { .. } => vec![with(Wish::BitmapLoss, Why::NoBackupNeedsBitmaps)],
        Hindrance::Snapshots { file, .. } => vec![
            with(Wish::SnapshotChange, Why::NobodyNeedsSnapshots),
            LiveWay::to(Act::Snapshots(file.clone()), Why::SnapshotNames),
        ],
        Hindrance::Plaintext { .. } => vec![with(Wish::Plaintext, Why::Meant)],
        Hindrance::StaleActive { file, .. } => {
            let mut ways = vec![with(Wish::Stale, Why::NothingStarts(file.clone()))];
            ways.extend((!wanted.deletes).then(|| with(Wish::Removal, Why::Removed)));
            ways
        }
        Hindrance::NotHere { .. } => {
            one(Act::Give(&[Value::BackingName, Value::StateFolder]), Why::QemuElsewhere)
        }
        Hindrance::JobExists { disk, .. } => end_first(disk),
        Hindrance::UnderWay { merge } => {
            let end = Act::End { disk: merge.disk.clone(), pivots: merge.merges_active() };
            vec![LiveWay::to(end, Why::JobMayEnd(merge.disk.clone())), cancel(&merge.disk)]
        }
        Hindrance::NoSpace { folder, .. } => one(Act::Again, Why::MakeRoom(folder.clone())),
        Hindrance::SharedBase { .. } => shared(Why::NobodyNeedsImages, wanted),
        Hindrance::SharedInside { .. } => shared(Why::NobodyNeedsNode, wanted),
        Hindrance::NotSearched { .. } => one(Act::Again, Why::SearchFolders),
        Hindrance::NoStateFolder { .. } | Hindrance::StateOfAnother { .. } => {
            one(Act::Give(&[Value::StateFolder]), Why::LastingFolder)
        }
        Hindrance::RecoverFirst { unfinished } => {
            one(Act::Recover(Some(unfinished.disk.clone())), Why::Plain)
        }
        Hindrance::ActiveNotAskedFor { below, .. } => {
            let mut ways = vec![with(Wish::Active, Why::Plain)];
            ways.extend(below.map(|below| LiveWay::to(Act::BelowActive(below), Why::LeaveOut)));
            ways
        }
        Hindrance::OnlyForActive { .. } => {
            let look = match wanted.task {
                LiveTask::Commit(disk) => Act::Chain(disk.to_owned()),
                _ => Act::List,
            };
            one(look, Why::OnlyForActive)
        }
        Hindrance::NotSlowed { .. } => one(Act::Outside, Why::NotSlowed),
    }
}

/// Others use a layer that would change: a merge up leaves it.
fn shared(why: Why, wanted: &Wanted<'_>) -> Vec<LiveWay> {
    let mut ways = Vec::new();
    if let LiveTask::Commit(disk) = wanted.task {
        ways.push(LiveWay::to(Act::Pull(disk.to_owned()), Why::TakeUp));
    }
    ways.push(LiveWay::to(Act::With(Wish::SharedBase), why));
    ways
}

/// A job of this disk is to end first.
pub fn end_first(disk: &str) -> Vec<LiveWay> {
    vec![LiveWay::to(Act::Jobs, Why::JobWorks(disk.to_owned())), cancel(disk)]
}

fn cancel(disk: &str) -> LiveWay {
    LiveWay::to(Act::Cancel(disk.to_owned()), Why::WithoutEffect)
}

/// The same of a merge that cannot be planned. Where QEMU would do it wrong, a stopped machine's can be merged, perhaps.
pub fn unplanned(error: &Error, disk: &Disk, request: &Request, wanted: &Wanted<'_>) -> Vec<LiveWay> {
    match error {
        Error::Layer { .. } => one(Act::Chain(disk.name().to_owned()), Why::LayerNames),
        Error::Refused { .. } => match StoppedMerge::of_request(disk, request) {
            Some(merge) => one(Act::Offline(merge), Why::ShutDown),
            None => after(error, wanted),
        },
        _ => after(error, wanted),
    }
}

/// The same of a merge that QEMU did not begin, for which it must be able to write these files.
pub fn not_begun(error: &Error, written: &[String], wanted: &Wanted<'_>) -> Vec<LiveWay> {
    match error {
        Error::Command { .. } => vec![
            LiveWay::to(Act::ListFiles(written.to_vec()), Why::WritableFiles),
            LiveWay::to(Act::Again, Why::Then),
        ],
        _ => after(error, wanted),
    }
}

/// The same of a merge that was begun and did not come to its end.
pub fn stopped(stopped: &Stopped, wanted: &Wanted<'_>) -> Vec<LiveWay> {
    match stopped {
        Stopped::Other(error) => after(error, wanted),
        Stopped::Lost(_) => {
            vec![LiveWay::to(Act::Again, Why::PicksUp), LiveWay::to(Act::Recover(None), Why::WhichImage)]
        }
        Stopped::Failed { merge, error, after: how } => match how {
            AfterFailure::AsItWas => one(Act::Again, Why::AsItWas),
            AfterFailure::InDoubt => one(Act::Recover(Some(merge.disk.clone())), Why::ValidImage),
            AfterFailure::Waiting => vec![
                LiveWay::to(Act::Again, Why::JobWaits),
                LiveWay::to(Act::Cancel(merge.disk.clone()), Why::GiveUp),
            ],
            AfterFailure::Unknown => after(error, wanted),
        },
        Stopped::Vanished { merge } => one(Act::Chain(merge.disk.clone()), Why::ChainAsItIs),
        Stopped::EndedByAnother { disk } => one(Act::Chain(disk.clone()), Why::ChainAsItIs),
        Stopped::GivenUp { .. } => one(Act::Again, Why::Plain),
    }
}
