//! Random damage to metadata: the same verdict as `qemu-img check`, or a known reason why not.

use std::path::{Path, PathBuf};

use kit::Random;

use super::super::finding::Findings;
use super::super::layout::{Scope, lay_out};
use super::super::{CheckOptions, CheckReport, Severity, Subject, Verdict, What, check};
use super::qemu::{Bench, code_of, patch, theirs, word};
use crate::error::{ErrorKind, Result};
use crate::storage::{Access, Host, OsHost};

/// Cases per image.
const CASES: u64 = 60;

/// Creation options of images to damage.
pub(crate) const IMAGES: &[&str] = &[
    "cluster_size=512",
    "cluster_size=512,refcount_bits=8",
    "cluster_size=512,compat=0.10",
    "cluster_size=1k,refcount_bits=64",
    "cluster_size=16k,extended_l2=on",
    "cluster_size=64k",
];

fn ours(path: &Path) -> Result<CheckReport> {
    let file = OsHost.open(path, Access::Read).unwrap();
    check(path, &*file, None, &CheckOptions::default())
}

/// The places of all 64-bit words of metadata, except the header: all that are not zero, and some others.
pub(crate) fn metadata_words(path: &Path) -> Vec<u64> {
    let file = OsHost.open(path, Access::Read).unwrap();
    let subject = Subject::open(path, &*file, None, None).unwrap();
    let (layout, gaps) = lay_out(&subject, Scope::Everything, &Findings::new(0)).unwrap();
    gaps.none(path).unwrap();
    let size = subject.geometry.cluster_size();
    let entry = |at| word(path, at) & 0x00ff_ffff_ffff_fe00;
    let mut clusters: Vec<u64> =
        layout.metadata.iter().flat_map(|s| s.range.clone()).filter(|&c| c > 0).map(|c| c * size).collect();
    for table in std::iter::once(layout.l1.active).chain(layout.l1.snapshots.into_iter().map(|s| s.range)) {
        clusters.extend(table.step_by(8).map(entry).filter(|&l2| l2 != 0));
    }
    clusters.extend(layout.refcount_table.iter().copied().filter(|&block| block != 0));
    clusters.extend(layout.bitmap_tables.into_iter().flat_map(|s| s.range).step_by(8).map(entry));
    clusters.retain(|&cluster| cluster != 0);
    clusters.sort_unstable();
    clusters.dedup();
    let bytes = std::fs::read(path).unwrap();
    let interesting = |at: &u64| {
        let at = *at as usize;
        let word = bytes.get(at..at + 8);
        word.is_some_and(|word| word != [0; 8] || at.is_multiple_of(136))
    };
    clusters.iter().flat_map(|&c| (c..c + size).step_by(8)).filter(interesting).collect()
}

/// Damages one to three words of metadata.
pub(crate) fn damage(path: &Path, words: &[u64], random: &mut Random) {
    for _ in 0..1 + random.below(3) {
        let at = random.pick(words);
        let old = word(path, at);
        let new = match random.below(8) {
            0..4 => old ^ 1 << random.below(64),
            4 => old ^ random.below(256) << (8 * random.below(8)),
            5 => 0,
            6 => word(path, random.pick(words)),
            _ => random.next(),
        };
        patch(path, at, &new.to_be_bytes());
    }
}

/// Why our verdict may differ from QEMU's exit code; `None` means that it must not.
fn reason(ours: &Result<CheckReport>, qemu: i32, extended: bool) -> Option<&'static str> {
    let report = match ours {
        Ok(report) => report,
        Err(error) => {
            let refused = matches!(error.kind(), ErrorKind::Damaged | ErrorKind::Unsupported);
            return (qemu == 1 && refused).then_some("both refuse the image");
        }
    };
    if qemu == 1 && report.verdict() == Verdict::Corrupt {
        // Snapshot tables and bitmaps that it cannot load, refcount blocks that are not aligned.
        return Some("QEMU gives up on damage that we report");
    }
    let stricter = |what: &What| match what {
        What::Overlap { .. } => true,
        What::Malformed(error) => {
            let text = error.to_string();
            text.contains("version 2 image")
                || text.contains("a host offset with the COPIED flag")
                || (error.field() == "L2 entry" && text.contains("reserved bits") && extended)
        }
        _ => false,
    };
    let mut corruptions = report.findings.iter().filter(|f| f.severity == Severity::Corruption);
    if matches!(qemu, 0 | 3) && report.verdict() == Verdict::Corrupt && corruptions.all(|f| stricter(&f.what))
    {
        return Some("QEMU lets shared metadata, reserved zero flags, and COPIED without a cluster pass");
    }
    None
}

/// An image of 4 MiB with clusters of every kind, snapshots, and a bitmap where the version allows it.
pub(crate) fn varied_image(bench: &Bench, name: &str, options: &str) -> PathBuf {
    let fill = "write -P 1 0 256k\nwrite -c -P 2 1M 64k\nwrite -P 2 3M 70k";
    let path = bench.image(name, &format!("-o {options} {name} 4M"), fill);
    bench.run(&format!("qemu-img snapshot -c one {name}"));
    let zero = if options.contains("0.10") { "discard 0 64k" } else { "write -z 64k 64k" };
    bench.fill(name, &format!("write -P 3 128k 96k\n{zero}\nwrite -P 3 3M 3k"));
    if !options.contains("0.10") {
        bench.run(&format!("qemu-img bitmap --add -g 512 {name} marks"));
        bench.fill(name, "write -P 4 2M 64k");
    }
    bench.run(&format!("qemu-img snapshot -c two {name}"));
    path
}

#[test]
fn random_damage_gets_the_verdict_of_qemu() {
    let Some(bench) = Bench::new() else { return };
    let damaged = bench.path("damaged");
    let mut verdicts = [0; 4];
    for (n, options) in IMAGES.iter().enumerate() {
        let name = format!("image{n}");
        let path = varied_image(&bench, &name, options);
        assert_eq!((code_of(&ours(&path).unwrap()), theirs(&path).0), (0, 0), "{options}");
        let words = metadata_words(&path);
        for case in 0..CASES {
            let seed = n as u64 * 1_000_000 + case;
            std::fs::copy(&path, &damaged).unwrap();
            damage(&damaged, &words, &mut Random::new(seed));
            let report = ours(&damaged);
            let qemu = theirs(&damaged).0;
            let code = report.as_ref().map_or(1, code_of);
            assert!(
                code == qemu || reason(&report, qemu, options.contains("extended")).is_some(),
                "{options}, seed {seed}: ours {code}, QEMU's {qemu}: {report:#?}"
            );
            verdicts[code as usize] += 1;
        }
    }
    // The damage must be of all kinds, or this would show nothing.
    assert!(verdicts[0] > 0 && verdicts[2] > 50 && verdicts[3] > 0, "{verdicts:?}");
}
