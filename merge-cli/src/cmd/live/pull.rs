//! `qmerge live pull`: layers of a disk merged up into the active one, while the guest runs.

use qmp_client::{Disk, Layer, MergeOptions, Procedure};

use super::estimate::Amounts;
use super::plan::{End, Plan};
use super::siblings::Searched;
use super::trouble::Session;
use super::{checks, estimate, files::Files};
use crate::cli::PullArgs;
use crate::failure::Failure;

/// The layer that stays below the active one. `None` in the outer option if nothing lies between: there is
/// nothing to pull then.
pub(super) fn base<'d>(
    session: &Session<'_>,
    disk: &'d Disk,
    args: &PullArgs,
) -> Result<Option<Option<&'d Layer>>, Failure> {
    let base = match &args.base {
        Some(name) => Some(disk.layer(name).map_err(|e| session.layer(&e, disk))?),
        None => None,
    };
    let bottom = base.map_or(0, |base| base.index);
    Ok((bottom + 1 < disk.active().index || bottom >= disk.active().index).then_some(base))
}

/// Plans the pull, and refuses what this host sees to be harmful or futile.
pub(super) fn plan(
    session: &Session<'_>,
    files: &Files,
    disk: &Disk,
    base: Option<&Layer>,
    args: &PullArgs,
) -> Result<(Procedure, Plan), Failure> {
    let options = MergeOptions {
        backing_file: args.backing_file.clone(),
        speed: args.job.bandwidth.unwrap_or(0),
        // Those of the layers that are left are asked about below, with the option that allows it.
        drop_bitmaps: true,
        nbd_socket: args.job.nbd_socket.clone().or_else(|| files.nbd_server()),
    };
    let pull = Procedure::pull(disk, base, options).map_err(|e| session.layer(&e, disk))?;
    checks::bitmaps(session, pull.merged(), args.drop_bitmaps)?;
    checks::plaintext(session, pull.merged(), disk.active(), args.allow_plaintext)?;
    checks::same_files(session, files, disk, args.backing_file.is_some() || args.job.state_dir.is_some())?;
    let plan = Plan {
        disk: disk.clone(),
        job: pull.job_id().to_owned(),
        pull: true,
        base: base.cloned(),
        merged: pull.merged().to_vec(),
        relink: Some((disk.active().clone(), pull.backing_file().map(str::to_owned))),
        end: if args.job.async_ { End::WaitForFinish } else { End::Finish },
        delete: false,
        leaves: Vec::new(),
        // Zeros stay what no layer has, or take no room.
        amounts: Amounts { zero: 0, ..estimate::amounts(disk, files, pull.merged(), disk.active()) },
        room: estimate::free_space(files, disk.active()),
        searched: Searched::default(),
        commands: pull.commands().map_err(|e| session.failure(&e))?,
    };
    Ok((pull, plan))
}
