//! Decides which merged layers become empty overlays on base, and empties them.
//!
//! A configuration may have recorded the chain layer by layer (libvirt does). Then QEMU is given each layer
//! with the one below it, whatever the headers say. So everything here must be right for two chains: the one of
//! the headers, and the recorded one.
//!
//! The order is from the bottom up, the active image last. When base holds what the guest sees, a layer above
//! only empty ones may lose its data piece by piece: base shows through, with the same bytes. From the top
//! down, the old data of the layers below would show. A layer's disk grows when the layer is empty, so that
//! base shows behind its former end, too. It grows before the layer above is emptied, whose data may lie behind
//! that end. The headers are changed when all layers are empty: until then the chain of the headers has all its
//! layers, and the same command finds what remains to be done.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::commit::Commit;
use super::options::CommitOptions;
use super::plan::{Afterwards, Kept, Plan};
use super::reason::KeptReason;
use super::resume::describe::{data_file, describe};
use super::resume::unfinished_work::UnfinishedWork;
use super::resume::work::Work;
use super::safety::Searched;
use super::stack::Stack;
use super::switch::empty::may_grow;
use super::switch::{empty, relink};
use crate::chain::Layer;
use crate::error::{Error, FileOp, Result};
use crate::format::parts;
use crate::image::refcounts::Refcounts;
use crate::image::{Image, Qcow2, bitmaps, grow};
use crate::journal::record::Header;
use crate::storage::{Access, Host};
use crate::transfer::target::{clear_autoclear, give_leaks_back, prepare};
use crate::units::GuestOffset;

/// The merged layers below the active image that become empty overlays on base, from the bottom up; and those
/// that keep their data, with the reason.
pub(super) fn plan(stack: &Stack<'_>, options: &CommitOptions, found: &Searched) -> (Vec<usize>, Vec<Kept>) {
    let (mut empties, mut kept) = (Vec::new(), Vec::new());
    if stack.has_active() && options.keep_active {
        // The active image stays as it is, and reads through all of them.
        return (empties, kept);
    }
    let size = stack.active.image.virtual_size();
    let mut read_through = false;
    let first = stack.span.base + 1;
    let merged = stack.merged.iter().enumerate().map(|(n, layer)| (first + n, layer));
    let below_active = merged.rev().filter(|(at, _)| *at != stack.span.active);
    for (at, layer) in below_active {
        let is_shared = found.shared.contains(&layer.id)
            || layer.data_file.as_ref().is_some_and(|data| found.shared.contains(&data.id));
        let why = match () {
            () if is_shared => Some(KeptReason::Used),
            () if read_through => Some(KeptReason::ReadThrough),
            () if found.signs.linked.contains(&layer.path) => Some(KeptReason::Linked),
            () => cannot(layer, size),
        };
        read_through |= is_shared;
        match why {
            Some(why) => kept.push(Kept { path: layer.path.clone(), why }),
            None => empties.push(at),
        }
    }
    empties.reverse();
    (empties, kept)
}

/// Why a layer cannot become an empty overlay with a disk of at least `size` bytes.
fn cannot(layer: &Layer, size: u64) -> Option<KeptReason> {
    let Some(image) = layer.image.as_qcow2() else { return Some(KeptReason::NotQcow2) };
    if layer.access != Access::ReadWrite {
        return Some(KeptReason::NotWritable);
    }
    if image.has_data_file() && image.header().snapshots > 0 {
        return Some(KeptReason::SnapshotsInDataFile);
    }
    if !may_grow(image, size) {
        return Some(KeptReason::SnapshotsWithoutSize);
    }
    grow::l1_growth(image, size).is_err().then_some(KeptReason::TablesTooSmall)
}

impl Plan {
    /// Enters into the plan what becomes of the merged layers: those at `empties` and a merged active image
    /// become empty overlays; `kept` stay as they are.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn will_empty(&mut self, stack: &Stack<'_>, empties: &[usize], kept: Vec<Kept>) -> Result<()> {
        let active = matches!(self.afterwards, Afterwards::Empty { .. } | Afterwards::Delete { .. });
        let active = active.then_some(stack.span.active);
        for (at, layer) in stack.chain.layers().iter().enumerate() {
            let is_removed = self.removes && self.obsolete.contains(&layer.path);
            let is_emptied = empties.contains(&at) || active == Some(at);
            if is_emptied && !is_removed {
                self.emptied.push(layer.path.clone());
            }
            if !is_emptied && !is_removed {
                continue;
            }
            self.bytes_freed += held(layer)?;
        }
        // A layer that keeps its data keeps its data file; one that is removed does not.
        self.data_files.retain(|data| self.removes || kept.iter().all(|kept| kept.path != data.image));
        self.kept = kept;
        Ok(())
    }
}

/// The bytes that a layer holds on disk, including its external data file.
///
/// # Errors
/// The system's.
pub(super) fn held(layer: &Layer) -> Result<u64> {
    let io = |e| Error::io(&layer.path, FileOp::Stat, None, e);
    let mut bytes = layer.image.file().stat().map_err(io)?.allocated;
    if let Some(image) = layer.image.as_qcow2().filter(|image| image.has_data_file()) {
        bytes += image.data_file().stat().map_err(io)?.allocated;
    }
    Ok(bytes)
}

/// Whether a layer may be opened for writing, and its data file too.
pub(super) fn is_writable(host: &dyn Host, layer: &Layer) -> bool {
    let paths = [Some(&layer.path), layer.data_file.as_ref().map(|data| &data.path)];
    let denied = |e: std::io::Error| {
        use std::io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem};
        matches!(e.kind(), PermissionDenied | ReadOnlyFilesystem)
    };
    paths.into_iter().flatten().all(|path| !host.open(path, Access::ReadWrite).is_err_and(denied))
}

impl Commit {
    /// Turns the merged layers below the active image into empty overlays, from the bottom up, each under a journal of its
    /// own. They keep their backing names.
    pub(super) fn empty_layers(&mut self, dir: Option<&Path>, top_index: u32) -> Result<()> {
        for at in self.empties.clone() {
            let Some(work) = self.empty_layer(at, None, dir, top_index)? else { continue };
            let host = Arc::clone(&self.host);
            work.finish(&*host, self.chain.image_at(at)?)?;
        }
        let active = self.chain.active();
        // An unfinished merge may have begun to empty a layer that this one keeps. Its journal is replayed, so
        // that the layer is consistent.
        let of_active = self.unfinished.above.split_off(&active);
        let kept = std::mem::replace(&mut self.unfinished.above, of_active);
        for (at, (_, work)) in kept {
            let host = Arc::clone(&self.host);
            let Some(work) = work else { continue };
            let image = self.chain.image_at(at)?;
            work.replay(image, Some(GuestOffset::ZERO))?;
            give_leaks_back(image, &AtomicBool::new(false))?;
            work.finish(&*host, image)?;
        }
        Ok(())
    }

    /// Turns the active image into an empty overlay on base, under a journal of its own.
    pub(super) fn empty_active(
        &mut self,
        name: Option<&OsStr>,
        dir: Option<&Path>,
        top_index: u32,
    ) -> Result<()> {
        let active = self.chain.active();
        let host = Arc::clone(&self.host);
        let Some(work) = self.empty_layer(active, name, dir, top_index)? else { return Ok(()) };
        if !self.removes_active() {
            return work.finish(&*host, self.chain.image_at(active)?);
        }
        // The journal is removed after the image, so that the same command still knows what became of the
        // image.
        let data_file = data_file(&*host, self.stack()?.active)?;
        work.journal().set_obsolete(Some(data_file));
        self.removing = Some(Arc::clone(work.journal()));
        work.release(self.chain.image_at(active)?)
    }

    /// Empties the layer at `at`, and relinks it to base if `name` is given. Returns the work, which the caller
    /// must finish.
    fn empty_layer(
        &mut self,
        at: usize,
        name: Option<&OsStr>,
        dir: Option<&Path>,
        top_index: u32,
    ) -> Result<Option<Work>> {
        let span = self.span();
        let host = Arc::clone(&self.host);
        let (unfinished, work) = self
            .unfinished
            .above
            .remove(&at)
            .map_or((None, None), |(unfinished, work)| (Some(unfinished), work));
        let format = self.stack()?.base.image.format().name();
        let base = self.base_name()?;
        let marks = at == span.active && !self.removes_active();
        let size = self.stack()?.active.image.virtual_size();
        let header = Header { top_index, ..describe(&*host, &self.chain, span, at)? };
        let image = self.chain.image_at(at)?;
        if !matches!(image, Image::Qcow2(_)) {
            return Ok(None);
        }
        let work = match work {
            Some(work) => {
                work.replay(image, Some(GuestOffset::ZERO))?;
                work
            }
            None => Work::begin(
                &*host,
                image,
                header,
                dir,
                unfinished.as_ref().map(UnfinishedWork::inherited).as_ref(),
            )?,
        };
        if unfinished.is_some_and(|unfinished| unfinished.is_ours()) {
            // The unfinished merge removed mappings before it freed their clusters; these are leaked now.
            give_leaks_back(image, &AtomicBool::new(false))?;
        }
        if let Image::Qcow2(image) = image {
            if marks {
                relink::mark_emptied(image, &base, name.map(|name| (name, format)))?;
            } else if let Some(name) = name {
                relink::relink_journaled(image, name, format)?;
            }
            clear_autoclear(image)?;
            if at != span.active {
                // A bitmap describes changes to data that goes away here; if it stayed, the next backup would
                // miss changes. The bitmaps of the active image stay true, because the guest sees the same disk
                // through it.
                let refcounts = Refcounts::load(image)?;
                bitmaps::drop_all(image, &refcounts)?;
            }
            empty::empty(image)?;
            grow_disk(image, size)?;
        }
        Ok(Some(work))
    }
}

/// Grows the disk of an empty image to at least `size` bytes.
fn grow_disk(image: &mut Qcow2, size: u64) -> Result<()> {
    if size <= image.virtual_size() {
        return Ok(());
    }
    prepare(image, 0, 0, size)?;
    image.switch_header(parts::SIZE, |header| header.size = size)?;
    image.barrier()
}
