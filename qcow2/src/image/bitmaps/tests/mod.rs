//! Bitmaps made by QEMU, changed by us, and read back through QEMU.

mod crash;
mod growing;
mod marking;
mod removing;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kit::ok;

use super::table::BitmapTable;
use super::{BitmapGrowth, BitmapPlan, Marker, bits_for};
use crate::error::Result;
use crate::format::{Bitmap, BitmapTableEntry};
use crate::image::refcounts::Refcounts;
use crate::image::{Qcow2, grow, read_bitmaps};
use crate::storage::{Access, Host, OsHost};
use crate::units::{GuestOffset, GuestRange};

/// Whether QEMU's tools are there. Without them these tests have no oracle.
pub(crate) fn qemu() -> bool {
    kit::are_here(&["qemu-img", "qemu-io", "qemu-nbd"])
}

/// An image of QEMU's in a folder of its own.
pub(crate) struct Fixture {
    _dir: tempfile::TempDir,
    pub(crate) path: PathBuf,
}

impl Fixture {
    pub(crate) fn new(options: &str, size: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("base.qcow2");
        let fixture = Self { _dir: dir, path };
        ok("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, fixture.name(), size]);
        fixture
    }

    pub(crate) fn name(&self) -> &str {
        self.path.to_str().unwrap()
    }

    pub(crate) fn bitmap(&self, name: &str, granularity: &str) -> &Self {
        ok("qemu-img", &["bitmap", "--add", "-g", granularity, self.name(), name]);
        self
    }

    pub(crate) fn disable(&self, name: &str) -> &Self {
        ok("qemu-img", &["bitmap", "--disable", self.name(), name]);
        self
    }

    pub(crate) fn write(&self, at: u64, len: u64) -> &Self {
        ok("qemu-io", &["-c", &format!("write {at} {len}"), self.name()]);
        self
    }

    fn open(&self) -> Qcow2 {
        open(&self.path)
    }

    /// Changes bytes of the file.
    fn patch(&self, at: u64, bytes: &[u8]) {
        OsHost.open(&self.path, Access::ReadWrite).unwrap().write_all_at(bytes, at).unwrap();
    }

    /// The image as it is on disk, and that QEMU finds nothing wrong with it, not even a leak.
    pub(crate) fn checked(&self) -> Qcow2 {
        ok("qemu-img", &["check", "-q", self.name()]);
        self.open()
    }

    /// The dirty bytes as QEMU reads a bitmap.
    pub(crate) fn dirty_by_qemu(&self, name: &str) -> Vec<Range<u64>> {
        let socket = self.path.with_extension("socket");
        let socket = socket.to_str().unwrap();
        let mut server = Command::new("qemu-nbd")
            .args(["-r", "-f", "qcow2", "-B", name, "-k", socket, self.name()])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(300);
        while !Path::new(socket).exists() {
            assert!(
                server.try_wait().unwrap().is_none() && Instant::now() < deadline,
                "qemu-nbd did not start"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        let options = format!(
            "driver=nbd,server.type=unix,server.path={socket},x-dirty-bitmap=qemu:dirty-bitmap:{name}"
        );
        let map = ok("qemu-img", &["map", "--output=json", "--image-opts", &options]);
        // The server leaves with its last client.
        assert!(server.wait().unwrap().success());
        let _ = std::fs::remove_file(socket);
        let map: Vec<serde_json::Value> = serde_json::from_str(&map).unwrap();
        let dirty = map.iter().filter(|e| e["data"] == false);
        let ranges = dirty.map(|e| {
            let start = e["start"].as_u64().unwrap();
            start..start + e["length"].as_u64().unwrap()
        });
        union(ranges.collect())
    }
}

pub(crate) fn open(path: &Path) -> Qcow2 {
    let file = OsHost.open(path, Access::ReadWrite).unwrap();
    Qcow2::open(path, file, None).unwrap()
}

fn range(start: u64, end: u64) -> GuestRange {
    GuestRange::between(GuestOffset::new(start), GuestOffset::new(end))
}

/// A list of one range.
pub(crate) fn only(range: Range<u64>) -> Vec<Range<u64>> {
    std::iter::once(range).collect()
}

/// Ranges sorted, with those that meet made one.
pub(crate) fn union(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_by_key(|r| r.start);
    let mut out: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match out.last_mut() {
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            _ => out.push(range),
        }
    }
    out
}

/// Ranges rounded outwards to a granularity, inside a disk.
fn rounded(ranges: &[GuestRange], granularity: u64, size: u64) -> Vec<Range<u64>> {
    let round =
        |r: &GuestRange| r.start.align_down(granularity).get()..r.end().align_up(granularity).get().min(size);
    union(ranges.iter().map(round).collect())
}

fn bitmaps(image: &Qcow2) -> Vec<Bitmap> {
    read_bitmaps(image.path(), &**image.file(), image.cluster0()).unwrap()
}

fn bitmap(image: &Qcow2, name: &str) -> Bitmap {
    bitmaps(image).into_iter().find(|b| b.display_name() == name).unwrap()
}

/// The dirty bytes of a bitmap as its clusters have them, read bit by bit.
fn dirty(image: &Qcow2, name: &str) -> Vec<Range<u64>> {
    let bitmap = bitmap(image, name);
    let mut table = BitmapTable::of(&bitmap);
    let cluster = image.geometry().cluster_size();
    let granularity = 1 << bitmap.granularity_bits;
    let mut ranges = Vec::new();
    for index in 0..table.entries() {
        let mut bytes = vec![0; cluster as usize];
        match table.entry(image, index).unwrap() {
            BitmapTableEntry::AllZero => continue,
            BitmapTableEntry::AllOne => bytes.fill(0xff),
            BitmapTableEntry::Data(host) => image.read_table(host, &mut bytes).unwrap(),
        }
        for bit in (0..cluster * 8).filter(|bit| bytes[(bit / 8) as usize] >> (bit % 8) & 1 == 1) {
            let start = (index * cluster * 8 + bit) * granularity;
            if start < image.virtual_size() {
                ranges.push(start..(start + granularity).min(image.virtual_size()));
            } else {
                assert_eq!(
                    table.entry(image, index).unwrap(),
                    BitmapTableEntry::AllOne,
                    "bit {bit} of entry {index} is set behind the last of {}",
                    bits_for(&bitmap, image.virtual_size()),
                );
            }
        }
    }
    union(ranges)
}

/// Clusters with a refcount.
fn used(image: &Qcow2, refcounts: &Refcounts) -> u64 {
    let mut block = Vec::new();
    let mut used = 0;
    for index in 0..refcounts.table().len() as u64 {
        if refcounts.read_block(image, index, &mut block).unwrap() {
            let slots = 0..refcounts.per_block() as usize;
            used += slots.filter(|&slot| refcounts.width().get(&block, slot) != Some(0)).count() as u64;
        }
    }
    used
}

fn plan(image: &Qcow2, ranges: &[GuestRange], new_size: u64) -> BitmapPlan {
    let mut plan = BitmapPlan::new(image, new_size).unwrap();
    for range in ranges {
        plan.add(image, *range).unwrap();
    }
    plan
}

/// Makes room for a plan and for the larger disk, as a merge does.
fn make_room(image: &mut Qcow2, plan: &BitmapPlan, new_size: u64) -> Refcounts {
    let mut refcounts = Refcounts::load(image).unwrap();
    let l1 = grow::l1_growth(image, new_size).unwrap().unwrap_or(0);
    let (clusters, run) = (plan.clusters() + l1, plan.side_by_side() + l1);
    if let Some(switch) = grow::make_room(image, &mut refcounts, clusters, run).unwrap() {
        switch.publish(image, &mut refcounts).unwrap();
    }
    grow::grow_l1(image, &refcounts, new_size).unwrap();
    refcounts
}

/// Sets the bits; also checks that the plan counted right.
fn mark(
    image: &Qcow2,
    refcounts: &Refcounts,
    plan: BitmapPlan,
    ranges: &[GuestRange],
) -> Result<BitmapGrowth> {
    let (before, planned) = (used(image, refcounts), plan.clusters());
    let mut marker = Marker::start(image, refcounts, plan)?;
    for range in ranges {
        marker.add(*range)?;
    }
    let growth = marker.finish()?;
    assert_eq!(used(image, refcounts) - before, planned, "clusters taken and planned");
    Ok(growth)
}

/// Everything that a merge does about bitmaps.
fn merge(image: &mut Qcow2, ranges: &[GuestRange], new_size: u64) -> Result<()> {
    let plan = plan(image, ranges, new_size);
    let refcounts = make_room(image, &plan, new_size);
    let growth = mark(image, &refcounts, plan, ranges)?;
    growth.publish(image, &refcounts)
}
