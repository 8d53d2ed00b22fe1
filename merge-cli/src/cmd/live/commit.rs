//! `qmerge live commit`: layers of a disk merged down into a base, while the guest runs.

use std::path::{Path, PathBuf};

use qcow2::image::Qcow2;
use qcow2::storage::{Access, Host, OsHost};
use qmp_client::{Disk, Layer, MergeOptions, Procedure, Range};

use super::plan::{End, Plan};
use super::siblings::{self, Searched};
use super::trouble::Session;
use super::{checks, estimate, files::Files, obstacle};
use crate::cli::LiveCommitArgs;
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::output::human::{printable, shell_word};

/// The layers that are meant. `None` if the disk has only one, so that nothing is left to merge.
pub(super) fn range<'d>(
    session: &Session<'_>,
    disk: &'d Disk,
    args: &LiveCommitArgs,
) -> Result<Option<Range<'d>>, Failure> {
    let named = |name: &String| disk.layer(name).map_err(|e| session.layer(&e, disk));
    let top = args.top.as_ref().map_or(Ok(disk.active()), named)?;
    let bottom = disk.layers().last().unwrap_or(disk.active());
    let base = match &args.base {
        Some(base) => named(base)?,
        None if args.shallow => disk.below(top).unwrap_or(bottom),
        None => bottom,
    };
    if disk.layers().len() == 1 && base == top {
        return Ok(None);
    }
    let range = disk.range(base, top).map_err(|e| session.layer(&e, disk))?;
    if range.above.is_none() && !args.allows_active() {
        return Err(not_without_active(session, disk, top, args));
    }
    if let (Some(_), Some(option)) = (range.above, option_for_active(args)) {
        return Err(only_for_active(session, disk, top, option));
    }
    Ok(Some(range))
}

/// Where a file was merged to that is in the chain no more, if its mark says so.
pub(super) fn merged_before(disk: &Disk, top: &str) -> Option<PathBuf> {
    if disk.layer(top).is_ok() {
        return None;
    }
    let path = Path::new(top);
    let file = OsHost.open(path, Access::Read).ok()?;
    Qcow2::read_cluster0(path, &*file).ok()?.merged_into()
}

fn option_for_active(args: &LiveCommitArgs) -> Option<&'static str> {
    let given =
        [(args.pivot, "--pivot"), (args.keep_overlay, "--keep-overlay"), (args.converge, "--converge")];
    given.into_iter().find_map(|(given, option)| given.then_some(option))
}

fn not_without_active(session: &Session<'_>, disk: &Disk, top: &Layer, args: &LiveCommitArgs) -> Failure {
    let below = disk.below(top).filter(|below| below.index > 1 && args.top.is_none());
    let without = below.map_or(String::new(), |below| {
        format!("; or leave that layer out: {}", session.again_with(&format!("--top '[{}]'", below.index)))
    });
    Report {
        kind: "usage",
        message: format!(
            "[{}] {} is the active layer, which the guest writes to; it is merged only with --active",
            top.index,
            printable(&top.file)
        ),
        hint: format!("{}{without}", session.again_with("--active --pivot")).into(),
        exit: Exit::USAGE,
    }
    .into()
}

fn only_for_active(session: &Session<'_>, disk: &Disk, top: &Layer, option: &str) -> Failure {
    Report {
        kind: "usage",
        message: format!(
            "{option} is for the active layer [{}], and [{}] is a layer below it",
            disk.active().index,
            top.index
        ),
        hint: format!(
            "leave {option} out, or leave --top out; the chain: {}",
            session.other(&format!("chain {}", word(disk)))
        )
        .into(),
        exit: Exit::USAGE,
    }
    .into()
}

/// What happens when all is copied.
pub(super) fn end(merges_active: bool, args: &LiveCommitArgs) -> End {
    match merges_active {
        false if args.job.async_ => End::WaitForFinish,
        false => End::Finish,
        true if args.pivot => End::Pivot,
        true if args.keep_overlay => End::KeepOverlay,
        true => End::Ready,
    }
}

/// Plans the merge, and refuses what this host sees to be harmful or futile.
pub(super) fn plan(
    session: &Session<'_>,
    files: &Files,
    disk: &Disk,
    range: &Range<'_>,
    args: &LiveCommitArgs,
) -> Result<(Procedure, Plan), Failure> {
    let is_merged = |layer: &&Layer| layer.index > range.base.index && layer.index <= range.top.index;
    let merged: Vec<Layer> = disk.layers().iter().filter(is_merged).cloned().collect();
    checks::bitmaps(session, &merged, args.drop_bitmaps)?;
    checks::same_files(session, files, disk, args.backing_file.is_some() || args.job.state_dir.is_some())?;
    let options = MergeOptions {
        backing_file: args.backing_file.clone(),
        speed: args.job.bandwidth.unwrap_or(0),
        drop_bitmaps: args.drop_bitmaps,
        nbd_socket: args.job.nbd_socket.clone().or_else(|| files.nbd_server()),
    };
    let commit = Procedure::commit(disk, range, options).map_err(|e| session.unplanned(&e, disk, range))?;
    let touched: Vec<&Layer> = merged.iter().chain([range.base]).collect();
    checks::plaintext(session, &merged, range.base, args.allow_plaintext)?;
    let searched: Searched =
        siblings::search(session, files, disk, &touched, &args.scan, args.allow_shared_base)?;
    let leaves = obstacle::of_merged(files, disk, range.base, &merged, &searched.users, args.no_lock);
    let end = end(range.above.is_none(), args);
    if end != End::KeepOverlay && range.above.is_none() && !args.allow_stale {
        checks::old_active(session, &leaves, args.delete)?;
    }
    let plan = Plan {
        disk: disk.clone(),
        job: commit.job_id().to_owned(),
        pull: false,
        base: Some(range.base.clone()),
        relink: range.above.map(|above| (above.clone(), commit.backing_file().map(str::to_owned))),
        end,
        delete: args.delete,
        leaves,
        amounts: estimate::amounts(disk, files, &merged, range.base),
        room: estimate::free_space(files, range.base),
        searched,
        commands: commit.commands().map_err(|e| session.failure(&e))?,
        merged,
    };
    Ok((commit, plan))
}

fn word(disk: &Disk) -> String {
    shell_word(disk.name())
}
