//! What is planned, and that a dry run changes nothing.

use serde_json::{Value, json};

use crate::machine::{Machine, Style};
use crate::support::{run, tools_are_here};

#[test]
fn a_dry_run_lists_bytes_commands_and_losses_and_changes_nothing() {
    if !tools_are_here() {
        return;
    }
    let machine = Machine::new(Style::Blockdev);
    let before = machine.files();
    let said = machine.ok("commit", &["--top", "[3]", "--dry-run"]);
    let (base, a) = (machine.path("base.img"), machine.path("a.img"));
    for words in [
        "to copy:",
        "7 MiB",
        "to zero:",
        "2 MiB",
        "QEMU writes them as data",
        "room:",
        "c.img gets base.img as its backing file",
        &format!("{base}, {a} will be restore points no more"),
        r#"{"execute": "change-backing-file""#,
        r#"{"execute": "block-commit""#,
        r#"{"execute": "job-finalize""#,
        r#"{"node-name":"a-file"}"#,
        "is flushed before job-finalize",
        "dry run: nothing was changed",
    ] {
        assert!(said.contains(words), "'{words}' is missing: {said}");
    }
    let said = machine.ok("commit", &["--active", "--pivot", "-n"]);
    assert!(said.contains("vda writes to") && said.contains("and what the guest wrote last"), "{said}");
    assert!(
        !said.contains("change-backing-file") && said.contains(r#"{"execute": "job-complete""#),
        "{said}"
    );
    let said = machine.ok("pull", &["--base", "[1]", "-n"]);
    assert!(
        said.contains("c.img gets base.img as its backing file") && said.contains("block-stream"),
        "{said}"
    );
    assert!(!said.contains("restore points"), "{said}");
    assert!(machine.job().is_null());
    assert!(before == machine.files(), "a dry run wrote to a file");
}

#[test]
fn the_plan_in_json_counts_what_moves() {
    if !tools_are_here() {
        return;
    }
    let machine = Machine::new(Style::Drive);
    let plan = |verb: &str, args: &[&str]| -> Value {
        let events = machine.events(verb, &[args, &["-n"]].concat());
        assert_eq!((events.len(), &events[0]["event"]), (1, &json!("plan")));
        events[0].clone()
    };
    let inner = plan("commit", &["--top", "[3]"]);
    assert_eq!((&inner["kind"], &inner["counted"]), (&json!("commit"), &json!(true)));
    assert_eq!((&inner["bytes-to-copy"], &inner["bytes-to-zero"]), (&json!(7 << 20), &json!(2 << 20)));
    assert_eq!(inner["obsolete"], json!([machine.path("b.img"), machine.path("a.img")]));
    assert_eq!(inner["restore-points-lost"], json!([machine.path("base.img"), machine.path("a.img")]));
    assert_eq!(inner["afterwards"]["backing-filename"], "base.img");
    assert_eq!(
        (&inner["base"], &inner["top"]),
        (&json!(machine.path("base.img")), &json!(machine.path("b.img")))
    );
    let names: Vec<_> = inner["commands"].as_array().unwrap().iter().map(|c| c["execute"].clone()).collect();
    assert_eq!(names, ["change-backing-file", "block-commit", "job-finalize", "job-dismiss"]);
    // 4 MiB lie where base has no data; the zeros are counted too.
    let file = machine.dir().join("base.img");
    let held = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(file).unwrap()) * 512;
    assert_eq!(inner["base-file-size-after"], held + (6 << 20));

    let shallow = plan("commit", &["--top", "[3]", "--shallow"]);
    assert_eq!(shallow["base"], machine.path("a.img").as_str());
    let active = plan("commit", &["--active"]);
    assert_eq!(
        (&active["kind"], &active["afterwards"]["action"]),
        (&json!("active-commit"), &json!("ready"))
    );
    let kept = plan("commit", &["--keep-overlay"]);
    assert_eq!((&kept["afterwards"]["action"], &kept["obsolete"]), (&json!("keep-overlay"), &json!([])));
    let pull = plan("pull", &[]);
    assert_eq!(
        (&pull["kind"], &pull["base"], &pull["restore-points-lost"]),
        (&json!("pull"), &json!(null), &json!([]))
    );
    assert_eq!(pull["afterwards"]["backing-filename"], json!(null));
}

#[test]
fn what_is_lost_or_broken_stands_in_the_plan() {
    if !tools_are_here() {
        return;
    }
    let machine = Machine::with(Style::Daemon, "c.img", |dir| {
        crate::machine::usual_chain(dir, "qcow2");
        run("qemu-img", dir, &["bitmap", "--add", "b.img", "nightly"]);
        run("qemu-img", dir, &["create", "-q", "-f", "qcow2", "-b", "a.img", "-F", "qcow2", "other.img"]);
    });
    machine.fails("commit", &["--top", "[3]", "-n"], 6, &["nightly", "--drop-bitmaps"]);
    let sibling = machine.path("other.img");
    machine.fails(
        "commit",
        &["--top", "[3]", "-n", "--drop-bitmaps"],
        6,
        &[&sibling, "--allow-shared-base", "qmerge live pull disk0 --qmp qmp.sock"],
    );
    let said = machine.ok("commit", &["--top", "[3]", "-n", "--drop-bitmaps", "--allow-shared-base"]);
    assert!(
        said.contains("bitmap nightly") && said.contains(&format!("breaks:           {sibling}")),
        "{said}"
    );
    // A pull changes no layer below.
    machine.ok("pull", &["-n", "--drop-bitmaps"]);
}

/// Another image reads through the layer that is kept, and so through those below it.
#[test]
fn what_lies_below_a_layer_that_is_kept_is_kept() {
    if !tools_are_here() {
        return;
    }
    let machine = Machine::with(Style::Daemon, "c.img", |dir| {
        crate::machine::usual_chain(dir, "qcow2");
        run("qemu-img", dir, &["create", "-q", "-f", "qcow2", "-b", "b.img", "-F", "qcow2", "other.img"]);
        run("qemu-img", dir, &["convert", "-O", "raw", "other.img", "other.raw"]);
    });
    let said = machine.ok("commit", &["--top", "[3]", "--allow-shared-base", "--delete"]);
    assert!(!said.contains("removed: "), "{said}");
    for (name, why) in [("b.img", "other.img uses it"), ("a.img", "a layer above it is kept")] {
        assert!(
            said.contains(&format!("stays as it is: {}: ", machine.path(name))) && said.contains(why),
            "{said}"
        );
    }
    // The chain below top shows what it did: all of it is in base.
    run("qemu-img", machine.dir(), &["compare", "-q", "-U", "-F", "raw", "other.img", "other.raw"]);
}
