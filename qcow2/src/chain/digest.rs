//! A digest of all that the guest sees.

use std::sync::atomic::{AtomicBool, Ordering};

use crc32fast::Hasher;
use rayon::prelude::*;

use super::view::{Supplied, View};
use crate::error::{Error, Result};
use crate::image::ClusterCache;
use crate::units::{GuestOffset, GuestRange};

/// How many bytes of data one worker hashes per group, roughly, and the most that it reads at once.
const PIECE: u64 = 1 << 20;

/// The CRC-32 (IEEE, as in zip and gzip) of the first `size` bytes that the guest sees through `view`; what
/// lies behind the disk's end counts as zeros. With the disk's size as `size`, it is the plain CRC-32 of what
/// `qemu-img convert -O raw` writes. Zeros that the layers' tables tell of are combined in, not hashed byte by
/// byte.
///
/// # Errors
/// A table or data that cannot be read or is damaged; [`Error::Cancelled`].
pub fn digest(view: View<'_>, size: u64, cancel: &AtomicBool) -> Result<u32> {
    let zeros = ZeroCrcs::new();
    let mut all = PartDigest::EMPTY;
    let mut supplied: Vec<Supplied> = Vec::new();
    let end = GuestOffset::new(size);
    while all.len < size {
        let at = GuestOffset::new(all.len);
        let next = view.next_supplied(at)?.map_or(end, |next| next.min(end));
        all = all.then(zeros.part(next - at));
        let window_end = (next.align_down(view.window()) + view.window()).min(end);
        supplied.clear();
        view.resolve(GuestRange::between(next, window_end), &mut supplied)?;
        let groups = group(&supplied);
        let parts: Vec<PartDigest> = groups
            .par_iter()
            .map_init(DigestWorker::default, |worker, group| worker.hash(&view, group, &zeros, cancel))
            .collect::<Result<_>>()?;
        all = parts.into_iter().fold(all, PartDigest::then);
        all = all.then(zeros.part(window_end.get().saturating_sub(all.len)));
    }
    Ok(all.crc)
}

/// The digest of some bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct PartDigest {
    crc: u32,
    len: u64,
}

impl PartDigest {
    const EMPTY: Self = Self { crc: 0, len: 0 };

    /// The digest of these bytes followed by others.
    fn then(self, next: Self) -> Self {
        let mut hasher = Hasher::new_with_initial_len(self.crc, self.len);
        hasher.combine(&Hasher::new_with_initial_len(next.crc, next.len));
        Self { crc: hasher.finalize(), len: self.len + next.len }
    }
}

/// Digests of runs of zeros whose lengths are powers of two, shortest first: each run is twice the one before
/// it.
struct ZeroCrcs([PartDigest; 64]);

impl ZeroCrcs {
    fn new() -> Self {
        let mut next = PartDigest { crc: crc32fast::hash(&[0]), len: 1 };
        Self(std::array::from_fn(|n| {
            let this = next;
            if n < 63 {
                next = this.then(this);
            }
            this
        }))
    }

    /// The digest of `len` zeros.
    fn part(&self, len: u64) -> PartDigest {
        let set = self.0.iter().enumerate().filter(|(bit, _)| len >> bit & 1 == 1);
        set.fold(PartDigest::EMPTY, |all, (_, run)| all.then(*run))
    }
}

/// Cuts a window into consecutive groups with about [`PIECE`] bytes of data each, so that workers are evenly
/// loaded.
fn group(supplied: &[Supplied]) -> Vec<Vec<Supplied>> {
    let mut groups: Vec<Vec<Supplied>> = Vec::new();
    let mut open: Vec<Supplied> = Vec::new();
    let mut bytes = 0;
    for part in supplied {
        let mut at = part.range.start;
        while at < part.range.end() {
            // A run of zeros is one piece however long it is.
            let len = if part.supply.is_zero() { u64::MAX } else { PIECE - bytes };
            let Some(piece) = part.clip(&GuestRange { start: at, len }) else { break };
            at = piece.range.end();
            open.push(piece);
            bytes += if piece.supply.is_zero() { 0 } else { piece.range.len };
            if bytes >= PIECE {
                groups.push(std::mem::take(&mut open));
                bytes = 0;
            }
        }
    }
    groups.push(open);
    groups
}

/// What a worker keeps between groups.
#[derive(Debug, Default)]
struct DigestWorker {
    buf: Vec<u8>,
    cache: ClusterCache,
}

impl DigestWorker {
    fn hash(
        &mut self,
        view: &View<'_>,
        group: &[Supplied],
        zeros: &ZeroCrcs,
        cancel: &AtomicBool,
    ) -> Result<PartDigest> {
        let mut all = PartDigest::EMPTY;
        for part in group {
            if cancel.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
            if part.supply.is_zero() {
                all = all.then(zeros.part(part.range.len));
                continue;
            }
            self.buf.resize(part.range.len as usize, 0);
            view.read_supplied(part, &mut self.buf, &mut self.cache)?;
            let mut hasher = Hasher::new_with_initial_len(all.crc, all.len);
            hasher.update(&self.buf);
            all = PartDigest { crc: hasher.finalize(), len: all.len + part.range.len };
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_of_any_length_are_combined() {
        let zeros = ZeroCrcs::new();
        for len in [0usize, 1, 2, 3, 511, 512, 4097, 1_000_003] {
            assert_eq!(
                zeros.part(len as u64),
                PartDigest { crc: crc32fast::hash(&vec![0; len]), len: len as u64 }
            );
        }
        // Two ways to the same length, far past what can be hashed.
        let long = zeros.part(1 << 50).then(zeros.part(12345));
        assert_eq!(long, zeros.part((1 << 50) + 12345));
    }

    #[test]
    fn parts_follow_each_other() {
        let bytes: Vec<u8> = (0..1000u32).map(|n| (n * n) as u8).collect();
        let (a, b) = bytes.split_at(313);
        let part = |b: &[u8]| PartDigest { crc: crc32fast::hash(b), len: b.len() as u64 };
        assert_eq!(part(a).then(part(b)), part(&bytes));
        assert_eq!(PartDigest::EMPTY.then(part(a)), part(a));
        assert_eq!(part(a).then(PartDigest::EMPTY), part(a));
    }
}
