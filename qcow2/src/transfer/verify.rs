//! Reads back what a merge has written, before anything depends on it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::job::Job;
use super::needs::Need;
use super::ops::Run;
use super::origin::Origin;
use crate::chain::differ::Differ;
use crate::chain::digest;
use crate::chain::view::{Supplied, Supply, View};
use crate::error::{Error, FileOp, Result};
use crate::image::{Image, Mapping};
use crate::storage::Storage;
use crate::units::{GuestOffset, GuestRange};

impl Job<'_> {
    /// Compares every range that the merge has moved with what the layers above base show there, read
    /// through base and what lies below it, by base's tables as they are on disk now and with nothing
    /// taken from the system's cache of its files. All of the merge must be durable, and base must have
    /// its new size. `run` counts the compared bytes, and its total is the caller's guess.
    ///
    /// # Errors
    /// [`Error::Verify`] with the first byte of the first window that differs; whatever reading reports;
    /// [`Error::Cancelled`].
    pub(crate) fn verify(&self, run: &Run<'_>) -> Result<u64> {
        let old = self.image()?;
        let fresh = reopen(old)?;
        let mut images: Vec<&Image> = self.layers.get(..self.base).unwrap_or_default().to_vec();
        images.push(&fresh);
        // The merge has moved nothing from a layer of a format that is not read here.
        let base = View::new(&images, usize::from(has_foreign_bottom(&images)), self.base);
        let differ = Differ::new(self.question.view, base)?;
        let compared = AtomicU64::new(0);
        let count = |bytes: u64| {
            compared.fetch_add(bytes, Ordering::Relaxed);
            run.progress.written(run.done.fetch_add(bytes, Ordering::Relaxed) + bytes, run.total);
        };
        for window in self.question.windows(GuestOffset::ZERO) {
            let window = window?;
            let needs: Vec<Supplied> = self.question.needs(window)?.into_iter().map(supplied).collect();
            let mut found: Vec<Supplied> = Vec::new();
            base.resolve(window, &mut found)?;
            let behind = GuestRange::between(window.start.max(GuestOffset::new(base.size())), window.end());
            if !behind.is_empty() {
                found.push(Supplied { range: behind, supply: Supply::Nothing });
            }
            if let Some(guest) = differ.first_difference(&needs, &found, run.cancel, &count)? {
                let what = "the base does not hold what the layers above it show".to_owned();
                return Err(Error::Verify { path: old.path().to_owned(), guest, what });
            }
        }
        Ok(compared.into_inner())
    }
}

/// The digest of what the guest sees through all of `images`, if all of them can be read.
pub(crate) fn whole_digest(images: &[&Image], size: u64, cancel: &AtomicBool) -> Result<Option<u32>> {
    let Some(top) = images.len().checked_sub(1).filter(|_| !has_foreign_bottom(images)) else {
        return Ok(None);
    };
    digest(View::new(images, 0, top), size, cancel).map(Some)
}

/// Whether the lowest layer is of a format that is not read here.
pub(crate) fn has_foreign_bottom(images: &[&Image]) -> bool {
    matches!(images.first(), Some(Image::Foreign(_)))
}

impl Job<'_> {
    /// Whether base holds, below the guest offset `end`, what the layers above it show there. `end` lies inside base's
    /// disk.
    ///
    /// # Errors
    /// Whatever reading reports; [`Error::Cancelled`].
    pub(crate) fn holds(&self, end: GuestOffset, cancel: &AtomicBool) -> Result<bool> {
        let base = View::new(self.layers, 0, self.base);
        let differ = Differ::new(self.question.view, base)?;
        let below = GuestRange::between(GuestOffset::ZERO, end);
        for window in self.question.windows(GuestOffset::ZERO) {
            let Some(window) = window?.intersect(&below) else { break };
            let needs = self.question.needs(window)?;
            let needs: Vec<Supplied> =
                needs.into_iter().filter_map(|need| need.clip(&below)).map(supplied).collect();
            let mut found: Vec<Supplied> = Vec::new();
            base.resolve(window, &mut found)?;
            if differ.first_difference(&needs, &found, cancel, &|_| {})?.is_some() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Opens an image again on the same files, with nothing of it in the system's cache.
pub(crate) fn reopen(image: &Image) -> Result<Image> {
    let drop_cache = |file: &dyn Storage| {
        // Data that is not written yet would stay in the cache, so write it first. An error of that is a failed
        // barrier.
        file.sync().map_err(|e| Error::barrier(image.path(), e))?;
        file.drop_cache().map_err(|e| Error::io(image.path(), FileOp::DropCache, None, e))
    };
    drop_cache(&**image.file())?;
    let data_file = image.as_qcow2().filter(|q| q.has_data_file()).map(|q| q.data_file().clone());
    if let Some(file) = &data_file {
        drop_cache(&**file)?;
    }
    Image::open(image.path(), image.file().clone(), image.format(), data_file)
}

fn supplied(need: Need) -> Supplied {
    let supply = match need.origin {
        Origin::Plain { layer, host } => Supply::Layer { layer, mapping: Mapping::Data { host } },
        Origin::Compressed { layer, part, .. } => Supply::Layer { layer, mapping: Mapping::Compressed(part) },
        Origin::Zeros => Supply::Nothing,
    };
    Supplied { range: need.range, supply }
}
