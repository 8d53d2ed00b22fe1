//! The article's story, live: overlays taken, the chain shortened in the middle, and then merged altogether.

use serde_json::json;

use crate::machine::{Machine, Style, shows};
use crate::support::{qmerge, run, text, tools_are_here};

/// A machine with one raw image, and the overlays a, b and c taken while the guest writes.
fn with_snapshots() -> Machine {
    let machine = Machine::with(Style::Drive, "a0.qcow2", |dir| {
        run("qemu-img", dir, &["create", "-q", "-f", "qcow2", "a0.qcow2", "32M"]);
        run("qemu-io", dir, &["-f", "qcow2", "-c", "write -q -P 1 0 4M", "a0.qcow2"]);
    });
    for (n, name) in (1..).zip(["a.qcow2", "b.qcow2", "c.qcow2"]) {
        let answer =
            qmerge(machine.dir(), &["live", "snapshot", &format!("vda={name}"), "--qmp", "qmp.sock"]);
        assert_eq!(answer.status.code(), Some(0), "{}", text(&answer.stderr));
        machine.guest_writes(n + 1, &format!("{n}M"), "2M");
        machine.guest_writes(n + 10, &format!("{}M", 8 + 2 * n), "1M");
    }
    machine
}

#[test]
fn the_article_by_path_and_then_by_the_default() {
    if !tools_are_here() {
        return;
    }
    let machine = with_snapshots();
    assert_eq!(machine.document(&["list"])[0]["file"], machine.path("c.qcow2").as_str());
    assert_eq!(machine.chain(), ["c.qcow2", "b.qcow2", "a.qcow2", "a0.qcow2"]);

    let (base, top) = (machine.path("a0.qcow2"), machine.path("b.qcow2"));
    let said = machine.ok("commit", &["--base", &base, "--top", &top]);
    assert!(said.contains(&format!("merged into {base}")), "{said}");
    assert!(
        said.contains(&format!("{} now has {base} as its backing file", machine.path("c.qcow2"))),
        "{said}"
    );
    assert_eq!(machine.chain(), ["c.qcow2", "a0.qcow2"]);
    let again = machine.ok("commit", &["--base", &base, "--top", &top]);
    assert!(again.contains("was already merged into"), "{again}");
    let info = text(&qmerge(machine.dir(), &["info", "b.qcow2"]).stdout);
    assert!(info.contains("merged into") && info.contains("a0.qcow2"), "{info}");
    machine.guest_writes(99, "3M", "64k");

    let said = machine.ok("commit", &["--active", "--pivot", "--delete"]);
    assert!(said.contains("vda writes to it now") && said.contains("removed: "), "{said}");
    assert!(said.contains(&format!("was started with {base}, which is right again")), "{said}");
    assert_eq!(machine.document(&["list"])[0]["file"], base.as_str());
    assert_eq!(machine.chain(), ["a0.qcow2"]);
    // What the first merge marked is not of this one.
    assert!(!machine.has("c.qcow2") && machine.has("a.qcow2") && machine.has("b.qcow2"));
    assert!(!machine.has(".c.qcow2.qmerge-live") && !machine.has("qmp.sock.qmerge"));
    machine.guest_writes(100, "5M", "64k");
    // The same command again has nothing to do.
    assert!(machine.ok("commit", &["--active", "--pivot"]).contains("nothing to do"));
    machine.holds_the_disk("a0.qcow2");
}

#[test]
fn the_article_by_index_with_every_file_removed_at_the_end() {
    if !tools_are_here() {
        return;
    }
    let machine = with_snapshots();
    machine.ok("commit", &["--base", "vda[1]", "--top", "vda[3]", "--delete"]);
    assert!(!machine.has("a.qcow2") && !machine.has("b.qcow2"));
    assert_eq!(machine.chain(), ["c.qcow2", "a0.qcow2"]);
    machine.ok("commit", &["--pivot", "--delete"]);
    assert!(!machine.has("c.qcow2"));
    machine.holds_the_disk("a0.qcow2");
}

#[test]
fn every_style_is_merged_and_the_old_active_image_boots_the_same_disk() {
    if !tools_are_here() {
        return;
    }
    let styles = [Style::Daemon, Style::NbdDaemon, Style::Drive, Style::RelativeDrive, Style::Blockdev];
    for style in styles {
        let mut machine = Machine::new(style);
        machine.ok("commit", &["--base", "[2]", "--top", "[3]"]);
        assert_eq!(machine.chain(), ["c.img", "a.img", "base.img"], "{style:?}");
        let last = machine.events("commit", &["--pivot"]).pop().unwrap();
        let files = ["c.img", "a.img"].map(|name| machine.path(name));
        assert_eq!(
            (&last["status"], &last["kind"]),
            (&json!("pivoted"), &json!("active-commit")),
            "{style:?}"
        );
        assert_eq!((&last["obsolete"], &last["kept"]), (&json!(files), &json!([])), "{style:?}");
        assert_eq!((&last["emptied"], &last["stale"]), (&json!(files), &json!([])), "{style:?}");
        assert_eq!(last["configuration"]["format"], "raw");
        assert!(last["configuration"]["words"][0].as_str().unwrap().contains("c.img"), "{last}");
        assert_eq!(machine.chain(), ["base.img"], "{style:?}");
        if !matches!(style, Style::Daemon | Style::NbdDaemon) {
            machine.guest_writes(77, "1M", "64k");
        }
        machine.stop();
        assert_eq!(machine.recorded_chain_differs(), None, "{style:?}");
        for image in ["base.img", "c.img"] {
            shows(machine.dir(), image, "expected.raw");
        }
        let output = qmerge(machine.dir(), &["commit", "b.img"]);
        assert!(
            text(&output.stderr).contains("already merged")
                || text(&output.stdout).contains("already merged")
        );
    }
}
