//! What the command says where something is in its way, or was done: the truth, and a hint that works.

use std::fs;
use std::io;
use std::os::unix::fs::chown;

use kit::{Lab, Run, are_here};

use crate::support::lab;

const MIB: u64 = 1 << 20;

fn chain(name: &str) -> Lab {
    let folder = lab(name);
    folder.create("base", 4 * MIB, "");
    folder.overlay("c", "base", "qcow2", None, "");
    folder.io("qcow2", "c", &["write -P 5 1M 64k"]);
    folder
}

fn shell(folder: &Lab, script: &str) -> Run {
    let script = script.replace("qmerge", &folder.command().display().to_string());
    kit::run(folder.dir(), "sh", &["-c", &script])
}

/// Something lies where a state file would: not one that a merge has made.
#[test]
fn what_is_planted_as_a_state_file_is_told_for_what_it_is() {
    if !are_here(&["qemu-img", "qemu-io"]) {
        return;
    }
    for plant in
        ["mkdir .c.qmerge-live", "ln -s c .c.qmerge-live", ": >.c.qmerge-live; chmod 666 .c.qmerge-live"]
    {
        let folder = chain("planted");
        folder.sh(plant);
        for args in [&["commit", "c"][..], &["commit", "c", "--dry-run"], &["live", "recover", "c"]] {
            let refused = folder.refused(args, &[6]).says(".c.qmerge-live");
            assert!(!refused.text().contains("was under way"), "{refused}");
        }
        folder.qmerge(&["info", "c"]).ok().says("not believed");
        let refused = folder.refused(&["commit", "c"], &[6]);
        let hint = refused.stderr.lines().find_map(|line| line.split_once("mv -T "));
        folder.sh(&format!("mv -T {}", hint.expect(plant).1));
        folder.merge("c", &[]);
    }
}

/// What somebody has put there who may not write the image keeps nobody from a merge.
#[test]
fn a_state_file_of_a_stranger_does_not_count() {
    if !are_here(&["qemu-img", "qemu-io"]) || !rustix::process::geteuid().is_root() {
        return;
    }
    for plant in ["mkdir", "touch"] {
        let folder = chain("stranger-state");
        folder.sh(&format!("{plant} .c.qmerge-live .other.qmerge-live"));
        for name in [".c.qmerge-live", ".other.qmerge-live"] {
            chown(folder.join(name), Some(65534), Some(65534)).unwrap();
        }
        folder.merge("c", &[]).says("not believed").says("user 65534");
        assert!(fs::symlink_metadata(folder.join(".c.qmerge-live")).is_ok(), "it is left alone");
    }
}

#[test]
fn where_too_many_files_are_open_the_limit_is_named() {
    if !are_here(&["qemu-img", "qemu-io"]) {
        return;
    }
    let folder = chain("limit");
    let mut named = 0;
    for limit in 4..24 {
        for command in ["commit c --dry-run", "live recover c", "info --chain c", "abort base"] {
            let run = shell(&folder, &format!("ulimit -n {limit}; qmerge {command}"));
            if run.text().contains("os error 24") {
                assert!(run.text().contains("ulimit -n"), "{limit}: {run}");
                named += 1;
            }
        }
    }
    assert!(named > 3, "{named}");
}

/// Damages `c`: its first L1 entry has no copied bit any more.
fn clear_copied(folder: &Lab) {
    let mut bytes = fs::read(folder.join("c")).unwrap();
    let l1 = u64::from_be_bytes(bytes[40..48].try_into().unwrap());
    bytes[l1 as usize] &= !(1 << 7);
    fs::write(folder.join("c"), bytes).unwrap();
}

/// A full disk behind standard output: what was done is done.
#[test]
fn what_is_done_is_told_where_it_cannot_be_printed() {
    if !are_here(&["qemu-img", "qemu-io"]) {
        return;
    }
    let folder = chain("full");
    shell(&folder, "qmerge flatten c -o new >/dev/full").expect(1).says("the new image is written");
    assert!(folder.join("new").exists());
    let run = shell(&folder, "qmerge commit c >/dev/full").expect(1).says("the merge is done");
    assert!(run.text().contains("standard output"), "{run}");
    folder.qmerge(&["commit", "c"]).ok().says("nothing to do");
    let run = shell(&folder, "qmerge commit c >/dev/full").expect(1);
    assert!(!run.text().contains("is done"), "nothing was: {run}");

    let folder = chain("full-pull");
    shell(&folder, "qmerge pull c >/dev/full").expect(1).says("the pull is done");
    folder.check_clean("c");
    clear_copied(&folder);
    let run = shell(&folder, "qmerge check c >/dev/full").expect(1);
    assert!(!run.text().contains("is done"), "nothing was: {run}");
    shell(&folder, "qmerge check --repair all c >/dev/full").expect(1).says("the repair is done");
    folder.check_clean("c");
}

/// The reader of standard output has gone: the work is done all the same, and a verdict stays what it is.
#[test]
fn work_is_done_and_judged_also_where_nobody_reads() {
    if !are_here(&["qemu-img", "qemu-io", "strace"]) {
        return;
    }
    let unread = |folder: &Lab, args: &[&str], code: i32| {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let ended = folder.to_run(args).stdout(writer).output().unwrap();
        let told = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(code), "{args:?}: {told}");
    };
    for more in [&[][..], &["--json"], &["--delete", "--json"]] {
        let folder = chain("unread");
        let before = folder.view("qcow2", "c");
        unread(&folder, &[&["commit", "c"], more].concat(), 0);
        assert_eq!(folder.join("c").exists(), !more.contains(&"--delete"));
        folder.view("qcow2", "base").assert_same(&before, "the merge");
    }
    for args in [&["pull", "c", "--json"][..], &["flatten", "c", "-o", "new", "--json"]] {
        let folder = chain("unread-pull");
        unread(&folder, args, 0);
        let image = if args[0] == "pull" { "c" } else { "new" };
        assert_eq!(folder.backing_of(image), None);
        folder.check_clean(image);
    }

    let folder = chain("unread-abort");
    folder.io("qcow2", "c", &["write -P 6 2M 1M"]);
    assert!(folder.killed_at_sync(6, &["commit", "c"]));
    unread(&folder, &["abort", "base"], 0);
    folder.qmerge(&["abort", "base"]).ok().says("no merge");

    let folder = chain("unread-verdict");
    folder.sh("cp c same; cp c odd");
    folder.io("qcow2", "odd", &["write -P 7 2M 64k"]);
    for json in [&[][..], &["--json"]] {
        unread(&folder, &[&["compare", "c", "same"], json].concat(), 0);
        unread(&folder, &[&["compare", "c", "odd"], json].concat(), 1);
    }
    shell(&folder, "qmerge compare c same >/dev/full").expect(2).says("standard output");
    shell(&folder, "qmerge compare c odd --json >/dev/full").expect(2).says("standard output");
    clear_copied(&folder);
    unread(&folder, &["check", "c"], 2);
    unread(&folder, &["check", "c", "--json"], 2);
    unread(&folder, &["check", "--repair", "all", "c"], 0);
    folder.check_clean("c");
}

/// A merge that is given up, and nobody can read it.
#[test]
fn a_merge_is_given_up_also_where_that_cannot_be_printed() {
    if !are_here(&["qemu-img", "qemu-io", "strace"]) {
        return;
    }
    let folder = chain("full-abort");
    folder.io("qcow2", "c", &["write -P 6 2M 1M"]);
    assert!(folder.killed_at_sync(6, &["commit", "c"]));
    folder.qmerge(&["info", "base"]).ok().says("pending");
    shell(&folder, "qmerge abort base >/dev/full").expect(1).says("the merge is given up");
    folder.qmerge(&["abort", "base"]).ok().says("no merge");
}

/// A layer that the merge is emptying has the dirty bit, and its journal explains it.
#[test]
fn a_layer_that_is_being_emptied_is_not_called_dirty() {
    if !are_here(&["qemu-img", "qemu-io", "strace"]) {
        return;
    }
    let folder = lab("emptying");
    folder.create("base", 4 * MIB, "");
    folder.overlay("a", "base", "qcow2", None, "");
    folder.overlay("c", "a", "qcow2", None, "");
    for (name, at) in [("a", "1M"), ("c", "2M")] {
        folder.io("qcow2", name, &[&format!("write -P 5 {at} 64k")]);
    }
    folder.sh("mkdir ../saved; cp base a c ../saved");
    let mut seen = 0;
    for call in 4.. {
        folder.sh("rm -f .*.qmerge-*; cp ../saved/* .");
        if !folder.killed_at_sync(call, &["commit", "c"]) {
            break;
        }
        for name in ["a", "c"] {
            let run = folder.qmerge(&["info", name]).ok();
            assert!(!run.text().contains("closed cleanly"), "{call}: {run}");
            let is_emptying = run.text().contains("being emptied");
            let checked = folder.call(&["check", name]);
            assert!(!checked.text().contains("closed cleanly"), "{call}: {checked}");
            let is_marked = folder.qmerge(&["info", "--json", name]).json()["dirty-flag"] == true;
            assert!(!is_marked || is_emptying, "{call}: {run}");
            if is_marked {
                checked.says("a merge is emptying it");
                assert_eq!(
                    folder.call(&["check", "--json", name]).json()["emptying-into"],
                    folder.arg("base"),
                    "{call}"
                );
                assert_eq!(
                    folder.qmerge(&["info", "--json", name]).json()["emptying-into"],
                    folder.arg("base"),
                    "{call}"
                );
            }
            seen += u32::from(is_emptying);
        }
    }
    assert!(seen > 1, "{seen}");
}
