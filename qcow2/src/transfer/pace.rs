//! How much data a batch of a merge takes.
//!
//! If a merge is stopped in the middle of a batch, the batch is lost; so batches should be short. Behind each
//! batch the merge waits for the disk; so there should be few.

use std::ops::Range;
use std::time::{Duration, Instant};

/// The bytes of data that a batch takes.
const BYTES: Range<u64> = 64 << 20..1 << 30;

/// The size of the first batch, when the speed is unknown: a wait costs fast disks more than a little lost work
/// costs slow ones.
const FIRST: u64 = 256 << 20;

/// How long a batch may take, as far as the one before tells.
const TIME: Duration = Duration::from_secs(1);

/// How much a batch takes, by the speed of the one before.
#[derive(Debug)]
pub(crate) struct Pace {
    bytes: u64,
    since: Instant,
}

impl Default for Pace {
    fn default() -> Self {
        Self { bytes: FIRST, since: Instant::now() }
    }
}

impl Pace {
    /// For a plan, which moves nothing.
    pub(crate) fn longest() -> Self {
        Self { bytes: BYTES.end, ..Self::default() }
    }

    /// The bytes of data with which a batch is full.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A batch of so many bytes is done.
    pub(crate) fn done(&mut self, bytes: u64) {
        self.bytes = next(self.bytes, bytes, self.since.elapsed());
        self.since = Instant::now();
    }
}

fn next(now: u64, bytes: u64, took: Duration) -> u64 {
    if bytes == 0 {
        return now;
    }
    let next = (bytes as f64 / took.as_secs_f64().max(1e-3) * TIME.as_secs_f64()) as u64;
    // The first bytes go into the system's cache, and tell little about the disk's speed.
    let most = bytes.saturating_mul(4).min(BYTES.end);
    next.min(most).max(BYTES.start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_takes_about_a_second() {
        let second = Duration::from_secs(1);
        assert_eq!(next(FIRST, FIRST, second), FIRST);
        assert_eq!(next(FIRST, FIRST, second * 2), FIRST / 2);
        assert_eq!(next(FIRST, FIRST, second * 100), BYTES.start);
        assert_eq!(next(FIRST, FIRST, Duration::ZERO), BYTES.end);
        assert_eq!(next(FIRST, 1 << 20, second / 1000), BYTES.start);
        assert_eq!(next(FIRST, 100 << 20, second / 10), 400 << 20);
        assert_eq!(next(FIRST, 0, second), FIRST);
    }
}
