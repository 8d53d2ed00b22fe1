//! `qmerge check --restore`: what `--backup` kept comes back to the byte, and never over what others wrote.

use std::fs;

use crate::repair::damaged;
use kit::{Holder, Lab, are_here, qemu_is_here};

use crate::support::{Patch, lab};

const REPAIR: [&str; 6] = ["check", "--repair", "all", "--backup", "saved", "b.qcow2"];
const RESTORE: [&str; 4] = ["check", "--restore", "saved", "b.qcow2"];

/// What QEMU's check says of `b.qcow2`.
fn theirs(folder: &Lab) -> (i32, String) {
    let run = folder.try_img(&["check", "--output=json", "-f", "qcow2", "b.qcow2"]);
    (run.code, run.stdout)
}

fn content(folder: &Lab, name: &str) -> Vec<u8> {
    fs::read(folder.join(name)).unwrap()
}

/// A damaged image that is repaired, and what it held before.
fn repaired(name: &str) -> (Lab, Vec<u8>) {
    let folder = damaged(name);
    Patch::of(&folder, "b.qcow2").set_bits(72, 1);
    let before = content(&folder, "b.qcow2");
    folder.qmerge(&REPAIR).ok();
    folder.check_clean("b.qcow2");
    (folder, before)
}

#[test]
fn what_was_repaired_is_as_before_to_the_byte() {
    if !qemu_is_here() {
        return;
    }
    let folder = damaged("restore");
    Patch::of(&folder, "b.qcow2").set_bits(72, 1);
    let (before, verdict) = (content(&folder, "b.qcow2"), theirs(&folder));
    let (disk, snapshot) = (folder.view("qcow2", "b.qcow2"), folder.snapshot_view("b.qcow2", "one"));
    folder.qmerge(&REPAIR).ok();
    folder.check_clean("b.qcow2");
    let files = folder.files();
    let plan = folder.qmerge(&["check", "--restore", "saved", "--dry-run", "b.qcow2"]).ok();
    assert!(plan.stdout.contains("This would be done:") && plan.stdout.contains("shortened: "), "{plan}");
    let json = folder.qmerge(&["check", "--restore", "saved", "--dry-run", "--json", "b.qcow2"]).ok().json();
    folder.assert_unchanged(&files, &plan);

    let run = folder.qmerge(&["check", "--restore", "saved", "--json", "b.qcow2"]).ok();
    assert_eq!(run.json()["restore"], json["plan"], "{run}");
    assert_eq!(run.json()["restore"]["continues"], false, "{run}");
    assert_eq!(run.json()["restore"]["file-length-after"], before.len(), "{run}");
    assert!(content(&folder, "b.qcow2") == before, "{run}");
    assert_eq!(theirs(&folder), verdict, "{run}");
    folder.view("qcow2", "b.qcow2").assert_same(&disk, "the disk");
    folder.snapshot_view("b.qcow2", "one").assert_same(&snapshot, "the snapshot");
    let again = folder.qmerge(&RESTORE).ok();
    assert!(again.stdout.contains("nothing to restore"), "{again}");
    // And so it can be repaired again, with another backup.
    folder.qmerge(&["check", "--repair", "all", "--backup", "saved.2", "b.qcow2"]).ok();
    folder.check_clean("b.qcow2");
    folder.view("qcow2", "b.qcow2").assert_same(&disk, "the disk");
}

#[test]
fn space_that_a_repair_freed_is_taken_back() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("restore-leaks");
    folder.create("b.qcow2", 8 << 20, "");
    folder.io("qcow2", "b.qcow2", &["write -P 1 0 1M"]);
    let patch = Patch::of(&folder, "b.qcow2");
    patch.set_u64(patch.l2_entry(0), 0);
    let (before, verdict) = (content(&folder, "b.qcow2"), theirs(&folder));
    assert_eq!(verdict.0, 3);
    folder.qmerge(&["check", "--repair", "leaks", "--backup", "saved", "b.qcow2"]).ok();
    folder.check_clean("b.qcow2");
    folder.qmerge(&RESTORE).ok();
    assert!(content(&folder, "b.qcow2") == before, "the leaked cluster too holds what it held");
    assert_eq!(theirs(&folder), verdict);
}

#[test]
fn another_image_is_refused() {
    if !qemu_is_here() {
        return;
    }
    let (folder, before) = repaired("restore-other");
    folder.create("other.qcow2", 8 << 20, "");
    folder.io("qcow2", "other.qcow2", &["write -P 9 0 1M"]);
    let run = folder.refused(&["check", "--restore", "saved", "other.qcow2"], &[6]);
    assert!(run.stderr.contains("about another file") && run.stderr.contains("b.qcow2"), "{run}");
    let run = folder.refused(&["check", "--restore", "saved", "--allow-copy", "other.qcow2"], &[6]);
    assert!(run.stderr.contains("written by others"), "{run}");
    // A raw disk that holds nothing of the kind, and a file that is no backup.
    folder.raw("disk.raw", 8 << 20, 4096, 7);
    folder.refused(&["check", "--restore", "saved", "--allow-copy", "disk.raw"], &[6]);
    folder.refused(&["check", "--restore", "other.qcow2", "b.qcow2"], &[6]);
    folder.refused(&["check", "--restore", "b.qcow2", "b.qcow2"], &[6]);
    folder.refused(&["check", "--restore", "nothing", "b.qcow2"], &[1]);
    fs::copy(folder.join("b.qcow2"), folder.join("copy.qcow2")).unwrap();
    let run = folder.refused(&["check", "--restore", "saved", "copy.qcow2"], &[6]);
    assert!(run.last_line().ends_with("qmerge check --restore saved copy.qcow2 --allow-copy"), "{run}");
    folder.qmerge(&["check", "--restore", "saved", "copy.qcow2", "--allow-copy"]).ok();
    assert!(content(&folder, "copy.qcow2") == before);
}

#[test]
fn a_backup_that_is_cut_off_or_flipped_is_refused() {
    if !qemu_is_here() {
        return;
    }
    let (folder, _) = repaired("restore-damaged");
    let saved = content(&folder, "saved");
    // The last record says only that the repair was not stopped: without it, all is still there.
    let needed = saved.len() - 41;
    for part in 0..40 {
        let at = needed * part / 40;
        fs::write(folder.join("saved"), &saved[..at]).unwrap();
        folder.refused(&RESTORE, &[6]);
        let mut flipped = saved.clone();
        flipped[at] ^= 0x10;
        fs::write(folder.join("saved"), &flipped).unwrap();
        // Between the records nothing is written.
        if saved[at.saturating_sub(64)..at + 64].iter().any(|byte| *byte != 0) {
            let run = folder.refused(&RESTORE, &[6]);
            let why = ["the backup is damaged", "or the backup was cut off"];
            assert!(why.iter().any(|why| run.stderr.contains(why)), "{run}");
        }
    }
}

#[test]
fn an_image_that_was_written_since_is_refused() {
    if !qemu_is_here() {
        return;
    }
    let (folder, _) = repaired("restore-written");
    folder.io("qcow2", "b.qcow2", &["write -P 5 7M 64k"]);
    let disk = folder.view("qcow2", "b.qcow2");
    let run = folder.refused(&RESTORE, &[6]);
    assert!(run.stderr.contains("written by others since the repair"), "{run}");
    assert_eq!(folder.qmerge(&[&RESTORE[..], &["--json"]].concat()).json()["kind"], "written-since");
    folder.refused(&["check", "--restore", "saved", "--dry-run", "b.qcow2"], &[6]);
    folder.view("qcow2", "b.qcow2").assert_same(&disk, "the disk");
}

/// Data that goes where data was changes no metadata: it stays, and all else comes back.
#[test]
fn data_written_in_place_since_is_kept() {
    if !qemu_is_here() {
        return;
    }
    let (folder, _) = repaired("restore-in-place");
    folder.io("qcow2", "b.qcow2", &["write -P 5 600k 64k"]);
    let disk = folder.view("qcow2", "b.qcow2");
    folder.qmerge(&RESTORE).ok();
    folder.view("qcow2", "b.qcow2").assert_same(&disk, "the disk");
}

#[test]
fn an_image_in_use_is_refused() {
    if !qemu_is_here() {
        return;
    }
    let (folder, _) = repaired("restore-in-use");
    let holder = Holder::qemu_io(folder.dir(), &["-r", "-f", "qcow2"], "b.qcow2");
    let run = folder.refused(&RESTORE, &[5]);
    assert!(run.stderr.contains(&holder.pid().to_string()), "{run}");
}

#[test]
fn arguments_that_do_not_fit_are_refused() {
    if !qemu_is_here() {
        return;
    }
    let (folder, _) = repaired("restore-usage");
    for more in [&["--repair", "all"][..], &["--backup", "x"], &["--repair", "all", "--allow-copy"]] {
        folder.refused(&[&RESTORE[..], more].concat(), &[1]);
    }
    folder.refused(&["check", "--allow-copy", "b.qcow2"], &[1]);
    folder.refused(&["check", "--dry-run", "b.qcow2"], &[1]);
}

#[test]
fn a_repair_that_was_killed_can_be_undone() {
    if !are_here(&["qemu-img", "qemu-io", "strace"]) {
        return;
    }
    let mut killed = 0;
    for call in 1..40 {
        let folder = damaged("restore-repair-killed");
        Patch::of(&folder, "b.qcow2").set_bits(72, 1);
        let before = content(&folder, "b.qcow2");
        if !folder.killed_at_sync(call, &REPAIR) {
            break;
        }
        killed += 1;
        let changed = content(&folder, "b.qcow2") != before;
        let run = folder.qmerge(&RESTORE);
        // Where the backup is not whole yet, nothing was written.
        assert!(run.code == 0 || (run.code == 6 && !changed), "killed at sync {call}: {run}");
        assert!(content(&folder, "b.qcow2") == before, "killed at sync {call}: {run}");
    }
    assert!(killed > 4, "only {killed} repairs were killed");
}

#[test]
fn a_restore_that_was_killed_goes_on() {
    if !are_here(&["qemu-img", "qemu-io", "strace"]) {
        return;
    }
    let mut half = 0;
    for call in 1..40 {
        let (folder, before) = repaired("restore-killed");
        let after = content(&folder, "b.qcow2");
        if !folder.killed_at_sync(call, &RESTORE) {
            break;
        }
        let now = content(&folder, "b.qcow2");
        if now != before && now != after {
            half += 1;
            // Nobody else writes to it half-way.
            let run = folder.try_io("qcow2", "b.qcow2", &["write -P 5 7M 64k"]);
            assert!(run.code != 0 && run.text().contains("corrupt"), "killed at sync {call}: {run}");
            let plan = folder.qmerge(&["check", "--restore", "saved", "--dry-run", "b.qcow2"]).ok();
            assert!(plan.stdout.starts_with("continues a restore that was stopped"), "{plan}");
        }
        folder.qmerge(&RESTORE).ok();
        assert!(content(&folder, "b.qcow2") == before, "killed at sync {call}");
    }
    assert!(half > 2, "only {half} restores were killed half-way");
}
