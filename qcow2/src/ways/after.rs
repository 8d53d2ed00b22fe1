//! Which ways lead on after an error. Nothing here reads the text of one.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::system::{after_failure, full, is_root, other_output};
use super::way::{Act, Allow, Asked, Task, Way, Why};
use super::{
    NamedBacking, can_be_flattened, can_be_repaired, folder, free_name, free_name_behind, holds_nothing,
    layer_down,
};
use crate::error::{Error, FileOp, Refusal, Role};
use crate::format::Container;
use crate::image::ImageFormat;
use crate::merge::{self, UnfinishedUp};
use crate::storage::OsHost;

/// What can be done after an error, the best first. What is named would succeed as things are, or its reason says what must be
/// put right before.
pub fn after(error: &Error, asked: &Asked<'_>) -> Vec<Way> {
    match error {
        Error::Io { path, op, source, .. } => after_failure(path, *op, source, asked),
        Error::Barrier { path, source } => after_failure(path, FileOp::Write, source, asked),
        Error::Unreadable { path, source, .. } => {
            let mut ways = after_failure(path, FileOp::Read, source, asked);
            ways.extend(salvage(asked));
            ways
        }
        Error::Format { path, .. } if merge::can_be_healed(&OsHost, path) => torn(path, asked),
        Error::Format { path, source } | Error::Mapping { path, source, .. } => {
            if source.is_unsupported() {
                unsupported(path, asked)
            } else {
                let mut ways = malformed(path, asked);
                ways.extend(salvage(asked).filter(|_| matches!(error, Error::Mapping { .. })));
                ways
            }
        }
        Error::Foreign { path, container } => foreign(path, *container, asked),
        Error::MissingLayer { image, role, resolved, source, .. } => {
            if source.kind() == io::ErrorKind::NotFound {
                missing(image, *role, resolved, asked)
            } else {
                after_failure(resolved, FileOp::Open, source, asked)
            }
        }
        Error::Refused { path, reason } => refused(path, reason, asked),
        // What those that hold it can be asked depends on what they are.
        Error::InUse { path, .. } => vec![match is_root() {
            true => Way::again(Why::HolderNotSeen(path.clone())),
            false => Way::to(Act::FindHolders(path.clone()), Why::WhoHolds),
        }],
        Error::NoSpace { path, .. } => vec![full(path)],
        Error::Cancelled => vec![Way::to(Act::GoOn, Why::NothingLost)],
        Error::Usage(_) => vec![layers(asked)],
        Error::Verify { path, .. } => {
            vec![Way::outside(Why::VerifyFailed), Way::to(Act::Check(path.clone()), Why::BaseAfterwards)]
        }
        Error::Broken { .. } => vec![Way::outside(Why::Broken)],
    }
}

/// The layers of the chain; or the image alone, where the chain would meet the same error again.
fn layers(asked: &Asked<'_>) -> Way {
    let image = asked.image.to_owned();
    let act = match asked.task {
        Task::Look | Task::Info => Act::Info(image),
        _ => Act::InfoChain(image),
    };
    Way::to(act, Why::Layers)
}

fn info(image: &Path, why: Why) -> Way {
    Way::to(Act::Info(image.to_owned()), why)
}

fn check(image: &Path, why: Why) -> Way {
    Way::to(Act::Check(image.to_owned()), why)
}

/// The chain of the named image as a new file, where there is a name for it.
fn flatten(why: Why, asked: &Asked<'_>) -> Option<Way> {
    let act = Act::Flatten { image: asked.image.to_owned(), output: free_name(asked.image)? };
    Some(Way::to(act, why))
}

/// The new file with zeros for what cannot be read.
fn salvage(asked: &Asked<'_>) -> Option<Way> {
    (asked.task == Task::Flatten).then(|| Way::allow(Allow::DataLoss, Why::ZerosForTheRest))
}

fn torn(path: &Path, asked: &Asked<'_>) -> Vec<Way> {
    let whole = match asked.task {
        Task::Commit | Task::Pull | Task::Rebase | Task::Relink => Act::InEarnest,
        _ => Act::Outside,
    };
    let why = match merge::unfinished_up(&OsHost, path, None).ok().flatten() {
        _ if asked.task == Task::Relink => Why::SameMakesWhole,
        Some(UnfinishedUp::Pull) => Why::MadeWholeByPull,
        Some(UnfinishedUp::Rebase(_)) => Why::MadeWholeByRebase,
        None => Why::MadeWhole,
    };
    vec![Way::to(whole, why), Way::to(Act::Abort(path.to_owned()), Why::GiveMergeUp)]
}

/// A merge that was stopped keeps another task from its images.
fn unfinished(path: &Path) -> Vec<Way> {
    let mut ways = vec![info(path, Why::WhatWasStopped)];
    let merge = merge::unfinished_merge(&OsHost, path, None).ok().flatten();
    // It names its images by where they lay.
    if let Some(merge) = merge.filter(|merge| fs::metadata(&merge.active).is_ok()) {
        ways.push(Way::to(finish(&merge.active, &merge.base, &merge.top, merge.removes), Why::Unfinished));
    }
    ways.push(Way::to(Act::Abort(path.to_owned()), Why::GiveUp));
    ways
}

fn finish(active: &Path, base: &Path, top: &Path, removes: bool) -> Act {
    let top = (top != active).then(|| top.to_owned());
    Act::Finish { active: active.to_owned(), base: base.to_owned(), top, removes }
}

fn unsupported(path: &Path, asked: &Asked<'_>) -> Vec<Way> {
    let qemu = Way::outside(Why::QemuReads(path.to_owned()));
    match asked.task {
        Task::Info => vec![qemu],
        _ => vec![info(path, Why::WhatItIs), qemu],
    }
}

/// A damaged image. What is damaged above cluster 0 can be repaired in part, and read as QEMU does.
fn malformed(path: &Path, asked: &Asked<'_>) -> Vec<Way> {
    let restore = Way::outside(Why::Restore(path.to_owned()));
    match asked.task {
        Task::Check => vec![restore],
        Task::Info => vec![check(path, Why::Damage), restore],
        _ => vec![restore, check(path, Why::Damage)],
    }
}

/// An image that must be repaired before it is written. What a repair cannot mend may still be read.
fn damaged(path: &Path, asked: &Asked<'_>) -> Vec<Way> {
    if can_be_repaired(path) {
        return vec![Way::to(Act::Repair(path.to_owned()), Why::RepairFirst)];
    }
    let mut ways = vec![Way::outside(Why::Unmendable(path.to_owned())), check(path, Why::Damage)];
    if can_be_flattened(asked.image) {
        ways.extend(flatten(Why::SaveReadable, asked));
    }
    ways
}

/// A file of a format that is not read here.
fn foreign(path: &Path, container: Container, asked: &Asked<'_>) -> Vec<Way> {
    let elsewhere = match container.packer() {
        Some(packer) => Why::Packed(Some(packer)),
        None if container.is_machine_state() => Why::MachineState,
        None if ImageFormat::from_name(container.name()).is_some() => Why::OtherFormat,
        None => Why::Packed(None),
    };
    let mut ways = vec![Way::outside(elsewhere)];
    if path == asked.image && !asked.states_format {
        ways.push(Way::allow(Allow::Raw, Why::PerhapsRaw));
    } else if asked.task == Task::Rebase && path != asked.image && !asked.states_new_format {
        ways.push(Way::allow(Allow::NewRaw, Why::PerhapsRaw));
    } else if asked.task == Task::Commit {
        ways.push(Way::to(Act::InfoChain(asked.image.to_owned()), Why::LayersAbove));
    }
    ways
}

/// A file that an image names is not there.
fn missing(image: &Path, role: Role, resolved: &Path, asked: &Asked<'_>) -> Vec<Way> {
    let resolved = resolved.to_owned();
    if asked.task == Task::Relink && image == asked.image && role == Role::DataFile {
        return vec![Way::outside(Why::NoDataFileThere(resolved))];
    }
    if asked.task == Task::Relink && image == asked.image {
        return vec![
            Way::outside(Why::NoFileOfNewName(resolved)),
            Way::to(Act::ListFolder(folder(image)), Why::FilesThere),
        ];
    }
    if role == Role::DataFile {
        return vec![Way::outside(Why::DataMissing(resolved))];
    }
    let Some(backing) = NamedBacking::of(image) else { return vec![Way::outside(Why::Missing(resolved))] };
    match backing.moved(image) {
        Some(found) => {
            let (image, name, format) = (image.to_owned(), found.name, found.format);
            let act = Act::Relink { image, name, format, trust: true };
            vec![Way::outside(Why::Missing(resolved)), Way::to(act, Why::Moved(found.path))]
        }
        None => vec![Way::outside(Why::MissingOrMoved(resolved)), Way::again(Why::ThereAgain)],
    }
}

fn refused(path: &Path, reason: &Refusal, asked: &Asked<'_>) -> Vec<Way> {
    let here = || path.to_owned();
    let one = |way: Way| vec![way];
    match reason {
        Refusal::SharedBase { users } | Refusal::PossiblyShared { users } => shared(users, asked),
        Refusal::NotProved { .. } => one(Way::allow(Allow::Unproved, Why::IsRightFile)),
        Refusal::MissingFormat { .. } if is_new_name(path, asked) => one(Way::outside(Why::SayFormat)),
        Refusal::FormatMismatch { .. } if is_new_name(path, asked) => {
            vec![Way::outside(Why::OtherFormatOfNewName), info(path, Why::WhatItIs)]
        }
        Refusal::Loop { .. } if asked.task == Task::Relink => one(Way::outside(Why::NewNameReadsThrough)),
        Refusal::MissingFormat { .. } => one(missing_format(path)),
        Refusal::FormatMismatch { .. } => mismatch(path, asked),
        Refusal::NotLocal { role, .. } | Refusal::NotAFile { role, .. } => {
            one(Way::outside(Why::CopyHere(*role)))
        }
        Refusal::OutsideAllowed { file } => one(Way::allow(Allow::Folders(vec![folder(file)]), Why::Trusted)),
        Refusal::Loop { .. } if asked.task == Task::Rebase => {
            one(Way::to(Act::InfoChain(here()), Why::ReadsThrough))
        }
        Refusal::Loop { .. } => one(info(path, Why::WrongName)),
        Refusal::Snapshots { .. } => vec![
            Way::outside(Why::DeleteSnapshots),
            info(path, Why::SnapshotNames),
            Way::allow(Allow::SnapshotChange, Why::AcceptChange),
        ],
        Refusal::Bitmaps { .. } => one(Way::allow(Allow::BitmapLoss, Why::NoBackupNeedsBitmaps)),
        Refusal::TornHeader | Refusal::TornTables => torn(path, asked),
        Refusal::UnfinishedMerge { .. } => unfinished(path),
        Refusal::Dirty | Refusal::CorruptBit | Refusal::Inconsistent { .. } => damaged(path, asked),
        Refusal::HeaderRoom { .. } => [Some(Way::outside(Why::ShorterName)), flatten(Why::NewFile, asked)]
            .into_iter()
            .flatten()
            .collect(),
        Refusal::NotWritable { kind, .. } => {
            after_failure(path, FileOp::Open, &io::Error::from(*kind), asked)
        }
        Refusal::NoLocks => one(Way::allow(Allow::NoLocks, Why::NobodyUsesImages)),
        Refusal::JournalPlace { .. } => one(Way::outside(Why::LastingFolder)),
        Refusal::Stranger { file, .. } => vec![
            Way::outside(Why::AskOwner(file.clone())),
            Way::again(Why::Then),
            Way::outside(Why::OwnJournalFolder),
        ],
        Refusal::InTheWay { file, .. } => {
            let away = match free_name_behind(file) {
                Some(to) => Way::to(Act::MoveAway { file: file.clone(), to }, Why::NothingNeedsIt),
                None => Way::outside(Why::MoveAway),
            };
            vec![away, Way::again(Why::Then), Way::outside(Why::OtherJournalFolder)]
        }
        Refusal::MergedDataLost => one(Way::outside(Why::OnlyAsItWas(here()))),
        Refusal::DataFileOwner { file } => {
            one(Way::allow(Allow::Folders(vec![folder(path), folder(file)]), Why::IsItsData))
        }
        Refusal::BackupOwner { file, .. } => one(Way::outside(Why::CopyOfBackup(file.clone()))),
        Refusal::WrittenSince { .. } => vec![
            Way::allow(Allow::Restart, Why::OnlyOpened(here())),
            Way::to(Act::Abort(here()), Why::OrGiveUp),
        ],
        Refusal::JournalVersion { .. } => one(Way::outside(Why::OtherVersion)),
        Refusal::JournalOfAnother { .. } => one(Way::outside(Why::AllAsItWas)),
        Refusal::JournalOfRenamed { journal, image, wanted } => {
            let rename = Act::RenameJournal { journal: journal.clone(), to: wanted.clone() };
            let mut ways = one(Way::to(rename, Why::JournalIsOf(image.clone())));
            if asked.task == Task::Commit {
                ways.push(Way::allow(Allow::Restart, Why::NotToGoOn));
            }
            ways
        }
        Refusal::MergedBefore { .. } => {
            [Some(layers(asked)), flatten(Why::ShownByChain, asked)].into_iter().flatten().collect()
        }
        Refusal::TwoChains { real, .. } => one(Way::to(Act::InfoChain(real.clone()), Why::ChainOfFile)),
        Refusal::MergeDone { top, active, removes } => {
            one(Way::to(finish(active, path, top, *removes), Why::Unfinished))
        }
        Refusal::BackupDamaged { .. } => {
            vec![Way::outside(Why::TakeCopy(here())), check(asked.image, Why::HowImageIs)]
        }
        Refusal::OtherImage { .. } => {
            vec![Way::outside(Why::NameThatImage), Way::allow(Allow::Copy, Why::IsCopy(here()))]
        }
        Refusal::WrittenSinceRepair { .. } => one(check(path, Why::BackupOutdated)),
        Refusal::TooDeep { limit } => one(too_deep(*limit, asked)),
        Refusal::DeviceIsThere => one(Way::allow(Allow::OverDevice, Why::NobodyNeedsDevice)),
        Refusal::Exists => one(other_output(path)),
        _ => one(layers(asked)),
    }
}

/// Whether what is wrong with the names of an image is wrong with the new ones that were asked for, and not with its header.
fn is_new_name(path: &Path, asked: &Asked<'_>) -> bool {
    asked.task == Task::Relink && path == asked.image
}

/// Others use base. An empty overlay may be a new disk of another machine, or what a merge of QEMU's has left: only the user can
/// tell.
fn shared(users: &[PathBuf], asked: &Asked<'_>) -> Vec<Way> {
    let hold_nothing = users.iter().all(|user| holds_nothing(user));
    let allowed = Way::allow(Allow::SharedBase, Why::NobodyNeedsUsers { hold_nothing });
    let ways = [flatten(Why::OwnFile, asked), Some(allowed), plain_name(asked)];
    ways.into_iter().flatten().collect()
}

/// A plain backing name for the named image, whose `json:` name repeats what lies below: that stays true in its header.
fn plain_name(asked: &Asked<'_>) -> Option<Way> {
    let backing = NamedBacking::of(asked.image).filter(NamedBacking::states_more)?;
    let format = backing.detected().filter(|found| *found == ImageFormat::Qcow2)?;
    let name = fs::canonicalize(&backing.path).ok()?.into();
    let act = Act::Relink { image: asked.image.to_owned(), name, format, trust: false };
    Some(Way::to(act, Why::NameSaysMore))
}

/// A backing name without a format: what the file's first bytes say can only be offered.
fn missing_format(image: &Path) -> Way {
    let found = NamedBacking::of(image).and_then(|backing| Some((backing.detected()?, backing)));
    let Some((format, backing)) = found else { return Way::outside(Why::SayFormat) };
    let why = match format {
        ImageFormat::Raw => Why::PlainDisk,
        format => Why::FirstBytesSay(format),
    };
    Way::allow(Allow::BackingFormat { name: backing.written, format }, why)
}

/// A stated format that the file contradicts.
fn mismatch(image: &Path, asked: &Asked<'_>) -> Vec<Way> {
    let Some(backing) = NamedBacking::of(image) else { return vec![layers(asked)] };
    if fs::metadata(&backing.path).is_ok_and(|meta| meta.is_file() && meta.len() == 0) {
        return vec![Way::outside(Why::EmptyFile(backing.path)), Way::again(Why::Then)];
    }
    let is_named = |found: &ImageFormat| ImageFormat::from_name(found.name()).is_some();
    let found = backing.detected().filter(|found| *found != ImageFormat::Raw && is_named(found));
    let Some(format) = found else { return vec![Way::outside(Why::LostHeader(backing.path))] };
    let (image, name) = (image.to_owned(), backing.written.clone());
    let relink = Act::Relink { image, name, format, trust: true };
    let relink = Way::to(relink, Why::FindOutWhoWrote(backing.path, format));
    // A word that was given already has not helped: the image itself must say it.
    if backing.declared.as_deref() != Some("raw") || asked.states_backing_format {
        return vec![relink];
    }
    let raw = Allow::BackingFormat { name: backing.written, format: ImageFormat::Raw };
    vec![Way::allow(raw, Why::GuestWrote), relink]
}

fn too_deep(limit: usize, asked: &Asked<'_>) -> Way {
    match layer_down(asked.image, limit / 2).filter(|_| asked.task == Task::Commit) {
        Some(layer) => Way::to(Act::MergeLower(layer), Why::TooDeep),
        None => info(asked.image, Why::LayerBelow),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::Errno;

    fn after_commit(error: &Error) -> Vec<Way> {
        let image = Path::new("no such disk.qcow2");
        let (states_format, states_backing_format, states_new_format) = (false, false, false);
        after(
            error,
            &Asked { task: Task::Commit, image, states_format, states_backing_format, states_new_format },
        )
    }

    #[test]
    fn refusals_name_what_allows_them() {
        for (reason, allow) in [
            (Refusal::SharedBase { users: vec!["d.qcow2".into()] }, Allow::SharedBase),
            (Refusal::Snapshots { count: 1 }, Allow::SnapshotChange),
            (Refusal::Bitmaps { names: vec!["b0".into()] }, Allow::BitmapLoss),
            (Refusal::OutsideAllowed { file: "/srv/x.raw".into() }, Allow::Folders(vec!["/srv".into()])),
        ] {
            let ways = after_commit(&Error::refused(Path::new("b.qcow2"), reason));
            assert!(ways.iter().any(|way| way.act == Act::Allow(allow.clone())), "{ways:?}");
        }
    }

    #[test]
    fn what_is_no_lost_name_advises_no_new_one() {
        for (role, errno) in [
            (Role::BackingFile, Errno::MFILE),
            (Role::BackingFile, Errno::ACCESS),
            (Role::BackingFile, Errno::NOSPC),
            (Role::BackingFile, Errno::IO),
            (Role::DataFile, Errno::NOENT),
        ] {
            let (image, name, resolved) = ("c.qcow2".into(), "b.qcow2".into(), "b.qcow2".into());
            let ways =
                after_commit(&Error::MissingLayer { image, role, name, resolved, source: errno.into() });
            let relinks = ways.iter().any(|way| matches!(way.act, Act::Relink { .. }));
            assert!(!ways.is_empty() && !relinks, "{role} {errno}: {ways:?}");
        }
    }

    #[test]
    fn a_missing_file_points_at_its_folder() {
        let error = Error::io(Path::new("x.qcow2"), FileOp::Open, None, io::ErrorKind::NotFound.into());
        assert_eq!(after_commit(&error), [Way::to(Act::ListFolder(".".into()), Why::FilesThere)]);
    }
}
