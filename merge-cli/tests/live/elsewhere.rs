//! Merges whose state file lies in a folder that only their user knows.

use std::fs;

use qmp_client::Execute;
use serde_json::{Value, json};

use crate::machine::{Machine, Style, usual_chain};
use crate::support::{failed, qmerge, text, tools_are_here};

/// A merge that is noted in the folder `states`, and of which no list beside the socket tells, as where QEMU is reached over
/// TCP or the socket's folder cannot be written. What the command said.
fn begun(machine: &Machine, args: &[&str]) -> String {
    fs::create_dir(machine.dir().join("states")).unwrap();
    let said = machine.ok("commit", &[args, &["--state-dir", "states"]].concat());
    fs::remove_file(machine.dir().join("qmp.sock.qmerge")).unwrap();
    said
}

#[test]
fn a_merge_of_ours_is_not_ended_without_its_note() {
    if !tools_are_here() {
        return;
    }
    for (verb, args, status) in
        [("pivot", &["--active"][..], "ready"), ("finish", &["--top", "[3]", "--async"], "pending")]
    {
        let machine = Machine::new(Style::Blockdev);
        let said = begun(&machine, args);
        machine.job_becomes(status);
        let words = ["was not found", "--state-dir DIR", "qmerge live cancel vda --qmp qmp.sock"];
        machine.fails(verb, &[], 6, &words);
        assert_eq!((machine.job()["status"].as_str(), machine.chain().len()), (Some(status), 4));
        // The command that was printed knows the folder.
        let hint = format!("qmerge live {verb} vda --qmp qmp.sock --state-dir states");
        assert!(said.contains(&hint), "{said}");
        machine.ok(verb, &["--state-dir", "states"]);
        assert_eq!(fs::read_dir(machine.dir().join("states")).unwrap().count(), 0);
        assert_eq!(machine.chain().len(), if verb == "pivot" { 1 } else { 2 });
        machine.holds_the_disk("c.img");
    }
}

/// Two machines whose active images have one name share a folder for their states.
#[test]
fn the_note_of_another_machine_is_not_written_over() {
    if !tools_are_here() {
        return;
    }
    let (one, other) = (Machine::new(Style::Blockdev), Machine::new(Style::Blockdev));
    begun(&one, &["--active"]);
    let folder = one.path("states");
    let note = || {
        let file = fs::read_dir(&folder).unwrap().next().unwrap().unwrap().path();
        fs::read(file).unwrap()
    };
    let before = note();
    let words = [one.dir().to_str().unwrap(), "notes the merge of another disk", "--state-dir DIR"];
    other.fails("commit", &["--active", "--state-dir", &folder], 6, &words);
    assert!(note() == before && other.job().is_null());
    one.ok("pivot", &["--state-dir", "states"]);
    // Now the file's name is free.
    other.ok("commit", &["--active", "--pivot", "--state-dir", &folder]);
    other.holds_the_disk("base.img");
    one.holds_the_disk("base.img");
}

/// The question whether the old active image may stay as it is was not asked, because that image was to be kept.
#[test]
fn a_pivot_in_the_place_of_another_end_asks_what_a_pivot_asks() {
    if !tools_are_here() {
        return;
    }
    let machine = Machine::with(Style::Drive, "c.img", |dir| usual_chain(dir, "vmdk"));
    machine.ok("commit", &["--active", "--allow-stale"]);
    // As the note of a client with --keep-overlay, that was killed when the job ran.
    let note = machine.dir().join(".c.img.qmerge-live");
    let mut state: Value = serde_json::from_slice(&fs::read(&note).unwrap()).unwrap();
    (state["allow-stale"], state["keep-overlay"]) = (json!(false), json!(true));
    fs::write(&note, serde_json::to_vec(&state).unwrap()).unwrap();
    machine.job_becomes("ready");
    let words = ["could not become an empty overlay", "--allow-stale"];
    machine.fails("pivot", &[], 7, &words);
    machine.fails("commit", &["--active", "--pivot"], 7, &words);
    assert_eq!((machine.job()["status"].as_str(), machine.chain().len()), (Some("ready"), 4));
    machine.ok("pivot", &["--allow-stale"]);
    assert_eq!(machine.chain(), ["base.img"]);
}

/// A client that was killed while it slowed the guest down has left the limit.
#[test]
fn whoever_cancels_puts_the_limits_of_the_guest_back() {
    if !tools_are_here() {
        return;
    }
    let machine = Machine::new(Style::Drive);
    begun(&machine, &["--active"]);
    let folder = machine.dir().join("states");
    let note = fs::read_dir(&folder).unwrap().next().unwrap().unwrap().path();
    let mut state: Value = serde_json::from_slice(&fs::read(&note).unwrap()).unwrap();
    let limits = |write: u64| {
        json!({"id": "/machine/peripheral/vda/virtio-backend", "bps": 0, "bps_rd": 0, "bps_wr": write,
            "iops": 0, "iops_rd": 0, "iops_wr": 0})
    };
    state["throttled"] = json!({"qdev": "/machine/peripheral/vda/virtio-backend", "former": limits(7 << 20)});
    fs::write(&note, serde_json::to_vec(&state).unwrap()).unwrap();
    machine.connect().query("block_set_io_throttle", limits(1 << 20)).unwrap();
    let args = ["live", "cancel", "vda", "--qmp", "qmp.sock", "--state-dir", "states"];
    let output = qmerge(machine.dir(), &args);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let disks = machine.connect().query("query-block", json!({})).unwrap();
    let limits = disks.as_array().unwrap().iter().filter_map(|disk| disk["inserted"]["bps_wr"].as_u64());
    assert_eq!(limits.collect::<Vec<_>>(), [7 << 20]);
    assert!(!note.exists());
    failed(&qmerge(machine.dir(), &args), 1, &["no job works on the disk vda"]);
}
