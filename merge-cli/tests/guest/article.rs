//! The article on a live guest: three overlays, two of them merged below the running disk, then the whole chain.

use crate::support::{Lab, Oracle, guest_possible};

#[test]
fn every_acknowledged_write_survives_an_intermediate_and_an_active_merge() {
    if !guest_possible() {
        return;
    }
    let lab = Lab::new();
    lab.chain(&["base.raw"]);
    let initial = lab.bytes("base.raw");
    let mut guest = lab.start("base.raw");
    guest.go(1, "vda");
    for overlay in ["a.qcow2", "b.qcow2", "c.qcow2"] {
        guest.writes(200);
        guest.live(&["snapshot", &format!("vda={overlay}")]).ok();
    }
    guest.writes(200);
    assert_eq!(guest.files("vda"), ["base.raw", "a.qcow2", "b.qcow2", "c.qcow2"]);
    guest.commit(&["vda", "--base", "[1]", "--top", "[3]"]).ok();
    guest.writes(200);
    assert_eq!(guest.files("vda"), ["base.raw", "c.qcow2"]);
    guest.commit(&["vda", "--active", "--pivot"]).ok();
    guest.writes(200);
    assert_eq!(guest.files("vda"), ["base.raw"]);
    let stall = guest.pause();
    let blocks = guest.verify();
    eprintln!("{blocks} blocks, longest stall {stall} ms");
    guest.quit();
    Oracle::new(&lab, initial, 0).exact(&lab, "base.raw");
}

/// The way out when others use the base.
#[test]
fn every_acknowledged_write_survives_pulls() {
    if !guest_possible() {
        return;
    }
    let lab = Lab::new();
    lab.chain(&["base.raw", "a.qcow2", "b.qcow2", "c.qcow2"]);
    let (initial, base) = (lab.bytes("c.qcow2"), lab.bytes("base.raw"));
    let mut guest = lab.start("c.qcow2");
    guest.go(4, "vda");
    guest.writes(200);
    guest.live(&["pull", "vda", "--base", "[2]"]).ok();
    guest.writes(200);
    assert_eq!(guest.files("vda"), ["base.raw", "a.qcow2", "c.qcow2"]);
    guest.live(&["pull", "vda"]).ok();
    guest.writes(200);
    assert_eq!(guest.files("vda"), ["c.qcow2"]);
    guest.pause();
    guest.verify();
    guest.quit();
    Oracle::new(&lab, initial, 0).exact(&lab, "c.qcow2");
    assert!(lab.bytes("base.raw") == base, "a pull has written in a layer below");
}
