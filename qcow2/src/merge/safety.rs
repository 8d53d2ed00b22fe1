//! The rules that a commit must pass before anything is written.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use super::options::CommitOptions;
use super::plan::{Afterwards, LostBitmap, Plan, Signs};
use super::stack::Stack;
use crate::chain::{
    BackingName, Chain, Layer, Lookalike, Looked, Search, Sibling, find_lookalikes, find_users_in,
    other_names,
};
use crate::check::{CheckOptions, check_consistent};
use crate::error::{Error, FileOp, Refusal, Result, Role};
use crate::image::{Image, bitmap_names};
use crate::journal;
use crate::storage::{Access, FileId, FileKind, Host, if_there};
use crate::units::GuestOffset;

/// Checks the rules that the headers alone decide. `ours` says whether the layer at a position was marked dirty
/// by an unfinished merge that this one continues.
pub(super) fn layers(stack: &Stack<'_>, options: &CommitOptions, ours: &dyn Fn(usize) -> bool) -> Result<()> {
    let span = stack.span;
    for (at, layer) in stack.chain.layers().iter().enumerate() {
        let merged = span.base < at && at <= span.top;
        let Some(image) = layer.image.as_qcow2() else { continue };
        let refuse = |reason| Err(Error::refused(&layer.path, reason));
        if let Some(data) = layer.data_file.as_ref().filter(|data| at == span.base && !data.may_write) {
            return refuse(Refusal::DataFileOwner { file: data.path.clone() });
        }
        if image.header().is_corrupt() && span.base <= at {
            return refuse(Refusal::CorruptBit);
        }
        let emptied = at == span.active && at == span.top && !options.keep_active;
        let written = merged && layer.access == Access::ReadWrite;
        if image.header().is_dirty() && (at == span.base || written) && !ours(at) {
            return refuse(Refusal::Dirty);
        }
        let grows = at == span.base && stack.top.image.virtual_size() > image.virtual_size();
        if grows && image.header().snapshots > 0 && image.header().version < 3 {
            return refuse(Refusal::SnapshotsWithoutSize);
        }
        if image.has_data_file() && image.header().snapshots > 0 && (at == span.base || emptied) {
            // QEMU makes no such images: a data file has one place per guest cluster, so a write would change
            // the snapshot, too.
            return refuse(Refusal::SnapshotsInDataFile);
        }
        if !merged {
            continue;
        }
        if image.header().snapshots > 0 && !options.allow_snapshot_change {
            return refuse(Refusal::Snapshots { count: image.header().snapshots as usize });
        }
        if let Some(base) = image.cluster0().merged_into()
            && image.cluster0().keeps_merged_data()
            && image.next_allocated(GuestOffset::ZERO)?.is_some()
        {
            return refuse(Refusal::MergedBefore { base });
        }
    }
    let lost = bitmaps(stack, options)?;
    if let Some(LostBitmap { file: path, .. }) = lost.first()
        && !options.drop_bitmaps
    {
        let names = lost.iter().filter(|l| l.file == *path).map(|l| l.name.clone()).collect();
        return Err(Error::refused(path, Refusal::Bitmaps { names }));
    }
    Ok(())
}

/// The bitmaps that the merge loses: those of layers that are removed, or through which nobody sees the disk
/// any more. An active image that stays shows the same disk as before, and keeps its bitmaps.
pub(super) fn bitmaps(stack: &Stack<'_>, options: &CommitOptions) -> Result<Vec<LostBitmap>> {
    let mut lost = Vec::new();
    let losing = match stack.has_active() {
        true if options.keep_active => 0,
        true if !options.delete => stack.merged.len() - 1,
        _ => stack.merged.len(),
    };
    for layer in stack.merged.iter().take(losing) {
        for bitmap in layer.image.as_qcow2().map(bitmap_names).transpose()?.unwrap_or_default() {
            lost.push(LostBitmap { file: layer.path.clone(), name: bitmap.name });
        }
    }
    Ok(lost)
}

/// Checks that each image that will be written has a place for its journal, and for the record of an edit.
pub(super) fn journal_places(
    host: &dyn Host,
    stack: &Stack<'_>,
    options: &CommitOptions,
    afterwards: &Afterwards,
) -> Result<()> {
    let (merged, overlay) = match afterwards {
        Afterwards::Relink { .. } => (stack.touched, stack.overlay),
        Afterwards::Empty { .. } | Afterwards::Delete { .. } => (stack.touched, None),
        Afterwards::Keep => (stack.touched.get(..stack.merged.len()).unwrap_or_default(), None),
    };
    for layer in merged.iter().chain(overlay) {
        if layer.access != Access::ReadWrite {
            continue;
        }
        let (file, dir) = (&**layer.image.file(), options.journal_dir.as_deref());
        for ending in [journal::JOURNAL, journal::SWITCH] {
            journal::place(host, &layer.path, file, dir, ending)?;
        }
    }
    Ok(())
}

/// Checks that a qcow2 image that will be written is consistent, because its refcounts decide which clusters
/// are free. Returns how many clusters it has leaked.
pub(super) fn consistent(layer: &Layer, cancel: &AtomicBool) -> Result<u64> {
    let Layer { image: Image::Qcow2(image), path, .. } = layer else { return Ok(0) };
    let data_file = image.has_data_file().then(|| &**image.data_file());
    let options = CheckOptions { cancel: Some(cancel) };
    check_consistent(path, &**image.file(), data_file, &options).map(|report| report.leaks)
}

/// The result of the search for images that share layers.
#[derive(Debug, Default)]
pub(super) struct Searched {
    pub(super) searched: Vec<PathBuf>,
    pub(super) unreadable: Vec<PathBuf>,
    pub(super) signs: Signs,
    /// Files of base and of merged layers that images outside the chain use.
    pub(super) shared: Vec<FileId>,
}

/// Checks that no image outside the chain reads through base or a merged layer. Exceptions are layers that were
/// `merged` before, and images whose content stays the same.
pub(super) fn siblings(
    host: &dyn Host,
    stack: &Stack<'_>,
    merged: Vec<FileId>,
    options: &CommitOptions,
) -> Result<Searched> {
    let Stack { chain, base, touched, .. } = *stack;
    let folders = chain.folders(host)?;
    let is_elsewhere = is_elsewhere(host, stack)?;
    let nearby = if is_elsewhere { neighbours(host, stack)? } else { Vec::new() };
    let search = Search { folders: folders.clone(), deep: options.scan.clone(), nearby: nearby.clone() };
    let targets: Vec<FileId> =
        touched.iter().flat_map(|l| [Some(l.id), l.data_file.as_ref().map(|d| d.id)]).flatten().collect();
    let theirs = [chain.files(), merged].concat();
    let mut found = find_users_in(host, &search, &targets, &theirs)?;
    let is_harmed = |user: &&Sibling| !keeps_its_view(stack, options, user);
    let harmed: Vec<&Sibling> = found.users.iter().filter(is_harmed).collect();
    if let Some(first) = harmed.first()
        && !options.allow_shared_base
    {
        let used = touched
            .iter()
            .find(|l| l.id == first.uses || l.data_file.as_ref().is_some_and(|d| d.id == first.uses));
        let path = used.map_or(first.path.as_path(), |layer| layer.path.as_path());
        let users = harmed.iter().filter(|u| u.uses == first.uses).map(|u| u.path.clone()).collect();
        return Err(Error::refused(path, Refusal::SharedBase { users }));
    }
    let Looked { found: possible, unreadable } = find_lookalikes(host, &found.files, touched);
    found.unreadable.extend(unreadable);
    if let Some(first) = possible.iter().find(|image| image.fits)
        && !options.allow_shared_base
    {
        let layer = touched.iter().find(|layer| layer.id == first.may_use);
        let path = layer.map_or(first.path.as_path(), |layer| layer.path.as_path());
        let is_same = |image: &&Lookalike| image.fits && image.may_use == first.may_use;
        let users = possible.iter().filter(is_same).map(|image| image.path.clone()).collect();
        return Err(Error::refused(path, Refusal::PossiblyShared { users }));
    }
    let shared = found.users.iter().map(|user| user.uses).collect();
    let mut signs = Signs {
        looked_at: found.files.len(),
        nearby,
        left_out: found.left_out,
        links: 1,
        is_elsewhere,
        possible_users: possible.into_iter().map(|image| image.path).collect(),
        ..Signs::default()
    };
    let failed = |e| Error::io(&base.path, FileOp::Stat, None, e);
    signs.is_read_only = base.image.file().stat().map_err(failed)?.owner.mode & WRITABLE == 0;
    signs.links = host.links(&base.path).map_err(failed)?;
    for layer in touched.iter().filter(|layer| layer.id != base.id) {
        if has_other_names(host, layer)? {
            signs.linked.push(layer.path.clone());
        }
    }
    let Looked { found: names, unreadable } = other_names(host, &found.files, base).map_err(failed)?;
    signs.other_names = names;
    found.unreadable.extend(unreadable);
    let unreadable: BTreeSet<PathBuf> = found.unreadable.into_iter().map(|(path, _)| path).collect();
    let unreadable = unreadable.into_iter().collect();
    let searched = [folders, options.scan.clone()].concat();
    Ok(Searched { searched, unreadable, shared, signs })
}

/// Whether a layer's file or its data file has another name. Somebody may use it by that name, where no search
/// finds them.
pub(super) fn has_other_names(host: &dyn Host, layer: &Layer) -> Result<bool> {
    for path in [Some(&layer.path), layer.data_file.as_ref().map(|data| &data.path)].into_iter().flatten() {
        if host.links(path).map_err(|e| Error::io(path, FileOp::Stat, None, e))? > 1 {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Checks that each image leads to the same chain by the given name and by the real name of its file. They may
/// differ, because a relative backing name starts at the folder of a symbolic link, not of its target.
///
/// # Errors
/// [`Refusal::TwoChains`]; the system's.
pub(super) fn one_chain(host: &dyn Host, chain: &Chain) -> Result<()> {
    for layer in chain.layers() {
        let name = layer.image.as_qcow2().and_then(|image| image.cluster0().backing_name.as_deref());
        if let Some(Ok(name)) = name.map(BackingName::parse) {
            one_meaning(host, &layer.path, &name)?;
        }
    }
    Ok(())
}

/// Refuses a backing name that leads from an image, by the name that the caller has for that, to another file than from
/// where the image really lies.
///
/// # Errors
/// [`Refusal::TwoChains`]; the system's.
pub(crate) fn one_meaning(host: &dyn Host, image: &Path, name: &BackingName) -> Result<()> {
    let looked = |path: &Path| if_there(host.stat(path)).map_err(|e| Error::io(path, FileOp::Stat, None, e));
    if !name.is_relative() || name.depends_on_working_dir() {
        return Ok(());
    }
    let real = host.canonicalize(image).map_err(|e| Error::io(image, FileOp::Resolve, None, e))?;
    let (by_name, beside) = (looked(&name.resolve(image))?, name.resolve_beside(&real));
    if by_name.zip(looked(&beside)?).is_some_and(|(by_name, beside)| by_name.id != beside.id) {
        return Err(Error::refused(image, Refusal::TwoChains { real, beside }));
    }
    Ok(())
}

/// The bits that permit anybody to write.
const WRITABLE: u32 = 0o222;

/// Whether the merge does not change what an outside image shows: it reads through the active image, which
/// stays as it is, or becomes an empty overlay on base with a disk of the same size.
fn keeps_its_view(stack: &Stack<'_>, options: &CommitOptions, user: &Sibling) -> bool {
    let reads_through = |layer: &Layer| layer.id == user.uses && user.role == Role::BackingFile;
    stack.has_active() && !options.delete && reads_through(stack.active)
}

/// The real folder of a layer.
fn folder_of(host: &dyn Host, layer: &Layer) -> Result<Option<PathBuf>> {
    let real =
        host.canonicalize(&layer.path).map_err(|e| Error::io(&layer.path, FileOp::Resolve, None, e))?;
    Ok(real.parent().map(Path::to_owned))
}

/// Whether base and the active image lie in different folders, as templates and the disks made from them do.
fn is_elsewhere(host: &dyn Host, stack: &Stack<'_>) -> Result<bool> {
    Ok(folder_of(host, stack.base)? != folder_of(host, stack.active)?)
}

/// The folder whose sub-folders are likely to hold other users of base: the one above the active image's
/// folder, if each machine has a folder of its own.
fn neighbours(host: &dyn Host, stack: &Stack<'_>) -> Result<Vec<PathBuf>> {
    let own = folder_of(host, stack.active)?;
    let above = own.as_deref().and_then(Path::parent).filter(|above| above.parent().is_some());
    Ok(above.map(Path::to_owned).into_iter().collect())
}

/// Whether the file system can share the blocks of the merged layers with base, instead of copying them.
fn moves_by_sharing(host: &dyn Host, stack: &Stack<'_>) -> bool {
    let Stack { base, touched, .. } = *stack;
    let device = |layer: &Layer| layer.data_file.as_ref().map_or(layer.id, |data| data.id).device;
    let coarse = |layer: &Layer| layer.image.as_qcow2().is_none_or(|q| q.geometry().cluster_size() >= 4096);
    touched.iter().all(|layer| device(layer) == device(base) && coarse(layer))
        && host.shares_blocks(&base.path)
}

/// Checks that there is room for what the merge writes. Returns the files whose file systems do not tell their
/// free space.
pub(super) fn space(host: &dyn Host, stack: &Stack<'_>, plan: &Plan) -> Result<Vec<PathBuf>> {
    let layer = stack.base;
    let stat = layer.image.file().stat().map_err(|e| Error::io(&layer.path, FileOp::Stat, None, e))?;
    let no_space = |needed, available| Err(Error::NoSpace { path: layer.path.clone(), needed, available });
    if stat.kind == FileKind::Block {
        let needed = plan.base_file_size_after;
        return if needed > stat.len { no_space(needed, stat.len) } else { Ok(Vec::new()) };
    }
    if moves_by_sharing(host, stack) {
        // How many blocks are shared is known only afterwards. If space runs out on the way, nothing is lost.
        return Ok(Vec::new());
    }
    // Count every new cluster: inside the file it may be a hole, behind the end it surely takes space.
    let metadata = match &layer.image {
        Image::Raw(_) | Image::Foreign(_) => 0,
        Image::Qcow2(image) => (plan.totals.clusters_to_allocate * image.geometry().cluster_size())
            .max(plan.base_file_size_after.saturating_sub(stat.len)),
    };
    let (of_image, of_data) = match &layer.data_file {
        Some(_) => (metadata, plan.totals.hole_bytes),
        None => (metadata + plan.totals.hole_bytes, 0),
    };
    let data = layer.data_file.as_ref().map(|data| &data.path);
    let mut unknown = Vec::new();
    for (path, needed) in data.map(|path| (path, of_data)).into_iter().chain([(&layer.path, of_image)]) {
        match host.free_space(path).map_err(|e| Error::io(path, FileOp::Stat, None, e))? {
            Some(available) if needed > available => return no_space(needed, available),
            Some(_) => {}
            None if needed > 0 => unknown.push(path.clone()),
            None => {}
        }
    }
    Ok(unknown)
}
