//! What is not done, with the reason, the exit code and the next thing to type.

use std::os::unix::fs::PermissionsExt;

use qmp_client::Execute;
use serde_json::json;

use crate::machine::{Machine, Style};
use crate::support::{failed, qmerge, run, tools_are_here};

#[test]
fn ranges_that_make_no_sense() {
    if !tools_are_here() {
        return;
    }
    let machine = Machine::new(Style::Daemon);
    let before = machine.files();
    let chain = "qmerge live chain disk0 --qmp qmp.sock";
    for (args, code, words) in [
        (&[][..], 2, &["[4]", "c.img is the active layer", "--active --pivot", "--top '[3]'"][..]),
        (&["--base", "[3]", "--top", "[2]"], 2, &["reversed", "[1] ", chain]),
        (&["--base", "[2]", "--top", "[2]"], 2, &["into itself", chain]),
        (&["--base", "[7]", "--top", "[2]"], 2, &["outside the chain", chain]),
        (&["--base", "nowhere.img", "--active"], 2, &["'nowhere.img' is no layer", chain]),
        (&["--base", "vdb[1]", "--active"], 2, &["names another disk", chain]),
        (&["--top", "[3]", "--pivot"], 2, &["--pivot is for the active layer [4]", chain]),
        (&["--top", "[3]", "--keep-overlay"], 2, &["--keep-overlay is for the active layer"]),
        (
            &["--pivot", "--backing-file", "x"],
            6,
            &[
                "relinks no overlay",
                "hint: without that name: qmerge live commit disk0 --pivot --qmp qmp.sock",
            ],
        ),
        (&["--pivot", "--keep-overlay"], 2, &["cannot be used with", "qmerge live commit --help"]),
        (&["--pivot", "--async"], 2, &["cannot be used with"]),
        (&["--keep-overlay", "--delete"], 2, &["cannot be used with"]),
        (&["--pivot", "--timeout", "soon"], 2, &["write seconds"]),
        (&["--pivot", "--bandwidth", "fast"], 2, &["is not a size"]),
    ] {
        machine.fails("commit", args, code, words);
    }
    machine.fails("finish", &[], 1, &["no job works on the disk disk0", "qmerge live jobs"]);
    machine.fails("pivot", &[], 1, &["no job works on the disk disk0"]);
    let output = qmerge(machine.dir(), &["live", "commit", "vdz", "--pivot", "--qmp", "qmp.sock"]);
    failed(&output, 2, &["'vdz'", "disk0", "qmerge live list"]);
    assert!(before == machine.files());
}

#[test]
fn what_only_a_stopped_machine_allows_names_the_command_for_it() {
    if !tools_are_here() {
        return;
    }
    // Top is shorter than the overlay above it and than base: QEMU would show base's old bytes.
    let machine = Machine::with(Style::Daemon, "c.img", |dir| {
        run("qemu-img", dir, &["create", "-q", "-f", "qcow2", "base.img", "16M"]);
        run("qemu-io", dir, &["-f", "qcow2", "-c", "write -q -P 1 0 16M", "base.img"]);
        run(
            "qemu-img",
            dir,
            &["create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "qcow2", "a.img", "8M"],
        );
        run("qemu-img", dir, &["create", "-q", "-f", "qcow2", "-b", "a.img", "-F", "qcow2", "c.img", "16M"]);
    });
    let offline = format!(
        "qmerge commit {} --top {} --base {}",
        machine.path("c.img"),
        machine.path("a.img"),
        machine.path("base.img")
    );
    machine.fails("commit", &["--top", "[2]"], 6, &["is shorter than", &offline]);
}

#[test]
fn a_folder_that_cannot_be_written_needs_another_for_the_state() {
    if !tools_are_here() {
        return;
    }
    let machine = Machine::with(Style::Daemon, "vm/c.img", |dir| {
        std::fs::create_dir(dir.join("vm")).unwrap();
        run("qemu-img", dir, &["create", "-q", "-f", "qcow2", "vm/base.img", "16M"]);
        run("qemu-img", dir, &["create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "qcow2", "vm/c.img"]);
        run("qemu-io", dir, &["-f", "qcow2", "-c", "write -q -P 3 0 1M", "vm/c.img"]);
    });
    let vm = machine.dir().join("vm");
    std::fs::create_dir(machine.dir().join("state")).unwrap();
    // Root writes where nobody may, so the folder gets a flag that holds for root too.
    std::fs::set_permissions(&vm, std::fs::Permissions::from_mode(0o555)).unwrap();
    let flag = |flag: &str| {
        std::process::Command::new("chattr").arg(flag).arg(&vm).status().is_ok_and(|s| s.success())
    };
    if tempfile::tempfile_in(&vm).is_ok() && !flag("+i") {
        kit::not_tried("root may write everywhere, and there is no chattr");
        return;
    }
    let refused = machine.live("commit", &["--pivot"]);
    let done = machine.live("commit", &["--pivot", "--state-dir", "state", "--async"]);
    let noted = machine.has("state/.c.img.qmerge-live");
    let pivoted = machine.live("commit", &["--active", "--pivot", "--state-dir", "state"]);
    flag("-i");
    std::fs::set_permissions(&vm, std::fs::Permissions::from_mode(0o755)).unwrap();
    failed(&refused, 6, &["vm", "cannot be noted there", "--state-dir DIR"]);
    // Both were asked for at once, which is a typing error, and starts nothing.
    failed(&done, 2, &["cannot be used with"]);
    assert!(!noted);
    assert_eq!(pivoted.status.code(), Some(0), "{}", crate::support::text(&pivoted.stderr));
    assert!(!machine.has("state/.c.img.qmerge-live"));
    machine.holds_the_disk("vm/base.img");
}

#[test]
fn a_state_that_may_have_been_switched_must_be_recovered_first() {
    if !tools_are_here() {
        return;
    }
    let machine = Machine::new(Style::Daemon);
    machine.ok("commit", &["--top", "[3]", "--async"]);
    machine.job_becomes("pending");
    let state = machine.dir().join(".c.img.qmerge-live");
    let text = std::fs::read_to_string(&state).unwrap();
    machine.ok("cancel", &[]);
    assert!(!state.exists());

    // A merge that was lost while it copied: nothing is lost, it begins anew.
    std::fs::write(&state, &text).unwrap();
    let said = machine.ok("commit", &["--top", "[3]", "-n"]);
    assert!(said.contains("ended without a switch") && said.contains("begins anew"), "{said}");

    let switching = text.replace("\"phase\": \"copying\"", "\"phase\": \"switching\"");
    assert_ne!(text, switching);
    std::fs::write(&state, &switching).unwrap();
    machine.fails("commit", &["--pivot"], 6, &["about to switch", "c.img", "qmerge live recover disk0"]);
    assert_eq!(machine.chain().len(), 4);
    std::fs::write(&state, "{").unwrap();
    machine.fails("commit", &["--pivot"], 1, &[".c.img.qmerge-live", "ls -la"]);
}

/// Has a file that not even root may write, while `f` runs; `false` where there are no such files.
fn unwritable(machine: &Machine, name: &str, f: impl FnOnce()) -> bool {
    let path = machine.dir().join(name);
    let flag = |flag: &str| {
        std::process::Command::new("chattr").arg(flag).arg(&path).status().is_ok_and(|s| s.success())
    };
    if !flag("+i") {
        kit::not_tried("chattr +i does not work here, so files that QEMU cannot write were not tested");
        return false;
    }
    f();
    flag("-i")
}

#[test]
fn images_that_qemu_cannot_write_are_named_and_qemu_lives() {
    if !tools_are_here() {
        return;
    }
    let machine = Machine::new(Style::Drive);
    let before = machine.files();
    for (image, args) in
        [("b.img", &["--top", "[2]"][..]), ("base.img", &["--top", "[3]"]), ("base.img", &["--pivot"])]
    {
        let refused =
            || machine.fails("commit", args, 1, &["refused", "nothing was changed", "ls -l", image]);
        if !unwritable(&machine, image, refused) {
            return;
        }
        assert!(
            machine.job().is_null() && !machine.has(".c.img.qmerge-live") && !machine.has("qmp.sock.qmerge")
        );
    }
    assert!(before == machine.files());
    machine.ok("commit", &["--top", "[2]"]);
    machine.holds_the_disk("c.img");
}

#[test]
fn a_name_that_only_qemu_understands_gets_a_hint() {
    if !tools_are_here() {
        return;
    }
    let machine = Machine::new(Style::RelativeDrive);
    std::fs::rename(machine.dir().join("c.img"), machine.dir().join("moved.img")).unwrap();
    let output = qmerge(machine.dir(), &["live", "snapshot", "vda=d.img", "--qmp", "qmp.sock"]);
    failed(&output, 6, &["'c.img'", "start QEMU with absolute names"]);
    assert!(!machine.has("d.img"));
}

/// Another disk of the same QEMU, or a node of it, reads through a merged layer: no folder shows that.
#[test]
fn a_layer_that_another_node_of_the_same_qemu_reads_is_not_merged() {
    if !tools_are_here() {
        return;
    }
    for by_name in [false, true] {
        let machine = Machine::with(Style::Blockdev, "c.img", |dir| {
            crate::machine::usual_chain(dir, "raw");
            std::fs::create_dir(dir.join("o")).unwrap();
            let create = ["create", "-q", "-f", "qcow2", "-b", "../b.img", "-F", "qcow2", "o/other.img"];
            run("qemu-img", dir, &create);
        });
        let mut node = json!({"driver": "qcow2", "node-name": "n4", "read-only": true,
            "file": {"driver": "file", "filename": machine.path("o/other.img")}});
        if !by_name {
            node["backing"] = "b".into();
        }
        machine.connect().query("blockdev-add", node).unwrap();
        let before = machine.files();
        for args in [&["--top", "[3]"][..], &["--pivot"], &["--keep-overlay"]] {
            machine.fails("commit", args, 6, &["n4", "o/other.img", "--allow-shared-base", "live pull vda"]);
        }
        // Through the same node [3], which shows what it did; nodes of their own below it would not.
        let below = machine.live("commit", &["--top", "[2]", "-n"]);
        assert_eq!(below.status.code(), Some(if by_name { 6 } else { 0 }));
        assert!(machine.job().is_null() && machine.files() == before, "{by_name}");
        let plan = machine.events("commit", &["--top", "[3]", "--allow-shared-base", "-n"]).remove(0);
        assert_eq!(plan["broken"], json!([machine.path("o/other.img")]), "{by_name}");
        assert_eq!(plan["becomes-empty"], json!([]), "{by_name}");
        // A pull changes no layer below; without that node, nothing stands in the way.
        machine.ok("pull", &["-n"]);
        machine.connect().query("blockdev-del", json!({"node-name": "n4"})).unwrap();
        std::fs::remove_dir_all(machine.dir().join("o")).unwrap();
        machine.ok("commit", &["--top", "[3]"]);
        machine.holds_the_disk("c.img");
    }
}

/// What an internal snapshot does not hold itself, it reads from the layers below.
#[test]
fn internal_snapshots_do_not_change_unasked() {
    if !tools_are_here() {
        return;
    }
    let make = |keeper: &'static str| {
        move |dir: &std::path::Path| {
            crate::machine::usual_chain(dir, "raw");
            run("qemu-img", dir, &["snapshot", "-c", "keep", keeper]);
            run("qemu-io", dir, &["-f", "qcow2", "-c", "write -q -P 77 1M 2M", keeper]);
        }
    };
    let option = "--allow-snapshot-change";
    let machine = Machine::with(Style::Daemon, "c.img", make("c.img"));
    let before = machine.files();
    for end in [&["--pivot"][..], &["--active"], &["--keep-overlay"], &["--pivot", "--delete"]] {
        machine.fails("commit", end, 6, &["c.img", "1 internal snapshot", option, "qemu-img snapshot"]);
    }
    machine.fails("pull", &[], 6, &["c.img", "1 internal snapshot", option]);
    assert!(machine.job().is_null() && machine.files() == before);
    // Layers below the one that holds it say nothing of it.
    machine.ok("commit", &["--top", "[3]", "-n"]);
    let plan = machine.events("commit", &["--pivot", "--allow-snapshot-change", "-n"]).remove(0);
    assert_eq!(plan["snapshots-changed"], json!([machine.path("c.img")]));
    machine.ok("commit", &["--pivot", "--allow-snapshot-change"]);
    machine.holds_the_disk("base.img");

    let machine = Machine::with(Style::Daemon, "c.img", make("b.img"));
    machine.fails("commit", &["--top", "[3]"], 6, &["b.img", "1 internal snapshot", option]);
    machine.ok("pull", &["-n"]);
    machine.ok("commit", &["--top", "[3]", "--allow-snapshot-change"]);
    machine.holds_the_disk("c.img");
}

/// The image of one disk is the base of another one.
#[test]
fn a_base_that_is_another_disk_of_the_same_qemu_is_not_written() {
    if !tools_are_here() {
        return;
    }
    let machine = Machine::new(Style::Blockdev);
    let monitor = machine.connect();
    let address = json!({"type": "unix", "data": {"path": machine.path("nbd.sock")}});
    monitor.query("nbd-server-start", json!({"addr": address})).unwrap();
    // An export of the active layer shows the same disk.
    let export = |id: &str, node: &str| json!({"type": "nbd", "id": id, "node-name": node});
    monitor.query("block-export-add", export("backup", "c")).unwrap();
    drop(monitor);
    machine.ok("commit", &["--top", "[3]", "-n"]);
    let add = json!({"driver": "raw", "node-name": "again", "read-only": true, "file": "base"});
    machine.connect().query("blockdev-add", add).unwrap();
    machine.fails("commit", &["--top", "[3]"], 6, &["again", "base.img", "--allow-shared-base"]);
}
