//! Base is put back from a backup when a merge that was stopped has emptied layers: then nothing else holds their data. No command
//! that goes on says that all is merged, and a merge that only was stopped again is finished.

use kit::{Lab, View, are_here};

use crate::support::lab;

const MIB: u64 = 1 << 20;
const JOURNAL: &str = ".base.qmerge-journal";

/// Two overlays on a base, and copies of all three in `backup`. The guest wrote less than clusters in them, so that the beginning
/// of what is merged is what base holds anyway.
fn chain(format: &str) -> Lab {
    let folder = lab("put-back");
    folder.img(&["create", "-q", "-f", format, "base", "16M"]);
    folder.io(format, "base", &["write -q -P 1 0 8M"]);
    for (name, below, format, pattern) in [("b", "base", format, 0), ("c", "b", "qcow2", 1)] {
        folder.overlay(name, below, format, None, "");
        let write = |n| format!("write -q -P {} {} 4k", pattern + 2, n * MIB + pattern * MIB / 2 + 32768);
        let writes: Vec<_> = (0..6).map(write).collect();
        folder.io("qcow2", name, &writes.iter().map(String::as_str).collect::<Vec<_>>());
    }
    folder.sh("mkdir backup; cp -p base b c backup");
    folder
}

/// Makes the chain again, and kills the merge when it is about to remove a file for the `call`-th time.
fn kill_at_removal(folder: &Lab, call: u32, args: &[&str]) {
    folder.sh("rm -f base b c .base.* .b.* .c.*; cp -p backup/* .");
    let calls = "?unlink,unlinkat";
    let kill = format!("inject={calls}:signal=SIGKILL:when={call}");
    let run = folder.traced(&["-e", &format!("trace={calls}"), "-e", &kill], args);
    assert!(run.code != 0, "{args:?} removes fewer than {call} files: {run}");
}

/// How base is put back: with new times, with its own, as another file.
const WAYS: [&str; 3] =
    ["cat backup/base >base", "cp -p backup/base base", "cp -p backup/base new; mv new base"];

fn never_said_to_be_merged(format: &str, want: &View) {
    let folder = chain(format);
    folder.view("qcow2", "c").assert_same(want, "every chain is alike");
    let all: &[&str] = &["commit", "c", "-q"];
    let lower: &[&str] = &["commit", "c", "--top", "b", "-q"];
    let (mut refused, mut merged) = (0, 0);
    for (n, (args, call)) in [(all, 1), (all, 2), (all, 3), (lower, 2), (lower, 4)].into_iter().enumerate() {
        for again in [args, &["commit", "c", "--keep-active", "--restart", "-q"]] {
            let way = WAYS[(n + again.len()) % WAYS.len()];
            kill_at_removal(&folder, call, args);
            folder.sh(way);
            let is_begun = folder.join(JOURNAL).exists();
            let run = folder.qmerge(again);
            let what = format!("{format}, {args:?} killed at removal {call}, {way}: {run}");
            assert!([0, 6].contains(&run.code), "{what}");
            refused += u32::from(run.code == 6);
            merged += u32::from(run.code == 0);
            if run.code == 0 && is_begun {
                folder.view("qcow2", "c").assert_same(want, &what);
            }
        }
    }
    assert!(refused > 3, "{format}: {refused} refused, {merged} merged");
}

#[test]
fn a_base_without_what_was_emptied_is_never_said_to_be_merged() {
    if !are_here(&["qemu-img", "qemu-io", "strace"]) {
        return;
    }
    for format in ["raw", "qcow2"] {
        let want = chain(format).view("qcow2", "c");
        never_said_to_be_merged(format, &want);
    }
}

/// What the second run has written to base itself does not look like somebody else's writing.
#[test]
fn a_merge_that_is_stopped_again_behind_its_emptying_is_finished() {
    if !are_here(&["qemu-img", "qemu-io", "strace"]) {
        return;
    }
    for format in ["raw", "qcow2"] {
        let folder = chain(format);
        let want = folder.view("qcow2", "c");
        for sync in [3, 5, 6] {
            kill_at_removal(&folder, 2, &["commit", "c", "-q"]);
            folder.killed_at_sync(sync, &["commit", "c", "-q"]);
            folder.qmerge(&["commit", "c", "-q"]).ok();
            folder.view("qcow2", "c").assert_same(&want, &format!("{format}, stopped again at sync {sync}"));
            assert!(!folder.join(JOURNAL).exists(), "{format}: a journal is left");
        }
    }
}

/// A repair clears the dirty bit by which the merge knows base. Ours waits for the merge. Behind QEMU's the merge goes on when
/// it is told to, since base still holds everything.
#[test]
fn a_merge_whose_base_was_repaired_while_layers_were_emptied_can_be_finished() {
    if !are_here(&["qemu-img", "qemu-io", "strace"]) {
        return;
    }
    let folder = chain("qcow2");
    let want = folder.view("qcow2", "c");
    for call in 1..=3 {
        kill_at_removal(&folder, call, &["commit", "c", "-q"]);
        let repair = folder.qmerge(&["check", "--repair", "all", "base"]);
        assert!(repair.code == 1 && repair.stderr.contains("finish"), "killed at removal {call}: {repair}");
        folder.img(&["check", "-q", "-r", "all", "base"]);
        let run = folder.qmerge(&["commit", "c", "-q"]);
        if run.code != 0 {
            assert!(run.code == 6 && run.stderr.contains("--restart"), "killed at removal {call}: {run}");
            folder.qmerge(&["commit", "c", "-q", "--restart"]).ok();
        }
        folder.view("qcow2", "c").assert_same(&want, &format!("killed at removal {call}, then repaired"));
        folder.view("qcow2", "base").assert_same(&want, &format!("base, killed at removal {call}"));
        folder.img(&["check", "-q", "base"]);
        assert!(!folder.join(JOURNAL).exists(), "a journal is left");
    }
}

/// A guest that booted base has written more than what the merge left there: nobody but the user knows which is right.
#[test]
fn a_base_that_a_guest_has_written_while_layers_were_emptied_is_left_alone() {
    if !are_here(&["qemu-img", "qemu-io", "strace"]) {
        return;
    }
    let folder = chain("qcow2");
    kill_at_removal(&folder, 2, &["commit", "c", "-q"]);
    folder.img(&["check", "-q", "-r", "all", "base"]);
    let writes: Vec<_> = (0..6).map(|n| format!("write -q -P 9 {} 4k", n * MIB + MIB / 2 + 32768)).collect();
    folder.io("qcow2", "base", &writes.iter().map(String::as_str).collect::<Vec<_>>());
    let before = folder.view("qcow2", "base");
    let run = folder.qmerge(&["commit", "c", "-q"]);
    assert_eq!(run.code, 6, "{run}");
    folder.view("qcow2", "base").assert_same(&before, "base after the refusal");
}

/// A merge that was killed before it wrote anything to base is named as unfinished. What QEMU writes to base then, at once, is
/// not merged over.
#[test]
fn what_is_written_to_base_before_the_dirty_bit_is_set_is_not_merged_over() {
    if !are_here(&["qemu-img", "qemu-io", "strace"]) {
        return;
    }
    let folder = lab("before-arming");
    let mut refused = 0;
    for sync in 1..=4 {
        folder.sh("rm -f base c .base.* .c.*");
        folder.img(&["create", "-q", "-f", "qcow2", "base", "32M"]);
        folder.overlay("c", "base", "qcow2", None, "");
        folder.io("qcow2", "c", &["write -q -P 5 2M 8M"]);
        folder.killed_at_sync(sync, &["commit", "c", "-q"]);
        if !folder.join(JOURNAL).exists() {
            continue;
        }
        folder.io("qcow2", "base", &["write -q -P 77 3M 64k"]);
        let before = folder.view("qcow2", "base");
        let run = folder.qmerge(&["commit", "c", "-q"]);
        assert_eq!(run.code, 6, "killed at sync {sync}: {run}");
        folder.view("qcow2", "base").assert_same(&before, &format!("killed at sync {sync}"));
        refused += 1;
    }
    assert!(refused > 1, "{refused} merges were stopped with a journal");
}
