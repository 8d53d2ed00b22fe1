//! Damaged images: a clear answer, the right exit code, and not one byte written.

use kit::{Lab, qemu_is_here};

use crate::support::{Patch, lab};

const K: u64 = 1 << 10;
const M: u64 = 1 << 20;
const COPIED: u64 = 1 << 63;

/// One kind of damage to an image of 64 KiB clusters with data in its first 128 KiB.
struct Damage {
    name: &'static str,
    /// Options for creating the image.
    options: &'static str,
    make: fn(&Patch) -> &Patch,
    /// Exit codes of `commit` with the image as base and as top.
    codes: &'static [i32],
    /// Whether `info` can still describe the image.
    opens: bool,
}

const fn damage(name: &'static str, make: fn(&Patch) -> &Patch) -> Damage {
    Damage { name, options: "", make, codes: &[9], opens: true }
}

const fn unopenable(name: &'static str, make: fn(&Patch) -> &Patch) -> Damage {
    Damage { name, options: "", make, codes: &[7, 9], opens: false }
}

/// Sets the refcount of a cluster that the first block describes, 16 bits wide.
fn set_refcount(image: &Patch, cluster: u64, count: u16) -> &Patch {
    image.write(image.refcount_block_offset() + cluster * 2, &count.to_be_bytes())
}

fn data_cluster(image: &Patch) -> u64 {
    image.host_offset(0) / image.cluster_size()
}

/// Where `qemu-img check` sees less, or gives up, and we report corruption.
const STRICTER: &[&str] = &[
    "L2 entry on the header",
    "refcount table entry unaligned",
    "refcount table entry past 2^63",
    "zero flag in version 2",
];

fn battery() -> Vec<Damage> {
    vec![
        unopenable("header_length larger than the cluster", |i| i.set_u32(100, 1 << 20)),
        unopenable("header_length not a multiple of 8", |i| i.set_u32(100, 109)),
        unopenable("extension longer than the header's room", |i| i.set_u32(116, 0x20000)),
        unopenable("backing name outside the first cluster", |i| i.set_u64(8, 0x100000).set_u32(16, 10)),
        unopenable("backing name too long", |i| i.set_u64(8, 1024).set_u32(16, 1024)),
        unopenable("refcount table larger than 8 MiB", |i| i.set_u32(56, 129)),
        unopenable("refcount table offset unaligned", |i| i.set_u64(48, 0x10200)),
        unopenable("refcount table offset past 2^63", |i| i.set_u64(48, 0x8000_0000_0000_0000)),
        unopenable("refcount table of no clusters", |i| i.set_u32(56, 0)),
        unopenable("L1 table larger than 32 MiB", |i| i.set_u32(36, (32 << 20) / 8 + 1)),
        unopenable("L1 table too small", |i| i.set_u32(36, 0)),
        unopenable("L1 table offset unaligned", |i| i.set_u64(40, 0x30200)),
        unopenable("L1 table offset past 2^63", |i| i.set_u64(40, 0x8000_0000_0000_0000)),
        unopenable("more than 65536 snapshots", |i| i.set_u32(60, 65537).set_u64(64, 0x30000)),
        unopenable("snapshot table unaligned", |i| i.set_u32(60, 1).set_u64(64, 0x30200)),
        unopenable("refcount order above 6", |i| i.set_u32(96, 7)),
        unopenable("cluster size below 512", |i| i.set_u32(20, 8)),
        unopenable("cluster size above 2 MiB", |i| i.set_u32(20, 22)),
        unopenable("size larger than the tables can map", |i| i.set_u64(24, 1 << 60)),
        unopenable("unknown incompatible bit", |i| i.set_bits(72, 1 << 63)),
        unopenable("compression type without its bit", |i| i.write(104, &[1])),
        unopenable("compression type bit without a type", |i| i.set_bits(72, 8)),
        unopenable("unknown compression type", |i| i.set_bits(72, 8).write(104, &[9])),
        unopenable("unknown encryption method", |i| i.set_u32(32, 3)),
        unopenable("LUKS without its extension", |i| i.set_u32(32, 2)),
        unopenable("raw data file without a data file", |i| i.set_bits(88, 2)),
        unopenable("data file bit without a name or a file", |i| i.set_bits(72, 4)),
        damage("L1 entry unaligned", |i| i.set_bits(i.l1_entry(0), 0x200)),
        damage("L1 entry with reserved bits", |i| i.set_bits(i.l1_entry(0), 1 << 57)),
        damage("L1 entry past the end of the file", |i| i.set_u64(i.l1_entry(0), COPIED | 1 << 40)),
        damage("L2 entry unaligned", |i| i.set_bits(i.l2_entry(0), 0x200)),
        damage("L2 entry with reserved bits", |i| i.set_bits(i.l2_entry(0), 1 << 57)),
        damage("L2 entry past the end of the file", |i| i.set_u64(i.l2_entry(0), COPIED | 1 << 40)),
        damage("L2 entry on the header", |i| i.set_u64(i.l2_entry(0), COPIED)),
        damage("L2 entry on the L1 table", |i| i.set_u64(i.l2_entry(0), COPIED | i.l1_offset())),
        damage("L2 entry on its own table", |i| i.set_u64(i.l2_entry(0), COPIED | i.l2_table(0))),
        damage("L2 entry on the refcount table", |i| {
            i.set_u64(i.l2_entry(0), COPIED | i.refcount_table_offset())
        }),
        damage("L2 entry on a refcount block", |i| {
            i.set_u64(i.l2_entry(0), COPIED | i.refcount_block_offset())
        }),
        damage("two L2 entries on one cluster", |i| i.set_u64(i.l2_entry(0), COPIED | i.host_offset(64 * K))),
        damage("L1 entry on the header", |i| i.set_u64(i.l1_entry(0), COPIED)),
        damage("L1 entry on the L1 table", |i| i.set_u64(i.l1_entry(0), COPIED | i.l1_offset())),
        damage("refcount table entry unaligned", |i| i.set_bits(i.refcount_table_offset(), 0x200)),
        damage("refcount table entry with reserved bits", |i| i.set_bits(i.refcount_table_offset(), 1)),
        damage("refcount table entry past the end of the file", |i| {
            i.set_u64(i.refcount_table_offset(), 1 << 40)
        }),
        damage("refcount table entry past 2^63", |i| i.set_u64(i.refcount_table_offset(), COPIED)),
        damage("empty refcount table", |i| i.set_u64(i.refcount_table_offset(), 0)),
        damage("empty refcount block", |i| i.write(i.refcount_block_offset(), &[0; 4096])),
        damage("refcount 0 of a data cluster", |i| set_refcount(i, data_cluster(i), 0)),
        damage("refcount 0 of the L2 table", |i| set_refcount(i, i.l2_table(0) / i.cluster_size(), 0)),
        damage("refcount 0 of the header", |i| set_refcount(i, 0, 0)),
        damage("refcount 0 of the refcount block", |i| {
            set_refcount(i, i.refcount_block_offset() / i.cluster_size(), 0)
        }),
        damage("COPIED missing", |i| i.set_u64(i.l2_entry(0), i.host_offset(0))),
        damage("COPIED beside a refcount of 2", |i| set_refcount(i, data_cluster(i), 2)),
        damage("refcount table offset inside the data", |i| i.set_u64(48, i.host_offset(0))),
        Damage {
            name: "zero flag in version 2",
            options: "compat=0.10",
            make: |i| i.set_bits(i.l2_entry(0), 1),
            codes: &[9],
            opens: true,
        },
        Damage {
            name: "version 2 and a reserved L2 bit",
            options: "compat=0.10",
            make: |i| i.set_bits(i.l2_entry(0), 1 << 57),
            codes: &[9],
            opens: true,
        },
        Damage {
            name: "subcluster both allocated and zero",
            options: "extended_l2=on",
            make: |i| {
                let at = (i.u64(i.l1_entry(0)) & 0x00ff_ffff_ffff_fe00) + 8;
                i.set_u64(at, 1 << 32 | 1)
            },
            codes: &[9],
            opens: true,
        },
        Damage {
            name: "subcluster allocated without a cluster",
            options: "extended_l2=on",
            make: |i| {
                let at = i.u64(i.l1_entry(0)) & 0x00ff_ffff_ffff_fe00;
                i.set_u64(at, 0).set_u64(at + 8, 1)
            },
            codes: &[9],
            opens: true,
        },
    ]
}

/// A chain of two; the damaged one is `victim`.
fn chain(victim: &str, damage: &Damage) -> Lab {
    let folder = lab("malformed");
    let options = |name: &str| if name == victim { damage.options } else { "" };
    folder.create("base.qcow2", M, options("base.qcow2"));
    folder.io("qcow2", "base.qcow2", &["write -P 1 0 128k"]);
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, options("top.qcow2"));
    folder.io("qcow2", "top.qcow2", &["write -P 2 0 128k", "write -P 3 512k 64k"]);
    (damage.make)(&Patch::of(&folder, victim));
    folder
}

/// Runs `test` on every damage, and reports all that failed.
fn each(test: impl Fn(&Damage) + std::panic::RefUnwindSafe) {
    if !qemu_is_here() {
        return;
    }
    let failed: Vec<_> = battery()
        .iter()
        .filter(|damage| {
            let failed = std::panic::catch_unwind(|| test(damage)).is_err();
            if failed {
                eprintln!("^ {}\n", damage.name);
            }
            failed
        })
        .map(|damage| damage.name)
        .collect();
    assert!(failed.is_empty(), "{} failed: {failed:#?}", failed.len());
}

#[test]
fn a_damaged_base_is_refused_and_named() {
    each(|damage| {
        let folder = chain("base.qcow2", damage);
        folder.refused(&["commit", "top.qcow2"], damage.codes).says("base.qcow2");
        folder.refused(&["commit", "top.qcow2", "--dry-run"], damage.codes).says("base.qcow2");
    });
}

#[test]
fn a_damaged_top_never_reaches_base() {
    each(|damage| {
        // Adding a data file or a backing name to an overlay makes a different chain, not a damaged one.
        if damage.name.starts_with("backing name outside") {
            return;
        }
        let folder = chain("top.qcow2", damage);
        let before = folder.files();
        let run = folder.qmerge(&["commit", "top.qcow2"]);
        let sound = folder.try_img(&["check", "-f", "qcow2", "top.qcow2"]).code;
        if run.code == 0 {
            // Only damage that does not touch what the guest reads may be merged: refcounts and flags of the overlay.
            let refcounts = damage.name.contains("refcount") || damage.name.contains("COPIED");
            assert!(refcounts, "merged in spite of '{}' (qemu-img check: {sound}):\n{run}", damage.name);
            let base = folder.view("qcow2", "base.qcow2");
            base.assert_all(0, 128 * K, 2, "top's data in base");
            base.assert_all(512 * K, 576 * K, 3, "top's data in base");
            folder.check_clean("base.qcow2");
        } else {
            assert!(damage.codes.contains(&run.code), "{run}");
            assert!(run.text().contains("top.qcow2"), "{run}");
            assert!(run.last_line().starts_with("hint: "), "{run}");
            folder.assert_unchanged(&before, &run);
        }
    });
}

#[test]
fn check_agrees_with_qemu_on_the_class_of_damage() {
    each(|damage| {
        let folder = chain("base.qcow2", damage);
        let before = folder.files();
        let theirs = folder.try_img(&["check", "-f", "qcow2", "base.qcow2"]);
        let ours = folder.qmerge(&["check", "base.qcow2"]);
        folder.assert_unchanged(&before, &ours);
        // What cannot be opened cannot be checked, however the program says so.
        let agree = match STRICTER.contains(&damage.name) {
            true => ours.code == 2 && theirs.code != 2,
            false if damage.opens => ours.code == theirs.code,
            false => ours.code > 0 && theirs.code > 0,
        };
        assert!(agree, "ours:\n{ours}\nQEMU's:\n{theirs}");
    });
}

#[test]
fn info_describes_what_can_be_described() {
    each(|damage| {
        let folder = chain("base.qcow2", damage);
        if damage.opens {
            folder.qmerge(&["info", "base.qcow2"]).ok();
        } else {
            let run = folder.qmerge(&["info", "base.qcow2"]);
            assert!([0, 7, 9].contains(&run.code), "{run}");
        }
    });
}

#[test]
fn reading_a_damaged_image_never_crashes_or_writes() {
    each(|damage| {
        let folder = chain("top.qcow2", damage);
        let before = folder.files();
        let target = folder.scratch();
        let target = target.to_str().unwrap();
        for args in [
            &["map", "top.qcow2", "--json"][..],
            &["compare", "top.qcow2", "base.qcow2"],
            &["flatten", "top.qcow2", "-o", target, "--to", "raw"],
            &["info", "top.qcow2", "--chain"],
        ] {
            let run = folder.qmerge(args);
            assert!((0..=9).contains(&run.code), "{run}");
            folder.assert_unchanged(&before, &run);
            if args[0] == "flatten" && run.code != 0 {
                assert!(!std::path::Path::new(target).exists(), "a failed flatten left its target:\n{run}");
            }
        }
    });
}

/// A qcow2 image with compressed clusters, to be damaged.
fn compressed(name: &str, kind: &str, make: impl Fn(&Patch)) -> Lab {
    let folder = lab(name);
    folder.create("base.qcow2", M, "");
    folder.io("qcow2", "base.qcow2", &["write -P 1 0 128k"]);
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, &format!("compression_type={kind}"));
    folder.io("qcow2", "top.qcow2", &["write -c -P 2 0 64k", "write -c -P 3 64k 64k"]);
    make(&Patch::of(&folder, "top.qcow2"));
    folder
}

#[test]
fn compressed_data_that_is_garbage_is_never_merged() {
    if !qemu_is_here() {
        return;
    }
    for kind in ["zlib", "zstd"] {
        let folder = compressed("garbage", kind, |top| {
            let start = top.u64(top.l2_entry(0)) & ((1 << 54) - 1);
            top.write(start, &[0xff; 8]);
        });
        let run = folder.qmerge(&["commit", "top.qcow2"]).expect(9).says("top.qcow2");
        assert!(run.last_line().starts_with("hint: "), "{run}");
        folder.check_clean("base.qcow2");
        // What QEMU can still read through top is what it was.
        let second = folder.scratch();
        folder.qmerge(&["flatten", "top.qcow2", "-o", second.to_str().unwrap(), "--to", "raw"]).expect(9);
        folder.io("qcow2", "top.qcow2", &["read -P 3 64k 64k"]);
    }
}

#[test]
fn compressed_data_past_the_end_of_the_file_is_never_merged() {
    if !qemu_is_here() {
        return;
    }
    for kind in ["zlib", "zstd"] {
        let folder = compressed("past-end", kind, |top| {
            let entry = top.u64(top.l2_entry(0));
            top.set_u64(top.l2_entry(0), entry & !((1 << 54) - 1) | 1 << 40);
        });
        folder.refused(&["commit", "top.qcow2"], &[9]).says("top.qcow2");
        folder.refused(&["flatten", "top.qcow2", "-o", "flat", "--to", "raw"], &[9]);
    }
}

#[test]
fn a_compressed_size_that_is_too_small_is_never_merged() {
    if !qemu_is_here() {
        return;
    }
    // Incompressible enough to need several sectors, and a size field that admits one.
    let folder = compressed("too-small", "zlib", |_| {});
    let noise = folder.scratch();
    let mut random = kit::Random::new(7);
    let bytes: Vec<u8> =
        (0..65536).map(|i| if i % 2 == 0 { (random.next() >> 40) as u8 & 15 } else { 0 }).collect();
    std::fs::write(&noise, bytes).unwrap();
    folder.io("qcow2", "top.qcow2", &[&format!("write -c -s {} 128k 64k", noise.display())]);
    let top = Patch::of(&folder, "top.qcow2");
    let at = top.l2_entry(128 * K);
    let sectors = top.u64(at) >> 54 & 0xff;
    assert!(sectors > 4, "the data needs {sectors} sectors");
    top.set_u64(at, top.u64(at) & !(0xff << 54) | 1 << 54);
    folder.qmerge(&["commit", "top.qcow2"]).expect(9).says("top.qcow2");
    folder.check_clean("base.qcow2");
}

#[test]
fn a_data_file_entry_away_from_its_guest_offset_is_refused() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("data-offset");
    folder.create("base.qcow2", M, "data_file=base.data");
    folder.io("qcow2", "base.qcow2", &["write -P 1 0 128k"]);
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
    folder.io("qcow2", "top.qcow2", &["write -P 2 0 64k"]);
    let base = Patch::of(&folder, "base.qcow2");
    base.set_u64(base.l2_entry(0), COPIED | 0x50000);
    folder.refused(&["commit", "top.qcow2"], &[9]).says("base.qcow2");
}

#[test]
fn a_snapshot_with_a_broken_table_is_refused() {
    if !qemu_is_here() {
        return;
    }
    for (field, value) in [(0, 0x30200_u64), (0, 1 << 62), (0, 1 << 40)] {
        let folder = lab("snapshot-table");
        folder.create("base.qcow2", M, "");
        folder.io("qcow2", "base.qcow2", &["write -P 1 0 128k"]);
        folder.img(&["snapshot", "-c", "snap", "base.qcow2"]);
        folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
        folder.io("qcow2", "top.qcow2", &["write -P 2 0 64k"]);
        let base = Patch::of(&folder, "base.qcow2");
        let table = base.u64(64);
        base.set_u64(table + field, value);
        folder.refused(&["commit", "top.qcow2"], &[9]).says("base.qcow2");
    }
}

#[test]
fn snapshot_entries_beyond_their_limits_are_refused() {
    if !qemu_is_here() {
        return;
    }
    for (at, value) in [(36_u64, 2000_u32), (36, u32::MAX), (8, u32::MAX)] {
        let folder = lab("snapshot-limits");
        folder.create("base.qcow2", M, "");
        folder.img(&["snapshot", "-c", "snap", "base.qcow2"]);
        folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
        folder.io("qcow2", "top.qcow2", &["write -P 2 0 64k"]);
        let base = Patch::of(&folder, "base.qcow2");
        base.set_u32(base.u64(64) + at, value);
        folder.refused(&["commit", "top.qcow2"], &[7, 9]).says("base.qcow2");
    }
}

#[test]
fn bitmap_directories_that_lie_are_refused_or_dropped() {
    if !qemu_is_here() {
        return;
    }
    // Fields of the bitmaps extension: count, reserved, directory size, directory offset.
    for (at, value) in [(0, 0), (0, 70000), (4, 1), (8, 1), (16, 1), (20, 0x200)] {
        let folder = lab("bitmap-directory");
        folder.create("base.qcow2", M, "");
        folder.img(&["bitmap", "--add", "base.qcow2", "backup"]);
        folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
        folder.io("qcow2", "top.qcow2", &["write -P 2 0 64k"]);
        let base = Patch::of(&folder, "base.qcow2");
        let mut extension = u64::from(base.u32(100));
        while base.u32(extension) != 0x2385_2875 {
            assert_ne!(base.u32(extension), 0, "there is no bitmaps extension");
            extension += 8 + u64::from(base.u32(extension + 4)).next_multiple_of(8);
        }
        base.set_u32(extension + 8 + at, value);
        folder.refused(&["commit", "top.qcow2"], &[6, 7, 9]).says("base.qcow2");
    }
}

#[test]
fn a_backing_format_that_does_not_exist_is_refused() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("format-foo");
    folder.create("base.qcow2", M, "");
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
    let top = Patch::of(&folder, "top.qcow2");
    let at = u64::from(top.u32(100));
    assert_eq!(top.u32(at), 0xe279_2aca, "the backing format is not the first extension");
    top.write(at + 8, b"foooo");
    folder.refused(&["commit", "top.qcow2"], &[6, 7]).says("foooo");
    folder.qmerge(&["info", "top.qcow2"]).ok();
}

#[test]
fn inconsistent_bitmaps_of_base_do_not_come_back_to_life() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("stale-bitmaps");
    folder.create("base.qcow2", M, "");
    folder.img(&["bitmap", "--add", "base.qcow2", "backup"]);
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
    folder.io("qcow2", "top.qcow2", &["write -P 2 0 64k"]);
    Patch::of(&folder, "base.qcow2").set_u64(88, 0);
    let before = folder.view("qcow2", "top.qcow2");
    let run = folder.qmerge(&["commit", "top.qcow2"]);
    if run.code == 0 {
        assert_eq!(
            Patch::of(&folder, "base.qcow2").u64(88) & 1,
            0,
            "stale bitmaps are called consistent:\n{run}"
        );
        folder.view("qcow2", "base.qcow2").assert_same(&before, "base");
    } else {
        assert!([6, 9].contains(&run.code), "{run}");
    }
}
