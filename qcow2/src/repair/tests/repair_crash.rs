//! Power cuts at every point of a repair: of what was not yet synced, each sector may be missing. The guest's
//! bytes stay in every state, and the repair that is made again succeeds.

use std::path::Path;
use std::sync::Arc;

use kit::Random;

use super::repair::{assert_same_guest, guest};
use crate::check::tests::qemu::{Bench, patch, patch_u64, places, word};
use crate::check::tests::random::varied_image;
use crate::check::{CheckOptions, CheckReport, Severity, Verdict, What, check};
use crate::format::parts;
use crate::repair::{RepairMode, repair};
use crate::storage::sim::{Cuts, DiskOp, Garbage, SimHost, Tear, power_cuts};
use crate::storage::{Access, Host, MemHost, Storage};

const NAME: &str = "/image";

/// A disk with this image, and the image opened.
fn disk(image: &[u8]) -> (SimHost, Arc<dyn Storage>) {
    let host = MemHost::new();
    host.add(NAME, image).unwrap();
    let disk = SimHost::over(&host);
    let file = disk.open(Path::new(NAME), Access::ReadWrite).unwrap();
    (disk, file)
}

fn content(disk: &SimHost) -> Vec<u8> {
    disk.now().content(Path::new(NAME)).unwrap().to_vec()
}

/// How many clusters have a refcount that is too low.
fn too_low(report: &CheckReport) -> u64 {
    let low = report.findings.iter().filter(|f| matches!(f.what, What::RefcountTooLow { .. }));
    low.map(|f| f.clusters).sum()
}

/// Repairs with power cuts; returns how many states were tried.
fn cut(image: &[u8], random: &mut Random, what: &str) -> u64 {
    let name = Path::new(NAME);
    let options = CheckOptions::default();
    let seen = guest(image);
    let (disk_of_image, file) = disk(image);
    let before = check(name, &*file, None, &options).unwrap();
    let done = repair(name, &*file, None, RepairMode::All, &options).unwrap();
    assert_eq!(done.after.verdict(), Verdict::Clean, "{what}: {done}");
    let log = disk_of_image.log();
    assert!(log.iter().all(|op| !matches!(op, DiskOp::SetLen { .. })), "{what}: a repair cuts nothing off");
    let cuts = Cuts {
        seed: random.next(),
        tear: Tear::Sector,
        exhaustive: 4,
        listed: 3,
        random: 5,
        garbage: Garbage::None,
        damaged: 0,
    };
    power_cuts(disk_of_image.start(), &log, &cuts, |cut| {
        let what = format!("{what}: {cut}");
        let state = cut.state.content(name).unwrap();
        assert_same_guest(&seen, &guest(&state), &what);
        let (again_on, file) = disk(&state);
        let found = check(name, &*file, None, &options).unwrap();
        if state[48..60] == image[48..60] {
            assert!(too_low(&found) <= too_low(&before), "{what}: refcounts are lower: {found:#?}");
        } else {
            // New structures are named only when they are there.
            let corruption = found
                .findings
                .iter()
                .find(|f| f.severity == Severity::Corruption && !matches!(f.what, What::CopiedFlag { .. }));
            assert_eq!(corruption, None, "{what}: half of the new structures");
        }
        let again = repair(name, &*file, None, RepairMode::All, &options).unwrap();
        assert_eq!(again.after.verdict(), Verdict::Clean, "{what}, again: {again}");
        assert_same_guest(&seen, &guest(&content(&again_on)), &what);
    })
}

#[test]
fn a_power_cut_leaves_what_can_be_repaired() {
    let Some(bench) = Bench::new() else { return };
    let mut states = 0;
    for (n, options) in
        ["cluster_size=512", "cluster_size=4k,refcount_bits=8", "cluster_size=16k,extended_l2=on"]
            .into_iter()
            .enumerate()
    {
        let path = varied_image(&bench, &format!("i{n}"), options);
        let sound = std::fs::read(&path).unwrap();
        let block = places(&path).refcount_block;
        let size = 1usize << u32::from_be_bytes(sound[20..24].try_into().unwrap());
        let damages: [(&str, &dyn Fn()); 5] = [
            ("refcounts lost", &|| patch(&path, block, &vec![0; size])),
            ("refcounts high", &|| patch(&path, block, &vec![0x77; size])),
            ("block lost, dirty", &|| {
                patch_u64(&path, places(&path).refcount_table, 0);
                patch_u64(
                    &path,
                    parts::INCOMPATIBLE.start as u64,
                    word(&path, parts::INCOMPATIBLE.start as u64) | 1,
                );
            }),
            ("table behind the end", &|| patch_u64(&path, 48, 1 << 30)),
            ("table is data", &|| patch_u64(&path, 48, word(&path, places(&path).l2) & !(1 << 63))),
        ];
        for (name, damage) in damages {
            std::fs::write(&path, &sound).unwrap();
            damage();
            let image = std::fs::read(&path).unwrap();
            states += cut(&image, &mut Random::new(n as u64), &format!("{options}, {name}"));
        }
    }
    assert!(states > 300, "{states}");
}

#[test]
fn on_a_device_new_structures_lie_in_free_clusters() {
    let Some(bench) = Bench::new() else { return };
    let path = varied_image(&bench, "i", "cluster_size=4k");
    patch_u64(&path, places(&path).refcount_table, 0);
    let image = std::fs::read(&path).unwrap();
    let options = CheckOptions::default();
    // There are free clusters in the middle; where there are none is tried in `mends`.
    for room in [1 << 20, 1 << 12, 0] {
        let mut device = image.clone();
        device.resize(image.len().next_multiple_of(4096) + room, 0xee);
        let (disk, file) = disk(&device);
        disk.make_device(Path::new(NAME)).unwrap();
        let done = repair(Path::new(NAME), &*file, None, RepairMode::All, &options).unwrap();
        assert!(done.rebuilt.is_some(), "{room}: {done}");
        assert_eq!(done.after.verdict(), Verdict::Clean, "{room}: {done}");
        let after = content(&disk);
        assert_eq!(after.len(), device.len(), "a device does not grow");
        assert_same_guest(&guest(&image), &guest(&after), "device");
    }
}
