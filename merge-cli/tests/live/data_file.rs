//! Images with an external data file: QEMU's statistics tell of the data file, and the image is another one.

use std::fs;
use std::os::unix::fs::MetadataExt;

use crate::machine::{Machine, Style};
use crate::support::{qmerge, run, text, tools_are_here};

#[test]
fn the_image_and_not_its_data_file_is_merged_and_snapshotted() {
    if !tools_are_here() {
        return;
    }
    for backed in ["a.qcow2", "base.qcow2"] {
        let machine = Machine::with(Style::Drive, "d.qcow2", |dir| {
            run("qemu-img", dir, &["create", "-q", "-f", "qcow2", "base.qcow2", "32M"]);
            run("qemu-io", dir, &["-f", "qcow2", "-c", "write -q -P 1 0 4M", "base.qcow2"]);
            run(
                "qemu-img",
                dir,
                &["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "a.qcow2"],
            );
            run("qemu-io", dir, &["-f", "qcow2", "-c", "write -q -P 2 1M 2M", "a.qcow2"]);
            let data = [
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                "data_file=d.data",
                "-F",
                "qcow2",
                "-b",
                backed,
                "d.qcow2",
            ];
            run("qemu-img", dir, &data);
            run("qemu-io", dir, &["-f", "qcow2", "-c", "write -q -P 9 8M 1M", "d.qcow2"]);
        });
        machine.guest_writes(5, "12M", "1M");
        if backed == "a.qcow2" {
            // From then on QEMU describes the active image as a json: name.
            machine.ok("commit", &["--top", "[2]", "-q"]);
        }
        assert_eq!(machine.chain(), ["d.qcow2", "base.qcow2"]);
        // What only an image names is named before it is touched. The other chain has a user of base beside it.
        for (args, fate) in [(&["--pivot"][..], "it is emptied"), (&["--pivot", "--delete"], "it stays")] {
            if backed == "a.qcow2" {
                let plan = machine.ok("commit", &[args, &["--dry-run"]].concat());
                assert!(plan.contains("/d.data of ") && plan.contains(fate), "{plan}");
            }
        }
        let snapshot = qmerge(machine.dir(), &["live", "snapshot", "vda=n.qcow2", "--qmp", "qmp.sock"]);
        assert_eq!(snapshot.status.code(), Some(0), "{}", text(&snapshot.stderr));
        machine.guest_writes(6, "13M", "1M");
        assert_eq!(machine.chain(), ["n.qcow2", "d.qcow2", "base.qcow2"]);
        let backing = run("qemu-img", machine.dir(), &["info", "-U", "n.qcow2"]);
        assert!(backing.contains(&format!("backing file: {}", machine.path("d.qcow2"))), "{backing}");
        machine.holds_the_disk("n.qcow2");
    }
}

/// QEMU may be given another data file than the one that the header names. Then nobody has said what becomes of that one.
#[test]
fn only_the_data_file_of_the_plan_is_emptied() {
    if !tools_are_here() {
        return;
    }
    for style in [Style::Drive, Style::OtherDataFile] {
        let mut machine = Machine::with(style, "d.qcow2", |dir| {
            run("qemu-img", dir, &["create", "-q", "-f", "qcow2", "base.img", "8M"]);
            let create = ["create", "-q", "-f", "qcow2", "-o", "data_file=d.raw"];
            let backed = ["-F", "qcow2", "-b", "base.img", "d.qcow2"];
            run("qemu-img", dir, &[&create[..], &backed].concat());
            run("qemu-io", dir, &["-f", "qcow2", "-c", "write -q -P 9 1M 1M", "d.qcow2"]);
            fs::create_dir(dir.join("other")).unwrap();
            fs::copy(dir.join("d.raw"), dir.join("other/real.raw")).unwrap();
        });
        let (own, given) = (machine.path("d.raw"), machine.path("other/real.raw"));
        let before = fs::read(&own).unwrap();
        let plan = machine.events("commit", &["--pivot", "-n"]).remove(0);
        let (file, action) = if style == Style::Drive { (&own, "empty") } else { (&given, "keep") };
        assert_eq!(plan["data-files"][0]["file"], file.as_str());
        assert_eq!(plan["data-files"][0]["action"], action);
        machine.ok("commit", &["--pivot"]);
        let blocks = fs::metadata(&own).unwrap().blocks();
        assert_eq!(blocks == 0, style == Style::Drive, "{style:?}: {blocks} blocks");
        assert!(style == Style::Drive || fs::read(&own).unwrap() == before);
        assert!(fs::metadata(&given).unwrap().blocks() > 0, "{style:?}");
        machine.stop();
        let map = run("qemu-io", machine.dir(), &["-r", "-f", "qcow2", "-c", "alloc 0 8M", "d.qcow2"]);
        assert!(map.starts_with("0/"), "{style:?}: {map}");
        machine.holds_the_disk("base.img");
    }
}
