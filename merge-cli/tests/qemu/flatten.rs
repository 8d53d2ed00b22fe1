//! What `qmerge flatten` takes and gives beside the whole chain: internal snapshots, judged by QEMU.

use kit::qemu_is_here;

use crate::support::lab;

const M: u64 = 1 << 20;

#[test]
fn an_internal_snapshot_becomes_a_file_as_qemu_shows_it() {
    if !qemu_is_here() {
        return;
    }
    for options in ["", "compat=0.10", "cluster_size=4k", "extended_l2=on,cluster_size=32k"] {
        let folder = lab("flatten-snapshot");
        folder.create("base.qcow2", 5 * M, "");
        folder.io("qcow2", "base.qcow2", &["write -P 1 0 5M"]);
        folder.overlay("vm.qcow2", "base.qcow2", "qcow2", Some(6 * M), options);
        folder.io("qcow2", "vm.qcow2", &["write -P 2 100k 1M", "write -z 2M 300k", "write -c -P 3 3M 64k"]);
        folder.img(&["snapshot", "-c", "first", "vm.qcow2"]);
        // Its name is the other one's id.
        folder.io("qcow2", "vm.qcow2", &["write -P 4 0 300k", "write -P 5 3M 64k", "write -P 6 2M 4k"]);
        folder.img(&["snapshot", "-c", "1", "vm.qcow2"]);
        folder.io("qcow2", "vm.qcow2", &["write -P 7 0 6M"]);
        let files = folder.files();
        for (asked, theirs) in
            [("first", "snapshot.name=first"), ("1", "snapshot.id=1"), ("2", "snapshot.name=1")]
        {
            for to in ["raw", "qcow2"] {
                let made =
                    folder.qmerge(&["flatten", "vm.qcow2", "--snapshot", asked, "-o", "new", "--to", to]);
                made.ok().says(asked);
                let shown = folder.snapshot_view("vm.qcow2", theirs);
                folder.view(to, "new").assert_same(&shown, &format!("{asked} of {options} as {to}"));
                if to == "qcow2" {
                    folder.check_clean("new");
                }
                std::fs::remove_file(folder.join("new")).unwrap();
            }
        }
        // Only what lies above the base.
        let shown = folder.snapshot_view("vm.qcow2", "snapshot.name=first");
        let upper =
            ["flatten", "vm.qcow2", "--snapshot", "first", "-o", "new", "--base", "base.qcow2", "--json"];
        let made = folder.qmerge(&upper).ok();
        assert_eq!(made.json_lines().last().unwrap()["snapshot"], "first");
        folder.view("qcow2", "new").assert_same(&shown, "above base");
        assert_eq!(folder.backing_of("new").unwrap().0, "base.qcow2");
        std::fs::remove_file(folder.join("new")).unwrap();
        folder.assert_unchanged(&files, &made);
    }
}

#[test]
fn the_disk_of_a_snapshot_is_as_large_as_it_was() {
    if !qemu_is_here() {
        return;
    }
    for (before, after) in [(4 * M, 9 * M), (9 * M, 4 * M)] {
        let folder = lab("flatten-resized");
        folder.create("vm.qcow2", before, "");
        folder.io("qcow2", "vm.qcow2", &["write -P 1 0 4M", "write -P 2 3M 1M"]);
        folder.img(&["snapshot", "-c", "s", "vm.qcow2"]);
        folder.img(&["resize", "-q", "--shrink", "vm.qcow2", &after.to_string()]);
        folder.io("qcow2", "vm.qcow2", &["write -P 3 0 4M"]);
        folder.qmerge(&["flatten", "vm.qcow2", "--snapshot", "s", "-o", "new.raw", "--to", "raw"]).ok();
        folder.img(&["snapshot", "-a", "s", "vm.qcow2"]);
        folder.view("raw", "new.raw").assert_same(&folder.view("qcow2", "vm.qcow2"), "the disk of that time");
    }
}

#[test]
fn a_snapshot_that_there_is_not_is_named_with_those_that_there_are() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("flatten-no-snapshot");
    folder.create("vm.qcow2", M, "");
    folder.raw("vm.raw", M, 0, 0);
    let none = ["flatten", "vm.qcow2", "--snapshot", "s", "-o", "new"];
    folder.refused(&none, &[2]).says("the image has none");
    folder.img(&["snapshot", "-c", "monday", "vm.qcow2"]);
    folder.refused(&none, &[2]).says("1 monday");
    folder
        .refused(&["flatten", "vm.raw", "--snapshot", "s", "-o", "new"], &[2])
        .says("no internal snapshots");
}
