//! QEMU killed at every stage of a merge: every write that was acknowledged to the guest is there afterwards.

use crate::support::{Guest, Lab, Oracle, guest_possible};

const CHAIN: [&str; 4] = ["base.qcow2", "a.qcow2", "b.qcow2", "c.qcow2"];

/// Kills QEMU at the stage to which `merge` brings it. The disk must then be all there through `top`, in what the files
/// hold and for a guest that is started from it; and the merge must be possible again.
fn killed(seed: u64, top: &str, merge: impl FnOnce(&Guest)) {
    if !guest_possible() {
        return;
    }
    let lab = Lab::new();
    lab.chain(&CHAIN);
    let initial = lab.bytes("c.qcow2");
    let mut guest = lab.start("c.qcow2");
    guest.go(seed, "vda");
    guest.writes(100);
    merge(&guest);
    guest.writes(100);
    guest.kill();

    let oracle = Oracle::new(&lab, initial, 0);
    oracle.nothing_lost(&lab, top);
    let mut guest = lab.start(top);
    assert!(guest.verify_journal() > 100);
    if top != CHAIN[0] {
        guest.commit(&["vda", "--pivot"]).ok();
    }
    assert_eq!(guest.files("vda"), CHAIN[..1]);
    guest.verify();
    guest.quit();
    oracle.nothing_lost(&lab, CHAIN[0]);
    lab.run(&["qemu-img", "check", "-q", CHAIN[0]]);
}

#[test]
fn while_an_intermediate_merge_copies() {
    killed(11, "c.qcow2", |guest| {
        guest.commit(&["vda", "--top", "[3]", "--bandwidth", "128K", "--async"]).ok();
        guest.until("copied bytes", |q| q.job().is_some_and(|job| job["offset"].as_u64() > Some(1 << 20)));
        assert_eq!(guest.job().unwrap()["status"], "running");
    });
}

#[test]
fn while_an_intermediate_merge_is_pending() {
    killed(12, "c.qcow2", |guest| {
        guest.commit(&["vda", "--top", "[3]", "--async"]).ok();
        guest.job_becomes("pending");
    });
}

#[test]
fn after_an_intermediate_merge() {
    killed(13, "c.qcow2", |guest| {
        guest.commit(&["vda", "--top", "[3]"]).ok();
        assert_eq!(guest.files("vda"), ["base.qcow2", "c.qcow2"]);
    });
}

#[test]
fn while_an_active_merge_copies() {
    killed(14, "c.qcow2", |guest| {
        guest.commit(&["vda", "--active", "--bandwidth", "128K", "--async"]).ok();
        guest.until("copied bytes", |q| q.job().is_some_and(|job| job["offset"].as_u64() > Some(1 << 20)));
        assert_eq!(guest.job().unwrap()["status"], "running");
    });
}

#[test]
fn while_an_active_merge_is_ready() {
    killed(15, "c.qcow2", |guest| {
        guest.commit(&["vda", "--active"]).ok();
        assert_eq!(guest.job().unwrap()["status"], "ready");
    });
}

#[test]
fn after_the_pivot() {
    killed(16, "base.qcow2", |guest| {
        guest.commit(&["vda", "--pivot"]).ok();
        assert_eq!(guest.files("vda"), CHAIN[..1]);
    });
}
