//! A merge that somebody else (QEMU) has begun, with an unknown end. This module opens its layers under locks,
//! and answers the two questions that decide what to do: does base hold what the layers above it show, and
//! which of them does the overlay above top name as its backing file?
//!
//! It writes nothing but the overlay's backing name: as long as base and the merged layers keep their bytes,
//! every decision can be undone.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::chain::view::View;
use crate::chain::{BackingName, Chain, OpenOptions, open_data_file};
use crate::error::{Error, FileOp, Refusal, Result};
use crate::format::plan_backing_switch;
use crate::image::rewrite;
use crate::image::{ClusterCache, Image, ImageFormat, Mapping, Qcow2};
use crate::merge::switch::mark::{self, require_unchanged};
use crate::stamp::{Difference, Stamp};
use crate::storage::{Access, FileId, Host, LockMode, if_there};
use crate::transfer::ask::Span;
use crate::transfer::ask::down;
use crate::transfer::ops::{Progress, Run};
use crate::transfer::workers::on_workers;
use crate::units::{GuestOffset, GuestRange};

/// The layers of an interrupted merge, opened and locked: for reading, and the overlay for writing.
#[derive(Debug)]
pub struct Interrupted {
    /// From top down.
    chain: Chain,
    base: usize,
    overlay: Option<Overlay>,
}

/// The image above top.
#[derive(Debug)]
struct Overlay {
    image: Image,
    /// The file to which its backing name leads, if there is one.
    names: Option<FileId>,
}

/// What the overlay above top names as its backing file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackingIs {
    /// Top, the uppermost merged layer: the overlay was not relinked.
    Top,
    /// Base: the overlay was relinked.
    Base,
    /// Another file, or none.
    Other,
}

impl Interrupted {
    /// Opens and locks the layers. `merged` are those above base, the top first. Each must be unchanged, and
    /// lead to the next one, the last one to `base`. `overlay` is the image above top, if there is one; it must
    /// be qcow2. `options` has the policy and the formats; its `active_format` is that of top.
    ///
    /// # Errors
    /// What [`Chain::open`] reports; [`Error::InUse`]; [`Refusal::NotAsKnown`] for a file that was replaced or
    /// changed, and for a chain with other files.
    pub fn open(
        host: &dyn Host,
        overlay: Option<&Stamp>,
        merged: &[Stamp],
        base: &Stamp,
        options: &OpenOptions,
    ) -> Result<Self> {
        let top = merged.first().ok_or_else(|| Error::Usage("no layer was merged".into()))?;
        let overlay = overlay.map(|overlay| open_overlay(host, overlay, options)).transpose()?;
        let below = OpenOptions { lock: true, access: Default::default(), ..options.clone() };
        let chain = Chain::open(host, &top.path, &below)?;
        let expected = merged.iter().chain([base]);
        for (at, (layer, stamp)) in chain.layers().iter().rev().zip(expected).enumerate() {
            let file = &**layer.image.file();
            if at < merged.len() {
                require_unchanged(host, stamp, file)?;
            } else if !stamp.is_same_file(&Stamp::of(host, &layer.path, file)?) {
                // Base may have changed: QEMU merged into it. It only has to be the same file.
                let what = Difference::OtherFile.to_string();
                return Err(Error::refused(&layer.path, Refusal::NotAsKnown { what }));
            }
        }
        let count = merged.len() + 1;
        let Some(base) = chain.layers().len().checked_sub(count) else {
            let what = format!("its chain has {} layers, fewer than {count}", chain.layers().len());
            return Err(Error::refused(&top.path, Refusal::NotAsKnown { what }));
        };
        Ok(Self { chain, base, overlay })
    }

    /// What the overlay names as its backing file; [`BackingIs::Top`] if there is no overlay.
    pub fn backing(&self) -> BackingIs {
        let Some(overlay) = &self.overlay else { return BackingIs::Top };
        let id = |at: usize| self.chain.layers().get(at).map(|layer| layer.id);
        match overlay.names {
            Some(named) if Some(named) == id(self.chain.active()) => BackingIs::Top,
            Some(named) if Some(named) == id(self.base) => BackingIs::Base,
            _ => BackingIs::Other,
        }
    }

    /// The first byte of the disk in which base does not hold what the layers above it show; `None` if it holds
    /// everything. Base is read past the system's cache. `size_before` is the size of base's disk before the
    /// merge, in bytes: behind it the guest saw zeros.
    ///
    /// # Errors
    /// Whatever reading reports; [`Error::Cancelled`].
    pub fn first_difference(
        &self,
        size_before: u64,
        progress: &dyn Progress,
        cancel: &AtomicBool,
    ) -> Result<Option<GuestOffset>> {
        let mut images = self.chain.images();
        let top = self.chain.active();
        images.extend(self.overlay.as_ref().map(|overlay| &overlay.image));
        let span = Span { base: self.base, top, active: images.len().saturating_sub(1) };
        on_workers(|| {
            let mut job = down(&images, span)?;
            job.question.base_size = size_before;
            let total = job.question.end();
            match job.verify(&Run { progress, total, done: AtomicU64::new(0), cancel, journal: None }) {
                Ok(_) => Ok(None),
                Err(Error::Verify { guest, .. }) => Ok(Some(guest)),
                Err(e) => Err(e),
            }
        })
    }

    /// A place of the disk that was certainly never copied to base: a layer above holds non-zero bytes there,
    /// and base has nothing allocated. A write to base would show in its tables even after the guest has
    /// discarded the place, because a discard leaves a zero cluster behind. `None` if there is no such place,
    /// or if base's format cannot tell: raw, or qcow2 of version 2, where a discarded cluster becomes
    /// unallocated.
    ///
    /// # Errors
    /// Whatever reading reports; [`Error::Cancelled`].
    pub fn never_copied(&self, cancel: &AtomicBool) -> Result<Option<GuestOffset>> {
        let images = self.chain.images();
        let base = images
            .get(self.base)
            .copied()
            .filter(|base| base.as_qcow2().is_some_and(|base| base.header().version >= 3));
        let Some(base) = base else { return Ok(None) };
        let view = View::new(&images, self.base.saturating_add(1), self.chain.active());
        let end = GuestOffset::new(view.size().min(base.virtual_size()));
        let (mut cache, mut buffer) = (ClusterCache::new(), vec![0; 1 << 16]);
        let (mut parts, mut extents) = (Vec::new(), Vec::new());
        let mut from = GuestOffset::ZERO;
        while let Some(next) = view.next_supplied(from)?.filter(|next| *next < end) {
            if cancel.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
            let start = next.align_down(view.window());
            from = start + view.window();
            let window = GuestRange::between(start, from.min(end));
            parts.clear();
            extents.clear();
            view.resolve(window, &mut parts)?;
            base.map(window, &mut extents)?;
            let missing = extents.iter().filter(|extent| extent.mapping == Mapping::Unallocated);
            for extent in missing {
                for part in parts.iter().filter_map(|part| part.clip(&extent.range)) {
                    if part.supply.is_zero() {
                        continue;
                    }
                    let whole = part.range;
                    let mut at = whole.start;
                    while at < whole.end() {
                        let range = GuestRange::between(at, (at + buffer.len() as u64).min(whole.end()));
                        let Some(piece) = part.clip(&range) else { break };
                        let bytes = buffer.get_mut(..range.len as usize).unwrap_or_default();
                        view.read_supplied(&piece, bytes, &mut cache)?;
                        if bytes.iter().any(|byte| *byte != 0) {
                            return Ok(Some(at));
                        }
                        at = range.end();
                    }
                }
            }
        }
        Ok(None)
    }

    /// Relinks the overlay to top, its former backing file, by the name that it had for it. This is done only
    /// if base is its backing file now. The name changes in one sector.
    ///
    /// # Errors
    /// [`Error::Refused`] for an overlay that names anything but base, a name that does not lead to top, or a
    /// header without room; nothing was changed then. After an I/O error the overlay names either of the two.
    pub fn relink_back(&mut self, host: &dyn Host, name: &str) -> Result<()> {
        let top = self.chain.layers().last().map(|layer| (layer.id, layer.image.format()));
        let (Some(overlay), Some((top, format))) = (&mut self.overlay, top) else {
            return Err(Error::Broken { invariant: "only an overlay that was found is relinked" });
        };
        let path = overlay.image.path().to_owned();
        let refuse = |why| Err(Error::refused(&path, why));
        let base = self.chain.layers().get(self.base).map(|layer| layer.id);
        if overlay.names.is_none() || overlay.names != base {
            return refuse(Refusal::NotOnBase);
        }
        if leads_to(host, name.as_bytes(), &path)? != Some(top) {
            return refuse(Refusal::NotTop { name: name.to_owned() });
        }
        let Image::Qcow2(image) = &mut overlay.image else {
            return refuse(Refusal::Raw);
        };
        let switch = plan_backing_switch(&rewrite::read_cluster(image)?, name, format.name())
            .map_err(|e| rewrite::rewrite_error(&path, name.as_ref(), e))?;
        if !switch.atomic {
            return Err(Error::refused(&path, Refusal::HeaderRoom { name: name.into() }));
        }
        rewrite::apply(image, &switch)?;
        image.reload_header()?;
        overlay.names = Some(top);
        Ok(())
    }
}

fn open_overlay(host: &dyn Host, stamp: &Stamp, options: &OpenOptions) -> Result<Overlay> {
    let file = mark::open(host, stamp, LockMode::Write, options.no_locks)?;
    if ImageFormat::detect(&stamp.path, &*file)? != ImageFormat::Qcow2 {
        let what = "it is no qcow2 image any more".to_owned();
        return Err(Error::refused(&stamp.path, Refusal::NotAsKnown { what }));
    }
    let cluster0 = Qcow2::read_cluster0(&stamp.path, &*file)?;
    let access = [(stamp.id, Access::ReadWrite)].into();
    let options = OpenOptions { lock: true, access, ..options.clone() };
    let data_file = open_data_file(host, &stamp.path, &*file, &cluster0, &options)?;
    let image = Qcow2::open(&stamp.path, file, data_file.map(|(_, file)| file))?;
    let name = image.cluster0().backing_name.as_deref();
    let names = name.map(|name| leads_to(host, name, &stamp.path)).transpose()?.flatten();
    Ok(Overlay { image: Image::Qcow2(image), names })
}

/// The file to which a backing name of `overlay` leads, if there is one.
fn leads_to(host: &dyn Host, name: &[u8], overlay: &Path) -> Result<Option<FileId>> {
    let Ok(name) = BackingName::parse(name) else { return Ok(None) };
    let path = name.resolve(overlay);
    let stat = if_there(host.stat(&path)).map_err(|e| Error::io(&path, FileOp::Stat, None, e))?;
    Ok(stat.map(|stat| stat.id))
}

#[cfg(test)]
#[path = "interrupted_tests.rs"]
mod tests;
