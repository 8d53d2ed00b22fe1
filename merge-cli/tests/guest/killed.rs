//! QEMU killed at every stage of a merge: every write that was acknowledged to the guest is there afterwards.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{Guest, Lab, Oracle, guest_possible};

const CHAIN: [&str; 4] = ["base.qcow2", "a.qcow2", "b.qcow2", "c.qcow2"];

/// Kills QEMU at the stage to which `merge` brings it. The disk must then be all there through the image that `live
/// recover` names, and that is `top`: in what the files hold, and for a guest that is started from it. The merge must be
/// possible again.
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
    // Nothing is noted of a merge that was complete.
    assert_eq!(recover(&lab).unwrap_or_else(|| top.to_owned()), top);
    oracle.nothing_lost(&lab, top);
    assert_eq!(recover(&lab), None);
    let mut guest = lab.start(top);
    assert!(guest.verify_journal() > 100);
    if top != CHAIN[0] {
        guest.commit(&["vda", "--pivot"]).ok();
    }
    assert_eq!(guest.files("vda"), CHAIN[..1]);
    guest.verify();
    guest.quit();
    // A configuration may name either.
    oracle.nothing_lost(&lab, CHAIN[0]);
    oracle.nothing_lost(&lab, CHAIN[3]);
    lab.run(&["qemu-img", "check", "-q", CHAIN[0]]);
}

/// Runs `live recover`, which must find out all that can be known, and returns the image that holds the disk; `None` if it had
/// nothing to do, or left the question to the user.
fn recover(lab: &Lab) -> Option<String> {
    let findings = lab.qmerge(&["live", "recover", "--qmp", "qmp.sock", "--json"]);
    let (code, findings) = (findings.code, findings.json());
    let finding = findings.as_array().unwrap().first()?;
    if code == Some(6) && finding["phase"] == "copying" && finding["kind"] == "active-commit" {
        // Nobody saw QEMU go with a job that another client could have pivoted. Whoever knows that nobody has says so.
        assert_eq!(
            (&finding["outcome"], &finding["valid-top"]),
            (&"unclear".into(), &Value::Null),
            "{finding:#}"
        );
        fs::remove_file(finding["state-file"].as_str().unwrap()).unwrap();
        return None;
    }
    assert_eq!(code, Some(0), "{finding:#}");
    assert_eq!(finding["error"], Value::Null, "{finding:#}");
    Some(finding["valid-top"].as_str().unwrap().rsplit('/').next().unwrap().to_owned())
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
    // Base lacks what the guest wrote last, and so would the old chain behind a pivot by another client.
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

/// Whatever the moment, the state file leads to the image that has everything: the guest's last acknowledged writes are in
/// the old active image before the switch, and in base alone after it.
#[test]
fn at_any_moment_of_a_pivot() {
    for (seed, share) in cases() {
        // The command takes about a quarter of a second.
        killed_in_a_pivot(seed, |_| thread::sleep(Duration::from_millis(260).mul_f64(share)));
    }
}

/// The moments that tell least: the switch is noted, and QEMU may have come to it or not. It closes the old active image
/// then, which writes the tables there that it still had in memory.
#[test]
fn behind_the_note_of_a_pivot() {
    let noted = |lab: &Lab| {
        let note = fs::read_to_string(lab.dir().join(".c.qcow2.qmerge-live"));
        note.is_ok_and(|note| note.contains("\"switching\""))
    };
    for (seed, share) in cases() {
        killed_in_a_pivot(seed, |lab| {
            let begin = Instant::now();
            while !noted(lab) && begin.elapsed() < Duration::from_secs(10) {
                thread::sleep(Duration::from_micros(100));
            }
            thread::sleep(Duration::from_millis(12).mul_f64(share));
        });
    }
}

/// Seeds, each with a number between 0 and 1.
fn cases() -> impl Iterator<Item = (u64, f64)> {
    let number = |name: &str| std::env::var(name).ok().map(|value| value.parse::<u64>().unwrap());
    let (first, count) = (number("QMERGE_TEST_SEED").unwrap_or(1), number("QMERGE_TEST_CASES").unwrap_or(3));
    // Steps of the golden section leave no part of the range out.
    (first..first + count).map(|seed| (seed, (seed as f64 * 0.618_033_988_7).fract()))
}

fn killed_in_a_pivot(seed: u64, wait: impl FnOnce(&Lab)) {
    if !guest_possible() {
        return;
    }
    let lab = Lab::new();
    lab.chain(&["base.qcow2", "c.qcow2"]);
    let initial = lab.bytes("c.qcow2");
    let mut guest = lab.start("c.qcow2");
    guest.go(seed, "vda");
    guest.commit(&["vda", "--active"]).ok();
    guest.writes(100);
    let begin = Instant::now();
    let ended = thread::scope(|scope| {
        let pivot = scope.spawn(|| guest.live(&["pivot", "vda"]));
        wait(&lab);
        rustix::process::kill_process(guest.process(), rustix::process::Signal::KILL).unwrap();
        pivot.join().unwrap()
    });
    let delay = begin.elapsed();
    guest.kill();
    let noted = lab.dir().join(".c.qcow2.qmerge-live").exists();
    assert!(noted || ended.code == Some(0), "{ended}");
    let top = recover(&lab).unwrap_or_else(|| "base.qcow2".to_owned());
    eprintln!("case {seed}: killed within {delay:?}; noted: {noted}; the disk is in {top}");
    let oracle = Oracle::new(&lab, initial, 0);
    oracle.nothing_lost(&lab, &top);
    if top == "base.qcow2" {
        // A configuration that names the old active image finds the same disk.
        oracle.nothing_lost(&lab, "c.qcow2");
    }
    let mut guest = lab.start(&top);
    assert!(guest.verify_journal() > 100);
    guest.quit();
}
