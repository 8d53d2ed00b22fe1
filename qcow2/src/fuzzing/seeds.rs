//! The seeds: small valid images of every kind, from which fuzzers start.

use kit::Random;

use super::sample::{Content, Sample, extension};

/// Valid images that together use every feature of the format.
pub fn images() -> Vec<(&'static str, Vec<u8>)> {
    samples().into_iter().map(|(name, sample)| (name, sample.build().bytes)).collect()
}

/// Inputs that are decoded to chains: pseudo-random bytes, from which every kind of chain comes.
pub fn chains() -> Vec<(&'static str, Vec<u8>)> {
    const NAMES: [&str; 8] = ["one", "two", "three", "four", "five", "six", "seven", "eight"];
    let input = |seed: u64| {
        let mut random = Random::new(seed);
        (0..256).map(|_| random.next() as u8).collect()
    };
    NAMES.iter().zip(1..).map(|(name, seed)| (*name, input(seed))).collect()
}

fn samples() -> Vec<(&'static str, Sample)> {
    let mixed = |sample: Sample| {
        sample
            .with(0, Content::Data(0x11))
            .with(1, Content::Data(0x22))
            .with(3, Content::Zero)
            .with(4, Content::ZeroAllocated(0x33))
            .with(5, Content::Compressed(0x44))
            .with(6, Content::Compressed(0x55))
            .with(70, Content::Data(0x66))
    };
    let plain = Sample::new(100);
    let v2 = Sample { version: 2, ..Sample::new(80) };
    let width = |refcount_order| mixed(Sample { refcount_order, ..Sample::new(100) });
    let extended = Sample { extended_l2: true, ..Sample::new(0) }.with_clusters(14, 6);
    vec![
        ("empty", plain.clone()),
        ("size-zero", Sample::new(0)),
        ("mixed", mixed(plain.clone())),
        ("odd-size", Sample { size: 100 * 512 - 511, ..mixed(plain.clone()) }),
        ("version-2", v2.with(0, Content::Data(1)).with(2, Content::Compressed(2)).over("base.raw", "raw")),
        ("overlay", mixed(plain.clone()).over("base.raw", "raw")),
        ("clusters-4k", mixed(plain.clone().with_clusters(12, 80))),
        ("zstd", mixed(Sample { zstd: true, ..plain.clone().with_clusters(12, 80) })),
        ("refcounts-1-bit", Sample { clusters: [(0, Content::Data(7))].into(), ..width(0) }),
        ("refcounts-2-bits", width(1)),
        ("refcounts-64-bits", width(6)),
        (
            "extended-l2",
            extended
                .with(0, Content::Data(1))
                .with(1, Content::Subclusters { allocated: 0x0000_00ff, zero: 0xff00_0000, fill: 2 })
                .with(2, Content::Subclusters { allocated: 0, zero: 0x5555_5555, fill: 0 })
                .with(3, Content::Zero)
                .with(4, Content::Compressed(9)),
        ),
        (
            "data-file",
            Sample { data_file: Some(("data.raw".into(), false)), ..plain.clone() }
                .with(0, Content::Data(1))
                .with(2, Content::Zero),
        ),
        (
            "data-file-raw",
            Sample { data_file: Some(("data.raw".into(), true)), ..plain.clone() }.with(1, Content::Data(1)),
        ),
        ("snapshots", Sample { snapshots: vec!["one".into(), "two".into()], ..mixed(plain.clone()) }),
        ("bitmaps", Sample { bitmaps: vec!["nightly".into()], ..mixed(plain.clone()) }),
        (
            "extensions",
            Sample {
                extensions: vec![
                    (0x1234_5678, b"kept as it is".to_vec()),
                    (extension::FEATURE_NAMES, names()),
                ],
                ..plain
            },
        ),
    ]
}

/// A feature name table with one name, for an incompatible bit that nobody knows.
fn names() -> Vec<u8> {
    let mut table = vec![0, 40];
    table.extend(b"a feature of tomorrow");
    table.resize(48, 0);
    table
}
