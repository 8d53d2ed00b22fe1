//! Merges that are killed: the same command goes on where it was, and never over what others wrote meanwhile.

use std::process::{Command, Stdio};

use serde_json::Value;

use kit::{Lab, Run, are_here, qemu_is_here};

use crate::support::{binary, lab};

const MIB: u64 = 1 << 20;

fn tools_are_here() -> bool {
    are_here(&["qemu-img", "qemu-io", "strace"])
}

/// A base that has something of everything below an overlay with much to move.
fn chain(format: &str, options: &str) -> Lab {
    let folder = lab("resume");
    match format {
        "raw" => folder.raw("base", 600 * MIB, 100 * MIB, 1),
        _ => {
            folder.create("base", 600 * MIB, options);
            folder.io("qcow2", "base", &["write -P 1 0 100M"]);
        }
    }
    folder.overlay("a.qcow2", "base", format, None, "");
    folder.io("qcow2", "a.qcow2", &["write -P 2 10M 400M", "write -z 430M 20M"]);
    folder.overlay("b.qcow2", "a.qcow2", "qcow2", None, "");
    folder.io("qcow2", "b.qcow2", &["write -P 3 50M 30M", "write -P 4 500M 64M"]);
    folder
}

fn pending(folder: &Lab, format: &str) -> Option<Value> {
    let info = folder.qmerge(&["info", "--json", "-f", format, "base"]).ok().json();
    info.get("merge-pending").cloned()
}

/// Sends a merge a signal at its first sync behind which it has noted some progress.
fn stopped(folder: &Lab, format: &str, args: &[&str], signal: &str) -> Run {
    for call in 2..100 {
        let run = folder.signalled_at_sync(signal, call, &[&["commit", "b.qcow2", "--json"], args].concat());
        let done = pending(folder, format).and_then(|pending| pending["bytes-done"].as_u64());
        if done.is_some_and(|done| done > 0) {
            return run;
        }
        assert_ne!(run.code, 0, "the merge was over before its sync {call}");
    }
    panic!("no merge could be stopped in the middle");
}

/// The plan event of a merge that is run to its end.
fn plan_of(run: &Run) -> Value {
    run.json_lines().into_iter().find(|event| event["event"] == "plan").unwrap()
}

#[test]
fn a_killed_merge_goes_on_where_it_was() {
    if !tools_are_here() {
        return;
    }
    for options in ["lazy_refcounts=on", "cluster_size=4k", "data_file=data,data_file_raw=off"] {
        let folder = chain("qcow2", options);
        stopped(&folder, "qcow2", &[], "SIGKILL");
        let before = folder.view("qcow2", "b.qcow2");
        let noted = pending(&folder, "qcow2").unwrap();
        let done = noted["bytes-done"].as_u64().unwrap();
        assert!(done > 0 && noted["percent"].as_u64().unwrap() < 100, "{noted}");
        folder.qmerge(&["info", "base"]).ok().says("merge pending");
        folder.qmerge(&["info", "--chain", "b.qcow2"]).ok().says("merge pending");
        let check = folder.try_img(&["check", "-f", "qcow2", "base"]);
        assert!(check.code == 0 || check.code == 3, "{check}");
        let files = folder.files();
        let dry = folder.qmerge(&["commit", "b.qcow2", "--dry-run"]).ok().says("are done already");
        folder.assert_unchanged(&files, &dry);
        let again = folder.qmerge(&["commit", "b.qcow2", "--json", "--verify"]).ok();
        let plan = plan_of(&again);
        assert_eq!(plan["resumed"]["bytes-done"], done, "{plan}");
        folder.view("qcow2", "b.qcow2").assert_same(&before, "the view when the merge is done");
        folder.view("qcow2", "base").assert_same(&before, "base when the merge is done");
        folder.all_clean();
        assert!(!folder.names().iter().any(|name| name.contains("qmerge")), "{:?}", folder.names());
        let info = folder.img(&["info", "--output=json", "base"]).json();
        let lazy = &info["format-specific"]["data"]["lazy-refcounts"];
        assert_eq!(lazy, &Value::Bool(options.contains("lazy")), "{info}");
        assert_eq!(info["dirty-flag"], false, "{info}");
    }
}

#[test]
fn bases_without_a_dirty_bit_come_to_the_same_end() {
    if !tools_are_here() {
        return;
    }
    for (format, options) in [("raw", ""), ("qcow2", "compat=0.10")] {
        let folder = chain(format, options);
        stopped(&folder, format, &[], "SIGKILL");
        let before = folder.view("qcow2", "b.qcow2");
        stopped(&folder, format, &["--top", "b.qcow2"], "SIGTERM");
        folder.view("qcow2", "b.qcow2").assert_same(&before, "the view between");
        let again = folder.qmerge(&["commit", "b.qcow2", "--json"]).ok();
        let plan = plan_of(&again);
        assert!(plan["resumed"]["bytes-done"].as_u64().unwrap() > 0, "stopped in good order: {plan}");
        folder.view(format, "base").assert_same(&before, "base when the merge is done");
        folder.all_clean();
    }
}

#[test]
fn ctrl_c_says_how_much_is_kept() {
    if !tools_are_here() {
        return;
    }
    let folder = chain("qcow2", "");
    let run = stopped(&folder, "qcow2", &[], "SIGINT").expect(130).says("are done for good");
    assert!(run.last_line().contains("qmerge commit") || run.stdout.contains("\"hint\""), "{run}");
    folder.merge("b.qcow2", &[]);
}

#[test]
fn a_base_that_was_written_by_others_meanwhile_is_not_touched() {
    if !tools_are_here() {
        return;
    }
    let folder = chain("qcow2", "lazy_refcounts=on");
    stopped(&folder, "qcow2", &[], "SIGKILL");
    // QEMU repairs base and clears its dirty bit; what it writes then must stay.
    folder.io("qcow2", "base", &["write -P 77 590M 1M"]);
    let view = folder.view("qcow2", "b.qcow2");
    folder.refused(&["commit", "b.qcow2"], &[6]).says("somebody has opened it").says("--restart");
    folder.refused(&["commit", "b.qcow2", "--dry-run"], &[6]);
    folder.qmerge(&["commit", "b.qcow2", "--restart"]).ok();
    folder.view("qcow2", "b.qcow2").assert_same(&view, "the view when begun again");
    folder.io("qcow2", "base", &["read -P 77 590M 1M"]);
    folder.all_clean();
    // Opening alone is enough to be noticed; giving up then only removes the journal.
    let folder = chain("qcow2", "");
    stopped(&folder, "qcow2", &[], "SIGKILL");
    folder.io("qcow2", "base", &["write -P 1 0 512"]);
    let before = folder.view("qcow2", "base");
    folder.qmerge(&["abort", "base"]).ok().says("only the merge's journal was removed");
    folder.view("qcow2", "base").assert_same(&before, "base");
    folder.merge("b.qcow2", &[]);
}

#[test]
fn a_guest_that_ran_in_between_loses_nothing() {
    if !tools_are_here() {
        return;
    }
    let folder = chain("qcow2", "");
    stopped(&folder, "qcow2", &[], "SIGKILL");
    // It runs on the overlays; QEMU opens base for reading only, and leaves its dirty bit.
    folder.io("qcow2", "b.qcow2", &["write -P 9 0 64k", "write -P 9 20M 1M", "write -z 100M 1M"]);
    let before = folder.view("qcow2", "b.qcow2");
    let again = folder.qmerge(&["commit", "b.qcow2", "--json"]).ok();
    assert!(plan_of(&again)["resumed"].is_null(), "a layer has changed: {again}");
    folder.view("qcow2", "base").assert_same(&before, "base");
    folder.all_clean();
}

#[test]
fn a_merge_that_is_given_up_leaves_base_consistent() {
    if !tools_are_here() {
        return;
    }
    for (format, options) in [("qcow2", "lazy_refcounts=on"), ("qcow2", "compat=0.10"), ("raw", "")] {
        let folder = chain(format, options);
        stopped(&folder, format, &[], "SIGKILL");
        let before = folder.view("qcow2", "b.qcow2");
        let abort = folder.qmerge(&["abort", "-f", format, "base"]).ok();
        abort.says("gave up the merge").says("a.qcow2").says("restore points no more");
        folder.view("qcow2", "b.qcow2").assert_same(&before, "the view when given up");
        folder.all_clean();
        assert_eq!(pending(&folder, format), None);
        folder.qmerge(&["abort", "-f", format, "base"]).ok().says("no merge");
        if options.contains("lazy") {
            let info = folder.img(&["info", "--output=json", "base"]).json();
            assert_eq!(info["format-specific"]["data"]["lazy-refcounts"], true, "{info}");
            assert_eq!(info["dirty-flag"], false, "{info}");
        }
        folder.merge("b.qcow2", &[]);
    }
}

#[test]
fn a_dirty_base_without_our_journal_is_refused() {
    if !tools_are_here() {
        return;
    }
    let folder = chain("qcow2", "");
    stopped(&folder, "qcow2", &[], "SIGKILL");
    std::fs::remove_file(folder.join(".base.qmerge-journal")).unwrap();
    folder.refused(&["commit", "b.qcow2"], &[9]).says("dirty").says("check --repair");
    folder.qmerge(&["check", "--repair", "all", "base"]);
    folder.merge("b.qcow2", &[]);
}

#[test]
fn kills_at_any_time_lose_nothing() {
    if !qemu_is_here() {
        return;
    }
    for (format, options) in [("qcow2", ""), ("qcow2", "cluster_size=512"), ("raw", "")] {
        let folder = lab("kills");
        match format {
            "raw" => folder.raw("base", 40 * MIB, 10 * MIB, 1),
            _ => folder.create("base", 40 * MIB, options),
        }
        folder.overlay("a.qcow2", "base", format, None, "cluster_size=512");
        folder.io("qcow2", "a.qcow2", &["write -P 2 1M 3M", "write -P 5 9000k 1537", "write -P 3 20M 6M"]);
        folder.overlay("b.qcow2", "a.qcow2", "qcow2", None, "");
        folder.io("qcow2", "b.qcow2", &["write -P 4 2M 4M", "write -z 22M 1M", "write -P 6 30M 700"]);
        let before = folder.view("qcow2", "b.qcow2");
        for delay in (0..60).step_by(6).chain((60..300).step_by(40)) {
            let mut child = Command::new(binary())
                .args(["commit", "b.qcow2", "-q"])
                .current_dir(folder.dir())
                .stdin(Stdio::null())
                .spawn()
                .unwrap();
            std::thread::sleep(std::time::Duration::from_millis(delay));
            let _ = child.kill();
            child.wait().unwrap();
            folder.view("qcow2", "b.qcow2").assert_same(&before, &format!("killed after {delay} ms"));
            if format == "qcow2" {
                let check = folder.try_img(&["check", "-f", "qcow2", "base"]);
                assert!(check.code == 0 || check.code == 3, "killed after {delay} ms: {check}");
            }
        }
        folder.qmerge(&["commit", "b.qcow2", "--verify"]).ok();
        folder.view("qcow2", "b.qcow2").assert_same(&before, "the view when the merge is done");
        folder.view(format, "base").assert_same(&before, "base when the merge is done");
        folder.all_clean();
        assert!(!folder.names().iter().any(|name| name.contains("qmerge")), "{:?}", folder.names());
    }
}

/// An index meant another layer before the chain was switched: going on with it would merge more than was asked for.
#[test]
fn a_merge_stopped_behind_its_switch_is_only_cleaned_up() {
    if !tools_are_here() {
        return;
    }
    let mut behind = 0;
    for top in ["[3]", "[2]", "b.qcow2"] {
        for call in 10..30 {
            let folder = lab("behind");
            folder.create("base.qcow2", 8 * MIB, "");
            for (name, below) in [("a.qcow2", "base.qcow2"), ("b.qcow2", "a.qcow2"), ("c.qcow2", "b.qcow2")] {
                folder.overlay(name, below, "qcow2", None, "");
                folder.io("qcow2", name, &["write -P 7 1M 1M"]);
            }
            if !folder.killed_at_sync(call, &["commit", "c.qcow2", "--top", top, "-q"]) {
                break;
            }
            let before = folder.view("qcow2", "c.qcow2");
            behind += u32::from(folder.chain_of("c.qcow2").len() < 4);
            folder.qmerge(&["commit", "c.qcow2", "--top", top]).ok();
            folder.view("qcow2", "c.qcow2").assert_same(&before, top);
            let left = folder.chain_of("c.qcow2").len();
            assert_eq!(left, if top == "[2]" { 3 } else { 2 }, "--top {top}, killed at sync {call}");
            folder.check_clean("base.qcow2");
            let names = folder.names();
            assert!(!names.iter().any(|name| name.ends_with("qmerge-journal")), "{names:?}");
        }
    }
    assert!(behind > 3, "only {behind} merges were killed behind the switch");
}
