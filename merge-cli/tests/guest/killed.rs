//! QEMU killed at every stage of a merge: every write that was acknowledged to the guest is there afterwards.

use std::fs;
use std::thread;
use std::time::Duration;

use serde_json::Value;

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

/// Whatever the moment, the state file names the image that has everything: the guest's last acknowledged writes are in
/// the old active image before the switch, and in base alone after it.
#[test]
fn at_any_moment_of_a_pivot() {
    if !guest_possible() {
        return;
    }
    let number = |name: &str| std::env::var(name).ok().map(|value| value.parse::<u64>().unwrap());
    let (first, cases) = (number("QMERGE_TEST_SEED").unwrap_or(1), number("QMERGE_TEST_CASES").unwrap_or(3));
    for seed in first..first + cases {
        let lab = Lab::new();
        lab.chain(&["base.qcow2", "c.qcow2"]);
        let initial = lab.bytes("c.qcow2");
        let mut guest = lab.start("c.qcow2");
        guest.go(seed, "vda");
        guest.commit(&["vda", "--active"]).ok();
        guest.writes(100);
        // The command takes about a quarter of a second.
        let delay = Duration::from_millis(seed * 67 % 260);
        let ended = thread::scope(|scope| {
            let pivot = scope.spawn(|| guest.live(&["pivot", "vda"]));
            thread::sleep(delay);
            rustix::process::kill_process(guest.process(), rustix::process::Signal::KILL).unwrap();
            pivot.join().unwrap()
        });
        guest.kill();
        let state = fs::read_to_string(lab.dir().join(".c.qcow2.qmerge-live")).ok();
        let state: Option<Value> = state.map(|text| serde_json::from_str(&text).unwrap());
        let top = match &state {
            Some(state) => state["valid-top"].as_str().unwrap().rsplit('/').next().unwrap().to_owned(),
            None => {
                assert_eq!(ended.code, Some(0), "{ended}");
                "base.qcow2".to_owned()
            }
        };
        eprintln!(
            "case {seed}: after {delay:?}, {:?}, {top} by {:?}",
            ended.code,
            state.map(|s| s["phase"].clone())
        );
        Oracle::new(&lab, initial, 0).nothing_lost(&lab, &top);
        let mut guest = lab.start(&top);
        assert!(guest.verify_journal() > 100);
        guest.quit();
    }
}
