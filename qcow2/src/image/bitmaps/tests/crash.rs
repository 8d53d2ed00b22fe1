//! Power cuts while bits are set and the disk grows: of what was not yet synced, any write may be
//! missing. Each state must be free of corruption for `qemu-img check`, and no valid bitmap may claim
//! too little.

use super::*;
use crate::storage::MemHost;
use crate::storage::sim::{Cuts, DiskOp, Garbage, SimHost, Tear, power_cuts};

const MIB: u64 = 1 << 20;

/// From here on a merge may write data.
const MARKED: &str = "marked";

/// Each write alone, all but each, and every prefix; writes are not torn.
const CUTS: Cuts = Cuts {
    seed: 1,
    tear: Tear::Call,
    exhaustive: 0,
    listed: usize::MAX,
    random: 0,
    garbage: Garbage::None,
    damaged: 0,
};

/// Whether `a` holds all of `b`.
fn covers(a: &[Range<u64>], b: &[Range<u64>]) -> bool {
    union([a, b].concat()) == a
}

/// How often a crash left what.
#[derive(Debug, Default)]
struct CrashCounts {
    states: usize,
    /// Without valid bitmaps.
    lost: usize,
    /// With the new size.
    grown: usize,
}

/// Cuts the power at every point of a merge into a base of 6 MiB, and judges what is left.
fn crash_everywhere(ranges: &[GuestRange], new_size: u64) -> CrashCounts {
    let old_size = 6 * MIB;
    let fixture = Fixture::new("cluster_size=512", &old_size.to_string());
    fixture.bitmap("fine", "512").bitmap("coarse", "65536").write(MIB, 3072).write(old_size - 512, 512);
    fixture.bitmap("fresh", "512").bitmap("idle", "512").disable("idle");
    let start = std::fs::read(&fixture.path).unwrap();

    let host = MemHost::new();
    host.add(&fixture.path, &start).unwrap();
    let disk = SimHost::over(&host);
    let file = disk.open(&fixture.path, Access::ReadWrite).unwrap();
    let mut image = Qcow2::open(&fixture.path, file, None).unwrap();
    let plan = plan(&image, ranges, new_size);
    let refcounts = make_room(&mut image, &plan, new_size);
    let growth = mark(&image, &refcounts, plan, ranges).unwrap();
    disk.note(MARKED);
    growth.publish(&mut image, &refcounts).unwrap();
    let log = disk.log();
    let marked_at = log.iter().position(|op| *op == DiskOp::Note(MARKED)).unwrap();

    let before = fixture.open();
    let before: Vec<_> = bitmaps(&before).iter().map(|b| dirty(&before, &b.display_name())).collect();
    let mut outcome = CrashCounts::default();
    power_cuts(disk.start(), &log, &CUTS, |cut| {
        outcome.states += 1;
        let states = format!("{}: {cut}", outcome.states);
        let marked = cut.reached > marked_at;
        std::fs::write(&fixture.path, cut.state.content(&fixture.path).unwrap()).unwrap();
        let check = kit::end(Command::new("qemu-img").args(["check", "-q", fixture.name()]));
        assert!(matches!(check.code, 0 | 3), "state {states}: {check}");
        let image = fixture.open();
        let size = image.virtual_size();
        assert!([old_size, new_size].contains(&size), "state {states}");
        outcome.grown += usize::from(size == new_size);
        let found = bitmaps(&image);
        if found.is_empty() {
            outcome.lost += 1;
            return;
        }
        for (bitmap, old) in found.iter().zip(&before) {
            let name = bitmap.display_name();
            assert_eq!(u64::from(bitmap.table_entries), bitmap.table_entries_for(image.geometry(), size));
            let dirty = dirty(&image, &name);
            let granularity = 1 << bitmap.granularity_bits;
            let ranges: Vec<_> = ranges.iter().filter_map(|r| r.intersect(&range(0, size))).collect();
            let due =
                if marked && bitmap.is_auto() { rounded(&ranges, granularity, size) } else { Vec::new() };
            assert!(covers(&dirty, &due), "state {states}, {name}: {dirty:?} and not {due:?}");
            assert!(covers(&dirty, old), "state {states}, {name}: {dirty:?} and not {old:?}");
        }
    });
    // A merge that is not disturbed leaks nothing.
    std::fs::write(&fixture.path, disk.now().content(&fixture.path).unwrap()).unwrap();
    fixture.checked();
    outcome
}

#[test]
fn no_power_cut_makes_a_bitmap_claim_too_little() {
    if !qemu() {
        return;
    }
    let ranges = [range(512, 1536), range(3 * MIB, 5 * MIB)];
    let outcome = crash_everywhere(&ranges, 6 * MIB);
    assert!(outcome.states > 10 && outcome.lost == 0 && outcome.grown == outcome.states, "{outcome:?}");
}

#[test]
fn a_power_cut_while_the_disk_grows_loses_bitmaps_at_most() {
    if !qemu() {
        return;
    }
    let ranges = [
        range(512, 1536),
        range(3 * MIB, 5 * MIB),
        range(6 * MIB - 1024, 7 * MIB),
        range(8 * MIB, 8 * MIB + 1),
    ];
    for ranges in [&ranges[..], &ranges[..2], &[]] {
        let outcome = crash_everywhere(ranges, 9 * MIB);
        assert!(outcome.states > 10 && outcome.lost > 0 && outcome.grown > 0, "{outcome:?}");
        assert!(outcome.grown < outcome.states, "{outcome:?}");
    }
}
