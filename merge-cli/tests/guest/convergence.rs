//! A guest that writes faster than its base takes it.

use std::thread;
use std::time::Instant;

use serde_json::{Value, json};

use crate::support::{Guest, Lab, Oracle, guest_possible};

/// What the base takes at first, in bytes per second: the merge takes a quarter of a minute, and longer if the guest writes.
const CRAWL: u64 = 1 << 20;
/// What QEMU copies for each block that the guest writes.
const COPIED: f64 = 65536.0;

#[test]
fn a_guest_that_is_faster_than_its_base_is_slowed_down_until_the_merge_is_ready() {
    if !guest_possible() {
        return;
    }
    let lab = Lab::new();
    lab.chain(&["base.qcow2", "c.qcow2"]);
    let initial = lab.bytes("c.qcow2");
    let mut guest = lab.start_with(&[slow_base(&lab), lab.drive("vdb", "vdb.raw").into()].concat());
    // 16 MiB, which QEMU copies anew all the time: it copies 64 KiB for each block.
    guest.go_within(31, 4096, "vda");
    // Half of what this guest on this machine makes QEMU copy; more than at the lowest limit that it is given.
    let begin = Instant::now();
    guest.writes(400);
    let copied = 400.0 * COPIED / begin.elapsed().as_secs_f64();
    let takes = ((copied / 2.0) as u64).clamp(5 << 18, 4 << 20);
    guest.commit(&["vda", "--pivot", "--timeout", "4"]).fails(4, &["the job is cancelled"]);
    assert_eq!(guest.files("vda").len(), 2);
    assert_eq!(limits(&guest), [0, 0]);

    guest.ask(
        "qom-set",
        json!({"path": "/objects/slow", "property": "limits", "value": {"bps-write": takes}}),
    );
    let mut lowest = [0, 0];
    thread::scope(|scope| {
        let merge = scope.spawn(|| guest.commit(&["vda", "--pivot", "--converge"]));
        while !merge.is_finished() {
            let now = limits(&guest);
            if now != [0, 0] {
                lowest = now;
            }
        }
        merge.join().unwrap().ok();
    });
    assert!(lowest[0] > 0 && lowest[0] < takes, "the guest was not slowed down: {lowest:?}, {takes}");
    assert_eq!(limits(&guest), [0, 0], "the limits are still there");
    assert_eq!(guest.disk("vda").layers().len(), 1);
    guest.writes(200);
    let stall = guest.pause();
    eprintln!("limits {lowest:?}, longest write {stall} ms");
    guest.verify();
    guest.quit();
    Oracle::new(&lab, initial, 0).exact(&lab, "base.qcow2");
}

/// The bytes and the requests per second that the guest may write.
fn limits(guest: &Guest) -> [u64; 2] {
    let all = guest.ask("query-block", json!({}));
    let is_it = |disk: &&Value| disk["qdev"].as_str().is_some_and(|path| path.contains("/vda/"));
    let disk = all.as_array().unwrap().iter().find(is_it).unwrap();
    ["bps_wr", "iops_wr"].map(|limit| disk["inserted"][limit].as_u64().unwrap())
}

/// `c.qcow2` over `base.qcow2`, whose file takes what its group allows.
fn slow_base(lab: &Lab) -> Vec<String> {
    let file = |name: &str| json!({"driver": "file", "filename": lab.dir().join(name)});
    let group = json!({"qom-type": "throttle-group", "id": "slow", "limits": {"bps-write": CRAWL}});
    let slow = json!({"driver": "throttle", "throttle-group": "slow", "file": file("base.qcow2")});
    let base = json!({"driver": "qcow2", "node-name": "base", "file": slow, "read-only": true});
    let active =
        json!({"driver": "qcow2", "node-name": "drive-vda", "file": file("c.qcow2"), "backing": "base"});
    let options = [("-object", group), ("-blockdev", base), ("-blockdev", active)];
    options.into_iter().flat_map(|(option, value)| [option.to_owned(), value.to_string()]).collect()
}
