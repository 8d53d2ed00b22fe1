//! Snapshots whose client is killed, and names that QMP cannot carry.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::chown;
use std::process::Command;

use qmp_client::Execute;
use serde_json::json;

use crate::left::strace_is_here;
use crate::machine::{Machine, Style};
use crate::support::{failed, qmerge, text, tools_are_here};

/// Runs a snapshot, which dies as it sends its command of this number. False if it came to its end.
fn dies(machine: &Machine, file: &str, count: u32) -> bool {
    let mut strace = Command::new("strace");
    strace.args(["-qq", "-f", "-o", "/dev/null", "-e", "trace=sendto"]);
    strace.args(["-e", &format!("inject=sendto:signal=SIGKILL:when={count}")]);
    strace.arg(env!("CARGO_BIN_EXE_qmerge")).args(["live", "snapshot", &format!("disk0={file}")]);
    let output = strace.args(["--qmp", "qmp.sock"]).current_dir(machine.dir()).output().unwrap();
    !output.status.success()
}

/// The nodes that snapshots have made, and the files in the machine's folder.
fn there_is(machine: &Machine) -> (usize, BTreeSet<String>) {
    let nodes = machine
        .connect()
        .query("query-named-block-nodes", json!({"flat": true}))
        .unwrap()
        .as_array()
        .cloned();
    let made = |node: &&serde_json::Value| node["node-name"].as_str().unwrap().starts_with("snap-");
    let names = fs::read_dir(machine.dir()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    (nodes.unwrap().iter().filter(made).count(), names.collect())
}

/// At whatever command a client is killed: the same command typed again takes the snapshot, unless it is taken already; or
/// `live recover` undoes it. Nothing else is left in QEMU or in the folder.
#[test]
fn a_killed_snapshot_is_taken_again_or_undone() {
    if !tools_are_here() || !strace_is_here() {
        return;
    }
    let machine = Machine::new(Style::Daemon);
    let (nodes, mut files) = there_is(&machine);
    assert_eq!(nodes, 0);
    let (mut count, mut taken, mut undone, mut again) = (1, 0, 0, 0);
    loop {
        let file = format!("s{count}.img");
        if !dies(&machine, &file, count) {
            break;
        }
        let recovers = count % 2 == 0;
        if recovers {
            let output = qmerge(machine.dir(), &["live", "recover", "--qmp", "qmp.sock"]);
            assert_eq!(output.status.code(), Some(0), "{count}: {}", text(&output.stderr));
        } else {
            let words = ["live", "snapshot", &format!("disk0={file}"), "--qmp", "qmp.sock"];
            let output = qmerge(machine.dir(), &words);
            if output.status.code() != Some(0) {
                failed(&output, 6, &[&file, "already", "qmerge live chain disk0"]);
            } else {
                again += 1;
            }
        }
        if machine.chain()[0] == file {
            taken += 1;
            files.insert(file);
        } else {
            assert!(recovers, "{count}: it was not taken");
            undone += 1;
        }
        assert_eq!(there_is(&machine), (2 * taken, files.clone()), "{count}");
        assert!(machine.job().is_null(), "{count}");
        count += 1;
        assert!(count < 100, "it never ends");
    }
    assert!(again > 5 && undone > 5, "{again} taken again, {undone} undone");
}

/// What JSON cannot carry is said before anything is made.
#[test]
fn a_name_that_is_not_utf_8_is_refused_for_what_it_is() {
    if !tools_are_here() {
        return;
    }
    let machine = Machine::new(Style::Daemon);
    let mut command = Command::new(env!("CARGO_BIN_EXE_qmerge"));
    command.args(["live", "snapshot"]).arg(OsStr::from_bytes(b"disk0=\xe4.img"));
    let output = command.args(["--qmp", "qmp.sock"]).current_dir(machine.dir()).output().unwrap();
    failed(&output, 6, &["not UTF-8", "control socket"]);
    assert_eq!(there_is(&machine).0, 0);
}

/// QEMU's word alone removes no file: neither one that lies elsewhere, nor one of another user.
#[test]
fn a_file_that_qemu_only_claims_to_have_made_stays() {
    if !tools_are_here() {
        return;
    }
    let machine = Machine::new(Style::Daemon);
    let elsewhere = tempfile::tempdir().unwrap();
    let mut victims = vec![elsewhere.path().join("nologin")];
    let theirs = machine.dir().join("theirs");
    fs::write(&theirs, "").unwrap();
    if chown(&theirs, Some(4242), None).is_ok() {
        victims.push(theirs);
    }
    for (n, victim) in (1..).zip(&victims) {
        fs::write(victim, "").unwrap();
        let node =
            json!({"driver": "file", "node-name": format!("snap-ffffffff.1.{n}-file"), "filename": victim});
        machine.connect().query("blockdev-add", node).unwrap();
    }
    let output = qmerge(machine.dir(), &["live", "snapshot", "disk0=new.img", "--qmp", "qmp.sock"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("the file stays"), "{}", text(&output.stderr));
    assert!(victims.iter().all(|victim| victim.exists()), "{victims:?}");
    assert_eq!(there_is(&machine).0, 2);
}

/// Whoever undoes a snapshot and is killed leaves a trace for the next call, as long as the file is there.
#[test]
fn what_a_killed_undo_leaves_is_undone() {
    if !tools_are_here() || !strace_is_here() {
        return;
    }
    let machine = Machine::new(Style::Daemon);
    let (_, files) = there_is(&machine);
    let mut kills = 0;
    // Steps of the snapshot behind which there are a job, a node for the file, and a node for the image.
    for step in (9..24).step_by(2) {
        let file = format!("s{step}.img");
        if !dies(&machine, &file, step) || machine.chain()[0] == file {
            break;
        }
        let mut strace = Command::new("strace");
        strace.args(["-qq", "-f", "-o", "/dev/null", "-e", "trace=unlink,unlinkat"]);
        strace.args(["-e", "inject=unlink,unlinkat:signal=SIGKILL:when=1"]);
        strace.arg(env!("CARGO_BIN_EXE_qmerge")).args(["live", "recover", "--qmp", "qmp.sock"]);
        kills += u32::from(!strace.current_dir(machine.dir()).output().unwrap().status.success());
        let output = qmerge(machine.dir(), &["live", "recover", "--qmp", "qmp.sock"]);
        assert_eq!(output.status.code(), Some(0), "{step}: {}", text(&output.stderr));
        assert_eq!(there_is(&machine), (0, files.clone()), "{step}");
    }
    assert!(kills > 2, "{kills} were killed");
}
