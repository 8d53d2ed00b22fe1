//! Which layers a request means.

use std::path::{Path, PathBuf};

use qcow2::image::Qcow2;
use qcow2::storage::{Access, Host, OsHost};

use super::Request;
use crate::block::graph::{Disk, Layer, Range};
use crate::error::Result;
use crate::live::hindrance::Hindrance;

/// The layers of a commit. `None` if the disk has only one, so that nothing is left to merge.
pub(super) fn of_commit<'d>(disk: &'d Disk, request: &Request) -> Result<Option<Range<'d>>> {
    let top = request.top.as_ref().map_or(Ok(disk.active()), |name| disk.layer(name))?;
    let bottom = disk.layers().last().unwrap_or(disk.active());
    let base = match &request.base {
        Some(base) => disk.layer(base)?,
        None if request.shallow => disk.below(top).unwrap_or(bottom),
        None => bottom,
    };
    if disk.layers().len() == 1 && base == top {
        return Ok(None);
    }
    let range = disk.range(base, top)?;
    if range.above.is_none() && !request.allows_active() {
        let below = disk.below(top).filter(|below| below.index > 1 && request.top.is_none());
        let below = below.map(|below| below.index);
        return Err(Hindrance::ActiveNotAskedFor { index: top.index, file: top.file.clone(), below }.into());
    }
    if range.above.is_some() && (request.pivot || request.keep_overlay || request.converge) {
        return Err(Hindrance::OnlyForActive { active: disk.active().index, top: top.index }.into());
    }
    Ok(Some(range))
}

/// The layer that stays below the active one of a pull. `None` in the outer option if nothing lies between: there is nothing
/// to pull then.
pub(super) fn base_of_pull<'d>(disk: &'d Disk, request: &Request) -> Result<Option<Option<&'d Layer>>> {
    let base = request.base.as_ref().map(|name| disk.layer(name)).transpose()?;
    let bottom = base.map_or(0, |base| base.index);
    Ok((bottom + 1 < disk.active().index || bottom >= disk.active().index).then_some(base))
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
