//! What only a whole QEMU has: devices with limits, and chains as it tells them. No guest runs in it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::process::Command;
use std::time::Duration;

use common::writer::Writer;
use common::{Chain, Daemon, Make, tools_are_here};
use qmp_client::{
    Connection, Execute, Goal, Graph, Merge, MergeOptions, Procedure, Throttle, Waited, Watch, Wishes,
    states_of,
};
use serde_json::{Value, json};

/// A QEMU that stands still, with the chain as the disk `vda`.
fn qemu(chain: &Chain) -> Option<Daemon> {
    if !kit::are_here(&["qemu-system-x86_64"]) {
        return None;
    }
    let socket = chain.folder.path().join("qmp.sock");
    let child = Command::new("qemu-system-x86_64")
        .args([
            "-S",
            "-accel",
            "tcg",
            "-M",
            "q35",
            "-m",
            "32",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
        ])
        .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
        .args(["-drive", &format!("file={},if=none,id=drive0,format=qcow2", chain.name(chain.layers))])
        .args(["-device", "virtio-blk-pci,drive=drive0,id=vda,share-rw=on"])
        .spawn()
        .unwrap();
    Some(Daemon { child, socket })
}

fn commit(monitor: &Connection, options: MergeOptions, base: &str, top: &str) -> Procedure {
    let graph = Graph::ask(monitor).unwrap();
    let disk = graph.disk("vda").unwrap();
    let range = disk.range(disk.layer(base).unwrap(), disk.layer(top).unwrap()).unwrap();
    let mut commit = Procedure::commit(disk, &range, options).unwrap();
    commit.preflight(monitor).unwrap();
    commit
}

fn limits(monitor: &Connection) -> Value {
    let all = monitor.query("query-block", json!({})).unwrap();
    let inserted = &all[0]["inserted"];
    let keys = ["bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr", "iops_rd_max", "group"];
    keys.iter().map(|key| inserted.get(*key).cloned().unwrap_or(Value::Null)).collect()
}

#[test]
fn a_guest_that_is_too_fast_is_throttled_and_gets_its_limits_back() {
    if !tools_are_here() {
        return;
    }
    for limited_before in [false, true] {
        let chain = Chain::new(Make::default());
        let Some(daemon) = qemu(&chain) else { return };
        let monitor = daemon.connect();
        let nbd = chain.nbd();
        let address = json!({"type": "unix", "data": {"path": nbd}});
        monitor.query("nbd-server-start", json!({"addr": address})).unwrap();
        let graph = Graph::ask(&monitor).unwrap();
        let node = &graph.disk("vda").unwrap().active().node;
        let export = json!({"type": "nbd", "id": "x", "node-name": node, "name": "x", "writable": true});
        monitor.query("block-export-add", export).unwrap();
        let qdev = "/machine/peripheral/vda/virtio-backend";
        if limited_before {
            let limits = json!({
                "id": qdev, "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 500, "iops_wr": 0, "iops_rd_max": 900,
                "group": "theirs",
            });
            monitor.query("block_set_io_throttle", limits).unwrap();
        }
        let before = limits(&monitor);

        // A writer beside the device is not slowed down by its limits, so the job never gets ready.
        let writer = Writer::start(&nbd, 16 << 20);
        writer.wait_for(10);
        let options = MergeOptions::default().with_speed(2 << 20);
        let planned = commit(&monitor, options, "[1]", "[4]");
        let mut merge =
            Merge::begin(&monitor, planned, chain.state_file(), &daemon.address(), &Wishes::default())
                .unwrap();
        let throttle = Throttle::of(&monitor, graph.disk("vda").unwrap()).unwrap();
        let seen = std::cell::Cell::new(0);
        let mut told = |limit| {
            seen.set(limit);
            let now = limits(&monitor);
            assert!(
                now[2].as_u64().unwrap() == limit && now[5].as_u64().unwrap() > 0 && now != before,
                "{now}"
            );
            let said = states_of(&daemon.address()).unwrap().remove(0).1;
            assert_eq!(said.throttled.unwrap().qdev, qdev);
        };
        let waited = merge
            .wait_converging(
                &throttle,
                Some(Duration::from_secs(600)),
                &mut |_| if seen.get() > 0 { Watch::Stop } else { Watch::GoOn },
                &mut told,
            )
            .unwrap();
        assert!(matches!(waited, Waited::Stopped(_)), "{waited:?}");
        assert!((Throttle::FLOOR..=4 << 20).contains(&seen.get()), "{}", seen.get());
        assert_eq!(limits(&monitor), before);
        assert_eq!(merge.state().throttled, None);
        merge.cancel().unwrap();
        writer.stop(&mut vec![0; 16 << 20]);
        monitor.query("block-export-del", json!({"id": "x", "mode": "hard"})).unwrap();
    }
}

#[test]
fn a_chain_that_is_nested_deeper_than_usual_json_is_read_and_merged() {
    if !tools_are_here() {
        return;
    }
    let chain = Chain::new(Make { layers: 160, ..Make::default() });
    let before = chain.bytes(160);
    let Some(daemon) = qemu(&chain) else { return };
    let monitor = daemon.connect();
    let graph = Graph::ask(&monitor).unwrap();
    let disk = graph.disk("vda").unwrap();
    assert_eq!(disk.layers().len(), 160);
    assert_eq!(disk.layer("vda[42]").unwrap().file, chain.name(42));
    Throttle::of(&monitor, disk).unwrap();
    let planned = commit(&monitor, MergeOptions::default(), "[1]", "[159]");
    let mut merge =
        Merge::begin(&monitor, planned, chain.state_file(), &daemon.address(), &Wishes::default()).unwrap();
    merge.job().wait(Goal::Pending, Some(Duration::from_secs(300)), &mut |_| Watch::GoOn).unwrap();
    let merged = merge.finish().unwrap();
    assert_eq!(merged.disk.layers().len(), 2);
    merge.done().unwrap();
    drop(daemon);
    assert!(chain.bytes(160) == before, "the guest sees other bytes");
}
