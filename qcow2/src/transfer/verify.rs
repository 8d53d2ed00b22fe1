//! Reading back what a merge has written, before anything depends on it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::commit::{Commit, job};
use super::job::Job;
use super::needs::Need;
use super::ops::{Progress, Run};
use super::origin::Origin;
use super::safety;
use crate::chain::differ::Differ;
use crate::chain::digest;
use crate::chain::view::{Supplied, Supply, View};
use crate::error::{Error, FileOp, Result};
use crate::image::{Image, Mapping};
use crate::storage::Storage;
use crate::units::{GuestOffset, GuestRange};

impl Commit {
    /// Reads back what the merge has written, checks base, and returns the digest of what the guest will
    /// see when base has taken the place of the merged layers, unless a layer below base is not read here.
    /// Everything is durable, nothing is switched.
    ///
    /// # Errors
    /// As [`Job::verify`]; [`Error::Refused`] for an inconsistent base.
    pub(super) fn read_back(&self, progress: &dyn Progress, cancel: &AtomicBool) -> Result<Option<u32>> {
        let span = self.span();
        let images = self.chain.images();
        let size = images.get(span.active).map_or(0, |image| image.virtual_size());
        if self.plan.nothing_to_do.is_some() {
            return whole_digest(&images, size, cancel);
        }
        let mut job = job(&images, span)?;
        job.question.base_size = self.plan.base_size_before;
        let total = self.plan.totals.bytes_to_copy + self.plan.totals.bytes_to_zero;
        job.verify(&Run { progress, total, done: AtomicU64::new(0), cancel, journal: None })?;
        safety::consistent(&self.chain, span.base, cancel)?;
        let base = reopen(job.image()?)?;
        let above = images.get(span.top + 1..).unwrap_or_default();
        let mut then: Vec<&Image> = images.get(..span.base).unwrap_or_default().to_vec();
        then.push(&base);
        then.extend(above);
        whole_digest(&then, size, cancel)
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
        // What lies in a format that is not read here is not what the merge has moved.
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
fn whole_digest(images: &[&Image], size: u64, cancel: &AtomicBool) -> Result<Option<u32>> {
    let Some(top) = images.len().checked_sub(1).filter(|_| !has_foreign_bottom(images)) else {
        return Ok(None);
    };
    digest(View::new(images, 0, top), size, cancel).map(Some)
}

fn has_foreign_bottom(images: &[&Image]) -> bool {
    matches!(images.first(), Some(Image::Foreign(_)))
}

impl Job<'_> {
    /// Whether base holds, below the guest offset `end`, what the layers above it show there. `end` lies inside base's
    /// disk.
    ///
    /// # Errors
    /// Whatever reading reports; [`Error::Cancelled`].
    pub(super) fn holds(&self, end: GuestOffset, cancel: &AtomicBool) -> Result<bool> {
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
fn reopen(image: &Image) -> Result<Image> {
    let drop_cache = |file: &dyn Storage| {
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

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::sync::Arc;

    use super::super::{BaseChoice, CommitOptions, put};
    use super::*;
    use crate::chain::Chain;
    use crate::compare::compare;
    use crate::image::{CreateOptions, create, create_raw};
    use crate::merge::testing::{Dice, Silent, local, random_chain};
    use crate::storage::{Access, Host, MemHost};

    /// A random chain whose upper layers can be committed; with the model, and the name of its top.
    fn chain(seed: u64) -> (MemHost, Vec<u8>, PathBuf) {
        let host = MemHost::new();
        let mut dice = Dice(seed);
        let layers = 2 + dice.roll(3);
        let model = random_chain(&host, &mut dice, layers);
        (host, model, PathBuf::from(format!("/{}", layers - 1)))
    }

    fn prepare(host: &MemHost, active: &Path, options: &CommitOptions) -> Commit {
        Commit::prepare(Arc::new(host.clone()), active, options, &AtomicBool::new(false)).unwrap()
    }

    fn options(base: BaseChoice) -> CommitOptions {
        CommitOptions { verify: true, open: local(), base, ..CommitOptions::default() }
    }

    #[test]
    fn a_verified_commit_tells_the_digest_of_what_the_guest_sees() {
        for seed in 0..40 {
            for base in [BaseChoice::Bottom, BaseChoice::Shallow] {
                let (host, model, active) = chain(seed);
                let options = options(base);
                let commit = prepare(&host, &active, &options);
                let report = commit.execute(&Silent, &AtomicBool::new(false)).unwrap();
                assert_eq!(report.digest, Some(crc32fast::hash(&model)), "seed {seed}, {:?}", options.base);
                let after = Chain::open(&host, &active, &local()).unwrap();
                let images = after.images();
                let view = View::new(&images, 0, after.active());
                let now = digest(view, model.len() as u64, &AtomicBool::new(false)).unwrap();
                assert_eq!(Some(now), report.digest, "seed {seed}, {:?}", options.base);
                drop(after);
                // Again, with nothing to do.
                let commit = prepare(&host, &active, &options);
                assert!(commit.plan().nothing_to_do.is_some(), "seed {seed}, {:?}", options.base);
                let report = commit.execute(&Silent, &AtomicBool::new(false)).unwrap();
                assert_eq!(report.digest, Some(now), "seed {seed}, {:?}", options.base);
            }
        }
    }

    #[test]
    fn a_base_that_does_not_hold_the_data_is_found_out() {
        let mut found = 0;
        for seed in 0..20 {
            let (host, model, active) = chain(seed);
            let commit = prepare(&host, &active, &options(BaseChoice::Bottom));
            if commit.plan().totals.bytes_to_copy == 0 {
                continue;
            }
            // Nothing was moved yet, so the first byte that the overlays changed must be the finding.
            let images = commit.chain.images();
            let (whole, base) = (View::new(&images, 0, commit.chain.active()), View::new(&images, 0, 0));
            let differ = compare(whole, base, &Silent, &AtomicBool::new(false)).unwrap().first_difference;
            let Some(expected) = differ.filter(|at| at.get() < model.len() as u64) else { continue };
            let error = commit.read_back(&Silent, &AtomicBool::new(false)).unwrap_err();
            let Error::Verify { guest, path, .. } = error else { panic!("seed {seed}: {error}") };
            assert_eq!((guest, path.as_path()), (expected, Path::new("/0")), "seed {seed}");
            found += 1;
        }
        assert!(found > 10, "only {found} chains had something to find");
    }

    #[test]
    fn one_wrong_byte_in_a_raw_base_is_found() {
        let host = MemHost::new();
        create_raw(&host, Path::new("/0"), 8 << 20).unwrap();
        let backing = Some((b"/0".to_vec(), "raw".to_owned()));
        let kind = CreateOptions { backing, ..CreateOptions::new(8 << 20) };
        create(&host, Path::new("/1"), &kind).unwrap();
        let bytes = vec![7; 3 << 20];
        put(&host, Path::new("/1"), &local(), &[(GuestOffset::new(1 << 20), bytes)]).unwrap();
        let (never, at) = (AtomicBool::new(false), (3 << 20) + 12345);
        let commit = prepare(&host, Path::new("/1"), &options(BaseChoice::Bottom));
        let file = host.open(Path::new("/0"), Access::ReadWrite).unwrap();
        file.write_all_at(&vec![7; 3 << 20], 1 << 20).unwrap();
        commit.read_back(&Silent, &never).unwrap();
        file.write_all_at(&[8], at).unwrap();
        let error = commit.read_back(&Silent, &never).unwrap_err();
        assert!(matches!(error, Error::Verify { guest, .. } if guest == GuestOffset::new(at)), "{error}");
    }
}
