//! Counts the references to each host cluster of a window, packed into atomics.
//!
//! A cluster has a slot of 16 bits (32 in the wide form). It holds the number of references, the kind of thing
//! they say the cluster is, and which COPIED flags the active tables carry for it. Everything that a refcount
//! must agree with is in the slot, so one pass over the tables is enough.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use rayon::prelude::*;

/// What a reference says a cluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReferenceKind {
    /// Guest data, plain or compressed: several entries may share it.
    Data = 0,
    /// An L2 table: several L1 tables may share it.
    L2Table = 1,
    /// Any other metadata: nothing may share it.
    Other = 2,
}

/// A reference, or several equal ones.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reference {
    pub(crate) kind: ReferenceKind,
    /// The COPIED flag, for an entry of the active tables.
    pub(crate) copied: Option<bool>,
    pub(crate) times: u64,
}

/// What the references say about one cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    /// How many references there are.
    pub(crate) count: u64,
    /// Whether an entry of the active tables refers to it with the COPIED flag.
    pub(crate) copied: bool,
    /// Whether an entry of the active tables refers to it without the COPIED flag.
    pub(crate) not_copied: bool,
    /// Whether metadata shares it with something that it must not share with.
    pub(crate) overlap: bool,
}

/// The width of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Width {
    /// 16 bits: up to 4094 references.
    Narrow,
    /// 32 bits: up to 2^28 - 2 references. Half as many clusters fit in a window; only absurd images need it.
    Wide,
}

// A slot from its highest bit: NOT_COPIED, COPIED, kind (2 bits), count.
const FLAG_BITS: u32 = 4;
const KIND_MIXED: u64 = 3;

/// The slots of a window of host clusters.
#[derive(Debug)]
pub(crate) struct Counts {
    words: Vec<AtomicU64>,
    width: Width,
    first: u64,
    slots: u64,
    saturated: AtomicBool,
}

impl Counts {
    /// Empty slots for `slots` clusters from cluster 0; `None` if there is no memory.
    pub(crate) fn new(slots: u64, width: Width) -> Option<Self> {
        let words = usize::try_from(slots.div_ceil(width.lanes())).ok()?;
        let mut this = Self { words: Vec::new(), width, first: 0, slots, saturated: AtomicBool::new(false) };
        this.words.try_reserve_exact(words).ok()?;
        (0..words)
            .into_par_iter()
            .with_min_len(1 << 16)
            .map(|_| AtomicU64::new(0))
            .collect_into_vec(&mut this.words);
        Some(this)
    }

    /// Empties the slots and moves the window to cluster `first`.
    pub(crate) fn restart_at(&mut self, first: u64) {
        self.first = first;
        self.words.par_iter().with_min_len(1 << 16).for_each(|word| word.store(0, Relaxed));
    }

    /// The clusters of the window.
    pub(crate) fn window(&self) -> Range<u64> {
        self.first..self.first.saturating_add(self.slots)
    }

    /// Whether a cluster has more references than a slot can count.
    pub(crate) fn is_saturated(&self) -> bool {
        self.saturated.load(Relaxed)
    }

    /// Adds a reference to every cluster of the range that lies in the window.
    pub(crate) fn add(&self, clusters: Range<u64>, reference: Reference) {
        let window = self.window();
        let start = clusters.start.max(window.start);
        let end = clusters.end.min(window.end);
        if start >= end || reference.times == 0 {
            return;
        }
        let (start, end) = (start - self.first, end - self.first);
        let lanes = self.width.lanes();
        let value = self.encode(reference);
        let pattern = self.width.in_all_lanes(value);
        let mut at = start;
        while at < end {
            let index = at / lanes;
            let lane_end = (end - index * lanes).min(lanes);
            let lane_start = at - index * lanes;
            if let Some(word) = self.words.get(index as usize) {
                self.add_to_word(word, lane_start as u32..lane_end as u32, value, pattern);
            }
            at = (index + 1) * lanes;
        }
    }

    fn add_to_word(&self, word: &AtomicU64, lanes: Range<u32>, value: u64, pattern: u64) {
        let bits = self.width.bits();
        let mut old = word.load(Relaxed);
        loop {
            // An empty word takes the same value in all its lanes at once: long runs of data are the common
            // case.
            let new = if old == 0 {
                let mask = u64::MAX >> (64 - (lanes.end - lanes.start) * bits) << (lanes.start * bits);
                pattern & mask
            } else {
                lanes.clone().fold(old, |word, lane| {
                    let shift = lane * bits;
                    let mask = self.width.mask() << shift;
                    word & !mask | self.merge(word >> shift & self.width.mask(), value) << shift
                })
            };
            match word.compare_exchange_weak(old, new, Relaxed, Relaxed) {
                Ok(_) => return,
                Err(now) => old = now,
            }
        }
    }

    fn merge(&self, old: u64, value: u64) -> u64 {
        if old == 0 {
            return value;
        }
        let width = self.width;
        let count = width.count(old) + width.count(value);
        if count >= width.max_count() {
            self.saturated.store(true, Relaxed);
        }
        let kind = if width.kind(old) == width.kind(value) { width.kind(old) } else { KIND_MIXED };
        let flags = (old | value) & width.flags();
        flags | kind << width.kind_shift() | count.min(width.max_count())
    }

    fn encode(&self, reference: Reference) -> u64 {
        let width = self.width;
        if reference.times >= width.max_count() {
            self.saturated.store(true, Relaxed);
        }
        let flag = match reference.copied {
            None => 0,
            Some(true) => width.copied(),
            Some(false) => width.not_copied(),
        };
        flag | (reference.kind as u64) << width.kind_shift() | reference.times.min(width.max_count())
    }

    /// How many slots a word holds.
    pub(crate) fn lanes(&self) -> u64 {
        self.width.lanes()
    }

    /// The word that holds the slots of `lanes` clusters from `cluster`, a multiple of `lanes` counted
    /// from the window's start; zero means that nothing refers to any of them.
    pub(crate) fn word(&self, cluster: u64) -> u64 {
        let index = cluster.saturating_sub(self.first) / self.width.lanes();
        self.words.get(index as usize).map_or(0, |word| word.load(Relaxed))
    }

    /// The word of clusters that have exactly one reference each, by guest data with the COPIED flag.
    pub(crate) fn all_copied_once(&self) -> u64 {
        self.width.in_all_lanes(self.width.copied() | 1)
    }

    /// What is known of the cluster at `lane` of a word.
    pub(crate) fn slot(&self, word: u64, lane: u32) -> Slot {
        let width = self.width;
        let raw = word >> (lane * width.bits()) & width.mask();
        let count = width.count(raw);
        let kind = width.kind(raw);
        Slot {
            count,
            copied: raw & width.copied() != 0,
            not_copied: raw & width.not_copied() != 0,
            overlap: kind == KIND_MIXED || (kind == ReferenceKind::Other as u64 && count > 1),
        }
    }
}

impl Width {
    const fn bits(self) -> u32 {
        match self {
            Self::Narrow => 16,
            Self::Wide => 32,
        }
    }

    /// How many slots a word holds.
    pub(crate) const fn lanes(self) -> u64 {
        64 / self.bits() as u64
    }

    const fn mask(self) -> u64 {
        (1 << self.bits()) - 1
    }

    /// The largest count. A slot that has reached it may have lost references.
    const fn max_count(self) -> u64 {
        (1 << (self.bits() - FLAG_BITS)) - 1
    }

    const fn count(self, slot: u64) -> u64 {
        slot & self.max_count()
    }

    const fn kind_shift(self) -> u32 {
        self.bits() - FLAG_BITS
    }

    const fn kind(self, slot: u64) -> u64 {
        slot >> self.kind_shift() & 3
    }

    const fn copied(self) -> u64 {
        1 << (self.bits() - 2)
    }

    const fn not_copied(self) -> u64 {
        1 << (self.bits() - 1)
    }

    const fn flags(self) -> u64 {
        self.copied() | self.not_copied()
    }

    const fn in_all_lanes(self, value: u64) -> u64 {
        match self {
            Self::Narrow => value * 0x0001_0001_0001_0001,
            Self::Wide => value * 0x0000_0001_0000_0001,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: Reference = Reference { kind: ReferenceKind::Data, copied: Some(true), times: 1 };
    const TABLE: Reference = Reference { kind: ReferenceKind::L2Table, copied: Some(false), times: 1 };
    const OTHER: Reference = Reference { kind: ReferenceKind::Other, copied: None, times: 1 };

    fn slot(counts: &Counts, cluster: u64) -> Slot {
        let in_window = cluster - counts.window().start;
        counts.slot(counts.word(cluster), (in_window % counts.lanes()) as u32)
    }

    #[test]
    fn ranges_are_counted_in_both_widths() {
        for width in [Width::Narrow, Width::Wide] {
            let counts = Counts::new(100, width).unwrap();
            counts.add(3..50, DATA);
            counts.add(20..21, Reference { times: 7, copied: None, ..DATA });
            counts.add(90..1000, OTHER);
            for cluster in 0..100 {
                let slot = slot(&counts, cluster);
                let expected = match cluster {
                    20 => 8,
                    3..50 | 90.. => 1,
                    _ => 0,
                };
                assert_eq!(slot.count, expected, "{width:?} {cluster}");
                assert_eq!(slot.copied, (3..50).contains(&cluster), "{width:?} {cluster}");
                assert!(!slot.overlap && !slot.not_copied);
            }
            assert!(!counts.is_saturated());
        }
    }

    #[test]
    fn a_window_holds_its_own_clusters_only() {
        let mut counts = Counts::new(10, Width::Narrow).unwrap();
        counts.add(0..10, DATA);
        counts.restart_at(10);
        counts.add(0..12, DATA);
        counts.add(19..25, DATA);
        let seen: Vec<_> = (10..20).map(|c| slot(&counts, c).count).collect();
        assert_eq!(seen, [1, 1, 0, 0, 0, 0, 0, 0, 0, 1]);
    }

    #[test]
    fn metadata_must_not_share() {
        for (first, second, overlap) in [
            (DATA, DATA, false),
            (TABLE, TABLE, false),
            (OTHER, OTHER, true),
            (DATA, TABLE, true),
            (TABLE, OTHER, true),
            (OTHER, DATA, true),
        ] {
            let counts = Counts::new(4, Width::Narrow).unwrap();
            counts.add(1..2, first);
            counts.add(1..2, second);
            let slot = slot(&counts, 1);
            assert_eq!((slot.count, slot.overlap), (2, overlap), "{first:?} {second:?}");
            assert_eq!(slot.copied, first.copied == Some(true) || second.copied == Some(true));
            assert_eq!(slot.not_copied, first.copied == Some(false) || second.copied == Some(false));
        }
    }

    #[test]
    fn narrow_counts_say_when_they_are_full() {
        let counts = Counts::new(4, Width::Narrow).unwrap();
        counts.add(0..1, Reference { times: 4094, ..DATA });
        assert!(!counts.is_saturated());
        assert_eq!(slot(&counts, 0).count, 4094);
        counts.add(0..1, DATA);
        assert!(counts.is_saturated());
        let counts = Counts::new(4, Width::Narrow).unwrap();
        counts.add(0..1, Reference { times: 5000, ..DATA });
        assert!(counts.is_saturated());
    }

    #[test]
    fn threads_do_not_lose_references() {
        let counts = Counts::new(64, Width::Narrow).unwrap();
        (0..1000u64).into_par_iter().for_each(|n| counts.add(n % 7..64 - n % 5, DATA));
        assert_eq!(slot(&counts, 30).count, 1000);
        let expected = (0..1000).filter(|n| n % 7 <= 3).count() as u64;
        assert_eq!(slot(&counts, 3).count, expected);
    }
}
