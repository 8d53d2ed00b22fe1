//! What `qmerge flatten` takes and gives beside the whole chain: internal snapshots, and what can be read of damaged images,
//! judged by QEMU.

use kit::qemu_is_here;

use crate::support::{Patch, lab};

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

#[test]
fn what_is_damaged_becomes_zeros_and_is_named() {
    if !qemu_is_here() {
        return;
    }
    let k = 1 << 10;
    for kind in ["zlib", "zstd"] {
        let folder = lab("salvage");
        folder.raw("base.raw", 4 * M, 4 * M, 1);
        folder.overlay("vm.qcow2", "base.raw", "raw", None, &format!("compression_type={kind}"));
        folder.io("qcow2", "vm.qcow2", &["write -P 2 0 1M", "write -c -P 3 1M 64k", "write -c -P 4 2M 64k"]);
        folder.overlay("top.qcow2", "vm.qcow2", "qcow2", None, "");
        folder.io("qcow2", "top.qcow2", &["write -P 5 128k 64k"]);
        let before = folder.view("qcow2", "top.qcow2");
        let vm = Patch::of(&folder, "vm.qcow2");
        // An entry that is no entry, seen and hidden; a stream that is none, and one behind the end of the file.
        vm.set_u64(vm.l2_entry(64 * k), 0x8000_0000_0000_0200);
        vm.set_u64(vm.l2_entry(128 * k), 0x8000_0000_0000_0200);
        vm.write(vm.u64(vm.l2_entry(M)) & ((1 << 54) - 1), &[0xff; 64]);
        vm.set_u64(vm.l2_entry(2 * M), vm.u64(vm.l2_entry(2 * M)) & !((1 << 54) - 1) | 1 << 40);
        let lost = [(64 * k, 64 * k), (M, 64 * k), (2 * M, 64 * k)];
        let files = folder.files();
        // Of the image alone, the hidden one is lost, too.
        let checked = folder.qmerge(&["check", "--data", "vm.qcow2", "--json"]).expect(2).json();
        let told: Vec<_> =
            checked["data"]["unreadable"].as_array().unwrap().iter().map(|range| &range["start"]).collect();
        assert_eq!(told, [&serde_json::json!(64 * k), &(M.into()), &((2 * M).into())], "{checked}");
        assert_eq!(checked["data"]["unreadable"][0]["length"], 128 * k);
        folder.qmerge(&["check", "--data", "top.qcow2"]).ok().says("All data can be read.");
        let plain = ["flatten", "top.qcow2", "-o", "new", "--to", "raw"];
        folder.refused(&plain, &[9]).says("--salvage");
        for extra in [&["--json"][..], &["--json", "--keep-zeros"], &[]] {
            let args = [&plain[..], &["--salvage"], extra].concat();
            let run = folder.qmerge(&args).expect(9);
            if extra.is_empty() {
                run.says("192 KiB (196608 bytes) could not be read").says("at guest offset 0x100000");
            } else {
                let result = run.json_lines().pop().unwrap();
                let told = result["lost"].as_array().unwrap().iter();
                let told: Vec<_> = told
                    .map(|range| (range["start"].as_u64().unwrap(), range["length"].as_u64().unwrap()))
                    .collect();
                assert_eq!(told, lost);
            }
            let after = folder.view("raw", "new");
            let mut at = 0;
            for (start, len) in lost {
                after.assert_same_range(&before, at, start, "what can be read");
                after.assert_all(start, start + len, 0, "what is lost");
                at = start + len;
            }
            after.assert_same_range(&before, at, 4 * M, "what can be read");
            std::fs::remove_file(folder.join("new")).unwrap();
        }
        let run = folder.qmerge(&["info", "top.qcow2"]);
        folder.assert_unchanged(&files, &run);
        // A sound image is salvaged like any other.
        folder.qmerge(&["flatten", "base.raw", "-f", "raw", "-o", "new", "--salvage"]).ok();
    }
}

#[test]
fn a_check_of_the_data_finds_a_damaged_stream_of_a_snapshot() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("check-data");
    folder.create("vm.qcow2", 4 * M, "");
    folder.io("qcow2", "vm.qcow2", &["write -c -P 3 1M 64k", "write -P 4 2M 64k"]);
    folder.img(&["snapshot", "-c", "monday", "vm.qcow2"]);
    folder.qmerge(&["check", "--data", "vm.qcow2"]).ok().says("All data can be read.");
    let vm = Patch::of(&folder, "vm.qcow2");
    let stream = vm.u64(vm.l2_entry(M)) & ((1 << 54) - 1);
    folder.io("qcow2", "vm.qcow2", &["write -P 5 1M 64k"]);
    folder.qmerge(&["check", "--data", "vm.qcow2"]).ok();
    vm.write(stream, &[0xff; 64]);
    // The tables alone do not tell.
    folder.qmerge(&["check", "vm.qcow2"]).ok();
    let files = folder.files();
    let run = folder.qmerge(&["check", "--data", "vm.qcow2"]).expect(2).says("of the snapshot monday");
    assert!(run.text().contains("64 KiB (65536 bytes) at guest offset 0x100000"), "{run}");
    folder.assert_unchanged(&files, &run);
}
