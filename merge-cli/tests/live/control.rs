//! Merges that are started, watched, stopped and ended in several calls.

use std::fs;
use std::process::{Child, Output};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::machine::{Machine, Style, events, shows};
use crate::support::{failed, qmerge, run, text, tools_are_here};

/// Slow enough to be met at work: minutes.
const SLOW: &[&str] = &["--top", "[3]", "--bandwidth", "32K"];
const SLOW_ACTIVE: &[&str] = &["--active", "--bandwidth", "32K"];

/// Waits until the child would not die of this signal: it takes it as a wish.
fn until_it_listens(machine: &Machine, child: &Child, signal: Signal) {
    let bit = 1_u64 << (signal.as_raw() - 1);
    machine.eventually(|| {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
        (u64::from_str_radix(caught.trim(), 16).unwrap() & bit != 0).then_some(())
    });
}

fn signal(child: Child, signal: Signal) -> Output {
    kill_process(Pid::from_child(&child), signal).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn an_asynchronous_merge_is_finished_later() {
    if !tools_are_here() {
        return;
    }
    let machine = Machine::new(Style::Drive);
    let said = machine.ok("commit", &["--top", "[3]", "--async"]);
    for verb in ["jobs", "finish vda", "cancel vda"] {
        assert!(said.contains(&format!("qmerge live {verb} --qmp qmp.sock")), "{said}");
    }
    let job = machine.job_becomes("pending");
    assert_eq!(job["merge"]["obsolete"], json!([machine.path("b.img"), machine.path("a.img")]));
    assert_eq!((&job["merge"]["phase"], &job["merge"]["kind"]), (&json!("copying"), &json!("commit")));
    assert_eq!(job["merge"]["valid-top"], machine.path("c.img").as_str());
    assert_eq!(job["merge"]["state-file"], machine.path(".c.img.qmerge-live").as_str());
    assert_eq!(machine.chain().len(), 4, "nothing is switched yet");
    machine.fails("pivot", &[], 2, &["no pivot", "qmerge live finish vda"]);
    machine.fails("commit", &["--top", "[2]"], 6, &["works on the disk vda already", "live cancel vda"]);
    machine.fails("pull", &[], 6, &["works on the disk vda already"]);
    // The same call with --async changes nothing.
    assert!(machine.ok("commit", &["--top", "[3]", "--async"]).contains("goes on in QEMU"));
    let last = machine.events("finish", &[]).pop().unwrap();
    assert_eq!((&last["status"], &last["base"]), (&json!("switched"), &json!(machine.path("base.img"))));
    assert_eq!(machine.chain(), ["c.img", "base.img"]);
    assert!(machine.job().is_null() && !machine.has(".c.img.qmerge-live") && !machine.has("qmp.sock.qmerge"));
    machine.fails("finish", &[], 1, &["no job works on the disk vda"]);
    machine.holds_the_disk("c.img");
}

#[test]
fn a_finish_waits_and_does_not_cancel_what_it_did_not_start() {
    if !tools_are_here() {
        return;
    }
    let machine = Machine::new(Style::Daemon);
    machine.ok("commit", &[SLOW, &["--async"]].concat());
    machine.fails("finish", &["--timeout", "0.2"], 4, &["the job goes on", "qmerge live finish disk0"]);
    let waiting = machine.command("finish", &[]).spawn().unwrap();
    until_it_listens(&machine, &waiting, Signal::INT);
    failed(&signal(waiting, Signal::INT), 130, &["the job goes on"]);
    assert_eq!(machine.job()["status"], "running");
    machine.ok("speed", &["0"]);
    // The same command that started it, without --async, ends it too.
    let said = machine.ok("commit", &["--top", "[3]"]);
    assert!(said.contains("picked up again") && said.contains("merged into"), "{said}");
    machine.holds_the_disk("c.img");
}

#[test]
fn an_active_merge_is_left_ready_and_then_pivoted_or_cancelled() {
    if !tools_are_here() {
        return;
    }
    for pivot in [true, false] {
        let machine = Machine::new(Style::Blockdev);
        let said = machine.ok("commit", &["--active"]);
        assert!(
            said.contains("qmerge live pivot vda --qmp") && said.contains("qmerge live cancel vda --qmp"),
            "{said}"
        );
        assert_eq!(machine.job()["status"], "ready");
        let snapshot = qmerge(machine.dir(), &["live", "snapshot", "vda=d.img", "--qmp", "qmp.sock"]);
        failed(&snapshot, 6, &["is under way", "a job works on vda", "qmerge live pivot vda --qmp qmp.sock"]);
        assert!(!machine.has("d.img"));
        machine.guest_writes(55, "2M", "128k");
        machine.fails("finish", &[], 2, &["ends with a pivot", "qmerge live pivot vda"]);
        if pivot {
            let said = machine.ok("pivot", &["--delete"]);
            assert!(said.contains("vda writes to it now"), "{said}");
            assert!(["a.img", "b.img", "c.img"].iter().all(|name| !machine.has(name)), "{said}");
            machine.holds_the_disk("base.img");
        } else {
            let said = machine.ok("cancel", &[]);
            assert!(said.contains("is cancelled"), "{said}");
            assert_eq!(machine.chain().len(), 4);
            assert!(!machine.has(".c.img.qmerge-live") && !machine.has("qmp.sock.qmerge"));
            machine.holds_the_disk("c.img");
        }
    }
}

/// An image in another folder begins to use a merged layer while the merge is under way.
#[test]
fn files_that_a_scanned_folder_uses_outlive_a_pivot_and_a_finish() {
    if !tools_are_here() {
        return;
    }
    for (verb, start, scans_at_the_end) in [
        ("pivot", &["--active"][..], false),
        ("pivot", &["--active"], true),
        ("finish", &["--top", "[3]", "--async"], false),
        ("finish", &["--top", "[3]", "--async"], true),
    ] {
        let machine = Machine::new(Style::Blockdev);
        std::fs::create_dir(machine.dir().join("elsewhere")).unwrap();
        let scan = ["--scan", "elsewhere"];
        let (first, last) = if scans_at_the_end { (&[][..], &scan[..]) } else { (&scan[..], &[][..]) };
        machine.ok("commit", &[start, first].concat());
        let used = machine.path("b.img");
        let other =
            ["create", "-q", "-u", "-f", "qcow2", "-b", &used, "-F", "qcow2", "elsewhere/other.img", "64M"];
        run("qemu-img", machine.dir(), &other);
        let said = machine.ok(verb, &[&["--delete"], last].concat());
        assert!(said.contains("other.img uses it"), "{verb}, {scans_at_the_end}: {said}");
        assert!(machine.has("b.img") && machine.has("a.img"), "{verb}, {scans_at_the_end}: {said}");
    }
}

#[test]
fn the_overlay_is_kept_with_base_as_the_disk_was() {
    if !tools_are_here() {
        return;
    }
    let mut machine = Machine::new(Style::Drive);
    let last = machine.events("commit", &["--keep-overlay"]).pop().unwrap();
    assert_eq!((&last["status"], &last["active"]), (&json!("overlay-kept"), &json!(machine.path("c.img"))));
    assert_eq!(machine.chain().len(), 4);
    assert!(machine.job().is_null() && !machine.has(".c.img.qmerge-live"));
    // What the guest writes from now on is not in base.
    fs::copy(machine.dir().join("expected.raw"), machine.dir().join("then.raw")).unwrap();
    machine.guest_writes(66, "0", "64k");
    machine.stop();
    shows(machine.dir(), "base.img", "then.raw");
    shows(machine.dir(), "c.img", "expected.raw");
}

#[test]
fn time_is_up() {
    if !tools_are_here() {
        return;
    }
    for args in [SLOW, SLOW_ACTIVE] {
        let machine = Machine::new(Style::Daemon);
        let begin = Instant::now();
        machine.fails(
            "commit",
            &[args, &["--timeout", "1"]].concat(),
            4,
            &[
                "after 1 s",
                "the chain of disk0 is as it was",
                "no restore points any more",
                "base.img",
                "--timeout",
            ],
        );
        assert!(begin.elapsed() < Duration::from_secs(60), "{:?}", begin.elapsed());
        assert!(machine.job().is_null() && !machine.has(".c.img.qmerge-live"));
        assert_eq!(machine.chain().len(), 4);
        machine.holds_the_disk("c.img");
    }
}

#[test]
fn bandwidth_limits_the_copy() {
    if !tools_are_here() {
        return;
    }
    let machine = Machine::new(Style::Daemon);
    // 8 MiB of data in three layers at 4 MiB/s.
    let last = machine.events("commit", &["--pivot", "--bandwidth", "4M"]).pop().unwrap();
    let seconds = last["seconds"].as_f64().unwrap();
    assert!(seconds > 1.0, "{seconds} s");
    assert!(last["bytes-copied"].as_u64().unwrap() >= 8 << 20, "{last}");
    machine.holds_the_disk("base.img");
}

#[test]
fn a_signal_cancels_the_job_and_says_what_changed() {
    if !tools_are_here() {
        return;
    }
    for (number, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        for args in [SLOW, SLOW_ACTIVE] {
            let machine = Machine::new(Style::Daemon);
            let child = machine.command("commit", &[args, &["--json"]].concat()).spawn().unwrap();
            until_it_listens(&machine, &child, number);
            machine.eventually(|| machine.has("qmp.sock.qmerge").then_some(()));
            let output = signal(child, number);
            failed(&output, code, &["stopped at", "is as it was, with the same bytes", "to begin anew"]);
            let last = events(&output.stdout).pop().unwrap();
            assert_eq!((&last["kind"], &last["exit-code"]), (&json!("interrupted"), &json!(code)));
            assert!(
                machine.job().is_null()
                    && !machine.has(".c.img.qmerge-live")
                    && !machine.has("qmp.sock.qmerge")
            );
            assert_eq!(machine.chain().len(), 4);
            machine.holds_the_disk("c.img");
        }
    }
}

#[test]
fn a_signal_that_comes_twice_at_once_still_cancels() {
    if !tools_are_here() {
        return;
    }
    // As timeout(1) sends it. A busy machine may make two signals of it, and then it is done again.
    loop {
        let machine = Machine::new(Style::Daemon);
        let child = machine.command("commit", SLOW).spawn().unwrap();
        until_it_listens(&machine, &child, Signal::TERM);
        machine.eventually(|| machine.has("qmp.sock.qmerge").then_some(()));
        let begin = Instant::now();
        kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
        std::thread::sleep(Duration::from_millis(2));
        kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
        let together = begin.elapsed() < Duration::from_millis(100);
        let output = child.wait_with_output().unwrap();
        if together {
            failed(&output, 143, &["stopped at"]);
            assert!(machine.job().is_null());
            break;
        }
    }
}

#[test]
fn progress_and_the_end_are_events() {
    if !tools_are_here() {
        return;
    }
    let machine = Machine::new(Style::Daemon);
    // 8 MiB at 1 MiB/s, and an event every half a second.
    let all = machine.events("commit", &["--pivot", "--bandwidth", "1M"]);
    let names: Vec<_> = all.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!((names[0], names[names.len() - 1]), ("plan", "result"));
    let progress: Vec<_> = all.iter().filter(|event| event["event"] == "progress").collect();
    assert!(progress.len() > 2, "{names:?}");
    assert_eq!(all.len(), progress.len() + 2, "{names:?}");
    let done: Vec<_> = progress.iter().map(|event| event["done"].as_u64().unwrap()).collect();
    assert!(
        done.is_sorted() && progress.iter().all(|e| e["total"].as_u64() >= e["done"].as_u64()),
        "{done:?}"
    );
    assert_eq!(all[0]["job"], all[all.len() - 1]["job"]);
    // Without --json standard error has no progress unless it is a terminal, and -q nothing at all.
    let output = machine.live("commit", &["--pivot", "-q"]);
    assert_eq!((text(&output.stdout), text(&output.stderr)), (String::new(), String::new()));
}

#[test]
fn a_guest_is_slowed_down_only_where_that_is_possible_and_not_for_ever() {
    if !tools_are_here() {
        return;
    }
    let daemon = Machine::new(Style::Daemon);
    let before = daemon.files();
    daemon.fails("commit", &["--pivot", "--converge"], 6, &["cannot be throttled", "leave --converge out"]);
    daemon.fails("commit", &["--top", "[3]", "--converge"], 2, &["--converge is for the active layer"]);
    assert!(before == daemon.files() && daemon.job().is_null());

    let machine = Machine::new(Style::Drive);
    machine.ok("commit", &["--pivot", "--converge"]);
    let disks = qmp_client::Execute::query(&machine.connect(), "query-block", json!({})).unwrap();
    let limits: Vec<_> =
        disks.as_array().unwrap().iter().filter_map(|d| d["inserted"]["bps_wr"].as_u64()).collect();
    assert_eq!(limits, [0]);
    machine.holds_the_disk("base.img");
}
