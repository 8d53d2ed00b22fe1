//! What is taken of a disk while the guest writes is of one instant: a snapshot of two disks, a base that is let go of.
//!
//! The guest makes one write after the other, so at any instant its disks are what the first so many of them left.

use std::fs;

use crate::support::{Lab, Oracle, guest_possible};

#[test]
fn two_disks_are_snapshotted_at_one_instant_and_merged_while_both_are_written() {
    if !guest_possible() {
        return;
    }
    let lab = Lab::new();
    lab.chain(&["vda.qcow2"]);
    let initial = [lab.bytes("vda.qcow2"), lab.bytes("vdb.raw")];
    let mut guest = lab.start("vda.qcow2");
    guest.go(2, "vda vdb");
    guest.writes(300);
    guest.live(&["snapshot", "vda=a1.qcow2", "vdb=b1.qcow2"]).ok();
    // Frozen now; the merges will change them.
    for (file, copy) in [("vda.qcow2", "frozen.qcow2"), ("vdb.raw", "frozen.raw")] {
        fs::copy(lab.dir().join(file), lab.dir().join(copy)).unwrap();
    }
    guest.writes(200);
    guest.live(&["snapshot", "vda=a2.qcow2", "vdb=b2.qcow2"]).ok();
    guest.writes(200);
    for disk in ["vda", "vdb"] {
        guest.commit(&[disk, "--top", "[2]"]).ok();
        guest.writes(100);
    }
    assert_eq!(guest.files("vda"), ["vda.qcow2", "a2.qcow2"]);
    assert_eq!(guest.files("vdb"), ["vdb.raw", "b2.qcow2"]);
    for disk in ["vdb", "vda"] {
        guest.commit(&[disk, "--pivot"]).ok();
        guest.writes(100);
    }
    guest.pause();
    guest.verify();
    guest.quit();
    let [frozen_a, frozen_b] = ["frozen.qcow2", "frozen.raw"].map(|image| lab.bytes(image));
    let disks = [0, 1].map(|n| Oracle::new(&lab, initial[n].clone(), n as u64));
    disks[0].exact(&lab, "vda.qcow2");
    disks[1].exact(&lab, "vdb.raw");
    let instant = disks[0].last_in(&frozen_a).max(disks[1].last_in(&frozen_b));
    assert!(instant >= 300);
    assert!(disks[0].expected(instant) == frozen_a, "vda was not frozen after write {instant}");
    assert!(disks[1].expected(instant) == frozen_b, "vdb was not frozen after write {instant}");
}

#[test]
fn a_base_that_is_let_go_of_is_the_disk_of_one_instant() {
    if !guest_possible() {
        return;
    }
    let lab = Lab::new();
    lab.chain(&["base.qcow2", "a.qcow2", "c.qcow2"]);
    let initial = lab.bytes("c.qcow2");
    let mut guest = lab.start("c.qcow2");
    guest.go(3, "vda");
    guest.writes(300);
    guest.commit(&["vda", "--keep-overlay"]).ok();
    guest.writes(200);
    assert_eq!(guest.files("vda"), ["base.qcow2", "a.qcow2", "c.qcow2"]);
    // A copy of an image that nobody writes.
    fs::copy(lab.dir().join("base.qcow2"), lab.dir().join("kept.qcow2")).unwrap();
    guest.writes(100);
    guest.pause();
    guest.verify();
    guest.quit();
    let oracle = Oracle::new(&lab, initial, 0);
    oracle.exact(&lab, "c.qcow2");
    let kept = lab.bytes("kept.qcow2");
    let instant = oracle.last_in(&kept);
    assert!(instant >= 300);
    assert!(oracle.expected(instant) == kept, "base is not the disk after write {instant}");
    assert!(lab.bytes("base.qcow2") == kept, "base was written after it was let go of");
}
