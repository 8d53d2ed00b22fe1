//! Power cuts at every point of a repair: of what was not yet synced, each sector may be missing. The guest's
//! bytes stay in every state, and the repair that is made again succeeds.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};

use super::super::repair::{RepairMode, repair};
use super::super::{CheckOptions, CheckReport, Severity, Verdict, What, check};
use super::qemu::{Bench, patch, patch_u64, places, word};
use super::random::{Random, varied_image};
use super::repair::{assert_same_guest, guest};
use crate::storage::{Access, FileKind, FileStat, Host, LockError, LockMode, MemHost, Storage};

const SECTOR: usize = 512;

/// What was done to the file: the part of a sector that was written, or (`None`) a barrier.
type Log = Vec<Option<(u64, Vec<u8>)>>;

/// A file that remembers what was done to it.
#[derive(Debug)]
struct Recorded {
    file: Arc<dyn Storage>,
    log: Mutex<Log>,
    kind: FileKind,
}

impl Storage for Recorded {
    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buf, offset)
    }
    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut at = 0;
        while at < buf.len() {
            let host = offset + at as u64;
            let len = (SECTOR - host as usize % SECTOR).min(buf.len() - at);
            self.log.lock().unwrap().push(Some((host, buf[at..at + len].to_vec())));
            at += len;
        }
        self.file.write_all_at(buf, offset)
    }
    fn write_zeroes(&self, _: u64, _: u64) -> io::Result<()> {
        unreachable!("a repair writes no zeros")
    }
    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        // What is given back may hold anything afterwards.
        self.write_all_at(&vec![0xa5; len as usize], offset)
    }
    fn copy_from(&self, _: &dyn Storage, _: u64, _: u64, _: u64) -> io::Result<()> {
        unreachable!("a repair copies nothing")
    }
    fn set_len(&self, _: u64) -> io::Result<()> {
        unreachable!("a repair cuts nothing off")
    }
    fn sync(&self) -> io::Result<()> {
        self.log.lock().unwrap().push(None);
        Ok(())
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.file.next_data(offset)
    }
    fn stat(&self) -> io::Result<FileStat> {
        Ok(FileStat { kind: self.kind, ..self.file.stat()? })
    }
    fn lock(&self, mode: LockMode) -> Result<(), LockError> {
        self.file.lock(mode)
    }
    fn used_by_others(&self) -> io::Result<Option<LockMode>> {
        self.file.used_by_others()
    }
    fn drop_cache(&self) -> io::Result<()> {
        Ok(())
    }
}

fn opened(image: &[u8]) -> Arc<dyn Storage> {
    let host = MemHost::new();
    host.add("/image", image).unwrap();
    host.open(Path::new("/image"), Access::ReadWrite).unwrap()
}

fn content(file: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0; file.size().unwrap() as usize];
    file.read_exact_or_zero(&mut bytes, 0).unwrap();
    bytes
}

fn apply(image: &mut Vec<u8>, (offset, bytes): &(u64, Vec<u8>)) {
    let (from, to) = (*offset as usize, *offset as usize + bytes.len());
    image.resize(image.len().max(to), 0);
    image[from..to].copy_from_slice(bytes);
}

/// Calls `f` with states that a power cut may leave: before every barrier, and at the end.
fn crashes(start: &[u8], log: &Log, random: &mut Random, mut f: impl FnMut(&[u8])) {
    let mut durable = start.to_vec();
    for pending in log.split(Option::is_none) {
        let pending: Vec<_> = pending.iter().flatten().collect();
        let n = pending.len() as u64;
        for round in 0..24.min(1 << n.min(10)) {
            let at = random.below(n);
            let bits = random.next();
            let mut image = durable.clone();
            for (i, write) in pending.iter().enumerate() {
                let kept = match round {
                    0 => true,
                    1 => false,
                    2..5 => (i as u64) < at,
                    5..8 => (i as u64) >= at,
                    8 => i as u64 == at,
                    9 => i as u64 != at,
                    _ => bits >> (i % 64) & 1 == 1,
                };
                if kept {
                    apply(&mut image, write);
                }
            }
            f(&image);
        }
        pending.into_iter().for_each(|write| apply(&mut durable, write));
    }
}

/// How many clusters have a refcount that is too low.
fn too_low(report: &CheckReport) -> u64 {
    let low = report.findings.iter().filter(|f| matches!(f.what, What::RefcountTooLow { .. }));
    low.map(|f| f.clusters).sum()
}

/// Repairs with power cuts; returns how many states were tried.
fn cut(image: &[u8], random: &mut Random, what: &str) -> u64 {
    let name = Path::new("/image");
    let options = CheckOptions::default();
    let seen = guest(image);
    let before = check(name, &*opened(image), None, &options).unwrap();
    let recorded = Recorded { file: opened(image), log: Mutex::default(), kind: FileKind::Regular };
    let done = repair(name, &recorded, None, RepairMode::All, &options).unwrap();
    assert_eq!(done.after.verdict(), Verdict::Clean, "{what}: {done}");
    let mut states = 0;
    crashes(image, &recorded.log.into_inner().unwrap(), random, |state| {
        assert_same_guest(&seen, &guest(state), what);
        let file = opened(state);
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
        assert_same_guest(&seen, &guest(&content(&*file)), what);
        states += 1;
    });
    states
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
                patch_u64(&path, 72, word(&path, 72) | 1);
            }),
            ("table behind the end", &|| patch_u64(&path, 48, 1 << 30)),
            ("table is data", &|| patch_u64(&path, 48, word(&path, places(&path).l2) & !(1 << 63))),
        ];
        for (name, damage) in damages {
            std::fs::write(&path, &sound).unwrap();
            damage();
            let image = std::fs::read(&path).unwrap();
            states += cut(&image, &mut Random(n as u64), &format!("{options}, {name}"));
        }
    }
    assert!(states > 300, "{states}");
}

#[test]
fn on_a_device_new_structures_lie_behind_what_is_in_use() {
    let Some(bench) = Bench::new() else { return };
    let path = varied_image(&bench, "i", "cluster_size=4k");
    patch_u64(&path, places(&path).refcount_table, 0);
    let image = std::fs::read(&path).unwrap();
    let options = CheckOptions::default();
    for (room, fits) in [(1 << 20, true), (2 << 12, true), (1 << 12, false), (0, false)] {
        let mut device = image.clone();
        device.resize(image.len().next_multiple_of(4096) + room, 0xee);
        let recorded = Recorded { file: opened(&device), log: Mutex::default(), kind: FileKind::Block };
        let done = repair(Path::new("/image"), &recorded, None, RepairMode::All, &options).unwrap();
        assert_eq!(done.rebuilt.is_some(), fits, "{room}: {done}");
        assert_eq!(done.after.verdict() == Verdict::Clean, fits, "{room}: {done}");
        let after = content(&*recorded.file);
        assert_eq!(after.len(), device.len(), "a device does not grow");
        assert_same_guest(&guest(&image), &guest(&after), "device");
    }
}
