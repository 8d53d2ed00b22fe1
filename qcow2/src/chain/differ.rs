//! Finds the first byte in which two views differ. Ranges that are known to be equal are not read.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rayon::prelude::*;

use super::view::{Supplied, Supply, View};
use crate::error::{Error, FileOp, Result};
use crate::image::{ClusterCache, Mapping};
use crate::storage::FileId;
use crate::units::{GuestOffset, GuestRange};

/// The most bytes that one worker reads of each side at once.
const PIECE: u64 = 1 << 20;

/// Two views whose bytes are compared.
#[derive(Debug)]
pub(crate) struct Differ<'a> {
    a: View<'a>,
    b: View<'a>,
    /// The files that hold the layers' data, by position.
    a_files: Vec<FileId>,
    b_files: Vec<FileId>,
}

/// A range that both lists cover, and what supplies it on each side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pair {
    pub(super) range: GuestRange,
    pub(super) a: Supply,
    pub(super) b: Supply,
}

/// The bytes of one side of a pair; `None` where it is zeros.
pub(super) type SideBytes<'w> = Option<&'w [u8]>;

/// What a worker keeps between pairs. Each side numbers its own layers, and a cache is keyed by the number; so
/// each side has its own cache.
#[derive(Debug, Default)]
pub(super) struct DifferWorker {
    a: Vec<u8>,
    b: Vec<u8>,
    a_cache: ClusterCache,
    b_cache: ClusterCache,
}

impl<'a> Differ<'a> {
    /// Prepares to compare two views.
    ///
    /// # Errors
    /// A file whose identity cannot be read.
    pub(crate) fn new(a: View<'a>, b: View<'a>) -> Result<Self> {
        Ok(Self { a_files: files(&a)?, b_files: files(&b)?, a, b })
    }

    /// The first offset where the bytes differ, among the ranges that both lists cover. Each list comes from
    /// its view, sorted and disjoint. `done` is called from many threads with the number of bytes that were
    /// just compared.
    ///
    /// # Errors
    /// Data that cannot be read or inflated; [`Error::Cancelled`].
    pub(crate) fn first_difference(
        &self,
        a: &[Supplied],
        b: &[Supplied],
        cancel: &AtomicBool,
        done: &(dyn Fn(u64) + Sync),
    ) -> Result<Option<GuestOffset>> {
        let mut pieces: Vec<Pair> = Vec::new();
        for_each_pair(a, b, |pair| {
            if self.known_same(&pair) {
                done(pair.range.len);
            } else {
                pieces.extend(pair.pieces());
            }
        });
        let first = AtomicU64::new(u64::MAX);
        // A worker is made for each run of pieces: longer runs keep its buffers and inflated clusters in use,
        // but there must be enough runs for every thread.
        pieces.par_iter().with_min_len((pieces.len() / 64).clamp(1, 32)).try_for_each_init(
            DifferWorker::default,
            |worker, pair| {
                if cancel.load(Ordering::Relaxed) {
                    return Err(Error::Cancelled);
                }
                // A piece behind a difference that is already found cannot hold the first one.
                if pair.range.start.get() < first.load(Ordering::Relaxed)
                    && let Some(at) = self.compare(pair, worker)?
                {
                    first.fetch_min(at.get(), Ordering::Relaxed);
                }
                done(pair.range.len);
                Ok(())
            },
        )?;
        let first = first.into_inner();
        Ok((first != u64::MAX).then(|| GuestOffset::new(first)))
    }

    /// Whether no byte needs to be read: both sides are zeros, or the same bytes of the same file.
    pub(super) fn known_same(&self, pair: &Pair) -> bool {
        let place = |supply: &Supply, files: &[FileId]| match supply {
            Supply::Layer { layer, mapping: mapping @ (Mapping::Data { .. } | Mapping::Compressed(_)) } => {
                files.get(*layer).map(|file| (*file, *mapping))
            }
            _ => None,
        };
        let same_place = || {
            let a = place(&pair.a, &self.a_files);
            a.is_some() && a == place(&pair.b, &self.b_files)
        };
        (pair.a.is_zero() && pair.b.is_zero()) || same_place()
    }

    fn compare(&self, pair: &Pair, worker: &mut DifferWorker) -> Result<Option<GuestOffset>> {
        let at = match self.read(pair, worker)? {
            (None, None) => None,
            (Some(bytes), None) | (None, Some(bytes)) => first_nonzero(bytes),
            (Some(a), Some(b)) => first_difference(a, b),
        };
        Ok(at.map(|at| pair.range.start + at as u64))
    }

    /// The bytes of both sides; `None` for a side that is zeros.
    ///
    /// # Errors
    /// Data that cannot be read or inflated.
    pub(super) fn read<'w>(
        &self,
        pair: &Pair,
        worker: &'w mut DifferWorker,
    ) -> Result<(SideBytes<'w>, SideBytes<'w>)> {
        let DifferWorker { a, b, a_cache, b_cache } = worker;
        let len = pair.range.len as usize;
        let read = |view: &View<'_>, supply: Supply, buf: &mut Vec<u8>, cache: &mut ClusterCache| {
            if supply.is_zero() {
                return Ok(());
            }
            buf.resize(len, 0);
            view.read_supplied(&Supplied { range: pair.range, supply }, buf, cache)
        };
        read(&self.a, pair.a, a, a_cache)?;
        read(&self.b, pair.b, b, b_cache)?;
        let (a, b): (&[u8], &[u8]) = (a, b);
        Ok(((!pair.a.is_zero()).then_some(a), (!pair.b.is_zero()).then_some(b)))
    }
}

/// The files that hold the data of a view's layers.
fn files(view: &View<'_>) -> Result<Vec<FileId>> {
    let id = |image: &&crate::image::Image| {
        let stat = image.data_file().stat().map_err(|e| Error::io(image.path(), FileOp::Stat, None, e))?;
        Ok(stat.id)
    };
    view.layers.iter().map(id).collect()
}

/// Calls `f` with each range that both lists cover.
pub(super) fn for_each_pair(a: &[Supplied], b: &[Supplied], mut f: impl FnMut(Pair)) {
    let (mut a, mut b) = (a.iter().peekable(), b.iter().peekable());
    while let (Some(left), Some(right)) = (a.peek(), b.peek()) {
        if let (Some(l), Some(r)) = (left.clip(&right.range), right.clip(&left.range)) {
            f(Pair { range: l.range, a: l.supply, b: r.supply });
        }
        if left.range.end() <= right.range.end() {
            a.next();
        } else {
            b.next();
        }
    }
}

impl Pair {
    /// The part inside `range`, or `None` if they do not meet.
    pub(super) fn clip(&self, range: &GuestRange) -> Option<Self> {
        let both = self.range.intersect(range)?;
        let skip = both.start - self.range.start;
        Some(Self { range: both, a: self.a.advance(skip), b: self.b.advance(skip) })
    }

    fn pieces(self) -> impl Iterator<Item = Pair> {
        (0..self.range.len.div_ceil(PIECE)).map(move |n| Pair {
            range: GuestRange {
                start: self.range.start + n * PIECE,
                len: PIECE.min(self.range.len - n * PIECE),
            },
            a: self.a.advance(n * PIECE),
            b: self.b.advance(n * PIECE),
        })
    }
}

/// Bytes are compared in strides of this length, as slices, which is fast. Only a stride that differs is
/// searched byte by byte.
const STRIDE: usize = 4096;
static ZEROS: [u8; STRIDE] = [0; STRIDE];

pub(super) fn first_nonzero(bytes: &[u8]) -> Option<usize> {
    let (n, chunk) = bytes.chunks(STRIDE).enumerate().find(|(_, c)| ZEROS.get(..c.len()) != Some(*c))?;
    Some(n * STRIDE + chunk.iter().position(|&b| b != 0)?)
}

pub(super) fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    let (n, (a, b)) = a.chunks(STRIDE).zip(b.chunks(STRIDE)).enumerate().find(|(_, (a, b))| a != b)?;
    Some(n * STRIDE + a.iter().zip(b).position(|(a, b)| a != b)?)
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use super::*;
    use crate::image::{Image, ImageFormat};
    use crate::storage::MemFile;
    use crate::units::HostOffset;

    fn part(start: u64, len: u64, host: Option<u64>) -> Supplied {
        let supply = match host {
            Some(host) => Supply::Layer { layer: 0, mapping: Mapping::Data { host: HostOffset::new(host) } },
            None => Supply::Nothing,
        };
        Supplied { range: GuestRange { start: GuestOffset::new(start), len }, supply }
    }

    #[test]
    fn pairs_are_the_ranges_that_both_lists_hold() {
        let a = [part(0, 10, Some(100)), part(20, 10, None), part(30, 100, Some(500))];
        let b = [part(5, 20, Some(0)), part(28, 10, Some(1000)), part(60, 10, None)];
        let mut pairs = Vec::new();
        for_each_pair(&a, &b, |pair| pairs.push(pair));
        let found: Vec<_> = pairs.iter().map(|p| (p.range.start.get(), p.range.len)).collect();
        assert_eq!(found, [(5, 5), (20, 5), (28, 2), (30, 8), (60, 10)]);
        assert_eq!(pairs[0].a, part(0, 1, Some(105)).supply);
        assert_eq!(pairs[3].b, part(0, 1, Some(1002)).supply);
        assert_eq!(pairs[4].a, part(0, 1, Some(530)).supply);
    }

    #[test]
    fn the_same_place_of_the_same_file_is_known_to_be_the_same() {
        let (one, other) = (Arc::new(MemFile::new()), Arc::new(MemFile::new()));
        let open =
            |file: &Arc<MemFile>| Image::open(Path::new("/x"), file.clone(), ImageFormat::Raw, None).unwrap();
        let (one, again, other) = (open(&one), open(&one), open(&other));
        let (a, b) = ([&one], [&other, &again]);
        let differ = Differ::new(View::new(&a, 0, 0), View::new(&b, 0, 1)).unwrap();
        let data =
            |layer, host| Supply::Layer { layer, mapping: Mapping::Data { host: HostOffset::new(host) } };
        let range = GuestRange { start: GuestOffset::ZERO, len: 10 };
        let same = |a, b| differ.known_same(&Pair { range, a, b });
        assert!(same(data(0, 5), data(1, 5)));
        assert!(!same(data(0, 5), data(1, 6)));
        assert!(!same(data(0, 5), data(0, 5)));
        assert!(same(Supply::Nothing, Supply::PastEnd { layer: 1 }));
        assert!(!same(Supply::Nothing, data(1, 5)));
    }

    #[test]
    fn long_pairs_are_cut() {
        let range = GuestRange { start: GuestOffset::new(3), len: 2 * PIECE + 1 };
        let pair = Pair { range, a: part(0, 1, Some(7)).supply, b: Supply::Nothing };
        let pieces: Vec<_> = pair.pieces().collect();
        assert_eq!(pieces.iter().map(|p| p.range.len).collect::<Vec<_>>(), [PIECE, PIECE, 1]);
        assert_eq!(pieces[2].a, part(0, 1, Some(7 + 2 * PIECE)).supply);
    }

    #[test]
    fn the_first_byte_is_found_wherever_it_lies() {
        for len in [1, STRIDE - 1, STRIDE, STRIDE + 1, 3 * STRIDE + 7] {
            let zeros = vec![0u8; len];
            assert_eq!(first_nonzero(&zeros), None);
            assert_eq!(first_difference(&zeros, &zeros), None);
            for at in [0, len / 2, len - 1] {
                let mut other = zeros.clone();
                other[at..].fill(1);
                assert_eq!(first_nonzero(&other), Some(at));
                assert_eq!(first_difference(&zeros, &other), Some(at));
            }
        }
    }
}
