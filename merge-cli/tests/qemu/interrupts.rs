//! Merges that are stopped half-way: nothing is lost, and the same command goes on.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use kit::qemu_is_here;

use crate::support::{binary, lab};

const M: u64 = 1 << 20;

/// Stops a merge of 96 MiB with `signal` some time after its plan; it must end with `code`, or be done before.
fn stopped(signal: Signal, code: i32) {
    if !qemu_is_here() {
        return;
    }
    for format in ["raw", "qcow2"] {
        let folder = lab("interrupt");
        folder.img(&["create", "-q", "-f", format, "base", "96M"]);
        folder.io(format, "base", &["write -P 1 0 48M"]);
        folder.overlay("top.qcow2", "base", format, None, "");
        folder.io("qcow2", "top.qcow2", &["write -P 2 16M 80M", "write -z 4M 4M"]);
        let before = folder.view("qcow2", "top.qcow2");
        for delay in [0, 10, 30] {
            let mut merge = Command::new(binary())
                .args(["commit", "top.qcow2", "--json"])
                .current_dir(folder.dir())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            let mut plan = String::new();
            BufReader::new(merge.stdout.as_mut().unwrap()).read_line(&mut plan).unwrap();
            assert!(plan.contains("\"plan\""), "the first line is no plan: {plan}");
            std::thread::sleep(Duration::from_millis(delay));
            // The process may have ended before; it is not waited for yet.
            kill_process(Pid::from_child(&merge), signal).unwrap();
            let output = merge.wait_with_output().unwrap();
            let stderr = String::from_utf8_lossy(&output.stderr);
            let ended =
                std::os::unix::process::ExitStatusExt::signal(&output.status).map(|signal| 128 + signal);
            let ended = ended.or(output.status.code()).unwrap();
            assert!(ended == 0 || ended == code, "exit code {ended} after {signal:?}: {stderr}");
            if ended == code && signal != Signal::KILL {
                assert!(stderr.lines().last().is_some_and(|line| line.starts_with("hint: ")), "{stderr}");
            }
            folder.view("qcow2", "top.qcow2").assert_same(&before, &format!("the view after {signal:?}"));
            folder.check_clean("top.qcow2");
            if format == "qcow2" {
                let check = folder.try_img(&["check", "-f", "qcow2", "base"]);
                assert!(check.code == 0 || check.code == 3, "more than leaks after {signal:?}:\n{check}");
            }
        }
        folder.qmerge(&["commit", "top.qcow2"]).ok();
        folder.view("qcow2", "top.qcow2").assert_same(&before, "the view when the merge is done");
        folder.view(format, "base").assert_same(&before, "base when the merge is done");
        assert_eq!(before.len(), 96 * M);
    }
}

#[test]
fn ctrl_c_stops_where_the_same_command_goes_on() {
    stopped(Signal::INT, 130);
}

#[test]
fn sigterm_stops_where_the_same_command_goes_on() {
    stopped(Signal::TERM, 143);
}

#[test]
fn a_killed_merge_leaves_leaks_at_most() {
    stopped(Signal::KILL, 137);
}

#[test]
fn a_header_without_room_for_a_long_mark_still_gets_one() {
    if !qemu_is_here() {
        return;
    }
    // Names that fill a first cluster of 512 bytes but for a few.
    let folder = lab("mark");
    let name = format!("{}.qcow2", "b".repeat(240));
    folder.create("base.qcow2", M, "");
    folder.io("qcow2", "base.qcow2", &["write -P 1 0 1M"]);
    folder.overlay("a.qcow2", "base.qcow2", "qcow2", None, "");
    std::fs::rename(folder.join("a.qcow2"), folder.join(&name)).unwrap();
    folder.overlay("b.qcow2", &name, "qcow2", None, "cluster_size=512");
    folder.overlay("c.qcow2", "b.qcow2", "qcow2", None, "");
    folder.io("qcow2", "b.qcow2", &["write -P 2 0 512k"]);
    folder.merge("c.qcow2", &["--top", "b.qcow2"]);
    folder.io("qcow2", "c.qcow2", &["write -P 9 0 1M"]);
    folder.merge("c.qcow2", &[]);
    folder.qmerge(&["commit", "b.qcow2"]).ok().says("already merged");
    folder.view("qcow2", "base.qcow2").assert_all(0, M, 9, "base after a stale merge");
}

#[test]
fn an_overlay_made_on_a_merged_layer_never_brings_old_data_back() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("on-merged");
    folder.create("base.qcow2", M, "");
    folder.overlay("a.qcow2", "base.qcow2", "qcow2", None, "");
    folder.io("qcow2", "a.qcow2", &["write -P 2 0 1M"]);
    folder.overlay("c.qcow2", "a.qcow2", "qcow2", None, "");
    folder.merge("c.qcow2", &["--top", "a.qcow2"]);
    folder.io("qcow2", "c.qcow2", &["write -P 9 0 1M"]);
    folder.merge("c.qcow2", &["--delete"]);
    folder.overlay("d.qcow2", "a.qcow2", "qcow2", None, "");
    // The merged layer is an empty overlay on base: there is no old data left that could come back.
    folder.merge("d.qcow2", &[]);
    folder.view("qcow2", "base.qcow2").assert_all(0, M, 9, "base");
}
