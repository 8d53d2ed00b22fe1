//! Power cuts while bits are set and the disk grows: of what was not yet synced, any write may be
//! missing. Each state must be free of corruption for `qemu-img check`, and no valid bitmap may claim
//! too little.

use std::io;
use std::sync::{Arc, Mutex};

use super::*;
use crate::storage::{FileStat, LockError, LockMode, MemFile, Storage};

const MIB: u64 = 1 << 20;

/// What was done to a file.
#[derive(Clone, Debug)]
enum Op {
    Write(u64, Vec<u8>),
    SetLen(u64),
    Sync,
    /// From here on a merge may write data.
    Marked,
}

/// A file in memory that remembers what was done to it.
#[derive(Debug)]
struct Recorder {
    file: MemFile,
    log: Mutex<Vec<Op>>,
}

impl Recorder {
    fn new(content: &[u8]) -> Self {
        let file = MemFile::new();
        file.write_all_at(content, 0).unwrap();
        Self { file, log: Mutex::default() }
    }

    fn note(&self, op: Op) {
        self.log.lock().unwrap().push(op);
    }
}

impl Storage for Recorder {
    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buf, offset)
    }
    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.note(Op::Write(offset, buf.to_vec()));
        self.file.write_all_at(buf, offset)
    }
    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_all_at(&vec![0; len as usize], offset)
    }
    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        // Blocks that are given back may hold anything.
        self.write_all_at(&vec![0xa5; len as usize], offset)
    }
    fn copy_from(&self, _: &dyn Storage, _: u64, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.note(Op::SetLen(len));
        self.file.set_len(len)
    }
    fn sync(&self) -> io::Result<()> {
        self.note(Op::Sync);
        Ok(())
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.file.next_data(offset)
    }
    fn stat(&self) -> io::Result<FileStat> {
        self.file.stat()
    }
    fn lock(&self, _: LockMode) -> std::result::Result<(), LockError> {
        Ok(())
    }
    fn used_by_others(&self) -> io::Result<Option<LockMode>> {
        Ok(None)
    }
    fn drop_cache(&self) -> io::Result<()> {
        Ok(())
    }
}

fn apply(content: &mut Vec<u8>, op: &Op) {
    match op {
        Op::Write(offset, bytes) => {
            let (from, to) = (*offset as usize, *offset as usize + bytes.len());
            content.resize(content.len().max(to), 0);
            content[from..to].copy_from_slice(bytes);
        }
        Op::SetLen(len) => content.resize(*len as usize, 0),
        Op::Sync | Op::Marked => {}
    }
}

/// Calls `f` with the files that a power cut may leave, and whether the bits were durable by then.
fn crashes(start: &[u8], log: &[Op], mut f: impl FnMut(&[u8], bool)) {
    let mut durable = start.to_vec();
    let mut marked = false;
    for epoch in log.split_inclusive(|op| matches!(op, Op::Sync)) {
        let ops: Vec<_> = epoch.iter().filter(|op| matches!(op, Op::Write(..) | Op::SetLen(_))).collect();
        marked |= epoch.iter().any(|op| matches!(op, Op::Marked));
        // Each write alone, all but each, and every prefix.
        let mut kept: Vec<Vec<bool>> = Vec::new();
        for n in 0..ops.len() {
            kept.push((0..ops.len()).map(|i| i == n).collect());
            kept.push((0..ops.len()).map(|i| i != n).collect());
            kept.push((0..ops.len()).map(|i| i < n).collect());
        }
        kept.sort();
        kept.dedup();
        for kept in kept {
            let mut content = durable.clone();
            ops.iter().zip(kept).filter(|(_, kept)| *kept).for_each(|(op, _)| apply(&mut content, op));
            f(&content, marked);
        }
        ops.iter().for_each(|op| apply(&mut durable, op));
    }
    f(&durable, true);
}

/// Whether `a` holds all of `b`.
fn covers(a: &[Range<u64>], b: &[Range<u64>]) -> bool {
    union([a, b].concat()) == a
}

/// How often a crash left what.
#[derive(Debug, Default)]
struct Outcome {
    states: usize,
    /// Without valid bitmaps.
    lost: usize,
    /// With the new size.
    grown: usize,
}

/// Cuts the power at every point of a merge into a base of 6 MiB, and judges what is left.
fn crash_everywhere(ranges: &[GuestRange], new_size: u64) -> Outcome {
    let old_size = 6 * MIB;
    let fixture = Fixture::new("cluster_size=512", &old_size.to_string());
    fixture.bitmap("fine", "512").bitmap("coarse", "65536").write(MIB, 3072).write(old_size - 512, 512);
    fixture.bitmap("fresh", "512").bitmap("idle", "512").disable("idle");
    let start = std::fs::read(&fixture.path).unwrap();

    let recorder = Arc::new(Recorder::new(&start));
    let mut image = Qcow2::open(&fixture.path, Arc::clone(&recorder) as Arc<dyn Storage>, None).unwrap();
    let plan = plan(&image, ranges, new_size);
    let refcounts = make_room(&mut image, &plan, new_size);
    let growth = mark(&image, &refcounts, plan, ranges).unwrap();
    recorder.note(Op::Marked);
    growth.publish(&mut image, &refcounts).unwrap();
    let log = recorder.log.lock().unwrap().clone();

    let before = fixture.open();
    let before: Vec<_> = bitmaps(&before).iter().map(|b| dirty(&before, &b.display_name())).collect();
    let mut outcome = Outcome::default();
    crashes(&start, &log, |content, marked| {
        outcome.states += 1;
        let states = outcome.states;
        std::fs::write(&fixture.path, content).unwrap();
        let check = run("qemu-img", &["check", "-q", fixture.name()]);
        assert!(matches!(check.status.code(), Some(0 | 3)), "state {states}: {check:?}");
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
    // The last state is that of a merge that was not disturbed, and leaks nothing.
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
