//! Unfinished work goes on only where nobody else wrote: a base that is put back at once, whenever the merge was stopped. The table
//! of what may become of a base is in `fates.rs`.

use std::fs;

use kit::{Lab, are_here};

use crate::support::lab;

const MIB: u64 = 1 << 20;

/// A small chain whose base holds little, and a copy of it in `backup`.
fn sparse(options: &str) -> Lab {
    let folder = lab("unfinished");
    folder.create("base", 16 * MIB, options);
    folder.io("qcow2", "base", &["write -q -P 1 0 1M"]);
    folder.overlay("top", "base", "qcow2", None, "");
    folder.io("qcow2", "top", &["write -q -P 2 4M 8M"]);
    folder.sh("mkdir backup; cp -a base* top backup");
    folder
}

/// Makes the chain again as it was, and stops the merge at its sync number `call`; false if it was over before.
fn stop_at(folder: &Lab, call: u32) -> bool {
    folder.sh("rm -f base* top .base.* .top.*; cp -a backup/* .");
    folder.signalled_at_sync("SIGKILL", call, &["commit", "top", "-q"]).code != 0
}

/// How base is put back at once, so that its times are within the second after the kill, or with older times, in place
/// or under the name.
const PUT_BACK: [&str; 3] = [
    "cd backup; for file in base*; do cp $file ../$file; done",
    "cd backup; for file in base*; do cp -p $file ../$file; done",
    "cd backup; for file in base*; do cp -p $file ../new; mv ../new ../$file; done",
];

/// Whenever the merge is stopped and base, or only its data file, is put back at once: what the guest saw then stays, or
/// the merge is refused. Nothing counts as done that is not there, and what was emptied is not said to hold everything.
#[test]
fn a_base_that_is_put_back_at_once_costs_no_data() {
    if !are_here(&["qemu-img", "qemu-io", "strace"]) {
        return;
    }
    let only_data = "cp backup/base.data base.data";
    for (options, how) in [
        ("data_file=base.data", only_data),
        ("data_file=base.data", PUT_BACK[2]),
        ("compat=0.10", PUT_BACK[0]),
        ("compat=1.1", PUT_BACK[1]),
    ] {
        let folder = sparse(options);
        let before = folder.view("qcow2", "top");
        let (mut stopped, mut refused) = (0, 0);
        for call in (4..40).step_by(3) {
            if !stop_at(&folder, call) {
                break;
            }
            stopped += 1;
            folder.sh(how);
            let what = format!("{options}, sync {call}: {how}");
            let lost = folder.view("qcow2", "top").first_difference(&before, 0, before.len()).is_some();
            let pending = folder.qmerge(&["info", "--json", "base"]).ok().json();
            let run = folder.qmerge(&["commit", "top", "-q"]);
            if run.code != 0 {
                assert_eq!(run.code, 6, "{what}: {run}");
                refused += 1;
            } else if !lost {
                folder.view("qcow2", "top").assert_same(&before, &what);
            } else {
                assert!(pending["merge-pending"].is_null(), "{what}: {run}");
            }
        }
        assert!(stopped > 3 && refused > 0, "{options}: {stopped} {refused}");
    }
}

/// A base of version 2 that is put back at once is not given what the journal holds for another.
#[test]
fn giving_up_leaves_a_base_that_was_put_back_at_once_as_it_is() {
    if !are_here(&["qemu-img", "qemu-io", "strace"]) {
        return;
    }
    let folder = sparse("compat=0.10");
    for call in 3..10 {
        assert!(stop_at(&folder, call));
        folder.sh(PUT_BACK[0]);
        let run = folder.qmerge(&["abort", "base"]);
        assert!([0, 6].contains(&run.code), "sync {call}: {run}");
        folder.sh("qemu-img check -q base; qemu-img compare -q base backup/base");
    }
}

/// Names of every length that file systems take, with characters of one and of several bytes.
#[test]
fn images_of_long_names_are_merged() {
    if !are_here(&["qemu-img", "qemu-io"]) {
        return;
    }
    for len in [200, 230, 235, 236, 237, 238, 239, 240, 241, 254, 255] {
        for letter in ["c", "\u{e4}", "\u{4e2d}"] {
            let folder = lab("names");
            let name = format!("{}{}", letter.repeat(len / letter.len()), "x".repeat(len % letter.len()));
            folder.create("base", MIB, "");
            folder.overlay(&name, "base", "qcow2", None, "");
            folder.io("qcow2", &name, &["write -q -P 7 0 64k"]);
            folder.qmerge(&["commit", &name, "-q"]).ok();
            assert_eq!(folder.names().len(), 2, "{:?}", folder.names());
        }
    }
}

/// Base is renamed while a merge is stopped, and another base takes its name: the journal is the renamed one's.
#[test]
fn a_second_base_does_not_take_the_journal_of_a_renamed_one() {
    if !are_here(&["qemu-img", "qemu-io", "strace"]) {
        return;
    }
    let folder = lab("second-base");
    folder.create("base", 8 << 20, "");
    folder.overlay("top", "base", "qcow2", None, "");
    folder.io("qcow2", "top", &["write -P 7 0 4M"]);
    let gold = folder.view("qcow2", "top");
    let journal = folder.join(".base.qmerge-journal");
    let mut call = 4;
    while !journal.exists() {
        assert!(folder.killed_at_sync(call, &["commit", "top"]), "the merge was over");
        call += 1;
    }
    fs::rename(folder.join("base"), folder.join("old")).unwrap();
    folder.create("base", 8 << 20, "");
    folder.overlay("second", "base", "qcow2", None, "");
    folder.io("qcow2", "second", &["write -P 8 0 1M"]);
    let second = folder.view("qcow2", "second");
    folder.img(&["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "old", "top"]);
    for args in [&["commit", "second"][..], &["abort", "base"]] {
        let run = folder.refused(args, &[6]).says("old, which had this name");
        assert!(
            run.text().contains("mv -n .base.qmerge-journal .old.qmerge-journal")
                || run.text().contains("/.old.qmerge-journal"),
            "{run}"
        );
    }
    // As the hint says.
    fs::rename(&journal, folder.join(".old.qmerge-journal")).unwrap();
    folder.qmerge(&["commit", "second"]).ok();
    folder.view("qcow2", "second").assert_same(&second, "the second disk");
    folder.qmerge(&["commit", "top"]).ok();
    folder.view("qcow2", "top").assert_same(&gold, "the first disk");
    folder.all_clean();
}
