//! Too little room, before a merge and in its midst.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde_json::json;

use crate::machine::{Machine, Style, events};
use crate::support::{failed, run, text, tools_are_here};

/// A small file system of its own; it is unmounted with the value.
struct Small(PathBuf);

impl Small {
    /// `None` where mounting is not allowed.
    fn new(folder: &std::path::Path, size: &str) -> Option<Self> {
        let point = folder.join("small");
        fs::create_dir(&point).unwrap();
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"])
            .arg(&point)
            .output();
        if mount.is_ok_and(|output| output.status.success()) {
            return Some(Self(point));
        }
        kit::not_tried("no file system may be mounted here, so a full one was not tested");
        None
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// A base of 64 MiB on a file system of that size, under an overlay with 48 MiB of data: more than an active commit
/// sends at once, whatever its limit is.
fn machine(small: &mut Option<Small>) -> Machine {
    Machine::with(Style::Daemon, "c.img", |dir| {
        *small = Small::new(dir, "64m");
        let folder = if small.is_some() { "small" } else { "." };
        let base = dir.join(folder).join("base.img").display().to_string();
        run("qemu-img", dir, &["create", "-q", "-f", "qcow2", &base, "64M"]);
        run("qemu-img", dir, &["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", "a.img"]);
        run("qemu-io", dir, &["-f", "qcow2", "-c", "write -q -P 5 0 48M", "a.img"]);
        run("qemu-img", dir, &["create", "-q", "-f", "qcow2", "-b", "a.img", "-F", "qcow2", "c.img"]);
    })
}

fn fill(small: &Small) -> PathBuf {
    let filler = small.0.join("filler");
    let _ = Command::new("dd")
        .args(["if=/dev/zero", "bs=1M", "count=100"])
        .arg(format!("of={}", filler.display()))
        .output();
    filler
}

#[test]
fn a_full_file_system_is_refused_before_the_start() {
    let mut small = None;
    if !tools_are_here() {
        return;
    }
    let machine = machine(&mut small);
    let Some(small) = &small else { return };
    fill(small);
    for args in [&["--top", "[2]"][..], &["--pivot"]] {
        machine.fails("commit", args, 8, &["will grow by 48 MiB", "are missing", "df -h", "small"]);
    }
    assert!(machine.job().is_null() && !machine.has(".c.img.qmerge-live"));
}

#[test]
fn a_file_system_that_fills_up_halts_the_job_until_there_is_room() {
    if !tools_are_here() {
        return;
    }
    for (args, image) in [(&["--top", "[2]"][..], "c.img"), (&["--pivot", "--json"], "small/base.img")] {
        let mut small = None;
        let machine = machine(&mut small);
        let Some(small) = &small else { return };
        let child = machine.command("commit", &[args, &["--bandwidth", "4M"]].concat()).spawn().unwrap();
        machine_has_begun(&machine);
        let filler = fill(small);
        // The command leaves the monitor to others while the job stands still.
        machine.eventually(|| {
            let jobs = machine.live_jobs()?;
            (jobs[0]["io-status"] == "nospace").then_some(())
        });
        let table = crate::support::qmerge(machine.dir(), &["live", "jobs", "--qmp", "qmp.sock"]);
        assert!(
            table.status.code() != Some(0) || text(&table.stdout).contains("no space"),
            "{}",
            text(&table.stdout)
        );
        fs::remove_file(filler).unwrap();
        machine.eventually(|| machine.live("resume", &[]).status.success().then_some(()));
        let output = child.wait_with_output().unwrap();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(0), "{out}{err}");
        if args.contains(&"--json") {
            let names: Vec<_> = events(&output.stdout).iter().map(|e| e["event"].clone()).collect();
            assert_eq!(names.iter().filter(|name| **name == "stalled").count(), 1, "{names:?}");
            assert!(names.contains(&json!("resumed")) && names.last() == Some(&json!("result")), "{names:?}");
        } else {
            assert_eq!(err.matches("the job stands still: no space is left").count(), 1, "{err}");
            assert!(
                err.contains("qmerge live resume disk0 --qmp qmp.sock") && err.contains("the job goes on"),
                "{err}"
            );
        }
        machine.holds_the_disk(image);
    }
}

#[test]
fn a_halted_job_is_given_up_by_a_signal_or_when_time_is_up() {
    if !tools_are_here() {
        return;
    }
    let mut small = None;
    let machine = machine(&mut small);
    let Some(small) = &small else { return };
    let child =
        machine.command("commit", &["--pivot", "--bandwidth", "4M", "--timeout", "10"]).spawn().unwrap();
    machine_has_begun(&machine);
    fill(small);
    let output = child.wait_with_output().unwrap();
    failed(&output, 4, &["stands still", "after 10 s", "is as it was"]);
    assert!(machine.job().is_null() && !machine.has(".c.img.qmerge-live"));
    machine.holds_the_disk("c.img");
}

/// Waits until the job is noted, and so about to start.
fn machine_has_begun(machine: &Machine) {
    let begin = std::time::Instant::now();
    while !machine.has(".c.img.qmerge-live") {
        assert!(begin.elapsed().as_secs() < 300);
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    std::thread::sleep(std::time::Duration::from_millis(200));
}
