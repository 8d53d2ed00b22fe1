//! Notes the ranges of the guest's disk that cannot be read, for a salvage, which goes on in spite of them.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use crate::units::{GuestOffset, GuestRange};

/// How many ranges are kept. This many take some megabytes.
const MOST: usize = 1 << 17;

/// What was lost, noted by many threads. Ranges that meet become one.
#[derive(Debug, Default)]
pub(crate) struct Lost {
    ranges: Mutex<Ranges>,
}

/// The lost ranges of a disk, sorted and disjoint.
#[derive(Clone, Debug, Default)]
struct Ranges {
    /// Their ends, by their starts.
    ends: BTreeMap<u64, u64>,
    /// Whether there were more than are kept.
    more: bool,
}

impl Lost {
    /// Notes a range, which may have been noted before.
    pub(crate) fn add(&self, range: GuestRange) {
        if !range.is_empty() {
            self.ranges.lock().unwrap_or_else(PoisonError::into_inner).add(range);
        }
    }

    /// The ranges, in order, and whether that is all of them.
    pub(crate) fn list(&self) -> (Vec<GuestRange>, bool) {
        let ranges = self.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        let list = ranges.ends.iter().map(|(&start, &end)| between(start, end));
        (list.collect(), !ranges.more)
    }
}

impl Ranges {
    fn add(&mut self, range: GuestRange) {
        let (mut start, mut end) = (range.start.get(), range.end().get());
        while let Some((&first, &last)) =
            self.ends.range(..=end).next_back().filter(|(_, last)| **last >= start)
        {
            self.ends.remove(&first);
            (start, end) = (start.min(first), end.max(last));
        }
        if self.ends.len() < MOST {
            self.ends.insert(start, end);
        } else {
            self.more = true;
        }
    }
}

fn between(start: u64, end: u64) -> GuestRange {
    GuestRange::between(GuestOffset::new(start), GuestOffset::new(end))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(ranges: &[(u64, u64)]) -> Vec<(u64, u64)> {
        let lost = Lost::default();
        for (start, end) in ranges {
            lost.add(between(*start, *end));
        }
        let (list, is_all) = lost.list();
        assert!(is_all);
        list.iter().map(|range| (range.start.get(), range.end().get())).collect()
    }

    #[test]
    fn ranges_that_meet_become_one() {
        assert_eq!(list(&[(10, 20), (30, 40), (5, 5)]), [(10, 20), (30, 40)]);
        assert_eq!(list(&[(10, 20), (30, 40), (20, 30)]), [(10, 40)]);
        assert_eq!(list(&[(10, 20), (12, 14), (0, 11), (10, 20)]), [(0, 20)]);
        assert_eq!(list(&[(1, 2), (3, 4), (5, 6), (0, 100)]), [(0, 100)]);
    }

    #[test]
    fn no_more_is_kept_than_memory_allows() {
        let lost = Lost::default();
        for n in 0..MOST as u64 + 5 {
            lost.add(between(n * 2, n * 2 + 1));
        }
        let (list, is_all) = lost.list();
        assert_eq!((list.len(), is_all), (MOST, false));
    }
}
