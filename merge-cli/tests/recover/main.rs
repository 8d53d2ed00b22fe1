//! `qmerge live recover`, and the merge of a stopped machine beside a running one, on a real qemu-storage-daemon
//! that is killed in the middle of its merges.
//!
//! Without QEMU every test says `SKIPPED` on standard error and passes, except where `CI` is set.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod above;
mod kinds;
mod lab;
mod pivot;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use lab::{Lab, When, run, text, tools_are_here};
use serde_json::json;

/// Writes into an image, as somebody who starts a virtual machine on it.
fn write(lab: &Lab, image: &str, command: &str) {
    // Far enough from the last write for the clock of files.
    thread::sleep(Duration::from_millis(50));
    run("qemu-io", lab.dir(), &["-f", "qcow2", "-c", command, image]);
}

#[test]
fn a_merge_that_was_copying_is_as_if_it_had_not_been() {
    if !tools_are_here() {
        return;
    }
    for (top, next) in [("[3]", "finish"), ("[4]", "pivot")] {
        let lab = Lab::new();
        let how = if next == "pivot" { ["--active"].as_slice() } else { &["--top", top] };
        let begin = ["live", "commit", "disk0", "--async", "--bandwidth", "64K", "--qmp", "qmp.sock"];
        lab.ok(&[&begin, how].concat());
        let found = lab.recover(0);
        assert_eq!(found["outcome"], "running");
        let expected = format!("qmerge live {next} disk0 --qmp {}", lab.path("qmp.sock"));
        assert_eq!(found["next"], expected.as_str());
        assert!(lab.state_file().exists());
        lab.kill();
        // A dry run says the same, and leaves the state where it is.
        let dry = lab.ok(&["live", "recover", "--dry-run"]);
        assert!(dry.contains("to do: remove the state file"), "{dry}");
        let found = lab.recover(0);
        assert_eq!((&found["outcome"], &found["phase"]), (&json!("not-switched"), &json!("copying")));
        assert_eq!(found["valid-top"], lab.path("4.img").as_str());
        lab.nothing_is_left();
        lab.shows("4.img");
        lab.type_in(found["next"].as_str().unwrap());
        lab.shows("4.img");
    }
}

#[test]
fn a_merge_that_died_before_the_switch_goes_on_with_the_chain_of_before() {
    if !tools_are_here() {
        return;
    }
    let lab = Lab::new();
    lab.dies("[3]", "job-finalize", When::Before);
    let found = lab.recover(0);
    assert_eq!((&found["outcome"], &found["phase"]), (&json!("not-switched"), &json!("switching")));
    lab.nothing_is_left();
    lab.shows("4.img");
    lab.type_in(found["next"].as_str().unwrap());
    lab.shows("4.img");
}

#[test]
fn a_merge_that_died_behind_the_switch_is_completed() {
    if !tools_are_here() {
        return;
    }
    let lab = Lab::new();
    lab.dies("[3]", "job-finalize", When::After);
    let dry = lab.ok(&["live", "recover", "4.img", "--dry-run"]);
    assert!(
        dry.contains("to do: make ") && dry.contains("empty overlays on") && lab.state_file().exists(),
        "{dry}"
    );
    let found = lab.recover(0);
    assert_eq!((&found["outcome"], &found["valid-top"]), (&json!("completed"), &json!(lab.path("4.img"))));
    lab.nothing_is_left();
    lab.shows("4.img");
    for image in ["3.img", "2.img"] {
        let info = lab.ok(&["info", image]);
        assert!(info.contains("merged into"), "{image}: {info}");
        lab.shows_nothing_of_its_own(image);
    }
    let info = run("qemu-img", lab.dir(), &["info", "4.img"]);
    assert!(info.contains("backing file: 1.img"), "{info}");
}

/// The kill comes when the overlay's header is written, and QEMU waits until it is durable.
#[test]
fn a_merge_that_died_inside_the_switch_is_completed() {
    if !tools_are_here() {
        return;
    }
    if Command::new("strace").arg("-V").stdout(Stdio::null()).status().is_err() {
        kit::not_tried("strace is not installed, so no daemon was killed inside its switch");
        return;
    }
    let lab = Lab::traced(&[
        "strace",
        "-f",
        "-o",
        "trace",
        "-P",
        "4.img",
        "-e",
        "trace=fdatasync",
        "-e",
        "inject=fdatasync:signal=SIGKILL:when=1",
    ]);
    let output = lab.qmerge(&["live", "commit", "disk0", "--top", "[3]", "--qmp", "qmp.sock"]);
    if output.status.success() {
        kit::not_tried("strace killed nothing, so no daemon was killed inside its switch");
        return;
    }
    lab.wait();
    let found = lab.recover(0);
    assert!(found["outcome"] == "completed" || found["outcome"] == "not-switched", "{found:#}");
    lab.nothing_is_left();
    lab.shows("4.img");
}

#[test]
fn an_overlay_on_a_base_that_lost_its_data_gets_the_old_chain_back() {
    if !tools_are_here() {
        return;
    }
    let lab = Lab::new();
    let before = fs::read(lab.dir().join("1.img")).unwrap();
    lab.dies("[3]", "job-finalize", When::After);
    // The same file, with the bytes that were durable: what a power cut in an unsynced merge leaves.
    fs::write(lab.dir().join("1.img"), &before).unwrap();
    let found = lab.recover(0);
    assert_eq!(found["outcome"], "pointed-back", "{found:#}");
    assert!(fs::read(lab.dir().join("1.img")).unwrap() == before, "base was written");
    lab.nothing_is_left();
    lab.shows("4.img");
    let info = run("qemu-img", lab.dir(), &["info", "4.img"]);
    assert!(info.contains("backing file: 3.img"), "{info}");
    lab.type_in(found["next"].as_str().unwrap());
    lab.shows("4.img");
}

#[test]
fn a_merged_layer_that_somebody_wrote_to_leaves_the_question_open() {
    if !tools_are_here() {
        return;
    }
    let lab = Lab::new();
    lab.dies("[3]", "job-finalize", When::After);
    write(&lab, "2.img", "write -q -P 9 8M 64k");
    let before = lab.contents();
    let found = lab.recover(6);
    assert_eq!((&found["outcome"], &found["valid-top"]), (&json!("unclear"), &json!(null)));
    assert!(found["error"]["message"].as_str().unwrap().contains("2.img was merged"), "{found:#}");
    assert!(lab.contents() == before && lab.state_file().exists());
}

#[test]
fn an_active_merge_that_died_behind_the_pivot_leaves_an_empty_overlay() {
    if !tools_are_here() {
        return;
    }
    let lab = Lab::new();
    lab.dies("[4]", "job-finalize", When::After);
    let found = lab.recover(0);
    assert_eq!((&found["outcome"], &found["valid-top"]), (&json!("completed"), &json!(lab.path("1.img"))));
    lab.nothing_is_left();
    lab.shows("1.img");
    lab.shows("4.img");
    let info = lab.ok(&["info", "--chain", "4.img", "--json"]);
    let chain: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(chain.as_array().unwrap().len(), 2, "{chain:#}");
    assert_eq!(chain[0]["visible-data"], 0, "{chain:#}");
}

/// The guest went on with base: the old active image is stale, and must not stay a trap.
#[test]
fn an_old_active_image_beside_a_base_in_use_becomes_that_base() {
    if !tools_are_here() {
        return;
    }
    let lab = Lab::new();
    lab.dies("[4]", "job-finalize", When::After);
    write(&lab, "1.img", "write -q -P 7 9M 1M");
    run("qemu-img", lab.dir(), &["convert", "-O", "raw", "1.img", "ref.raw"]);
    lab.start(&[], "1.img");
    let found = lab.recover(0);
    assert_eq!((&found["outcome"], &found["valid-top"]), (&json!("completed"), &json!(lab.path("1.img"))));
    lab.kill();
    lab.nothing_is_left();
    lab.shows("4.img");
}

#[test]
fn two_disks_that_both_went_on_are_left_to_the_user() {
    if !tools_are_here() {
        return;
    }
    let lab = Lab::new();
    lab.dies("[4]", "job-finalize", When::After);
    write(&lab, "1.img", "write -q -P 7 9M 1M");
    write(&lab, "4.img", "write -q -P 8 10M 1M");
    let before = lab.contents();
    let found = lab.recover(6);
    assert_eq!((&found["outcome"], &found["valid-top"]), (&json!("unclear"), &json!(null)));
    let message = found["error"]["message"].as_str().unwrap();
    assert!(message.contains("Either") && message.contains("; or "), "{message}");
    assert!(lab.contents() == before && lab.state_file().exists());
}

/// Base and the old active image were equal, and only the latter was written since: the pivot never came.
#[test]
fn a_guest_that_stayed_on_the_active_image_keeps_it() {
    if !tools_are_here() {
        return;
    }
    let lab = Lab::new();
    lab.dies("[4]", "job-finalize", When::Before);
    write(&lab, "4.img", "write -q -P 8 10M 1M");
    run("qemu-img", lab.dir(), &["convert", "-O", "raw", "4.img", "ref.raw"]);
    let found = lab.recover(0);
    assert_eq!((&found["outcome"], &found["valid-top"]), (&json!("not-switched"), &json!(lab.path("4.img"))));
    lab.nothing_is_left();
    lab.shows("4.img");
    lab.type_in(found["next"].as_str().unwrap());
    lab.shows("4.img");
}

#[test]
fn images_in_use_are_named_with_their_holder() {
    if !tools_are_here() {
        return;
    }
    let lab = Lab::new();
    lab.dies("[3]", "job-finalize", When::After);
    fs::remove_file(lab.dir().join("qmp.sock")).unwrap();
    // Another daemon, whose monitor is not that of the merge.
    let export = "type=vhost-user-blk,id=d,node-name=n,writable=on,addr.type=unix,addr.path=other.sock";
    let mut other = Command::new("qemu-storage-daemon")
        .args([
            "--blockdev",
            "driver=qcow2,node-name=n,file.driver=file,file.filename=4.img",
            "--export",
            export,
        ])
        .current_dir(lab.dir())
        .spawn()
        .unwrap();
    while !lab.dir().join("other.sock").exists() {
        thread::sleep(Duration::from_millis(20));
    }
    let found = lab.recover(5);
    let message = found["error"]["message"].as_str().unwrap().to_owned();
    other.kill().unwrap();
    other.wait().unwrap();
    assert!(message.contains(&format!("process {}", other.id())), "{message}");
    assert!(lab.state_file().exists());
    assert_eq!(lab.recover(0)["outcome"], "completed");
    lab.shows("4.img");
}

#[test]
fn a_state_of_other_images_changes_nothing() {
    if !tools_are_here() {
        return;
    }
    let lab = Lab::new();
    lab.dies("[4]", "job-finalize", When::After);
    // As if a whole folder had been copied back from a backup.
    for image in ["1.img", "4.img"] {
        let bytes = fs::read(lab.dir().join(image)).unwrap();
        fs::rename(lab.dir().join(image), lab.dir().join(format!("{image}.old"))).unwrap();
        fs::write(lab.dir().join(image), bytes).unwrap();
    }
    let before = lab.contents();
    let found = lab.recover(6);
    assert_eq!(found["outcome"], "unclear", "{found:#}");
    for image in ["1.img", "4.img"] {
        fs::remove_file(lab.dir().join(image)).unwrap();
    }
    assert_eq!(lab.recover(6)["outcome"], "unclear");
    for image in ["1.img", "4.img"] {
        fs::rename(lab.dir().join(format!("{image}.old")), lab.dir().join(image)).unwrap();
    }
    assert!(lab.contents() == before);
    assert_eq!(lab.recover(0)["outcome"], "completed");
    lab.shows("4.img");
}

#[test]
fn a_damaged_state_file_is_named_and_blocks_the_merge() {
    if !tools_are_here() {
        return;
    }
    let lab = Lab::new();
    lab.dies("[3]", "job-finalize", When::Before);
    let whole = fs::read(lab.state_file()).unwrap();
    for damaged in [&whole[..whole.len() / 2], b"", b"{}"] {
        fs::write(lab.state_file(), damaged).unwrap();
        for args in [["live", "recover"].as_slice(), &["commit", "4.img"], &["commit", "4.img", "--dry-run"]]
        {
            let output = lab.qmerge(args);
            let err = text(&output.stderr);
            assert_eq!(output.status.code(), Some(9), "{err}");
            assert!(
                err.contains(".4.img.qmerge-live") && err.lines().last().unwrap().contains("rm "),
                "{err}"
            );
        }
        let info = lab.ok(&["info", "4.img"]);
        assert!(info.contains("cannot be read"), "{info}");
    }
    // The way out that is printed.
    let err = text(&lab.qmerge(&["live", "recover"]).stderr);
    let hint = err.lines().last().unwrap();
    lab.type_in(&hint[hint.find("rm ").unwrap()..]);
    assert!(lab.ok(&["live", "recover", "4.img"]).starts_with("nothing to recover: "));
}

#[test]
fn a_stopped_merge_waits_until_an_interrupted_live_one_is_looked_at() {
    if !tools_are_here() {
        return;
    }
    let lab = Lab::new();
    lab.dies("[3]", "job-finalize", When::After);
    for image in ["4.img", "2.img"] {
        let output = lab.qmerge(&["commit", image]);
        let err = text(&output.stderr);
        assert_eq!(output.status.code(), Some(6), "{err}");
        assert!(err.contains("was interrupted"), "{err}");
    }
    let info = lab.ok(&["info", "4.img"]);
    assert!(info.contains("live merge:") && info.contains("qmerge live recover 4.img"), "{info}");
    let info: serde_json::Value = serde_json::from_str(&lab.ok(&["info", "4.img", "--json"])).unwrap();
    assert_eq!(info["live-merge"]["phase"], "switching", "{info:#}");
    let err = text(&lab.qmerge(&["commit", "4.img"]).stderr);
    lab.type_in(err.lines().last().unwrap().strip_prefix("hint: ").unwrap());
    lab.ok(&["commit", "4.img"]);
    lab.shows("4.img");
}

#[test]
fn an_image_that_a_qemu_holds_is_merged_by_the_command_that_is_printed() {
    if !tools_are_here() {
        return;
    }
    for (args, active, shown) in [
        (vec!["commit", "4.img", "--base", "1.img", "--top", "3.img", "--delete"], "4.img", "4.img"),
        (vec!["commit", "4.img", "--top", "[3]", "--shallow"], "4.img", "4.img"),
        (vec!["commit", "4.img", "--base", "2.img"], "2.img", "2.img"),
        (vec!["commit", "4.img", "--keep-active"], "4.img", "1.img"),
        (vec!["commit", "3.img"], "4.img", "4.img"),
    ] {
        let lab = Lab::new();
        let output = lab.qmerge(&args);
        let err = text(&output.stderr);
        assert_eq!(output.status.code(), Some(5), "{args:?}: {err}");
        let hint = err.lines().find_map(|line| line.strip_prefix("hint: merge it as it runs: ")).unwrap();
        lab.type_in(hint);
        let list: serde_json::Value =
            serde_json::from_str(&lab.ok(&["live", "list", "--json", "--qmp", "qmp.sock"])).unwrap();
        assert_eq!(list[0]["file"], lab.path(active).as_str(), "{args:?}");
        assert_eq!(args.contains(&"--delete"), !Path::new(&lab.path("3.img")).exists(), "{args:?}");
        lab.kill();
        lab.shows(shown);
    }
}
