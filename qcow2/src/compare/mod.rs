//! Compares what a guest sees through two images or chains.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::chain::differ::Differ;
use crate::chain::view::{Supplied, Supply, View};
use crate::error::Result;
use crate::transfer::Progress;
use crate::units::{GuestOffset, GuestRange};

/// What a comparison has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Comparison {
    /// Whether the guest sees the same bytes. Disks of different sizes count as equal if the rest of the longer
    /// one is zero, as for `qemu-img compare` without `-s`.
    pub same: bool,
    /// The first byte that differs.
    pub first_difference: Option<GuestOffset>,
    /// The size of the first disk in bytes.
    pub size_a: u64,
    /// The size of the second disk in bytes.
    pub size_b: u64,
}

/// Compares two disks on all cores, up to the first difference. Ranges that are zero on both sides, or that
/// both sides read from the same place of the same file, are not read. `progress` counts the compared bytes of
/// the longer disk.
///
/// # Errors
/// Tables or data that cannot be read or are damaged; [`Error::Cancelled`](crate::Error::Cancelled).
pub fn compare(a: View<'_>, b: View<'_>, progress: &dyn Progress, cancel: &AtomicBool) -> Result<Comparison> {
    let differ = Differ::new(a, b)?;
    let (size_a, size_b) = (a.size(), b.size());
    let total = size_a.max(size_b);
    let end = GuestOffset::new(total);
    let window = a.window().min(b.window());
    let done = AtomicU64::new(0);
    let count = |bytes: u64| progress.written(done.fetch_add(bytes, Ordering::Relaxed) + bytes, total);

    let mut at = GuestOffset::ZERO;
    let mut first_difference = None;
    while at < end && first_difference.is_none() {
        // Up to here neither side supplies anything: both read as zeros, and are equal.
        let next = [a.next_supplied(at)?, b.next_supplied(at)?, Some(end)].into_iter().flatten().min();
        let next = next.unwrap_or(end);
        count(next - at);
        let range = GuestRange::between(next, (next.align_down(window) + window).min(end));
        let (left, right) = rayon::join(|| resolve(&a, range), || resolve(&b, range));
        first_difference = differ.first_difference(&left?, &right?, cancel, &count)?;
        at = range.end();
    }
    Ok(Comparison { same: first_difference.is_none(), first_difference, size_a, size_b })
}

/// What supplies each part of a window; behind the disk's end it reads as zeros.
fn resolve(view: &View<'_>, range: GuestRange) -> Result<Vec<Supplied>> {
    let mut supplied = Vec::new();
    view.resolve(range, &mut supplied)?;
    let behind = GuestRange::between(range.start.max(GuestOffset::new(view.size())), range.end());
    if !behind.is_empty() {
        supplied.push(Supplied { range: behind, supply: Supply::Nothing });
    }
    Ok(supplied)
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::{Arc, Mutex};

    use kit::Random;

    use super::*;
    use crate::chain::Chain;
    use crate::error::ErrorKind;
    use crate::image::{Image, ImageFormat};
    use crate::storage::{MemFile, MemHost, Storage};
    use crate::testing::{Silent, local, random_chain};

    /// Remembers the last report.
    #[derive(Default)]
    struct Last(Mutex<(u64, u64)>);

    impl Progress for Last {
        fn written(&self, done: u64, total: u64) {
            let mut last = self.0.lock().unwrap();
            *last = (last.0.max(done), total);
        }
    }

    fn raw(len: u64, writes: &[(u64, &[u8])]) -> Image {
        let file = MemFile::new();
        file.set_len(len).unwrap();
        for (at, bytes) in writes {
            file.write_all_at(bytes, *at).unwrap();
        }
        Image::open(Path::new("/raw"), Arc::new(file), ImageFormat::Raw, None).unwrap()
    }

    fn run(a: &Image, b: &Image) -> (Comparison, (u64, u64)) {
        let (left, right) = ([a], [b]);
        let last = Last::default();
        let found = compare(View::new(&left, 0, 0), View::new(&right, 0, 0), &last, &AtomicBool::new(false));
        (found.unwrap(), last.0.into_inner().unwrap())
    }

    const GIB: u64 = 1 << 30;

    #[test]
    fn the_first_difference_is_found_and_not_another() {
        let mut bytes = vec![7u8; 5 << 20];
        let a = raw(3 * GIB, &[(GIB, &bytes), (2 * GIB, b"x")]);
        let same = raw(3 * GIB, &[(GIB, &bytes), (2 * GIB, b"x")]);
        let (found, progress) = run(&a, &same);
        assert_eq!(
            found,
            Comparison { same: true, first_difference: None, size_a: 3 * GIB, size_b: 3 * GIB }
        );
        assert_eq!(progress, (3 * GIB, 3 * GIB));
        for at in [0, 4095, (3 << 20) + 17, (5 << 20) - 1] {
            bytes[at] ^= 1;
            let other = raw(3 * GIB, &[(GIB, &bytes), (2 * GIB, b"y")]);
            let (found, _) = run(&a, &other);
            assert_eq!(found.first_difference, Some(GuestOffset::new(GIB + at as u64)));
            assert!(!found.same);
            bytes[at] ^= 1;
        }
        let (found, _) = run(&a, &raw(3 * GIB, &[(GIB, &bytes)]));
        assert_eq!(found.first_difference, Some(GuestOffset::new(2 * GIB)));
    }

    #[test]
    fn a_longer_disk_is_the_same_if_its_rest_is_zero() {
        let short = raw(GIB, &[(5, b"x")]);
        let zeros = raw(4 * GIB, &[(5, b"x"), (2 * GIB, &[0; 100])]);
        let tail = raw(4 * GIB, &[(5, b"x"), (GIB, &[0; 10]), (GIB + 10, b"y")]);
        for (a, b) in [(&short, &zeros), (&zeros, &short)] {
            assert!(run(a, b).0.same);
        }
        for (a, b) in [(&short, &tail), (&tail, &short)] {
            assert_eq!(run(a, b).0.first_difference, Some(GuestOffset::new(GIB + 10)));
        }
        assert!(run(&raw(0, &[]), &raw(0, &[])).0.same);
        assert!(run(&raw(0, &[]), &raw(GIB, &[])).0.same);
    }

    #[test]
    fn random_chains_differ_where_their_models_do() {
        let mut differences = 0;
        for seed in 0..40 {
            let host = MemHost::new();
            let mut dice = Random::new(seed);
            let layers = 1 + dice.below(4);
            let model = random_chain(&host, &mut dice, layers);
            let active = format!("/{}", layers - 1);
            let chain = Chain::open(&host, Path::new(&active), &local()).unwrap();
            let images = chain.images();
            let view = View::new(&images, 0, chain.active());
            for round in 0..10 {
                // The same disk in one raw file, longer or shorter, with some bytes changed.
                let mut other = model.clone();
                other.resize(((1 + dice.below(4096)) * 512) as usize, 0);
                for _ in 0..round {
                    let at = dice.below(other.len() as u64) as usize;
                    other[at] ^= dice.below(2) as u8;
                }
                let longer = model.len().max(other.len());
                let byte = |bytes: &[u8], at| bytes.get(at).copied().unwrap_or(0);
                let expected = (0..longer).find(|&at| byte(&model, at) != byte(&other, at));
                let other = raw(other.len() as u64, &[(0, &other)]);
                let (other, never) = ([&other], AtomicBool::new(false));
                let other = View::new(&other, 0, 0);
                for (a, b) in [(view, other), (other, view)] {
                    let found = compare(a, b, &Silent, &never).unwrap();
                    let at = found.first_difference.map(|at| at.get() as usize);
                    assert_eq!((at, found.same), (expected, expected.is_none()), "seed {seed}");
                    assert_eq!((found.size_a, found.size_b), (a.size(), b.size()));
                }
                differences += usize::from(expected.is_some());
            }
            assert!(compare(view, view, &Silent, &AtomicBool::new(false)).unwrap().same);
        }
        assert!((100..390).contains(&differences), "{differences}");
    }

    #[test]
    fn a_comparison_stops_on_request() {
        let (a, b) = (raw(GIB, &[(0, b"x")]), raw(GIB, &[(0, b"x")]));
        let (left, right) = ([&a], [&b]);
        let stopped = compare(
            View::new(&left, 0, 0),
            View::new(&right, 0, 0),
            &Last::default(),
            &AtomicBool::new(true),
        );
        assert_eq!(stopped.unwrap_err().kind(), ErrorKind::Cancelled);
    }
}
