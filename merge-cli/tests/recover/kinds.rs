//! Merges of other kinds than the plain one: with files to delete, upwards, with their state elsewhere.

use std::fs;

use qmp_client::{StateFile, Wishes};
use serde_json::json;

use crate::lab::{Lab, Merging, When, run, tools_are_here};

#[test]
fn what_was_to_be_deleted_is_deleted() {
    if !tools_are_here() {
        return;
    }
    for (top, valid, left) in [("[3]", "4.img", ["1.img", "4.img"].as_slice()), ("[4]", "1.img", &["1.img"])]
    {
        let lab = Lab::new();
        let file = StateFile::beside(&lab.dir().join("4.img")).unwrap();
        let mut wishes = Wishes::default();
        wishes.delete = true;
        lab.dies_as(&Merging { top: Some(top), wishes, file }, "job-finalize", When::After);
        let dry = lab.ok(&["live", "recover", "--dry-run"]);
        assert!(dry.contains("to do: remove "), "{dry}");
        assert_eq!(lab.images(), ["1.img", "2.img", "3.img", "4.img"]);
        let found = lab.recover(0);
        assert_eq!((&found["outcome"], &found["valid-top"]), (&json!("completed"), &json!(lab.path(valid))));
        lab.nothing_is_left();
        assert_eq!(lab.images(), left);
        lab.shows(valid);
    }
}

/// An image that the merge did not know of reads through a merged layer: QEMU never looks for such. It is found beside the
/// chain, and in a folder that was named to the merge.
#[test]
fn what_another_image_needs_is_not_deleted() {
    if !tools_are_here() {
        return;
    }
    for folder in [".", "elsewhere"] {
        let lab = Lab::new();
        let file = StateFile::beside(&lab.dir().join("4.img")).unwrap();
        let other = lab.dir().join(folder);
        std::fs::create_dir_all(&other).unwrap();
        let scan = if folder == "." { Vec::new() } else { vec![other.clone()] };
        let mut wishes = Wishes::default();
        (wishes.delete, wishes.scan) = (true, scan);
        lab.dies_as(&Merging { top: Some("[3]"), wishes, file }, "job-finalize", When::After);
        let used = lab.path("2.img");
        run("qemu-img", &other, &["create", "-q", "-f", "qcow2", "-b", &used, "-F", "qcow2", "other.img"]);
        let dry = lab.ok(&["live", "recover", "--dry-run"]);
        let said = lab.ok(&["live", "recover"]);
        assert_eq!(dry.replace("to do:", "done:"), said);
        assert!(said.contains("2.img stays as it is: ") && said.contains("other.img uses it"), "{said}");
        lab.nothing_is_left();
        assert_eq!(lab.images()[..3], ["1.img", "2.img", "4.img"]);
        assert!(lab.ok(&["info", "2.img"]).contains("merged into"));
        lab.shows("4.img");
    }
}

#[test]
fn a_pull_that_died_is_complete_or_as_if_it_had_not_been() {
    if !tools_are_here() {
        return;
    }
    for (when, outcome, backing) in
        [(When::Before, "not-switched", "3.img"), (When::After, "completed", "1.img")]
    {
        let lab = Lab::new();
        let file = StateFile::beside(&lab.dir().join("4.img")).unwrap();
        lab.dies_as(&Merging { top: None, wishes: Wishes::default(), file }, "job-finalize", when);
        let before = lab.contents();
        let found = lab.recover(0);
        assert_eq!((&found["outcome"], &found["valid-top"]), (&json!(outcome), &json!(lab.path("4.img"))));
        lab.nothing_is_left();
        assert!(lab.contents() == before, "a pull leaves nothing to put right");
        lab.shows("4.img");
        let info = run("qemu-img", lab.dir(), &["info", "4.img"]);
        assert!(info.contains(&format!("backing file: {backing}")), "{info}");
    }
}

#[test]
fn a_state_in_another_folder_is_found_there() {
    if !tools_are_here() {
        return;
    }
    let lab = Lab::new();
    let folder = lab.dir().join("states");
    fs::create_dir(&folder).unwrap();
    let file = StateFile::in_folder(&folder, &lab.dir().join("4.img"));
    let merging = Merging { top: Some("[4]"), wishes: Wishes::default(), file };
    lab.dies_as(&merging, "job-finalize", When::After);
    // The pointer beside the socket would lead there too.
    fs::remove_file(lab.dir().join("qmp.sock.qmerge")).unwrap();
    assert!(lab.ok(&["live", "recover"]).starts_with("nothing to recover: "));
    let said = lab.ok(&["live", "recover", "--state-dir", "states"]);
    assert!(said.contains("make ") && said.contains("empty overlay"), "{said}");
    assert!(lab.ok(&["live", "recover", "--state-dir", "states"]).starts_with("nothing to recover: "));
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
    lab.shows("1.img");
    lab.shows("4.img");
}
