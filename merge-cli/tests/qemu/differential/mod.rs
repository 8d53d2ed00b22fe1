//! Random chains, read and merged by us, judged by QEMU.
//!
//! Each case is made from one seed: a chain over the axes of the format (cluster size, version, subclusters, refcount
//! width, compression, data file, depth, kind of base, sizes that grow and shrink), filled by `qemu-io`; then one merge of
//! a random range. `QMERGE_TEST_SEED=n QMERGE_TEST_CASES=1` repeats the case of seed n alone.

mod generate;
mod judge;

use std::panic::{AssertUnwindSafe, catch_unwind};

use kit::qemu_is_here;

/// Shards run beside each other; each takes every fourth seed.
const SHARDS: u64 = 4;
const CASES: u64 = 60;
/// In the gate, which sets `CI`.
const CASES_OF_THE_GATE: u64 = 240;

fn number(variable: &str) -> Option<u64> {
    let value = std::env::var(variable).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{variable} is no number: {value}")))
}

fn shard(shard: u64) {
    if !qemu_is_here() {
        return;
    }
    let first = number("QMERGE_TEST_SEED").unwrap_or(1);
    let cases = number("QMERGE_TEST_CASES")
        .unwrap_or_else(|| if std::env::var_os("CI").is_some() { CASES_OF_THE_GATE } else { CASES });
    let seeds: Vec<_> = (first..first + cases).filter(|seed| seed % SHARDS == shard).collect();
    eprintln!("differential: {} chains, seeds from {first} to {}", seeds.len(), first + cases - 1);
    let failed: Vec<_> = seeds
        .iter()
        .filter(|seed| {
            let failed = catch_unwind(AssertUnwindSafe(|| case(**seed))).is_err();
            if failed {
                eprintln!("repeat with QMERGE_TEST_SEED={seed} QMERGE_TEST_CASES=1\n");
            }
            failed
        })
        .collect();
    assert!(failed.is_empty(), "{} of {} chains failed, seeds {failed:?}", failed.len(), seeds.len());
}

fn case(seed: u64) {
    let case = generate::MergeCase::new(seed);
    judge::reading(&case);
    judge::merging(&case);
}

#[test]
fn random_chains_0() {
    shard(0);
}

#[test]
fn random_chains_1() {
    shard(1);
}

#[test]
fn random_chains_2() {
    shard(2);
}

#[test]
fn random_chains_3() {
    shard(3);
}
