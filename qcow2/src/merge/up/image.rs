//! The image that takes data: opened, judged, and whether there is room in it.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use super::UpOptions;
use crate::chain::{Chain, Layer, OpenOptions, new_backing_name};
use crate::error::{Error, FileOp, Refusal, Result};
use crate::format::{plan_backing_removal, plan_backing_switch};
use crate::image::rewrite::{header_error, read_cluster, rewrite_error};
use crate::image::{Qcow2, grow};
use crate::merge::resume::torn::{refuse_torn_header, refuse_torn_tables};
use crate::merge::resume::unfinished_work::UnfinishedWork;
use crate::merge::resume::work::Work;
use crate::merge::safety;
use crate::storage::{Access, FileId, FileKind, Host};
use crate::transfer::Totals;

/// Opens and locks a chain; `written` is the file of it that is written, if one is. `judge` sees it before it is locked.
///
/// # Errors
/// [`Refusal::TornHeader`], [`Refusal::ChainChanged`], [`Refusal::TwoChains`]; what [`Chain::open`] reports; what `judge`
/// does.
pub(in crate::merge) fn open(
    host: &dyn Host,
    path: &Path,
    options: &OpenOptions,
    written: Option<FileId>,
    dir: Option<&Path>,
    judge: impl FnOnce(&Chain) -> Result<()>,
) -> Result<Chain> {
    let unlocked = OpenOptions { lock: false, ..options.clone() };
    let scout = Chain::open_after(host, path, &unlocked, &|path| refuse_torn_header(host, path, dir))?;
    judge(&scout)?;
    let files = scout.files();
    drop(scout);
    let access = written.map(|id| (id, Access::ReadWrite)).into_iter().collect();
    let chain = Chain::open(host, path, &OpenOptions { lock: true, access, ..options.clone() })?;
    if chain.files() != files {
        return Err(Error::refused(path, Refusal::ChainChanged));
    }
    safety::one_chain(host, &chain)?;
    Ok(chain)
}

/// What a pull or a rebase that was stopped has left in the last image of a chain, which is read under its journal from here
/// on. A merge that was stopped in the chain must be finished first: its journal tells what its layers hold.
///
/// # Errors
/// [`Refusal::UnfinishedMerge`], [`Refusal::TornTables`]; [`Error::InUse`]; the system's.
pub(in crate::merge) fn unfinished(
    host: &dyn Host,
    chain: &mut Chain,
    dir: Option<&Path>,
) -> Result<Option<(UnfinishedWork, Option<Work>)>> {
    let at = chain.active();
    refuse_torn_tables(host, chain.layers().get(..at).unwrap_or_default(), dir)?;
    let mut found = refuse_merges(host, chain, dir)?;
    let Some(work) = found.pop().flatten() else { return Ok(None) };
    let taken_up = match work.is_ours() {
        true => Some(work.take_up(host, chain.image_at(at)?, false)?),
        false => None,
    };
    Ok(Some((work, taken_up)))
}

/// Refuses a merge that was stopped in a chain; gives what else is unfinished in each of its layers, the bottom first.
///
/// # Errors
/// As [`unfinished`].
pub(in crate::merge) fn refuse_merges(
    host: &dyn Host,
    chain: &Chain,
    dir: Option<&Path>,
) -> Result<Vec<Option<UnfinishedWork>>> {
    let judge = |layer: &Layer| {
        let Some(work) = UnfinishedWork::find(host, layer, dir)? else { return Ok(None) };
        work.refuse_renamed(host, &layer.path)?;
        // A pull or a rebase of a layer has not changed what that shows.
        if work.is_ours() && !work.purpose().is_up() {
            let percent = work.percent();
            return Err(Error::refused(&layer.path, Refusal::UnfinishedMerge { percent }));
        }
        Ok(Some(work))
    };
    chain.layers().iter().map(judge).collect()
}

/// The rules that the header of the image decides; `is_ours` tells whether it is marked dirty by a work that goes on.
///
/// # Errors
/// [`Error::Refused`].
pub(in crate::merge) fn judge<'a>(layer: &'a Layer, options: &UpOptions, is_ours: bool) -> Result<&'a Qcow2> {
    let refuse = |reason| Err(Error::refused(&layer.path, reason));
    let Some(image) = layer.image.as_qcow2() else { return refuse(Refusal::Raw) };
    if let Some(data) = layer.data_file.as_ref().filter(|data| !data.may_write) {
        return refuse(Refusal::DataFileOwner { file: data.path.clone() });
    }
    let header = image.header();
    if header.is_corrupt() {
        return refuse(Refusal::CorruptBit);
    }
    if header.is_dirty() && !is_ours {
        return refuse(Refusal::Dirty);
    }
    if header.snapshots > 0 && image.has_data_file() {
        return refuse(Refusal::SnapshotsInDataFile);
    }
    if header.snapshots > 0 && !options.allow_snapshot_change {
        return refuse(Refusal::Snapshots { count: header.snapshots as usize });
    }
    Ok(image)
}

/// The name by which the image will call its new backing file.
///
/// # Errors
/// As [`new_backing_name`].
pub(in crate::merge) fn name_of(host: &dyn Host, layer: &Layer, base: &Layer) -> Result<OsString> {
    let old = layer.image.as_qcow2().and_then(|image| image.cluster0().backing_name.clone());
    let name = new_backing_name(host, &old.unwrap_or_default(), &layer.path, &base.path)?;
    Ok(OsString::from_vec(name))
}

/// Refuses if the header has no room for the name and the format of the new backing file; without them, there will be none.
///
/// # Errors
/// [`Refusal::HeaderRoom`]; a cluster 0 that must not be edited.
pub(in crate::merge) fn fits(image: &Qcow2, backing: Option<(&OsStr, &str)>) -> Result<()> {
    let cluster = read_cluster(image)?;
    match backing {
        Some((name, format)) => drop(
            plan_backing_switch(&cluster, name.as_encoded_bytes(), format)
                .map_err(|e| rewrite_error(image.path(), name, e))?,
        ),
        None => drop(plan_backing_removal(&cluster).map_err(|e| header_error(image.path(), e))?),
    }
    Ok(())
}

/// The length of the image's file when it is done, if there is room for that, and whether that is not known.
///
/// # Errors
/// [`Error::NoSpace`]; the system's.
pub(in crate::merge) fn room(
    host: &dyn Host,
    layer: &Layer,
    image: &Qcow2,
    totals: Totals,
) -> Result<(u64, bool)> {
    let failed = |e| Error::io(&layer.path, FileOp::Stat, None, e);
    let stat = layer.image.file().stat().map_err(failed)?;
    let bits = image.geometry().cluster_bits();
    let end = grow::end_after(image, totals.clusters_to_allocate, 0)? << bits;
    let no_space = |needed, available| Err(Error::NoSpace { path: layer.path.clone(), needed, available });
    if stat.kind == FileKind::Block {
        return if end > stat.len { no_space(end, stat.len) } else { Ok((end, false)) };
    }
    let after = end.max(stat.len);
    let of_image = (totals.clusters_to_allocate << bits).max(after - stat.len);
    let data = layer.data_file.as_ref().map(|data| (&data.path, totals.hole_bytes));
    let mut is_unknown = false;
    for (path, needed) in data.into_iter().chain([(&layer.path, of_image)]) {
        match host.free_space(path).map_err(|e| Error::io(path, FileOp::Stat, None, e))? {
            Some(available) if needed > available => return no_space(needed, available),
            Some(_) => {}
            None => is_unknown |= needed > 0,
        }
    }
    Ok((after, is_unknown))
}
