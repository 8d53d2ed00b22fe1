//! Reads back what a merge has written, before anything depends on it.

use std::sync::atomic::{AtomicBool, AtomicU64};

use super::commit::Commit;
use super::safety;
use crate::error::Result;
use crate::image::Image;
use crate::transfer::ask::down;
use crate::transfer::verify::{reopen, whole_digest};
use crate::transfer::{Progress, Run};

impl Commit {
    /// Reads back what the merge has written, checks base, and returns the digest of the disk that the guest
    /// will see when base has replaced the merged layers; `None` if a layer below base cannot be read here. At
    /// this point everything is durable, and nothing is switched.
    ///
    /// # Errors
    /// As [`Job::verify`]; [`Error::Refused`] for an inconsistent base.
    pub(super) fn read_back(&self, progress: &dyn Progress, cancel: &AtomicBool) -> Result<Option<u32>> {
        let (stack, span) = (self.stack()?, self.span());
        let images = self.chain.images();
        let size = stack.active.image.virtual_size();
        let mut job = down(&images, span)?;
        job.question.base_size = self.plan.base_size_before;
        let total = self.plan.totals.bytes_to_copy + self.plan.totals.bytes_to_zero;
        job.verify(&Run { progress, total, done: AtomicU64::new(0), cancel, journal: None })?;
        safety::consistent(stack.base, cancel)?;
        let base = reopen(job.image()?)?;
        let below = images.iter().take(span.base).copied();
        let above = images.iter().skip(span.top + 1).copied();
        let then: Vec<&Image> = below.chain([&base]).chain(above).collect();
        whole_digest(&then, size, cancel)
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::sync::Arc;

    use kit::Random;

    use super::*;
    use crate::chain::Chain;
    use crate::chain::digest;
    use crate::chain::view::View;
    use crate::compare::compare;
    use crate::error::Error;
    use crate::image::{CreateOptions, create, create_raw};
    use crate::merge::{BaseChoice, CommitOptions, Prepared};
    use crate::storage::{Access, Host, MemHost};
    use crate::testing::{Silent, local, random_chain};
    use crate::transfer::put;
    use crate::units::GuestOffset;

    /// A random chain whose upper layers can be committed; with the model, and the name of its top.
    fn chain(seed: u64) -> (MemHost, Vec<u8>, PathBuf) {
        let host = MemHost::new();
        let mut dice = Random::new(seed);
        let layers = 2 + dice.below(3);
        let model = random_chain(&host, &mut dice, layers);
        (host, model, PathBuf::from(format!("/{}", layers - 1)))
    }

    fn prepare(host: &MemHost, active: &Path, options: &CommitOptions) -> Prepared {
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
                assert!(commit.plan().is_none(), "seed {seed}, {:?}", options.base);
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
            let Prepared::Merge(commit) = commit else { continue };
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
        let prepared = prepare(&host, Path::new("/1"), &options(BaseChoice::Bottom));
        let Prepared::Merge(commit) = prepared else { panic!("there is data to merge") };
        let file = host.open(Path::new("/0"), Access::ReadWrite).unwrap();
        file.write_all_at(&vec![7; 3 << 20], 1 << 20).unwrap();
        commit.read_back(&Silent, &never).unwrap();
        file.write_all_at(&[8], at).unwrap();
        let error = commit.read_back(&Silent, &never).unwrap_err();
        assert!(matches!(error, Error::Verify { guest, .. } if guest == GuestOffset::new(at)), "{error}");
    }
}
