//! Reading back what a merge has written, before anything depends on it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::commit::{Commit, job};
use super::job::Job;
use super::needs::{Content, Need};
use super::ops::{Progress, Run};
use super::safety;
use crate::chain::differ::Differ;
use crate::chain::digest;
use crate::chain::view::{Supplied, Supply, View};
use crate::error::{Error, Result};
use crate::image::{Image, Mapping};
use crate::storage::Storage;
use crate::units::{GuestOffset, GuestRange};

impl Commit {
    /// Reads back what the merge has written, checks base, and returns the digest of what the guest will
    /// see when base has taken the place of the merged layers. Everything is durable, nothing is switched.
    ///
    /// # Errors
    /// As [`Job::verify`]; [`Error::Refused`] for an inconsistent base.
    pub(super) fn read_back(&self, progress: &dyn Progress, cancel: &AtomicBool) -> Result<u32> {
        let span = self.span();
        let images = self.chain.images();
        let size = images.get(span.active).map_or(0, |image| image.virtual_size());
        if self.plan.nothing_to_do.is_some() {
            return digest(View::new(&images, 0, span.active), size, cancel);
        }
        let mut job = job(&images, span)?;
        job.question.base_size = self.plan.base_size_before;
        let total = self.plan.totals.bytes_to_copy + self.plan.totals.bytes_to_zero;
        job.verify(&Run { progress, total, done: AtomicU64::new(0), cancel })?;
        safety::consistent(&self.chain, span.base, cancel)?;
        let base = reopen(job.image()?)?;
        let above = images.get(span.top + 1..).unwrap_or_default();
        let mut then: Vec<&Image> = images.get(..span.base).unwrap_or_default().to_vec();
        then.push(&base);
        then.extend(above);
        digest(View::new(&then, 0, span.base + above.len()), size, cancel)
    }
}

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
        let base = View::new(&images, 0, self.base);
        let differ = Differ::new(self.question.view, base)?;
        let compared = AtomicU64::new(0);
        let count = |bytes: u64| {
            compared.fetch_add(bytes, Ordering::Relaxed);
            run.progress.written(run.done.fetch_add(bytes, Ordering::Relaxed) + bytes, run.total);
        };
        for window in self.question.windows() {
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

/// Opens an image again on the same files, with nothing of it in the system's cache.
fn reopen(image: &Image) -> Result<Image> {
    let drop_cache = |file: &dyn Storage| {
        file.drop_cache().map_err(|e| Error::io(image.path(), "drop the cache of", None, e))
    };
    drop_cache(&**image.file())?;
    let data_file = image.as_qcow2().filter(|q| q.has_data_file()).map(|q| q.data_file().clone());
    if let Some(file) = &data_file {
        drop_cache(&**file)?;
    }
    Image::open(image.path(), image.file().clone(), image.format(), data_file)
}

fn supplied(need: Need) -> Supplied {
    let supply = match need.content {
        Content::Plain { layer, host } => Supply::Layer { layer, mapping: Mapping::Data { host } },
        Content::Compressed { layer, part } => Supply::Layer { layer, mapping: Mapping::Compressed(part) },
        Content::Zeros => Supply::Nothing,
    };
    Supplied { range: need.range, supply }
}
