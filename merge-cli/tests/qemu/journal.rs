//! Where the journal of a merge lies, and what happens where there is no room for it or for the merge.

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use kit::{Lab, Run, are_here, qemu_is_here, skipped};

use crate::support::{binary, lab};

const MIB: u64 = 1 << 20;

/// Something of the system that is undone when the test ends: a command and its arguments.
struct Undo(Vec<String>);

impl Drop for Undo {
    fn drop(&mut self) {
        let _ = Command::new(&self.0[0]).args(&self.0[1..]).status();
    }
}

/// Runs a command of the system that undoes itself; says so where that is not possible.
fn done(command: &[&str], undo: &[&str]) -> Option<Undo> {
    match Command::new(command[0]).args(&command[1..]).output() {
        Ok(output) if output.status.success() => Some(Undo(undo.iter().map(|s| (*s).to_owned()).collect())),
        other => {
            skipped(&format!("{command:?} cannot be done: {other:?}"));
            None
        }
    }
}

#[test]
fn a_folder_that_cannot_be_written_needs_another_place() {
    if !are_here(&["qemu-img", "qemu-io", "chattr"]) {
        return;
    }
    let folder = lab("locked-folder");
    std::fs::create_dir(folder.join("locked")).unwrap();
    folder.create("locked/base", 16 * MIB, "");
    folder.overlay("a.qcow2", "locked/base", "qcow2", None, "");
    folder.io("qcow2", "a.qcow2", &["write -P 2 1M 3M"]);
    let locked = folder.arg("locked");
    let Some(_unlock) = done(&["chattr", "+i", &locked], &["chattr", "-i", &locked]) else { return };
    folder.refused(&["commit", "a.qcow2"], &[6]).says("cannot be written").says("--journal-dir");
    folder.refused(&["commit", "a.qcow2", "--journal-dir", "absent"], &[6]);
    folder.merge("a.qcow2", &["--journal-dir", "."]);
    assert_eq!(folder.names(), ["a.qcow2", "locked/base"]);
}

#[test]
fn a_block_device_needs_another_place() {
    if !are_here(&["qemu-img", "qemu-io", "losetup", "strace"]) {
        return;
    }
    let folder = lab("device-journal");
    folder.raw("disk.img", 64 * MIB, 64 * MIB, 0xee);
    let disk = folder.arg("disk.img");
    let Ok(made) = Command::new("losetup").args(["--find", "--show", &disk]).output() else { return };
    if !made.status.success() {
        return skipped("no loop device can be made");
    }
    let device = String::from_utf8(made.stdout).unwrap().trim().to_owned();
    let _detach = Undo(vec!["losetup".into(), "--detach".into(), device.clone()]);
    folder.create(&device, 256 * MIB, "");
    folder.overlay("a.qcow2", &device, "qcow2", None, "cluster_size=512");
    folder.io("qcow2", "a.qcow2", &["write -P 2 1M 20M", "write -P 3 200M 700"]);
    let before = folder.view("qcow2", "a.qcow2");
    folder.refused(&["commit", "a.qcow2"], &[6]).says("block device").says("--journal-dir");
    std::fs::create_dir(folder.join("journals")).unwrap();
    for sync in [6, 4] {
        let args = ["commit", "a.qcow2", "-q", "--journal-dir", "journals"];
        let killed = folder.killed_at_sync(sync, &args);
        assert!(killed, "the merge is over before its sync {sync}");
        folder.view("qcow2", "a.qcow2").assert_same(&before, &format!("killed at sync {sync}"));
        let info = |args: &[&str]| folder.qmerge(&[&["info"], args].concat()).ok().stdout;
        assert!(!info(&[&device]).contains("merge pending"), "nothing lies beside the device");
        assert!(info(&[&device, "--journal-dir", "journals"]).contains("merge pending"), "sync {sync}");
        let chain = info(&["a.qcow2", "--chain", "--journal-dir", "journals", "--json"]);
        assert!(chain.contains("merge-pending"), "sync {sync}: {chain}");
    }
    folder.qmerge(&["abort", &device, "--journal-dir", "journals"]).ok();
    folder.check_clean(&device);
    folder.merge("a.qcow2", &["--journal-dir", "journals", "--verify"]);
    folder.view("qcow2", &device).assert_same(&before, "the device");
    assert_eq!(std::fs::read_dir(folder.join("journals")).unwrap().count(), 0);
}

/// A small disk in memory.
fn small_disk(folder: &Lab, size: &str) -> Option<Undo> {
    let on = folder.arg("small");
    std::fs::create_dir(&on).unwrap();
    done(&["mount", "-t", "tmpfs", "-o", &format!("size={size}"), "none", &on], &["umount", &on])
}

#[test]
fn a_full_disk_is_refused_before_anything_is_written() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("full-disk");
    let Some(_unmount) = small_disk(&folder, "64m") else { return };
    folder.create("small/base", 512 * MIB, "");
    folder.overlay("a.qcow2", "small/base", "qcow2", None, "");
    folder.io("qcow2", "a.qcow2", &["write -P 2 1M 100M"]);
    folder.refused(&["commit", "a.qcow2"], &[8]).says("not enough space");
}

#[test]
fn a_disk_that_fills_up_in_the_middle_loses_nothing() {
    if !qemu_is_here() {
        return;
    }
    for format in ["qcow2", "raw"] {
        let folder = lab("filling-disk");
        let Some(_unmount) = small_disk(&folder, "400m") else { return };
        folder.img(&["create", "-q", "-f", format, "small/base", "512M"]);
        folder.overlay("a.qcow2", "small/base", format, None, "");
        folder.io("qcow2", "a.qcow2", &["write -P 2 1M 300M", "write -P 3 400M 700"]);
        let before = folder.view("qcow2", "a.qcow2");
        let mut child = Command::new(binary())
            .args(["commit", "a.qcow2", "--json"])
            .current_dir(folder.dir())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut plan = String::new();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        lines.read_line(&mut plan).unwrap();
        // Somebody else fills the disk now.
        let filler = folder.join("small/filler");
        let full = std::fs::write(&filler, vec![7; 350 << 20]);
        let mut rest = String::new();
        lines.read_to_string(&mut rest).unwrap();
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        let code = output.status.code().unwrap_or(-1);
        let run = Run { command: "qmerge commit".into(), code, stdout: plan + &rest, stderr };
        assert!(full.is_err() || run.code == 8, "the disk has room for both: {run}");
        assert!(run.code == 8 || run.code == 0, "{run}");
        folder.view("qcow2", "a.qcow2").assert_same(&before, &format!("the view on a full disk, {run}"));
        std::fs::remove_file(&filler).unwrap();
        if run.code == 8 {
            assert!(run.text().contains("again: qmerge commit"), "{run}");
            folder.qmerge(&["commit", "a.qcow2"]).ok();
        }
        folder.view(format, "small/base").assert_same(&before, "base when there was room again");
        folder.view("qcow2", "a.qcow2").assert_same(&before, "the view when there was room again");
        folder.all_clean();
        let left: Vec<PathBuf> =
            std::fs::read_dir(folder.join("small")).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(left, [folder.join("small/base")]);
    }
}
