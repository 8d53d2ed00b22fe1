//! Cuts ranges that may overlap into disjoint ones.

use std::ops::Range;

/// A range, and how many of the given ranges cover it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) range: Range<u64>,
    pub(crate) times: u64,
}

/// Cuts `ranges` into disjoint segments in ascending order. There are at most twice as many segments as ranges,
/// and they cover the union once. So each byte of an image's tables is read once, however often tables overlap.
pub(crate) fn sweep(ranges: &[Range<u64>]) -> Vec<Segment> {
    let mut borders: Vec<(u64, bool)> = Vec::with_capacity(ranges.len() * 2);
    for range in ranges.iter().filter(|r| r.start < r.end) {
        borders.push((range.start, true));
        borders.push((range.end, false));
    }
    borders.sort_unstable();
    let mut segments = Vec::new();
    let (mut from, mut times) = (0, 0u64);
    for (at, opens) in borders {
        if times > 0 && at > from {
            segments.push(Segment { range: from..at, times });
        }
        from = at;
        times = if opens { times + 1 } else { times.saturating_sub(1) };
    }
    segments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::single_range_in_vec_init)] // These are lists of ranges.
    fn overlaps_are_counted() {
        let segment = |range: Range<u64>, times| Segment { range, times };
        assert_eq!(sweep(&[]), []);
        assert_eq!(sweep(&[5..5]), []);
        assert_eq!(sweep(&[0..4, 4..8]), [segment(0..4, 1), segment(4..8, 1)]);
        assert_eq!(
            sweep(&[0..10, 2..4, 2..10, 20..30]),
            [segment(0..2, 1), segment(2..4, 3), segment(4..10, 2), segment(20..30, 1)]
        );
    }

    #[test]
    fn the_union_is_cut_once() {
        let ranges: Vec<_> = (0..1000u64).map(|n| n * 7 % 50..60 + n % 11).collect();
        let segments = sweep(&ranges);
        assert_eq!(segments.iter().map(|s| s.range.end - s.range.start).sum::<u64>(), 70);
        for s in &segments {
            let covering = ranges.iter().filter(|r| r.start <= s.range.start && s.range.end <= r.end).count();
            assert_eq!(covering as u64, s.times);
        }
    }
}
