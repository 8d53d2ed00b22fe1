//! Repairs of damage made on purpose and at random: what can be repaired is clean afterwards, for
//! `qemu-img check` too, and the guest's bytes stay.

use std::path::Path;

use kit::Random;

use crate::chain::view::View;
use crate::chain::{Chain, OpenOptions};
use crate::check::tests::ours;
use crate::check::tests::qemu::{Bench, patch, patch_u64, places, theirs, word};
use crate::check::tests::random::{IMAGES, damage, metadata_words, varied_image};
use crate::check::{CheckOptions, Verdict, What};
use crate::format::parts;
use crate::image::ClusterCache;
use crate::repair::{RepairMode, RepairPlan, plan, repair};
use crate::storage::{Access, Host, MemHost, OsHost};
use crate::units::GuestOffset;

const COPIED: u64 = 1 << 63;
/// Random cases per image.
const CASES: u64 = 60;

/// Repairs an image file, after the plan has said the same and changed nothing.
fn repaired(path: &Path, mode: RepairMode) -> RepairPlan {
    let before = std::fs::read(path).unwrap();
    let file = OsHost.open(path, Access::ReadWrite).unwrap();
    let options = CheckOptions::default();
    let planned = plan(path, &*file, None, mode, &options).unwrap();
    assert!(std::fs::read(path).unwrap() == before, "a plan changes nothing");
    let done = repair(path, &*file, None, mode, &options).unwrap();
    assert_eq!(planned, done);
    done
}

/// What the guest sees, piece by piece; `None` where it cannot be read.
pub(crate) fn guest(image: &[u8]) -> Vec<Option<Vec<u8>>> {
    let host = MemHost::new();
    host.add("/image", image).unwrap();
    let Ok(chain) = Chain::open(&host, Path::new("/image"), &OpenOptions::default()) else {
        return Vec::new();
    };
    let images = chain.images();
    let view = View::new(&images, 0, 0);
    let read = |at: u64| {
        let mut bytes = vec![0; (view.size() - at).min(4096) as usize];
        let read = view.read(GuestOffset::new(at), &mut bytes, &mut ClusterCache::new());
        read.ok().map(|()| bytes)
    };
    (0..view.size()).step_by(4096).map(read).collect()
}

/// Every piece that could be read before reads the same.
pub(crate) fn assert_same_guest(before: &[Option<Vec<u8>>], after: &[Option<Vec<u8>>], what: &str) {
    for (n, old) in before.iter().enumerate().filter(|(_, old)| old.is_some()) {
        assert!(after.get(n) == Some(old), "{what}: the guest's bytes changed at {}", n * 4096);
    }
}

/// The bytes of the disk and of its snapshots, as qemu-img reads them.
fn converted(bench: &Bench, name: &str) -> Vec<Vec<u8>> {
    let views = ["", "-l snapshot.name=one ", "-l snapshot.name=two "];
    let read = |view| {
        bench.run(&format!("qemu-img convert -f qcow2 -O raw {view}{name} raw"));
        std::fs::read(bench.path("raw")).unwrap()
    };
    views.into_iter().map(read).collect()
}

/// Sets the 16-bit refcount of a cluster, in the first block.
fn set_refcount(path: &Path, cluster: u64, refcount: u16) {
    patch(path, places(path).refcount_block + cluster * 2, &refcount.to_be_bytes());
}

type MakeDamage = fn(&Path);

/// Damage that can be repaired, what it is, and whether the structures must be made anew for it.
const REPAIRABLE: &[(&str, bool, MakeDamage)] = &[
    ("a leak", false, |p| set_refcount(p, word(p, places(p).l2) << 1 >> 17, 7)),
    ("a data cluster is free", false, |p| set_refcount(p, word(p, places(p).l2) << 1 >> 17, 0)),
    ("an L1 table is free", false, |p| set_refcount(p, places(p).l1 >> 16, 0)),
    ("the header is free", false, |p| set_refcount(p, 0, 0)),
    ("a COPIED flag is wrong", false, |p| patch_u64(p, places(p).l2, word(p, places(p).l2) ^ COPIED)),
    ("a COPIED flag in the L1 table is wrong", false, |p| {
        patch_u64(p, places(p).l1, word(p, places(p).l1) ^ COPIED);
    }),
    ("all refcounts are lost", false, |p| patch(p, places(p).refcount_block, &[0; 1 << 16])),
    ("all refcounts are high", false, |p| patch(p, places(p).refcount_block, &[0xff; 1 << 16])),
    ("the block is lost", true, |p| patch_u64(p, places(p).refcount_table, 0)),
    ("the block is not aligned", true, |p| {
        patch_u64(p, places(p).refcount_table, places(p).refcount_block + 512);
    }),
    ("the block lies behind the end", true, |p| patch_u64(p, places(p).refcount_table, 1 << 40)),
    ("the block is the table", true, |p| {
        patch_u64(p, places(p).refcount_table, places(p).refcount_table);
    }),
    ("the block is an L2 table", true, |p| patch_u64(p, places(p).refcount_table, places(p).l2)),
    ("a block twice", true, |p| {
        patch_u64(p, places(p).refcount_table + 8, places(p).refcount_block);
    }),
    ("the table is a data cluster", true, |p| {
        patch_u64(p, 48, word(p, places(p).l2) & !COPIED);
    }),
    ("the table lies behind the end", true, |p| patch_u64(p, 48, 1 << 30)),
    ("dirty, and all refcounts are lost", false, |p| {
        patch(p, places(p).refcount_block, &[0; 1 << 16]);
        patch_u64(p, parts::INCOMPATIBLE.start as u64, 1);
    }),
    ("marked corrupt", false, |p| patch_u64(p, parts::INCOMPATIBLE.start as u64, 2)),
    ("dirty only", false, |p| patch_u64(p, parts::INCOMPATIBLE.start as u64, 1)),
    ("dirty, corrupt, and the block is lost", true, |p| {
        patch_u64(p, places(p).refcount_table, 0);
        patch_u64(p, parts::INCOMPATIBLE.start as u64, 3);
    }),
];

#[test]
fn what_can_be_repaired_is_clean_afterwards() {
    let Some(bench) = Bench::new() else { return };
    let sound = varied_image(&bench, "sound", "cluster_size=64k");
    let bytes = converted(&bench, "sound");
    let damaged = bench.path("damaged");
    for (name, anew, damage) in REPAIRABLE {
        std::fs::copy(&sound, &damaged).unwrap();
        damage(&damaged);
        let plan = repaired(&damaged, RepairMode::All);
        assert!(!plan.is_empty(), "{name}");
        assert_eq!(plan.rebuilt.is_some(), *anew, "{name}: {plan}");
        assert_eq!(plan.after.verdict(), Verdict::Clean, "{name}: {plan}");
        assert_eq!(word(&damaged, parts::INCOMPATIBLE.start as u64), 0, "{name}: dirty and corrupt bits");
        let again = ours(&damaged);
        assert_eq!(again, plan.after, "{name}");
        assert_eq!(theirs(&damaged).0, 0, "{name}");
        assert!(converted(&bench, "damaged") == bytes, "{name}: the guest's bytes changed");
        // It is an image that can be written.
        bench.fill("damaged", "write -P 9 0 4M");
        assert_eq!(theirs(&damaged).0, 0, "{name}, written");
    }
}

#[test]
fn lost_space_is_given_back_and_nothing_else_is_done() {
    let Some(bench) = Bench::new() else { return };
    let path = bench.image("i", "i 4M", "write -P 1 0 1M");
    bench.run("qemu-img snapshot -c one i");
    let before = ours(&path);
    // The snapshot is lost, all that it held is leaked, and its table as well.
    patch(&path, 60, &[0; 4]);
    patch_u64(&path, 64, 0);
    let plan = repaired(&path, RepairMode::Leaks);
    assert!(plan.before.leaks > 0 && plan.lowered > 16 && plan.freed > 0 && plan.flags > 16, "{plan}");
    assert_eq!(plan.after.verdict(), Verdict::Clean, "{plan}");
    assert_eq!(plan.leaks_fixed(), plan.before.leaks);
    assert_eq!(plan.after.allocated_clusters, before.allocated_clusters);
    assert_eq!(theirs(&path).0, 0);
    // A refcount that is too low is none of its business.
    set_refcount(&path, word(&path, places(&path).l2) << 1 >> 17, 0);
    let plan = repaired(&path, RepairMode::Leaks);
    assert!(plan.is_empty() && plan.after.verdict() == Verdict::Corrupt, "{plan}");
}

#[test]
fn nothing_is_given_back_while_an_entry_is_damaged() {
    let Some(bench) = Bench::new() else { return };
    let path = bench.image("i", "i 4M", "write -P 1 0 256k");
    let l2 = places(&path).l2;
    let entry = word(&path, l2);
    // The entry points nowhere: its cluster looks leaked, and is not.
    patch_u64(&path, l2, entry ^ 1 << 45);
    for mode in [RepairMode::Leaks, RepairMode::All] {
        let plan = repaired(&path, mode);
        assert!(plan.withheld && plan.is_empty(), "{plan}");
        assert_eq!((plan.after.corruptions, plan.after.leaks), (1, 1));
    }
    patch_u64(&path, l2, entry);
    assert_eq!(theirs(&path).0, 0);
    // It would mean new structures behind the end of the file, so there are none.
    patch_u64(&path, l2, entry ^ 1 << 45);
    let table = word(&path, places(&path).refcount_table + 8);
    patch_u64(&path, places(&path).refcount_table + 8, 1 << 40);
    let plan = repaired(&path, RepairMode::All);
    assert!(plan.not_rebuilt.is_some() && plan.is_empty(), "{plan}");
    patch_u64(&path, places(&path).refcount_table + 8, table);
    // Where new ones can be made, they keep what looks leaked.
    patch_u64(&path, l2, (word(&path, l2 + 8) & !COPIED) + 512);
    patch_u64(&path, places(&path).refcount_table + 8, 1 << 40);
    let plan = repaired(&path, RepairMode::All);
    assert!(plan.rebuilt.is_some() && plan.after.corruptions == 1 && plan.after.leaks > 0, "{plan}");
    // Where the old refcounts are lost too, all that looks unused is kept.
    patch_u64(&path, places(&path).refcount_table, 0);
    let plan = repaired(&path, RepairMode::All);
    assert!(plan.rebuilt.is_some() && plan.freed == 0 && plan.after.leaks > 0, "{plan}");
    patch_u64(&path, l2, entry);
    assert!(matches!(theirs(&path).0, 0 | 3));
}

#[test]
fn flags_of_a_data_file_are_corrected() {
    let Some(bench) = Bench::new() else { return };
    let path = bench.image("i", "-o data_file=data i 4M", "write -P 1 0 256k");
    let l2 = places(&path).l2;
    patch_u64(&path, l2 + 8, word(&path, l2 + 8) & !COPIED);
    assert_eq!(theirs(&path).0, 2);
    let plan = repaired(&path, RepairMode::All);
    assert_eq!((plan.flags, plan.after.verdict()), (1, Verdict::Clean), "{plan}");
    assert_eq!(theirs(&path).0, 0);
}

#[test]
fn shared_clusters_of_metadata_are_left_alone() {
    let Some(bench) = Bench::new() else { return };
    let path = bench.image("i", "i 4M", "write -P 1 0 256k");
    let p = places(&path);
    // The guest sees its own L2 table, the second entry of which lacks its flag.
    patch_u64(&path, p.l2, p.l2 | COPIED);
    patch_u64(&path, p.l2 + 8, word(&path, p.l2 + 8) & !COPIED);
    let before = guest(&std::fs::read(&path).unwrap());
    let plan = repaired(&path, RepairMode::All);
    assert!(plan.after.findings.iter().any(|f| matches!(f.what, What::Overlap { .. })), "{plan}");
    assert_same_guest(&before, &guest(&std::fs::read(&path).unwrap()), "overlap");
}

#[test]
fn random_damage_is_repaired_as_far_as_that_is_promised() {
    let Some(bench) = Bench::new() else { return };
    let damaged = bench.path("damaged");
    let (mut clean, mut left, mut anew) = (0, 0, 0);
    for (n, options) in IMAGES.iter().enumerate() {
        let path = varied_image(&bench, &format!("image{n}"), options);
        let words = metadata_words(&path);
        for case in 0..CASES {
            let seed = n as u64 * 1_000_000 + case;
            let what = format!("{options}, seed {seed}");
            std::fs::copy(&path, &damaged).unwrap();
            damage(&damaged, &words, &mut Random::new(seed));
            let bytes = std::fs::read(&damaged).unwrap();
            let host = MemHost::new();
            host.add("/image", &bytes).unwrap();
            let name = Path::new("/image");
            let file = host.open(name, Access::ReadWrite).unwrap();
            let run = || repair(name, &*file, None, RepairMode::All, &CheckOptions::default());
            let Ok(planned) = plan(name, &*file, None, RepairMode::All, &CheckOptions::default()) else {
                assert!(run().is_err() && host.content(name).unwrap() == bytes, "{what}");
                continue;
            };
            let done = run().unwrap();
            assert_eq!(planned, done, "{what}");
            let after = host.content(name).unwrap();
            assert_same_guest(&guest(&bytes), &guest(&after), &what);
            let findings = &done.after.findings;
            let hopeless = findings
                .iter()
                .any(|f| matches!(f.what, What::Overlap { .. } | What::RefcountOverflow { .. }));
            if !done.withheld && done.not_rebuilt.is_none() && !hopeless {
                assert_eq!(done.after.verdict(), Verdict::Clean, "{what}: {done}");
                std::fs::write(&damaged, &after).unwrap();
                assert_eq!(theirs(&damaged).0, 0, "{what}: {done}");
                clean += 1;
            } else {
                assert_ne!(done.after.verdict(), Verdict::Clean, "{what}: {done}");
                left += 1;
            }
            if done.not_rebuilt.is_none() {
                let low = findings.iter().find(|f| matches!(f.what, What::RefcountTooLow { .. }));
                assert_eq!(low, None, "{what}: {done}");
            }
            anew += u32::from(done.rebuilt.is_some());
            let again = run().unwrap();
            assert!(again.is_empty() && again.after == done.after, "{what}: {again}");
            assert!(host.content(name).unwrap() == after, "{what}: a second repair changes something");
        }
    }
    // The damage must be of all kinds, or this would show nothing.
    assert!(clean > 50 && left > 50 && anew > 5, "{clean} {left} {anew}");
}
