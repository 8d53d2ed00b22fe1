//! What `qemu-img check -r all` mends although an entry is damaged: zeros that are kept nowhere (iotest 060), snapshot tables
//! (261), refcounts on a device without room behind the image (108). Judged by QEMU.

use std::path::Path;

use super::repair::{assert_same_guest, guest};
use crate::check::tests::qemu::{Bench, patch, patch_u64, places, theirs, word};
use crate::check::{CheckOptions, Verdict};
use crate::format::{Snapshot, decode_snapshots, snapshot_table_bound};
use crate::repair::{RepairMode, RepairPlan, repair};
use crate::storage::sim::SimHost;
use crate::storage::{Access, Host, MemHost, OsHost};

fn repaired(path: &Path) -> RepairPlan {
    let file = OsHost.open(path, Access::ReadWrite).unwrap();
    repair(path, &*file, None, RepairMode::All, &CheckOptions::default()).unwrap()
}

fn snapshots(path: &Path) -> Vec<Snapshot> {
    let bytes = std::fs::read(path).unwrap();
    let (table, count) = (word(path, 64), word(path, 56) as u32);
    let end = bytes.len().min((table + snapshot_table_bound(count)) as usize);
    decode_snapshots(&bytes[table as usize..end], count, table).unwrap().0
}

/// Writes the entries with so many bytes of extra data: what they had, cut or followed by others.
fn write_entries(path: &Path, extra_len: u32) {
    let mut table = word(path, 64);
    for mut snapshot in snapshots(path) {
        snapshot.extra.resize(extra_len as usize, 0x77);
        let entry = snapshot.encode();
        patch(path, table, &entry);
        table += entry.len() as u64;
    }
}

#[test]
fn snapshot_tables_are_mended_as_qemu_does() {
    let Some(bench) = Bench::new() else { return };
    for stated in [0, 4, 8, 15, 1025, 2000, 5000] {
        let path = bench.image("i", "i 4M", "write -P 1 0 1M");
        for name in ["one", "two"] {
            bench.run(&format!("qemu-img snapshot -c {name} i"));
            bench.fill("i", "write -P 2 512k 1M");
        }
        let before = snapshots(&path);
        write_entries(&path, stated);
        std::fs::copy(&path, bench.path("theirs")).unwrap();
        let seen = guest(&std::fs::read(&path).unwrap());
        let plan = repaired(&path);
        assert_eq!((plan.snapshots, plan.after.verdict()), (2, Verdict::Clean), "{stated}: {plan}");
        assert_same_guest(&seen, &guest(&std::fs::read(&path).unwrap()), "snapshots");
        assert_eq!(theirs(&path).0, 0, "{stated}");
        bench.run("qemu-img check -q -r all theirs");
        let (ours, theirs) = (snapshots(&path), snapshots(&bench.path("theirs")));
        for ((ours, theirs), old) in ours.iter().zip(&theirs).zip(&before) {
            assert_eq!(ours.extra, theirs.extra, "{stated}");
            assert_eq!((&ours.name, ours.l1_offset), (&old.name, old.l1_offset), "{stated}");
        }
        assert!(repaired(&path).is_empty(), "{stated}");
        // They can be gone back to.
        bench.run("qemu-img snapshot -a one i");
        assert_eq!(crate::check::tests::qemu::theirs(&path).0, 0, "{stated}");
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn zeros_kept_at_an_unaligned_offset_are_mended_as_qemu_does() {
    let Some(bench) = Bench::new() else { return };
    let cases: [(&str, u64, Option<u64>, bool); 6] = [
        ("", 1 << 63 | 0x52a01, None, true),
        ("", 0x52a01, None, true),
        // Data, whose place is not known.
        ("", 1 << 63 | 0x52a00, None, false),
        ("-o extended_l2=on", 1 << 63 | 0x52a00, Some(0xf << 32), true),
        ("-o extended_l2=on", 1 << 63 | 0x52a00, Some(0), true),
        ("-o extended_l2=on", 1 << 63 | 0x52a00, Some(1), false),
    ];
    for (options, entry, bitmap, is_mended) in cases {
        let what = format!("{options} {entry:#x} {bitmap:?}");
        let path = bench.image("i", &format!("{options} i 4M"), "write -P 1 0 256k");
        patch_u64(&path, places(&path).l2, entry);
        if let Some(bitmap) = bitmap {
            patch_u64(&path, places(&path).l2 + 8, bitmap);
        }
        std::fs::copy(&path, bench.path("theirs")).unwrap();
        let plan = repaired(&path);
        assert_eq!(plan.offsets_dropped, u64::from(is_mended), "{what}: {plan}");
        assert_eq!(plan.after.verdict() == Verdict::Clean, is_mended, "{what}: {plan}");
        if is_mended {
            bench.run("qemu-img check -q -r all theirs");
            assert_eq!(theirs(&path).0, 0, "{what}");
            bench.run("qemu-img compare -q i theirs");
        }
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn refcounts_are_made_anew_in_free_clusters_of_a_full_device() {
    let Some(bench) = Bench::new() else { return };
    let path = bench.image("i", "-o cluster_size=4k i 4M", "write -P 1 0 3M");
    let l2 = places(&path).l2;
    let name = Path::new("/device");
    // Two are needed. The lost block's own cluster is free, and others are where entries were dropped.
    for (freed, fits) in [(&[4, 9, 10, 200, 201, 202][..], true), (&[7][..], true), (&[][..], false)] {
        let mut image = std::fs::read(&path).unwrap();
        image.truncate(image.len() / 4096 * 4096);
        for entry in freed {
            let at = l2 as usize + entry * 8;
            image[at..at + 8].fill(0);
        }
        let table = places(&path).refcount_table as usize;
        image[table..table + 8].fill(0);
        let host = MemHost::new();
        host.add(name, &image).unwrap();
        let disk = SimHost::over(&host);
        disk.make_device(name).unwrap();
        let file = disk.open(name, Access::ReadWrite).unwrap();
        let plan = repair(name, &*file, None, RepairMode::All, &CheckOptions::default()).unwrap();
        assert_eq!(plan.rebuilt.is_some(), fits, "{freed:?}: {plan}");
        assert_eq!(plan.after.verdict() == Verdict::Clean, fits, "{freed:?}: {plan}");
        let after = disk.now().content(name).unwrap();
        assert_same_guest(&guest(&image), &guest(&after), "device");
        if fits {
            std::fs::write(bench.path("after"), &after).unwrap();
            assert_eq!(theirs(&bench.path("after")).0, 0, "{freed:?}");
        }
    }
}
