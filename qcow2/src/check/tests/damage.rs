//! Sound images agree with `qemu-img check` in every number; damaged ones in the verdict, and the
//! findings name the damage.

use std::path::Path;

use super::super::{CheckReport, Severity, Structure, What};
use super::qemu::{Bench, assert_same, code_of, patch, patch_u64, places, theirs, word};
use super::{ours, ours_with};
use crate::format::parts;

const COPIED: u64 = 1 << 63;

/// Options and qemu-io commands that make images of every kind.
const KINDS: &[(&str, &str, &str)] = &[
    ("empty", "", ""),
    ("plain", "", "write -P 1 0 1M\nwrite -P 2 3M 100k\nwrite -z 5M 1M\nwrite -P 3 7M 64k\ndiscard 3M 64k"),
    ("old", "-o compat=0.10", "write -P 1 64k 300k\nwrite -P 1 6M 64k"),
    ("tiny", "-o cluster_size=512", "write -P 1 0 100k\nwrite -P 2 4M 3k\nwrite -P 3 7M 512"),
    ("huge", "-o cluster_size=2M", "write -P 1 0 1M\nwrite -z 4M 2M"),
    ("packed", "", "write -c -P 1 0 64k\nwrite -c -P 2 64k 64k\nwrite -P 3 128k 64k\nwrite -c -P 4 5M 64k"),
    ("zstd", "-o compression_type=zstd,cluster_size=4k", "write -c -P 1 0 256k\nwrite -P 1 1M 8k"),
    ("sub", "-o extended_l2=on", "write -P 1 0 3k\nwrite -z 64k 2k\nwrite -P 1 1M 64k\nwrite -z 3M 64k"),
    ("subpacked", "-o extended_l2=on,cluster_size=16k", "write -c -P 1 0 64k\nwrite -P 1 1M 1k"),
    ("one", "-o refcount_bits=1", "write -P 1 0 3M"),
    ("two", "-o refcount_bits=2", "write -P 1 0 3M"),
    ("eight", "-o refcount_bits=8,cluster_size=1k", "write -P 1 0 3M"),
    ("wide", "-o refcount_bits=64,cluster_size=512", "write -P 1 0 3M\nwrite -c -P 1 4M 64k"),
    ("ready", "-o preallocation=metadata", ""),
    (
        "scattered",
        "-o cluster_size=4k",
        "write -P 1 4M 4k\nwrite -P 1 0 4k\nwrite -P 1 8k 4k\nwrite -P 1 4k 4k",
    ),
    ("odd", "", "write -P 1 8388096 512"),
];

#[test]
fn sound_images_of_every_kind_agree_in_every_number() {
    let Some(bench) = Bench::new() else { return };
    for (name, options, fill) in KINDS {
        let path = bench.image(name, &format!("{options} {name} 8M"), fill);
        assert_same(&path, &ours(&path));
        bench.run(&format!("qemu-img resize -q {name} 11M"));
        bench.fill(name, "write -P 9 10M 64k");
        assert_same(&path, &ours(&path));
    }
}

#[test]
fn snapshots_and_bitmaps_agree_in_every_number() {
    let Some(bench) = Bench::new() else { return };
    for options in ["cluster_size=512", "cluster_size=64k", "extended_l2=on,cluster_size=16k", "compat=0.10"]
    {
        let name = options.replace('=', "-");
        let path =
            bench.image(&name, &format!("-o {options} {name} 8M"), "write -P 1 0 1M\nwrite -c 2M 128k");
        for (n, fill) in
            ["write -P 2 512k 1M", "write -P 3 0 64k", "", "write -P 4 7M 64k"].iter().enumerate()
        {
            bench.run(&format!("qemu-img snapshot -c s{n} {name}"));
            bench.fill(&name, fill);
            assert_same(&path, &ours(&path));
        }
        if !options.starts_with("compat") {
            for bitmap in ["one", "two"] {
                bench.run(&format!("qemu-img bitmap --add -g 64k {name} {bitmap}"));
            }
            bench.fill(&name, "write -P 5 1M 3M");
            assert_same(&path, &ours(&path));
        }
        bench.run(&format!("qemu-img snapshot -d s1 {name}"));
        assert_same(&path, &ours(&path));
    }
}

#[test]
fn external_data_files_agree_in_every_number() {
    let Some(bench) = Bench::new() else { return };
    for (name, options) in [("plain", ""), ("raw", ",data_file_raw=on"), ("ready", ",preallocation=metadata")]
    {
        let data = format!("{name}.data");
        let create = format!("-o data_file={data}{options} {name} 8M");
        let path = bench.image(name, &create, "write -P 1 0 1M\nwrite -z 2M 1M\nwrite -P 1 7M 1000k");
        let report = ours_with(&path, Some(&bench.path(&data)));
        assert_same(&path, &report);
        assert!(report.is_consistent());

        // What QEMU lets pass: data that does not lie where it must, or is lost.
        let l2 = places(&path).l2;
        std::fs::OpenOptions::new().write(true).open(bench.path(&data)).unwrap().set_len(64 << 10).unwrap();
        let report = ours_with(&path, Some(&bench.path(&data)));
        let lost = |f: &super::super::Finding| {
            matches!(f.what, What::PastEnd { structure: Structure::ExternalData, .. })
        };
        assert!(report.findings.iter().all(lost) && report.corruptions >= 15, "{:#?}", report.findings);
        assert_eq!(ours(&path).corruptions, 0, "without the data file its length is not known");
        patch_u64(&path, l2 + 8, COPIED | 0x20000);
        let report = ours(&path);
        assert_eq!(report.corruptions, 1);
        assert!(
            report.findings[0].to_string().contains("0x20000 in the data file"),
            "{}",
            report.findings[0]
        );
        patch_u64(&path, l2 + 8, 0x10000);
        let report = ours(&path);
        assert_eq!(code_of(&report), theirs(&path).0);
        assert!(matches!(report.findings[0].what, What::CopiedFlag { set: false, .. }));
    }
}

#[test]
fn encrypted_images_are_checked_without_their_key() {
    let Some(bench) = Bench::new() else { return };
    let secret = "--object secret,id=s,data=abc";
    let luks = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let path = bench.image("luks", &format!("{secret} -o {luks} luks 8M"), "");
    let report = ours(&path);
    assert_eq!(code_of(&report), 0, "{:#?}", report.findings);
    let at = super::luks_header(&path);
    let rb = places(&path).refcount_block;
    patch(&path, rb + (at >> 16) * 2, &[0, 0]);
    let report = ours(&path);
    assert_eq!(code_of(&report), 2);
    assert_eq!(report.findings[0].host.get(), at);
}

/// A damage to make, and what the check must say of it.
struct DamageCase {
    what: &'static str,
    make: fn(&Path),
    code: i32,
    /// What QEMU says, where that differs.
    qemu: Option<i32>,
    found: fn(&CheckReport) -> bool,
}

fn has(report: &CheckReport, test: impl Fn(&What) -> bool) -> bool {
    report.findings.iter().any(|finding| test(&finding.what))
}

fn malformed(report: &CheckReport, field: &str) -> bool {
    has(report, |what| matches!(what, What::Malformed(error) if error.field().contains(field)))
}

/// Refcount of the cluster at a host offset, for clusters of 64 KiB.
fn set_refcount(path: &Path, host: u64, refcount: u16) {
    patch(path, places(path).refcount_block + (host >> 16) * 2, &refcount.to_be_bytes());
}

const DAMAGES: &[DamageCase] = &[
    DamageCase {
        what: "a data cluster with refcount 0",
        make: |p| set_refcount(p, word(p, places(p).l2) & !COPIED, 0),
        code: 2,
        qemu: None,
        found: |r| {
            r.corruptions == 2
                && has(r, |w| *w == What::RefcountTooLow { stored: 0, references: 1 })
                && has(r, |w| *w == What::CopiedFlag { set: true, refcount: 0 })
                && r.findings.iter().all(|f| f.guest.is_some_and(|guest| guest.get() == 0))
        },
    },
    DamageCase {
        what: "a leaked cluster",
        make: |p| {
            let leak = std::fs::metadata(p).unwrap().len().next_multiple_of(1 << 16);
            patch(p, leak + 0xffff, &[1]);
            set_refcount(p, leak, 1);
        },
        code: 3,
        qemu: None,
        found: |r| r.leaks == 1 && has(r, |w| *w == What::RefcountTooHigh { stored: 1, references: 0 }),
    },
    DamageCase {
        what: "a cluster leaked by too high a refcount, which COPIED contradicts",
        make: |p| set_refcount(p, word(p, places(p).l2) & !COPIED, 2),
        code: 2,
        qemu: None,
        found: |r| r.leaks == 1 && has(r, |w| *w == What::CopiedFlag { set: true, refcount: 2 }),
    },
    DamageCase {
        what: "a data entry without COPIED",
        make: |p| patch_u64(p, places(p).l2, word(p, places(p).l2) & !COPIED),
        code: 2,
        qemu: None,
        found: |r| r.corruptions == 1 && has(r, |w| *w == What::CopiedFlag { set: false, refcount: 1 }),
    },
    DamageCase {
        what: "an L1 entry without COPIED",
        make: |p| patch_u64(p, places(p).l1, places(p).l2),
        code: 2,
        qemu: None,
        found: |r| r.corruptions == 1 && has(r, |w| *w == What::CopiedFlag { set: false, refcount: 1 }),
    },
    DamageCase {
        what: "an unaligned data cluster",
        make: |p| patch_u64(p, places(p).l2, word(p, places(p).l2) | 0x200),
        code: 2,
        qemu: None,
        found: |r| malformed(r, "L2 entry"),
    },
    DamageCase {
        what: "reserved bits of an L2 entry",
        make: |p| patch_u64(p, places(p).l2, word(p, places(p).l2) | 1 << 60),
        code: 2,
        qemu: None,
        found: |r| malformed(r, "L2 entry") && r.corruptions == 1,
    },
    DamageCase {
        what: "reserved bits of an L1 entry",
        make: |p| patch_u64(p, places(p).l1, word(p, places(p).l1) | 4),
        code: 2,
        qemu: None,
        found: |r| malformed(r, "L1 entry"),
    },
    DamageCase {
        what: "an unaligned L2 table",
        make: |p| patch_u64(p, places(p).l1, word(p, places(p).l1) | 0x400),
        code: 2,
        qemu: None,
        found: |r| malformed(r, "L2 table offset") && !r.references_complete,
    },
    DamageCase {
        what: "an L2 table far behind the end of the file",
        make: |p| patch_u64(p, places(p).l1, COPIED | 1 << 48),
        code: 2,
        qemu: None,
        found: |r| has(r, |w| matches!(w, What::PastEnd { structure: Structure::L2Table, .. })),
    },
    DamageCase {
        what: "a data cluster far behind the end of the file",
        make: |p| patch_u64(p, places(p).l2 + 8, COPIED | 1 << 48),
        code: 2,
        qemu: None,
        found: |r| {
            r.findings.iter().any(|f| {
                matches!(f.what, What::PastEnd { structure: Structure::Data, .. })
                    && f.guest.is_some_and(|guest| guest.get() == 0x10000)
            })
        },
    },
    DamageCase {
        what: "a data entry that points into an L2 table",
        make: |p| patch_u64(p, places(p).l2 + 8, COPIED | places(p).l2),
        code: 2,
        qemu: None,
        found: |r| has(r, |w| *w == What::Overlap { references: 2 }),
    },
    DamageCase {
        what: "a data entry that points at the header, as the refcount says",
        make: |p| {
            patch_u64(p, places(p).l2 + 800, (1 << 16) | 1);
            let table = places(p).refcount_table;
            assert_eq!(table, 1 << 16);
            set_refcount(p, table, 2);
        },
        code: 2,
        qemu: Some(0),
        found: |r| r.corruptions == 1 && has(r, |w| *w == What::Overlap { references: 2 }),
    },
    DamageCase {
        what: "an L1 entry that points at the L1 table",
        make: |p| patch_u64(p, places(p).l1, COPIED | places(p).l1),
        code: 2,
        qemu: None,
        found: |r| has(r, |w| matches!(w, What::Overlap { .. })),
    },
    DamageCase {
        what: "an empty refcount table",
        make: |p| patch_u64(p, places(p).refcount_table, 0),
        code: 2,
        qemu: None,
        found: |r| has(r, |w| *w == What::RefcountTooLow { stored: 0, references: 1 }) && r.leaks == 0,
    },
    DamageCase {
        what: "an empty refcount block",
        make: |p| patch(p, places(p).refcount_block, &[0; 1 << 10]),
        code: 2,
        qemu: None,
        found: |r| has(r, |w| *w == What::RefcountTooLow { stored: 0, references: 1 }),
    },
    DamageCase {
        what: "an unaligned refcount block",
        make: |p| patch_u64(p, places(p).refcount_table, 0x20200),
        code: 2,
        // It gives up: "Can't get refcount", exit code 1.
        qemu: Some(1),
        found: |r| malformed(r, "refcount table entry"),
    },
    DamageCase {
        what: "a refcount block with reserved bits",
        make: |p| patch_u64(p, places(p).refcount_table, word(p, places(p).refcount_table) | 1),
        code: 2,
        qemu: None,
        found: |r| malformed(r, "refcount table entry"),
    },
    DamageCase {
        what: "a refcount block behind the end of the file",
        make: |p| patch_u64(p, places(p).refcount_table + 8, 1 << 40),
        code: 2,
        qemu: None,
        found: |r| has(r, |w| matches!(w, What::PastEnd { structure: Structure::RefcountBlock, .. })),
    },
    DamageCase {
        what: "a refcount block past 2^63",
        make: |p| patch_u64(p, places(p).refcount_table + 8, (1 << 63) + (1 << 62)),
        code: 2,
        qemu: None,
        found: |r| malformed(r, "refcount table entry"),
    },
    DamageCase {
        what: "two refcount table entries for one block",
        make: |p| patch_u64(p, places(p).refcount_table + 8, places(p).refcount_block),
        code: 2,
        qemu: None,
        found: |r| has(r, |w| *w == What::Overlap { references: 2 }),
    },
    DamageCase {
        what: "COPIED on a compressed cluster",
        make: |p| {
            let l2 = places(p).l2 + 8 * 80;
            assert_ne!(word(p, l2) & 1 << 62, 0);
            patch_u64(p, l2, word(p, l2) | COPIED);
        },
        code: 2,
        qemu: None,
        found: |r| malformed(r, "L2 entry") && r.corruptions == 1 && r.leaks == 0,
    },
    DamageCase {
        what: "a compressed cluster behind the end of the file",
        make: |p| patch_u64(p, places(p).l2 + 8 * 80, 1 << 62 | 1 << 45),
        code: 2,
        qemu: None,
        found: |r| has(r, |w| matches!(w, What::PastEnd { structure: Structure::Compressed, .. })),
    },
    DamageCase {
        what: "a truncated file",
        make: |p| {
            let file = std::fs::OpenOptions::new().write(true).open(p).unwrap();
            file.set_len(places(p).l2 + (3 << 16)).unwrap();
        },
        code: 2,
        // It finds that too, and then gives up on the bitmaps: exit code 1.
        qemu: Some(1),
        found: |r| has(r, |w| matches!(w, What::PastEnd { .. })),
    },
    DamageCase {
        what: "an L1 table behind the end of the file",
        make: |p| patch_u64(p, 40, 1 << 40),
        code: 2,
        qemu: None,
        found: |r| has(r, |w| matches!(w, What::PastEnd { structure: Structure::ActiveL1, .. })),
    },
    DamageCase {
        what: "a snapshot's L1 table that is unaligned",
        make: |p| patch_u64(p, places(p).snapshots, word(p, places(p).snapshots) | 0x200),
        code: 2,
        qemu: None,
        found: |r| malformed(r, "L1 table offset") && !r.references_complete,
    },
    DamageCase {
        what: "a snapshot's L1 table that is too large",
        make: |p| patch(p, places(p).snapshots + 8, &0x0100_0000u32.to_be_bytes()),
        code: 2,
        qemu: None,
        found: |r| malformed(r, "L1 table entries"),
    },
    DamageCase {
        what: "a snapshot with too much extra data",
        make: |p| patch(p, places(p).snapshots + 36, &2000u32.to_be_bytes()),
        code: 2,
        // It cannot load the table: exit code 1.
        qemu: Some(1),
        found: |r| malformed(r, "extra data length"),
    },
    DamageCase {
        what: "a snapshot's data cluster with too low a refcount",
        make: |p| {
            // The first cluster was overwritten after the snapshot, so only the snapshot has the old one.
            let old_l1 = word(p, places(p).snapshots);
            let old_l2 = word(p, old_l1) & !COPIED;
            set_refcount(p, word(p, old_l2) & !COPIED, 0);
        },
        code: 2,
        qemu: None,
        found: |r| {
            r.corruptions == 1
                && has(r, |w| *w == What::RefcountTooLow { stored: 0, references: 1 })
                && r.findings[0].guest.is_none()
        },
    },
    DamageCase {
        what: "bitmaps that are not marked consistent",
        make: |p| patch_u64(p, 88, 0),
        code: 3,
        qemu: None,
        found: |r| r.leaks == 3,
    },
    DamageCase {
        what: "a bitmap table entry with reserved bits",
        make: |p| patch_u64(p, bitmap_table(p), word(p, bitmap_table(p)) | 2),
        code: 2,
        // It refuses to open the image: exit code 1.
        qemu: Some(1),
        found: |r| malformed(r, "bitmap table entry"),
    },
    DamageCase {
        what: "bitmap data behind the end of the file",
        make: |p| patch_u64(p, bitmap_table(p), 1 << 45),
        code: 2,
        qemu: None,
        found: |r| has(r, |w| matches!(w, What::PastEnd { structure: Structure::BitmapData, .. })),
    },
    DamageCase {
        what: "a bitmap directory entry with a broken granularity",
        make: |p| patch(p, bitmap_directory(p) + 17, &[70]),
        code: 2,
        // It finds that too, and then gives up: exit code 1.
        qemu: Some(1),
        found: |r| malformed(r, "granularity") && !r.references_complete,
    },
    DamageCase {
        what: "a dirty image with wrong refcounts",
        make: |p| {
            patch_u64(p, parts::INCOMPATIBLE.start as u64, 1);
            set_refcount(p, word(p, places(p).l2) & !COPIED, 0);
        },
        code: 2,
        qemu: None,
        found: |r| r.dirty && !r.marked_corrupt,
    },
    DamageCase {
        what: "a sound image that is marked corrupt",
        make: |p| patch_u64(p, parts::INCOMPATIBLE.start as u64, 2),
        code: 0,
        qemu: None,
        found: |r| !r.dirty && r.marked_corrupt && r.is_consistent(),
    },
];

fn bitmap_directory(path: &Path) -> u64 {
    // The extension's data: count and reserved word, then size, then offset.
    let at = (104..4096).step_by(8).find(|&at| word(path, at) >> 32 == 0x2385_2875).unwrap();
    word(path, at + 24)
}

fn bitmap_table(path: &Path) -> u64 {
    word(path, bitmap_directory(path))
}

#[test]
fn every_damage_is_found_and_named() {
    let Some(bench) = Bench::new() else { return };
    let sound = bench.image("sound", "sound 8M", "write -P 1 0 512k\nwrite -c -P 1 5M 128k");
    bench.run("qemu-img snapshot -c old sound");
    bench.fill("sound", "write -P 2 0 512k\nwrite -P 2 7M 64k");
    bench.run("qemu-img bitmap --add sound marks");
    bench.fill("sound", "write -P 3 0 64k");
    let report = ours(&sound);
    assert_same(&sound, &report);
    assert!(report.is_consistent() && report.references_complete && report.first_corruption().is_none());

    let damaged = bench.path("damaged");
    for damage in DAMAGES {
        std::fs::copy(&sound, &damaged).unwrap();
        (damage.make)(&damaged);
        let report = ours(&damaged);
        let text = format!("{}: {:#?}", damage.what, report);
        assert_eq!(code_of(&report), damage.code, "{text}");
        assert_eq!(theirs(&damaged).0, damage.qemu.unwrap_or(damage.code), "QEMU: {text}");
        assert!((damage.found)(&report), "{text}");
        assert_eq!(report.is_consistent(), damage.code != 2);
        assert_eq!(report.first_corruption().is_some(), damage.code == 2);
        for finding in &report.findings {
            assert!(
                finding.severity == Severity::Leak || finding.to_string().contains("offset"),
                "{finding}"
            );
        }
    }
}

#[test]
fn damaged_extended_entries_are_found() {
    let Some(bench) = Bench::new() else { return };
    let sound = bench.image("sound", "-o extended_l2=on sound 8M", "write -P 1 0 3k\nwrite -c -P 1 1M 64k");
    assert_same(&sound, &ours(&sound));
    let l2 = places(&sound).l2;
    let cluster = word(&sound, l2);
    let damaged = bench.path("damaged");
    for (what, place, value, qemu) in [
        ("allocated and zero", l2 + 8, 0x0000_0001_0000_0003, 2),
        ("allocated without a cluster", l2 + 24, 1, 2),
        ("a bitmap beside a compressed cluster", l2 + 16 * 16 + 8, 1, 2),
        ("the zero flag, which is reserved here", l2, cluster | 1, 0),
    ] {
        std::fs::copy(&sound, &damaged).unwrap();
        patch_u64(&damaged, place, value);
        let report = ours(&damaged);
        assert_eq!(code_of(&report), 2, "{what}: {report:#?}");
        assert!(malformed(&report, "L2 entry"), "{what}: {report:#?}");
        assert_eq!(theirs(&damaged).0, qemu, "{what}");
    }
}

#[test]
fn a_zero_flag_in_a_version_2_image_is_corrupt() {
    let Some(bench) = Bench::new() else { return };
    let path = bench.image("old", "-o compat=0.10 old 8M", "write -P 1 0 64k");
    patch_u64(&path, places(&path).l2 + 8, 1);
    let report = ours(&path);
    assert_eq!((code_of(&report), report.corruptions), (2, 1), "{report:#?}");
    assert!(report.findings[0].to_string().contains("no zero flag in a version 2 image"));
    assert_eq!(theirs(&path).0, 0, "QEMU cannot read that cluster, and finds nothing wrong");
}

#[test]
fn refcounts_that_are_too_narrow_are_corrupt() {
    let Some(bench) = Bench::new() else { return };
    let path = bench.image("one", "-o refcount_bits=1 one 8M", "write -P 1 0 128k");
    let l2 = places(&path).l2;
    patch_u64(&path, l2 + 8, word(&path, l2));
    let report = ours(&path);
    assert_eq!((code_of(&report), theirs(&path).0), (2, 2));
    assert!(has(&report, |w| *w == What::RefcountOverflow { references: 2, max: 1 }), "{report:#?}");
    assert_eq!(report.leaks, 1, "the cluster that is no longer used");
}

#[test]
fn thousands_of_references_to_a_cluster_are_counted() {
    let Some(bench) = Bench::new() else { return };
    // Compressed zeros are so small that thousands of clusters share a host cluster.
    let options = "-o cluster_size=2M,compression_type=zstd,refcount_bits=32";
    let path = bench.image("zeros", &format!("{options} zeros 40G"), "write -c -P 0 0 2M");
    let (l1, l2) = (places(&path).l1, places(&path).l2);
    let entry = word(&path, l2);
    assert_ne!(entry & 1 << 62, 0);
    // What 9000 such writes would make, in less time.
    let entries: Vec<u8> = (0..9000).flat_map(|_| entry.to_be_bytes()).collect();
    patch(&path, l2, &entries);
    let cluster = (entry & 0x1_ffff_ffff_ffff) >> 21;
    patch(&path, places(&path).refcount_block + cluster * 4, &9000u32.to_be_bytes());
    let report = ours(&path);
    assert_same(&path, &report);
    assert_eq!((report.compressed_clusters, code_of(&report)), (9000, 0));
    assert_ne!(l1, 0);
}

#[test]
fn every_number_agrees_whatever_the_window() {
    let Some(bench) = Bench::new() else { return };
    let path = bench.image("many", "-o cluster_size=512 many 8M", "write -P 1 0 3M\nwrite -c -P 1 5M 64k");
    bench.run("qemu-img snapshot -c s many");
    bench.fill("many", "write -P 2 1M 1M\nwrite -P 2 7M 64k");
    bench.run("qemu-img bitmap --add -g 512 many marks");
    bench.fill("many", "write -P 3 64k 64k");
    let whole = ours(&path);
    assert_same(&path, &whole);
    patch(&path, places(&path).refcount_block + 100, &[0, 7, 0, 0, 0, 1]);
    let damaged = ours(&path);
    assert_eq!(code_of(&damaged), 2);
    for words in [1, 7, 100, 1000] {
        assert_eq!(super::ours_in_windows(&path, words), damaged, "{words} words");
    }
}
