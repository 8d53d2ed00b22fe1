//! Unfinished work goes on only where nobody else wrote: each kind of base, killed, and what may become of it until the same
//! command is typed again. TESTING.md has the table.

use std::process::Command;
use std::time::Duration;

use crate::support::{Folder, needs_tools};

const MIB: u64 = 1 << 20;

/// What becomes of a base behind a stopped merge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Untouched,
    /// QEMU writes to it.
    Newer,
    /// It is put back from a backup, in place and with its times.
    Older,
    /// The same from a backup that has another inode.
    Replaced,
    /// Other bytes, and its time of modification set back.
    OtherBytes,
    /// The folder is copied, and the command typed there.
    Copied,
    /// The folder is renamed.
    Moved,
    /// The folder is copied without the journal.
    CopiedWithoutJournal,
}

const FATES: [Fate; 8] = [
    Fate::Untouched,
    Fate::Newer,
    Fate::Older,
    Fate::Replaced,
    Fate::OtherBytes,
    Fate::Copied,
    Fate::Moved,
    Fate::CopiedWithoutJournal,
];

/// A base, and how its format is called.
const BASES: [(&str, &str); 3] = [("raw", ""), ("qcow2", "compat=0.10"), ("qcow2", "")];

fn sh(folder: &Folder, script: &str) {
    let status = Command::new("sh").arg("-ec").arg(script).current_dir(folder.path()).status().unwrap();
    assert!(status.success(), "{script}");
}

fn done(folder: &Folder, format: &str) -> u64 {
    let info = folder.qmerge(&["info", "--json", "-f", format, "vm/base"]).ok().json();
    info["merge-pending"]["bytes-done"].as_u64().unwrap_or(0)
}

/// A chain in the folder `vm`, and a backup of base, with a merge that was stopped when it had noted something.
fn stopped(format: &str, options: &str) -> Folder {
    let folder = Folder::new("unfinished");
    sh(&folder, "mkdir vm");
    match format {
        "raw" => folder.raw("vm/base", 16 * MIB, 16 * MIB, 1),
        _ => {
            let options = if options.is_empty() { "compat=1.1" } else { options };
            sh(&folder, &format!("cd vm; qemu-img create -q -f qcow2 -o {options} base 16M"));
            folder.io("qcow2", "vm/base", &["write -q -P 1 0 16M"]);
        }
    }
    sh(&folder, &format!("cd vm; qemu-img create -q -f qcow2 -b base -F {format} top"));
    folder.io("qcow2", "vm/top", &["write -q -P 2 4M 8M"]);
    sh(&folder, "sleep 0.02; cp -a vm backup; mkdir keep; cp -a vm/top keep");
    for call in 3..40 {
        let run = folder.signalled_at_sync("SIGKILL", call, &["commit", "vm/top", "-q"]);
        if run.code != 0 && done(&folder, format) > 0 {
            return folder;
        }
        assert_ne!(run.code, 0, "the merge was over before its sync {call}");
    }
    panic!("no merge could be stopped in the middle");
}

/// Lets it happen; returns the folder in which the command is typed.
fn happen(folder: &Folder, format: &str, fate: Fate) -> &'static str {
    match fate {
        Fate::Untouched => "vm",
        Fate::Newer => {
            std::thread::sleep(Duration::from_millis(1300));
            folder.io(format, "vm/base", &["write -q -P 9 6M 64k"]);
            "vm"
        }
        Fate::Older => {
            sh(folder, "cd backup; for file in *; do [ $file = top ] || cp -p $file ../vm/$file; done");
            "vm"
        }
        Fate::Replaced => {
            sh(
                folder,
                "cd backup; for file in *; do [ $file = top ] || { cp -p $file ../vm/new; mv ../vm/new ../vm/$file; }; done",
            );
            "vm"
        }
        Fate::OtherBytes => {
            sh(
                folder,
                "cd vm; cp -p base then; head -c 16M /dev/zero | tr '\\0' '\\7' | dd of=base bs=1M seek=1 count=14 iflag=fullblock conv=notrunc status=none; touch -r then base; rm then",
            );
            "vm"
        }
        Fate::Copied => {
            sh(folder, "cp -a vm copy");
            "copy"
        }
        Fate::Moved => {
            sh(folder, "mv vm moved");
            "moved"
        }
        Fate::CopiedWithoutJournal => {
            sh(folder, "cp -a vm copy; rm -f copy/.*.qmerge-*");
            "copy"
        }
    }
}

/// The exit codes that are right. Where a code is not zero, nothing was written.
fn right(format: &str, options: &str, fate: Fate) -> &'static [i32] {
    let has_dirty_bit = format == "qcow2" && options != "compat=0.10";
    match fate {
        Fate::Untouched | Fate::Older | Fate::Replaced | Fate::Copied | Fate::Moved => &[0],
        Fate::Newer => &[6],
        // A damaged base is refused as such.
        Fate::OtherBytes => &[0, 6, 9],
        Fate::CopiedWithoutJournal if has_dirty_bit => &[9],
        Fate::CopiedWithoutJournal => &[0],
    }
}

fn row(format: &str, options: &str, fate: Fate) {
    let what = format!("{format} {options}, {fate:?}");
    let folder = stopped(format, options);
    let before = folder.view("qcow2", "vm/top");
    let at = happen(&folder, format, fate);
    if fate != Fate::OtherBytes {
        folder.view("qcow2", &format!("{at}/top")).assert_same(&before, &format!("{what}: before"));
    }
    let run = folder.qmerge(&["commit", &format!("{at}/top"), "-q"]);
    assert!(right(format, options, fate).contains(&run.code), "{what}: {run}");
    if fate == Fate::OtherBytes {
        return;
    }
    folder.view("qcow2", &format!("{at}/top")).assert_same(&before, &what);
    if run.code == 0 {
        folder.view(format, &format!("{at}/base")).assert_same(&before, &format!("{what}: base"));
    }
    if fate == Fate::Newer {
        folder.io(format, "vm/base", &["read -P 9 6M 64k"]);
        folder.qmerge(&["commit", "vm/top", "--restart", "-q"]).ok();
        folder.view("qcow2", "vm/top").assert_same(&before, &format!("{what}: begun again"));
    }
    let journals = std::fs::read_dir(folder.join(at)).unwrap().flatten();
    let left = journals.filter(|e| e.file_name().to_string_lossy().contains("qmerge")).count();
    assert!(run.code != 0 && fate != Fate::Newer || left == 0, "{what}: journals are left");
}

fn table(base: (&str, &str)) {
    if !needs_tools(&["qemu-img", "qemu-io", "strace"]) {
        return;
    }
    for fate in FATES {
        row(base.0, base.1, fate);
    }
}

#[test]
fn a_raw_base() {
    table(BASES[0]);
}

#[test]
fn a_base_of_version_2() {
    table(BASES[1]);
}

#[test]
fn a_base_of_version_3() {
    table(BASES[2]);
}

/// A small chain whose base holds little, and a copy of it in `backup`.
fn sparse(options: &str) -> Folder {
    let folder = Folder::new("unfinished");
    folder.create("base", 16 * MIB, options);
    folder.io("qcow2", "base", &["write -q -P 1 0 1M"]);
    folder.overlay("top", "base", "qcow2", None, "");
    folder.io("qcow2", "top", &["write -q -P 2 4M 8M"]);
    sh(&folder, "mkdir backup; cp -a base* top backup");
    folder
}

/// Makes the chain again as it was, and stops the merge at its sync number `call`; false if it was over before.
fn stop_at(folder: &Folder, call: u32) -> bool {
    sh(folder, "rm -f base* top .base.* .top.*; cp -a backup/* .");
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
    if !needs_tools(&["qemu-img", "qemu-io", "strace"]) {
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
            sh(&folder, how);
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
    if !needs_tools(&["qemu-img", "qemu-io", "strace"]) {
        return;
    }
    let folder = sparse("compat=0.10");
    for call in 3..10 {
        assert!(stop_at(&folder, call));
        sh(&folder, PUT_BACK[0]);
        let run = folder.qmerge(&["abort", "base"]);
        assert!([0, 6].contains(&run.code), "sync {call}: {run}");
        sh(&folder, "qemu-img check -q base; qemu-img compare -q base backup/base");
    }
}

/// Names of every length that file systems take, with characters of one and of several bytes.
#[test]
fn images_of_long_names_are_merged() {
    if !needs_tools(&["qemu-img", "qemu-io"]) {
        return;
    }
    for len in [200, 230, 235, 236, 237, 238, 239, 240, 241, 254, 255] {
        for letter in ["c", "\u{e4}", "\u{4e2d}"] {
            let folder = Folder::new("names");
            let name = format!("{}{}", letter.repeat(len / letter.len()), "x".repeat(len % letter.len()));
            folder.create("base", MIB, "");
            folder.overlay(&name, "base", "qcow2", None, "");
            folder.io("qcow2", &name, &["write -q -P 7 0 64k"]);
            folder.qmerge(&["commit", &name, "-q"]).ok();
            assert_eq!(folder.names().len(), 2, "{:?}", folder.names());
        }
    }
}
