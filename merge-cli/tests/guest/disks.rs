//! Two disks of one guest: their snapshots are of one instant, and each is merged under the eyes of the other.

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
    // The guest makes one write after the other, so what was frozen is what the first so many of them left.
    let instant = disks[0].last_in(&frozen_a).max(disks[1].last_in(&frozen_b));
    assert!(instant >= 300);
    assert!(disks[0].expected(instant) == frozen_a, "vda was not frozen after write {instant}");
    assert!(disks[1].expected(instant) == frozen_b, "vdb was not frozen after write {instant}");
}
