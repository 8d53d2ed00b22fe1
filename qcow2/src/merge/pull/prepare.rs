//! Preparing a pull: its chain is opened and judged, and what will be done is planned.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::{PreparedPull, Pull, PullOptions, PullPlan};
use crate::chain::{Chain, Layer, OpenOptions, new_backing_name};
use crate::error::{Error, FileOp, Refusal, Result, shown};
use crate::format::{plan_backing_removal, plan_backing_switch};
use crate::image::rewrite::{header_error, read_cluster, rewrite_error};
use crate::image::{Qcow2, grow};
use crate::journal;
use crate::journal::record::{Header, Purpose};
use crate::merge::resume::describe::describe;
use crate::merge::resume::torn::{refuse_torn_header, refuse_torn_tables};
use crate::merge::resume::unfinished_work::UnfinishedWork;
use crate::merge::resume::work::Work;
use crate::merge::safety;
use crate::storage::{Access, FileKind, Host};
use crate::transfer::Totals;
use crate::transfer::ask::{Span, up};

impl Pull {
    /// Opens, locks, judges and plans; nothing is written. Headers that a power cut has torn must be whole: see
    /// [`heal`](crate::merge::heal()).
    ///
    /// # Errors
    /// [`Refusal::TornHeader`], [`Refusal::UnfinishedMerge`]; what [`Chain::open`] reports; [`Error::Usage`] for a base that is
    /// not below the image; [`Error::Refused`] for every safety rule; [`Error::NoSpace`]; [`Error::Cancelled`].
    pub fn prepare(
        host: Arc<dyn Host>,
        active: &Path,
        options: &PullOptions,
        cancel: &AtomicBool,
    ) -> Result<PreparedPull> {
        let dir = options.journal_dir.as_deref();
        let unlocked = OpenOptions { lock: false, ..options.open.clone() };
        let scout =
            Chain::open_after(&*host, active, &unlocked, &|path| refuse_torn_header(&*host, path, dir))?;
        let files = scout.files();
        let access = [(scout.layer(scout.active())?.id, Access::ReadWrite)].into();
        drop(scout);
        let mut chain =
            Chain::open(&*host, active, &OpenOptions { lock: true, access, ..options.open.clone() })?;
        if chain.files() != files {
            return Err(Error::refused(active, Refusal::ChainChanged));
        }
        safety::one_chain(&*host, &chain)?;
        let (at, base) = (chain.active(), base_of(&*host, &chain, options)?);
        let unfinished = unfinished(&*host, &mut chain, dir)?;
        let layer = chain.layer(at)?;
        let image = judge(layer, options, unfinished.as_ref().is_some_and(|(work, _)| work.is_ours()))?;
        let backing_name = base.map(|base| name_of(&*host, layer, chain.layer(base)?)).transpose()?;
        let mut plan = PullPlan {
            active: layer.path.clone(),
            base: base.map(|base| Ok::<_, Error>(chain.layer(base)?.path.clone())).transpose()?,
            pulled: pulled(&chain, base),
            virtual_size: image.virtual_size(),
            is_resumed: unfinished.as_ref().is_some_and(|(work, _)| work.is_ours()),
            backing_name,
            ..PullPlan::default()
        };
        if plan.pulled.is_empty() && unfinished.is_none() {
            return Ok(PreparedPull::Nothing(Box::new(plan)));
        }
        fits(image, &plan, &chain, base)?;
        journal::place(&*host, &layer.path, &**layer.image.file(), dir, journal::JOURNAL)?;
        let leaks = safety::consistent(layer, cancel)?;
        plan.totals = up(&chain.images(), base, at)?.plan(cancel)?;
        (plan.file_size_after, plan.is_room_unknown) = room(&*host, layer, image, plan.totals)?;
        let span = Span { base: base.unwrap_or(0), top: at, active: at };
        let header = Header {
            purpose: Purpose::Pull,
            // No index leads to this pull.
            top_index: 0,
            total: plan.totals.bytes_to_write,
            ..describe(&*host, &chain, span, at)?
        };
        let options = options.clone();
        Ok(PreparedPull::Ready(Box::new(Self {
            host,
            options,
            chain,
            base,
            plan,
            header,
            unfinished,
            leaks,
        })))
    }
}

/// The position of the layer that is to be the backing file.
fn base_of(host: &dyn Host, chain: &Chain, options: &PullOptions) -> Result<Option<usize>> {
    let Some(name) = &options.base else { return Ok(None) };
    let base = chain.find(host, name)?;
    if base >= chain.active() {
        let path = shown(&chain.layer(base)?.path);
        return Err(Error::Usage(format!("base [{}] {path} must lie below the image", base + 1)));
    }
    Ok(Some(base))
}

/// The layers whose data is taken in, the uppermost first.
fn pulled(chain: &Chain, base: Option<usize>) -> Vec<std::path::PathBuf> {
    let first = base.map_or(0, |base| base + 1);
    let layers = chain.layers().get(first..chain.active()).unwrap_or_default();
    layers.iter().rev().map(|layer| layer.path.clone()).collect()
}

/// Finds an unfinished pull into the image, which is read under its journal from here on. An unfinished merge
/// in the chain must be finished first: only with its journal do its layers show the right data.
fn unfinished(
    host: &dyn Host,
    chain: &mut Chain,
    dir: Option<&Path>,
) -> Result<Option<(UnfinishedWork, Option<Work>)>> {
    let at = chain.active();
    refuse_torn_tables(host, chain.layers().get(..at).unwrap_or_default(), dir)?;
    let active = chain.layer(at)?.id;
    let mut found = None;
    for layer in chain.layers() {
        let Some(work) = UnfinishedWork::find(host, layer, dir)? else { continue };
        work.refuse_renamed(host, &layer.path)?;
        if work.is_ours() && work.purpose() != Purpose::Pull {
            let percent = work.percent();
            return Err(Error::refused(&layer.path, Refusal::UnfinishedMerge { percent }));
        }
        // A pull into a layer below has not changed what that shows.
        if layer.id == active {
            found = Some(work);
        }
    }
    let Some(work) = found else { return Ok(None) };
    let taken_up = match work.is_ours() {
        true => Some(work.take_up(host, chain.image_at(at)?, false)?),
        false => None,
    };
    Ok(Some((work, taken_up)))
}

/// The rules that the header of the image decides.
fn judge<'a>(layer: &'a Layer, options: &PullOptions, is_ours: bool) -> Result<&'a Qcow2> {
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

/// The name by which the image will call its base.
fn name_of(host: &dyn Host, layer: &Layer, base: &Layer) -> Result<OsString> {
    let old = layer.image.as_qcow2().and_then(|image| image.cluster0().backing_name.clone());
    let name = new_backing_name(host, &old.unwrap_or_default(), &layer.path, &base.path)?;
    Ok(OsString::from_vec(name))
}

/// Whether the header has room for what it is to name.
fn fits(image: &Qcow2, plan: &PullPlan, chain: &Chain, base: Option<usize>) -> Result<()> {
    let cluster = read_cluster(image)?;
    match (&plan.backing_name, base) {
        (Some(name), Some(base)) => {
            let format = chain.layer(base)?.image.format().name();
            plan_backing_switch(&cluster, name.as_encoded_bytes(), format)
                .map_err(|e| rewrite_error(image.path(), name, e))?;
        }
        _ => drop(plan_backing_removal(&cluster).map_err(|e| header_error(image.path(), e))?),
    }
    Ok(())
}

/// The length of the image's file when it is done, if there is room for that, and whether that is not known.
fn room(host: &dyn Host, layer: &Layer, image: &Qcow2, totals: Totals) -> Result<(u64, bool)> {
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
