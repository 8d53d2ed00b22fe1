//! Clients that die, clients of others, and monitors that are taken.

use std::io::{BufRead, BufReader};
use std::time::Duration;

use qmp_client::{Execute, Graph};
use serde_json::json;

use crate::machine::{Machine, Style};
use crate::support::{failed, tools_are_here};

#[test]
fn a_killed_client_is_followed_by_the_same_command() {
    if !tools_are_here() {
        return;
    }
    for (active, delays) in [(false, [0, 40, 120, 400, 900]), (true, [20, 60, 150, 500, 1000])] {
        let args: &[&str] = if active { &["--pivot"] } else { &["--top", "[3]"] };
        for delay in delays {
            let machine = Machine::new(Style::Daemon);
            let mut child =
                machine.command("commit", &[args, &["--bandwidth", "8M"]].concat()).spawn().unwrap();
            std::thread::sleep(Duration::from_millis(delay));
            child.kill().unwrap();
            child.wait().unwrap();
            let said = machine.ok("commit", args);
            assert!(
                ["merged into", "nothing to do"].iter().any(|end| said.contains(end)),
                "{delay} ms: {said}"
            );
            let expected: &[&str] = if active { &["base.img"] } else { &["c.img", "base.img"] };
            assert_eq!(machine.chain(), expected, "{delay} ms");
            assert!(machine.job().is_null(), "{delay} ms");
            machine.holds_the_disk(expected[0]);
        }
    }
}

#[test]
fn a_client_killed_at_ready_is_followed_by_a_pivot() {
    if !tools_are_here() {
        return;
    }
    let machine = Machine::new(Style::Blockdev);
    machine.ok("commit", &["--active"]);
    // Another call asks for the end that the first one did not want.
    let said = machine.ok("commit", &["--pivot"]);
    assert!(said.contains("picked up again") && said.contains("vda writes to it now"), "{said}");
    machine.holds_the_disk("base.img");
}

/// Starts an active commit as another client would, and leaves it ready.
fn foreign_commit(machine: &Machine, dismiss: bool, finalize: bool) {
    let monitor = machine.connect();
    let graph = Graph::ask(&monitor).unwrap();
    let disk = graph.disk(machine.disk()).unwrap();
    let base = disk.layer("[1]").unwrap().node.clone();
    let arguments = json!({
        "job-id": "theirs", "device": disk.root(), "base-node": base, "auto-dismiss": dismiss, "auto-finalize": finalize,
    });
    monitor.query("block-commit", arguments).unwrap();
    drop(monitor);
    machine.job_becomes("ready");
}

#[test]
fn the_ready_job_of_another_client_is_pivoted() {
    if !tools_are_here() {
        return;
    }
    for (dismiss, finalize) in [(true, true), (false, true), (true, false), (false, false)] {
        let machine = Machine::new(Style::Drive);
        foreign_commit(&machine, dismiss, finalize);
        machine.fails("commit", &["--pivot"], 6, &["theirs", "works on the disk vda already"]);
        machine.fails("finish", &[], 1, &["theirs", "another client", "qmerge live jobs"]);
        let said = machine.ok("pivot", &[]);
        let base = machine.path("base.img");
        assert!(said.contains(&format!("vda writes to {base} now")), "{said}");
        assert!(said.contains("do not start it with"), "{said}");
        assert!(machine.job().is_null(), "{dismiss} {finalize}");
        machine.holds_the_disk("base.img");
    }
}

#[test]
fn the_running_job_of_another_client_is_not_ended() {
    if !tools_are_here() {
        return;
    }
    let machine = Machine::new(Style::Daemon);
    let monitor = machine.connect();
    let graph = Graph::ask(&monitor).unwrap();
    let base = graph.disks()[0].layer("[1]").unwrap().node.clone();
    let arguments = json!({"job-id": "theirs", "device": "top", "base-node": base, "speed": 65536});
    monitor.query("block-commit", arguments).unwrap();
    drop(monitor);
    machine.fails("pivot", &[], 1, &["theirs", "not ready", "qmerge live jobs"]);
    machine.ok("cancel", &[]);
    machine.holds_the_disk("c.img");
}

#[test]
fn a_monitor_that_is_taken_or_stale_is_explained() {
    if !tools_are_here() {
        return;
    }
    let mut machine = Machine::new(Style::Daemon);
    let before = machine.files();
    let other = machine.connect();
    machine.fails(
        "commit",
        &["--pivot"],
        1,
        &["another client holds this monitor", "then again: qmerge live commit"],
    );
    drop(other);
    machine.stop();
    machine.fails("commit", &["--pivot"], 1, &["nobody listens there any more", "qmerge commit"]);
    let output = machine.live("pull", &["--json"]);
    failed(&output, 1, &["nobody listens"]);
    assert!(before == machine.files());
}

#[test]
fn a_qemu_that_ends_during_the_merge_leaves_a_note_and_the_disk() {
    if !tools_are_here() {
        return;
    }
    let mut machine = Machine::new(Style::Daemon);
    let args = ["--pivot", "--bandwidth", "32K", "--json"];
    let mut child = machine.command("commit", &args).spawn().unwrap();
    // It watches the job once it tells of progress.
    let mut events = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(events.any(|event| event.unwrap().contains("\"progress\"")));
    machine.stop();
    assert!(events.all(|event| event.is_ok()));
    let output = child.wait_with_output().unwrap();
    failed(&output, 1, &["closed", "picks it up again", "qmerge live recover --qmp qmp.sock"]);
    assert!(machine.has(".c.img.qmerge-live"));
    machine.holds_the_disk("c.img");
}
