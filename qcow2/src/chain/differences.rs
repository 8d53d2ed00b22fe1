//! Where a disk would change if other layers lay below its image: unit by unit, on all cores.
//!
//! A unit is what the image can hold by itself: a cluster, or a subcluster. What the image holds is seen whatever lies
//! below. Of the rest, what both sides read from the same place of the same file is the same, and so are zeros on both
//! sides; only what is left is read.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rayon::prelude::*;

use super::differ::{Differ, DifferWorker, Pair, first_difference, first_nonzero, for_each_pair};
use super::view::{Supplied, Supply, View};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::units::{GuestOffset, GuestRange};

/// The most bytes that one worker reads of each side at once, unless a unit is larger.
const PIECE: u64 = 1 << 20;

/// The most ranges that are remembered: what they take is some tens of megabytes.
const REMEMBERED: usize = 1 << 20;

/// Units that would show something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DifferentRange {
    /// The range, never empty: whole units, or up to the end of the disk.
    pub(crate) range: GuestRange,
    /// Whether all of it is zeros now.
    pub(crate) is_zero: bool,
}

impl DifferentRange {
    fn clip(&self, range: &GuestRange) -> Option<Self> {
        Some(Self { range: self.range.intersect(range)?, ..*self })
    }
}

/// An image, the layers below it, and those that will lie there.
#[derive(Debug)]
pub(crate) struct Sides<'a> {
    /// The image and what lies below it now.
    now: View<'a>,
    /// What lies below it now, if anything does.
    below: Option<View<'a>>,
    /// The position of the image in `now`.
    own: usize,
    /// What will lie below it: a view of nothing where nothing will.
    then: View<'a>,
    /// The size of a unit, in bytes.
    unit: u64,
    differ: Differ<'a>,
}

/// The ranges that differ, as far as they were looked for.
#[derive(Debug, Default)]
pub(crate) struct Differences {
    /// Sorted and disjoint.
    ranges: Vec<DifferentRange>,
    /// Everything below this offset was looked at.
    known: GuestOffset,
}

/// Neighbours that one worker compares.
#[derive(Debug)]
struct Stretch {
    /// Where the stretch begins: all of it lies inside one piece.
    start: GuestOffset,
    pairs: Vec<Pair>,
}

/// What is known of a unit.
#[derive(Clone, Copy, Debug, Default)]
struct UnitState {
    differs: bool,
    has_data: bool,
}

impl<'a> Sides<'a> {
    /// The image at `own` of `images`, which lie bottom first, and `then`, the layers that will lie below it, in the same
    /// order.
    ///
    /// # Errors
    /// A file whose identity cannot be read.
    pub(crate) fn new(images: &'a [&'a Image], own: usize, then: &'a [&'a Image]) -> Result<Self> {
        let now = View::new(images, 0, own);
        let then = View::new(then, 0, then.len().saturating_sub(1));
        let image = images.get(own).and_then(|image| image.as_qcow2());
        Ok(Self {
            now,
            below: own.checked_sub(1).map(|top| View::new(images, 0, top)),
            own,
            then,
            unit: image.map_or(1 << 16, |image| image.geometry().subcluster_size()),
            differ: Differ::new(now, then)?,
        })
    }

    /// The size of the disk that will lie below, in bytes; zero if there is none.
    pub(crate) fn size_then(&self) -> u64 {
        self.then.size()
    }

    /// How much is looked at in one go, in bytes: a multiple of every cluster size.
    fn window(&self) -> u64 {
        self.now.window().min(self.then.window())
    }

    /// The first offset at or behind `from` where either side may have something.
    ///
    /// # Errors
    /// A table that cannot be read.
    fn next(&self, from: GuestOffset) -> Result<Option<GuestOffset>> {
        let below = self.below.map(|below| below.next_allocated(from)).transpose()?.flatten();
        let then = self.then.next_allocated(from)?;
        Ok([below, then].into_iter().flatten().min().filter(|next| next.get() < self.now.size()))
    }

    /// The ranges of a window that differ; it begins and ends at borders of units, or where the disk does. `done` is told
    /// how many more bytes were compared, from many threads.
    ///
    /// # Errors
    /// Tables or data that cannot be read or are damaged; [`Error::Cancelled`].
    fn find(
        &self,
        window: GuestRange,
        cancel: &AtomicBool,
        done: &(dyn Fn(u64) + Sync),
    ) -> Result<Vec<DifferentRange>> {
        let mut now: Vec<Supplied> = Vec::new();
        self.now.resolve(window, &mut now)?;
        now.retain(|part| !matches!(part.supply, Supply::Layer { layer, .. } if layer == self.own));
        if now.is_empty() {
            return Ok(Vec::new());
        }
        let then = self.resolve_then(&now, window)?;
        let stretches = self.stretches(&now, &then);
        let found: Vec<Vec<DifferentRange>> = stretches
            .par_iter()
            .map_init(DifferWorker::default, |worker, stretch| {
                if cancel.load(Ordering::Relaxed) {
                    return Err(Error::Cancelled);
                }
                let found = self.compare(stretch, &now, worker);
                done(stretch.pairs.iter().map(|pair| pair.range.len).sum());
                found
            })
            .collect::<Result<_>>()?;
        let mut joined: Vec<DifferentRange> = Vec::new();
        for range in found.into_iter().flatten() {
            push(&mut joined, range);
        }
        Ok(joined)
    }

    /// What will supply the window, behind its end zeros. A damaged entry that the image hides is nobody's concern.
    fn resolve_then(&self, now: &[Supplied], window: GuestRange) -> Result<Vec<Supplied>> {
        let mut then: Vec<Supplied> = Vec::new();
        if self.then.resolve(window, &mut then).is_err() {
            then.clear();
            now.iter().try_for_each(|part| self.then.resolve(part.range, &mut then))?;
        }
        let end = GuestOffset::new(self.then.size());
        let behind = GuestRange::between(window.start.max(end), window.end());
        if !behind.is_empty() {
            then.push(Supplied { range: behind, supply: Supply::Nothing });
        }
        Ok(then)
    }

    /// What must be read, in stretches.
    fn stretches(&self, now: &[Supplied], then: &[Supplied]) -> Vec<Stretch> {
        let piece = PIECE.max(self.unit);
        let mut all: Vec<Stretch> = Vec::new();
        for_each_pair(now, then, |pair| {
            if self.differ.known_same(&pair) {
                return;
            }
            let mut at = pair.range.start;
            while at < pair.range.end() {
                let start = at.align_down(piece);
                let end = start + piece;
                let Some(part) = pair.clip(&GuestRange::between(at, end)) else { break };
                at = end;
                match all.last_mut() {
                    Some(last) if last.start == start => last.pairs.push(part),
                    _ => all.push(Stretch { start, pairs: vec![part] }),
                }
            }
        });
        all
    }

    /// The units of a stretch that differ.
    fn compare(
        &self,
        stretch: &Stretch,
        now: &[Supplied],
        worker: &mut DifferWorker,
    ) -> Result<Vec<DifferentRange>> {
        let mut units = vec![UnitState::default(); (PIECE.max(self.unit) / self.unit) as usize];
        for pair in &stretch.pairs {
            let (a, b) = self.differ.read(pair, worker)?;
            let mut at = pair.range.start;
            while at < pair.range.end() {
                let unit = at.align_down(self.unit);
                let end = (unit + self.unit).min(pair.range.end());
                let inside = (at - pair.range.start) as usize..(end - pair.range.start) as usize;
                let a = a.and_then(|a| a.get(inside.clone()));
                let b = b.and_then(|b| b.get(inside));
                if let Some(state) = units.get_mut(((unit - stretch.start) / self.unit) as usize) {
                    let has_data = a.is_some_and(|a| first_nonzero(a).is_some());
                    state.has_data |= has_data;
                    state.differs |= match (a, b) {
                        (Some(a), Some(b)) => first_difference(a, b).is_some(),
                        (None, Some(b)) => first_nonzero(b).is_some(),
                        _ => has_data,
                    };
                }
                at = end;
            }
        }
        let mut found = Vec::new();
        let disk = GuestRange::between(GuestOffset::ZERO, GuestOffset::new(self.now.size()));
        for (n, state) in units.iter().enumerate().filter(|(_, state)| state.differs) {
            let unit = GuestRange { start: stretch.start + n as u64 * self.unit, len: self.unit };
            let Some(range) = unit.intersect(&disk) else { continue };
            let is_zero = !state.has_data && self.is_zero(&range, now, worker)?;
            push(&mut found, DifferentRange { range, is_zero });
        }
        Ok(found)
    }

    /// Whether a range is zeros now; `now` says what supplies it.
    fn is_zero(&self, range: &GuestRange, now: &[Supplied], worker: &mut DifferWorker) -> Result<bool> {
        let first = now.partition_point(|part| part.range.end() <= range.start);
        for part in now.iter().skip(first).map_while(|part| part.clip(range)) {
            let pair = Pair { range: part.range, a: part.supply, b: Supply::Nothing };
            if self.differ.read(&pair, worker)?.0.is_some_and(|bytes| first_nonzero(bytes).is_some()) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl Differences {
    /// Looks for them in the whole disk, and remembers so many that memory is bounded: what lies behind is looked at again
    /// when it is asked for. `done` is told how many more bytes of the disk were looked at, from many threads.
    ///
    /// # Errors
    /// Tables or data that cannot be read or are damaged; [`Error::Cancelled`].
    pub(crate) fn find(sides: &Sides<'_>, cancel: &AtomicBool, done: &(dyn Fn(u64) + Sync)) -> Result<Self> {
        Self::find_some(sides, REMEMBERED, cancel, done)
    }

    fn find_some(
        sides: &Sides<'_>,
        most: usize,
        cancel: &AtomicBool,
        done: &(dyn Fn(u64) + Sync),
    ) -> Result<Self> {
        let mut all = Self::default();
        let end = GuestOffset::new(sides.now.size());
        while all.known < end && all.ranges.len() < most {
            if cancel.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
            let next = sides.next(all.known)?.unwrap_or(end);
            let start = next.align_down(sides.window()).max(all.known);
            let window =
                GuestRange::between(start, (start.align_down(sides.window()) + sides.window()).min(end));
            done(start - all.known);
            let compared = AtomicU64::new(0);
            let count = |bytes| {
                compared.fetch_add(bytes, Ordering::Relaxed);
                done(bytes);
            };
            if next < end {
                for range in sides.find(window, cancel, &count)? {
                    push(&mut all.ranges, range);
                }
            }
            done(window.len.saturating_sub(compared.into_inner()));
            all.known = window.end();
        }
        Ok(all)
    }

    /// The first offset at or behind `from` where something may differ.
    ///
    /// # Errors
    /// A table that cannot be read.
    pub(crate) fn next(&self, sides: &Sides<'_>, from: GuestOffset) -> Result<Option<GuestOffset>> {
        let first = self.ranges.partition_point(|range| range.range.end() <= from);
        match self.ranges.get(first) {
            Some(range) => Ok(Some(range.range.start.max(from))),
            None => sides.next(from.max(self.known)),
        }
    }

    /// The ranges of a window that differ; its borders are those of windows.
    ///
    /// # Errors
    /// Tables or data that cannot be read or are damaged.
    pub(crate) fn within(&self, sides: &Sides<'_>, window: GuestRange) -> Result<Vec<DifferentRange>> {
        let first = self.ranges.partition_point(|range| range.range.end() <= window.start);
        let mut found: Vec<DifferentRange> =
            self.ranges.iter().skip(first).map_while(|range| range.clip(&window)).collect();
        let rest = GuestRange::between(window.start.max(self.known), window.end());
        if !rest.is_empty() {
            found.extend(sides.find(rest, &AtomicBool::new(false), &|_| {})?);
        }
        Ok(found)
    }
}

/// Adds a range, joined to the last one where it goes on from it.
fn push(all: &mut Vec<DifferentRange>, range: DifferentRange) {
    match all.last_mut() {
        Some(last) if last.range.end() == range.range.start && last.is_zero == range.is_zero => {
            last.range.len += range.range.len;
        }
        _ => all.push(range),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use kit::Random;

    use super::*;
    use crate::chain::Chain;
    use crate::image::{CreateOptions, create};
    use crate::storage::MemHost;
    use crate::testing::{local, random_chain, random_chain_at};
    use crate::transfer::put;

    fn open(host: &MemHost, path: &str) -> Chain {
        Chain::open(host, Path::new(path), &local()).unwrap()
    }

    fn range(start: u64, len: u64, is_zero: bool) -> DifferentRange {
        DifferentRange { range: GuestRange { start: GuestOffset::new(start), len }, is_zero }
    }

    const M: u64 = 1 << 20;

    /// `/a` and `/b` on one base, and `/image` on `/a`.
    fn related() -> MemHost {
        let host = MemHost::new();
        create(&host, Path::new("/base"), &CreateOptions::new(8 * M)).unwrap();
        put(&host, Path::new("/base"), &local(), &[(GuestOffset::ZERO, vec![3; 6 << 20])]).unwrap();
        for (name, below) in [("/a", "/base"), ("/b", "/base"), ("/image", "/a")] {
            let backing = Some((below.as_bytes().to_vec(), "qcow2".to_owned()));
            create(&host, Path::new(name), &CreateOptions { backing, ..CreateOptions::new(8 * M) }).unwrap();
        }
        let write = |name: &str, at: u64, bytes: Vec<u8>| {
            put(&host, Path::new(name), &local(), &[(GuestOffset::new(at), bytes)]).unwrap();
        };
        write("/a", M, vec![1; 65536]);
        write("/b", M + 65535, vec![3; 1]);
        write("/b", 7 * M, vec![1; 70_000]);
        host
    }

    #[test]
    fn what_both_read_from_the_same_place_is_not_read() {
        let host = related();
        let (image, other) = (open(&host, "/image"), open(&host, "/b"));
        let (images, then) = (image.images(), other.images());
        let sides = Sides::new(&images, image.active(), &then).unwrap();
        let window = GuestRange { start: GuestOffset::ZERO, len: 8 * M };
        let mut now = Vec::new();
        sides.now.resolve(window, &mut now).unwrap();
        let stretches = sides.stretches(&now, &sides.resolve_then(&now, window).unwrap());
        let mut to_read: Vec<DifferentRange> = Vec::new();
        for pair in stretches.iter().flat_map(|stretch| &stretch.pairs) {
            push(&mut to_read, DifferentRange { range: pair.range, is_zero: false });
        }
        assert_eq!(to_read, [range(M, 65536, false), range(7 * M, 2 * 65536, false)]);
        let found = Differences::find(&sides, &AtomicBool::new(false), &|_| {}).unwrap();
        assert_eq!(found.ranges, [range(M, 65536, false), range(7 * M, 2 * 65536, true)]);
    }

    /// What is not remembered is looked at again.
    #[test]
    fn few_remembered_ranges_say_the_same_as_all() {
        for seed in 0..30 {
            let host = MemHost::new();
            let mut dice = Random::new(seed);
            random_chain(&host, &mut dice, 3);
            random_chain_at(&host, "/new", &mut dice, 2);
            let (image, other) = (open(&host, "/2"), open(&host, "/new1"));
            let (images, then) = (image.images(), other.images());
            let sides = Sides::new(&images, 2, &then).unwrap();
            let never = AtomicBool::new(false);
            let all = Differences::find(&sides, &never, &|_| {}).unwrap();
            let end = GuestOffset::new(sides.now.size());
            assert_eq!(all.known, end, "seed {seed}");
            for most in 0..2 {
                let some = Differences::find_some(&sides, most, &never, &|_| {}).unwrap();
                let mut at = GuestOffset::ZERO;
                let mut found = Vec::new();
                while at < end {
                    let window = GuestRange::between(at, (at + sides.now.window()).min(end));
                    if some.next(&sides, at).unwrap().is_some_and(|next| next < window.end()) {
                        some.within(&sides, window)
                            .unwrap()
                            .into_iter()
                            .for_each(|range| push(&mut found, range));
                    }
                    at = window.end();
                }
                assert_eq!(found, all.ranges, "seed {seed}, {most} remembered");
            }
        }
    }

    #[test]
    fn all_of_the_disk_is_counted_and_a_comparison_stops_on_request() {
        let host = related();
        let (image, other) = (open(&host, "/image"), open(&host, "/b"));
        let (images, then) = (image.images(), other.images());
        let sides = Sides::new(&images, image.active(), &then).unwrap();
        let counted = AtomicU64::new(0);
        let count = |bytes| {
            counted.fetch_add(bytes, Ordering::Relaxed);
        };
        Differences::find(&sides, &AtomicBool::new(false), &count).unwrap();
        assert_eq!(counted.into_inner(), 8 * M);
        let stopped = Differences::find(&sides, &AtomicBool::new(true), &|_| {});
        assert!(matches!(stopped, Err(Error::Cancelled)));
    }
}
