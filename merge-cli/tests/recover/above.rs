//! A snapshot that was taken behind a merge of which the end was never noted: what the guest wrote last is in it.

use qmp_client::{Execute, Graph};
use serde_json::json;

use crate::lab::{Lab, run, tools_are_here};
use crate::write;

/// Another client takes a snapshot of the disk.
fn snapshot(lab: &Lab, name: &str) {
    let monitor = lab.connect();
    let graph = Graph::ask(&monitor).unwrap();
    let active = graph.disk("disk0").unwrap().active().clone();
    let below = active.file.clone();
    let file = lab.path(name);
    run(
        "qemu-img",
        lab.dir(),
        &["create", "-q", "-f", "qcow2", "-u", "-b", &below, "-F", "qcow2", &file, "16M"],
    );
    let storage = json!({"driver": "file", "filename": file});
    let overlay = json!({"driver": "qcow2", "node-name": name.replace(['.', '/'], "-"), "file": storage, "backing": null});
    monitor.query("blockdev-add", overlay).unwrap();
    let overlay = name.replace(['.', '/'], "-");
    monitor.query("blockdev-snapshot", json!({"node": active.node, "overlay": overlay})).unwrap();
}

#[test]
fn the_newest_overlay_is_the_disk_while_qemu_runs_and_when_it_is_gone() {
    if !tools_are_here() {
        return;
    }
    for alive in [true, false] {
        let lab = Lab::new();
        lab.pivots();
        snapshot(&lab, "n.img");
        snapshot(&lab, "o.img");
        if !alive {
            lab.kill();
            // What shows the same as the image below it is no other disk.
            write(&lab, "o.img", "write -q -P 9 8M 1M");
        }
        let found = lab.recover(0);
        assert_eq!(found["outcome"], "completed", "{found:#}");
        assert_eq!(found["valid-top"], lab.path("o.img").as_str(), "{found:#}");
        let facts = found["facts"].to_string();
        assert!(facts.contains("should name") && facts.contains("o.img"), "{facts}");
        // Who has seen QEMU needs to search nowhere.
        assert_eq!(facts.contains("looked for only in"), !alive, "{facts}");
        lab.kill();
        lab.nothing_is_left();
        for image in ["4.img", "3.img", "2.img"] {
            lab.shows_nothing_of_its_own(image);
        }
    }
}

/// Nothing leads from an image to the overlays above it: where was searched is said, and that the rest is not known.
#[test]
fn a_snapshot_in_a_folder_that_is_not_searched_is_not_ruled_out() {
    if !tools_are_here() {
        return;
    }
    let lab = Lab::new();
    lab.pivots();
    std::fs::create_dir(lab.dir().join("elsewhere")).unwrap();
    snapshot(&lab, "elsewhere/n.img");
    lab.kill();
    write(&lab, "elsewhere/n.img", "write -q -P 9 8M 1M");
    let found = lab.recover(0);
    let facts = found["facts"].to_string();
    let folder = lab.dir().canonicalize().unwrap();
    assert!(facts.contains(&format!("looked for only in {}", folder.display())), "{facts}");
    assert!(facts.contains("unless a snapshot above it lies in another folder"), "{facts}");
    lab.nothing_is_left();
}

#[test]
fn of_two_overlays_none_is_called_the_disk() {
    if !tools_are_here() {
        return;
    }
    let lab = Lab::new();
    lab.pivots();
    lab.kill();
    for name in ["n.img", "o.img"] {
        run("qemu-img", lab.dir(), &["create", "-q", "-f", "qcow2", "-b", "1.img", "-F", "qcow2", name]);
        write(&lab, name, "write -q -P 9 8M 1M");
    }
    let found = lab.recover(6);
    assert_eq!(
        (&found["valid-top"], &found["error"]["kind"]),
        (&json!(null), &json!("unclear")),
        "{found:#}"
    );
    let why = found["error"]["message"].to_string();
    assert!(why.contains("n.img") && why.contains("o.img") && why.contains("1.img"), "{why}");
    // What the merge had left is dealt with all the same.
    lab.nothing_is_left();
}
