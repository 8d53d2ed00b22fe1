//! A bounded list of free clusters inside a file.

use std::ops::Range;

/// The first free clusters of a file, as runs. It keeps only as many as are wanted, so that its size does not
/// depend on the image.
#[derive(Debug)]
pub(super) struct FreeRuns {
    wanted: u64,
    runs: Vec<Range<u64>>,
    clusters: u64,
}

impl FreeRuns {
    /// An empty list, which will keep at most `wanted` clusters.
    pub(super) fn wanting(wanted: u64) -> Self {
        Self { wanted, runs: Vec::new(), clusters: 0 }
    }

    /// Adds a cluster; they come in ascending order.
    pub(super) fn add(&mut self, cluster: u64) {
        match self.runs.last_mut() {
            Some(last) if last.end == cluster && self.clusters < self.wanted => last.end += 1,
            _ if self.clusters < self.wanted => self.runs.push(cluster..cluster + 1),
            _ => return,
        }
        self.clusters += 1;
    }

    /// Takes the first `count` clusters in a row.
    pub(super) fn take_run(&mut self, count: u64) -> Option<Range<u64>> {
        let run = self.runs.iter_mut().find(|run| run.end - run.start >= count)?;
        let taken = run.start..run.start + count;
        run.start = taken.end;
        Some(taken)
    }

    /// Takes one cluster.
    pub(super) fn take(&mut self) -> Option<u64> {
        self.take_run(1).map(|run| run.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_taken_from_the_first_that_is_long_enough() {
        let mut free = FreeRuns::wanting(6);
        [3, 5, 6, 8, 9, 10, 11].into_iter().for_each(|cluster| free.add(cluster));
        assert_eq!(free.take_run(3), Some(8..11));
        assert_eq!(free.take_run(2), Some(5..7));
        assert_eq!(free.take(), Some(3));
        assert_eq!(free.take(), None, "no more than were wanted");
    }
}
