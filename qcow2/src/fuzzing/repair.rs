//! Damaged images checked and repaired: what a repair claims must be so, and what could be read before
//! must read the same.

use std::collections::BTreeMap;
use std::path::Path;

use super::sample::{Content, Image as Laid, Sample, field};
use crate::Result;
use crate::check::{CheckOptions, CheckReport, Verdict, check};
use crate::format::{Snapshot, decode_snapshots};
use crate::image::{ClusterCache, Image, ImageFormat};
use crate::repair as repairs;
use crate::repair::{RepairMode, RepairPlan, RestoreOptions};
use crate::storage::{Access, Host, MemHost, Storage};
use crate::units::{GuestOffset, GuestRange};

const IMAGE: &str = "/image.qcow2";
const DATA: &str = "/data.raw";
const BACKUP: &str = "/image.metadata";

/// An image checked twice, planned, and repaired in both modes, with a backup and without. The check says the same twice
/// and writes nothing; the plan is what is done; what is left is what a new check finds, no more than
/// before; what the guest could read before, it reads after; a second repair has nothing left to do; what the backup
/// restores is the image as it was, to the byte.
pub fn repair(bytes: &[u8]) {
    for mode in [RepairMode::Leaks, RepairMode::All] {
        Disk::holding(bytes).repair_in(mode, bytes);
    }
}

struct Disk {
    host: MemHost,
}

impl Disk {
    fn holding(bytes: &[u8]) -> Self {
        let host = MemHost::new();
        let added = host.add(IMAGE, bytes).and_then(|()| host.add(DATA, &[0xda; 8192]));
        assert!(added.is_ok(), "files in memory can be added");
        Self { host }
    }

    fn file(&self, name: &str, access: Access) -> std::sync::Arc<dyn Storage> {
        match self.host.open(Path::new(name), access) {
            Ok(file) => file,
            Err(error) => unreachable!("files in memory can be opened: {error}"),
        }
    }

    fn check(&self) -> Result<CheckReport> {
        let data = self.file(DATA, Access::Read);
        check(Path::new(IMAGE), &*self.file(IMAGE, Access::Read), Some(&*data), &CheckOptions::default())
    }

    fn plan(&self, mode: RepairMode) -> Result<RepairPlan> {
        let (file, data) = (self.file(IMAGE, Access::Read), self.file(DATA, Access::Read));
        repairs::plan(Path::new(IMAGE), &*file, Some(&*data), mode, &CheckOptions::default())
    }

    fn execute(&self, mode: RepairMode) -> Result<RepairPlan> {
        let (file, data) = (self.file(IMAGE, Access::ReadWrite), self.file(DATA, Access::Read));
        repairs::repair(Path::new(IMAGE), &*file, Some(&*data), mode, &CheckOptions::default())
    }

    fn content(&self) -> Vec<u8> {
        self.host.content(IMAGE).unwrap_or_default()
    }

    fn repair_in(&self, mode: RepairMode, bytes: &[u8]) {
        let (first, second) = (self.check(), self.check());
        let Ok(before) = first else {
            assert!(second.is_err(), "a second check finds what the first did not");
            assert!(self.execute(mode).is_err(), "what cannot be checked cannot be repaired");
            assert!(self.content() == bytes, "a refused repair has written");
            return;
        };
        assert_eq!(second.ok().as_ref(), Some(&before), "a second check finds something else");
        let planned = self.plan(mode).ok();
        assert!(self.content() == bytes, "check or plan has written");
        let readable = self.readable();
        let done = match self.execute(mode) {
            Ok(done) => done,
            Err(error) => unreachable!("a repair in memory failed: {error}"),
        };
        assert_eq!(planned.as_ref(), Some(&done), "the plan was not what was done");
        assert_eq!(done.before, before);
        self.assert_no_worse(&done);
        self.assert_reads(&readable);
        self.assert_done(mode, &done);
        Self::holding(bytes).assert_undone(mode, &done, bytes);
    }

    /// The same repair with a backup does the same, and can be undone to the byte.
    fn assert_undone(&self, mode: RepairMode, done: &RepairPlan, bytes: &[u8]) {
        let (image, backup, how) = (Path::new(IMAGE), Path::new(BACKUP), CheckOptions::default());
        let (file, data) = (self.file(IMAGE, Access::ReadWrite), self.file(DATA, Access::Read));
        let again = repairs::repair_with_backup(image, &*file, Some(&*data), mode, &self.host, backup, &how);
        assert_eq!(again.ok().as_ref(), Some(done), "a repair with a backup does something else");
        let options = RestoreOptions::default();
        for is_empty in [self.content() == bytes, true] {
            let planned = repairs::plan_restore(image, &*file, &self.host, backup, &options);
            let restored = repairs::restore(image, &*file, &self.host, backup, &options);
            match (&planned, &restored) {
                (Ok(planned), Ok(restored)) => assert_eq!(planned, restored),
                _ => unreachable!("what was repaired cannot be restored: {planned:?} {restored:?}"),
            }
            assert_eq!(restored.ok().map(|plan| plan.is_empty()), Some(is_empty), "what is left to restore");
            assert!(self.content() == bytes, "a restore does not bring back what was there");
        }
    }

    /// What is left is what a new check finds, and not more than there was.
    fn assert_no_worse(&self, done: &RepairPlan) {
        let (before, after) = (&done.before, &done.after);
        match self.check() {
            Ok(now) => assert_eq!(&now, after, "the repair does not tell what is left"),
            Err(error) => unreachable!("the repaired image cannot be checked: {error}"),
        }
        let bad = |report: &CheckReport| report.corruptions + report.check_errors;
        assert!(bad(after) <= bad(before), "{} were wrong, now {}", bad(before), bad(after));
        if done.mode == RepairMode::All && after.verdict() == Verdict::Clean {
            assert!(!after.dirty && !after.marked_corrupt, "a sound image is still marked");
        }
    }

    /// The same repair finds nothing more to do.
    fn assert_done(&self, mode: RepairMode, done: &RepairPlan) {
        let now = self.content();
        match self.execute(mode) {
            Ok(again) => {
                assert_eq!(again.after, done.after, "a second repair comes to something else");
                assert!(again.is_empty(), "a second repair still finds something to do: {again}");
                assert!(self.content() == now, "a second repair has written");
            }
            Err(error) => unreachable!("a second repair failed: {error}"),
        }
    }

    /// What the guest can read, cluster by cluster: the first ones that have a mapping.
    fn readable(&self) -> BTreeMap<u64, Vec<u8>> {
        let mut readable = BTreeMap::new();
        let Some(image) = self.image() else { return readable };
        let cluster = image.as_qcow2().map_or(512, |q| q.geometry().cluster_size());
        let mut at = 0;
        for _ in 0..CLUSTERS {
            let Ok(Some(start)) = image.next_allocated(GuestOffset::new(at)) else { break };
            if let Some(bytes) = read(&image, start.get(), cluster) {
                readable.insert(start.get(), bytes);
            }
            at = (start.get() / cluster + 1) * cluster;
            if at >= image.virtual_size() {
                break;
            }
        }
        readable
    }

    fn image(&self) -> Option<Image> {
        let (file, data) = (self.file(IMAGE, Access::Read), self.file(DATA, Access::Read));
        Image::open(Path::new(IMAGE), file, ImageFormat::Qcow2, Some(data)).ok()
    }

    fn assert_reads(&self, readable: &BTreeMap<u64, Vec<u8>>) {
        let Some(image) = self.image() else {
            assert!(readable.is_empty(), "the image does not open any more");
            return;
        };
        for (&at, bytes) in readable {
            let now = read(&image, at, bytes.len() as u64);
            assert_eq!(now.as_ref(), Some(bytes), "the guest's bytes at {at:#x} have changed");
        }
    }
}

/// The guest clusters that are compared, at most, and the bytes of each.
const CLUSTERS: usize = 128;
const READ: u64 = 4096;

/// The first bytes of a guest cluster, if they can be read.
fn read(image: &Image, at: u64, len: u64) -> Option<Vec<u8>> {
    let len = len.min(READ).min(image.virtual_size().checked_sub(at)?);
    let range = GuestRange { start: GuestOffset::new(at), len };
    let mut extents = Vec::new();
    image.map(range, &mut extents).ok()?;
    let mut bytes = Vec::new();
    let mut cache = ClusterCache::new();
    for extent in &extents {
        let mut part = vec![0; extent.range.len as usize];
        image.read_extent(extent, &mut part, &mut cache, 0).ok()?;
        bytes.extend(part);
    }
    Some(bytes)
}

/// Images with damage of each kind that a repair mends, beside the sound ones.
pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let sample = |snapshots: &[&str]| {
        let snapshots = snapshots.iter().map(|name| (*name).to_owned()).collect();
        let sample = Sample { snapshots, ..Sample::new(100) };
        sample.with(0, Content::Data(1)).with(3, Content::ZeroAllocated(2)).with(5, Content::Compressed(3))
    };
    let damaged = |damage: &dyn Fn(&mut Laid), snapshots: &[&str]| {
        let mut image = sample(snapshots).build();
        damage(&mut image);
        image.bytes
    };
    let leak = |image: &mut Laid| {
        let end = image.bytes.len() as u64;
        image.put(end, &[0xee; 512]);
        image.set_refcount(end, 1);
    };
    let too_low = |image: &mut Laid| image.set_refcount(image.at.hosts[&0] & OFFSET, 0);
    let too_high = |image: &mut Laid| image.set_refcount(image.at.hosts[&3] & OFFSET, 7);
    let copied = |image: &mut Laid| {
        let entry = image.l2_entry(0);
        image.put_u64(entry, image.get_u64(entry) & !(1 << 63));
    };
    let no_block = |image: &mut Laid| image.put_u64(image.at.refcount_table, 0);
    let block_is_data = |image: &mut Laid| image.put_u64(image.at.refcount_table, image.at.l1);
    let marks = |image: &mut Laid| image.put_u64(field::INCOMPATIBLE, 3);
    let shared = |image: &mut Laid| {
        let (from, to) = (image.l2_entry(0), image.l2_entry(3));
        image.put_u64(to, image.get_u64(from));
    };
    let behind_the_end = |image: &mut Laid| {
        let entry = image.l2_entry(0);
        image.put_u64(entry, 1 << 63 | 1 << 30);
    };
    // An offset can only be unaligned where clusters are larger than a sector, and large entries need room.
    let of_large_clusters = |damage: &dyn Fn(&mut Laid), snapshots: &[&str]| {
        let mut image = sample(snapshots).with_clusters(12, 100).build();
        damage(&mut image);
        image.bytes
    };
    // The entries move together: what follows the last one is zero.
    let with_extra = |image: &mut Laid, extra: &[u8], stated: u32| {
        let table = image.get_u64(64);
        let bytes =
            image.bytes.get(table as usize..table as usize + 4096).map(<[u8]>::to_vec).unwrap_or_default();
        let count = (image.get_u64(56) & 0xffff_ffff) as u32;
        let (snapshots, _) = decode_snapshots(&bytes, count, table).unwrap_or_default();
        let mut at = table;
        for snapshot in snapshots {
            let entry = Snapshot { extra: extra.to_vec(), ..snapshot }.encode();
            image.put(at, &entry);
            image.put_u32(at + 36, stated);
            at += entry.len() as u64;
        }
    };
    let snapshot_without_size = |image: &mut Laid| with_extra(image, &[], 0);
    let snapshot_with_too_much = |image: &mut Laid| with_extra(image, &[7; 2000], 2000);
    let stray_host = |image: &mut Laid| {
        let entry = image.l2_entry(3);
        image.put_u64(entry, image.get_u64(entry) | 0x201);
    };
    vec![
        ("leak", damaged(&leak, &[])),
        ("refcount-too-low", damaged(&too_low, &[])),
        ("refcount-too-high", damaged(&too_high, &["s"])),
        ("copied-flag", damaged(&copied, &[])),
        ("no-refcount-block", damaged(&no_block, &["s"])),
        ("refcount-block-is-l1", damaged(&block_is_data, &[])),
        ("dirty-and-corrupt", damaged(&marks, &[])),
        ("data-twice", damaged(&shared, &["s"])),
        ("behind-the-end", damaged(&behind_the_end, &[])),
        ("stray-host-of-zeros", of_large_clusters(&stray_host, &[])),
        ("snapshot-without-size", of_large_clusters(&snapshot_without_size, &["s", "t"])),
        ("snapshot-with-too-much", of_large_clusters(&snapshot_with_too_much, &["s"])),
    ]
}

/// The offset in an L2 entry of a standard cluster.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
