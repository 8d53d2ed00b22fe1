//! `qmerge check --repair`: what it repairs is sound for QEMU, and the guest's bytes stay.

use kit::{Holder, Lab, qemu_is_here};

use crate::support::{Patch, lab};

/// A folder with `b.qcow2`, 8 MiB with data, a snapshot `one`, and no refcount block any more.
pub(crate) fn damaged(name: &str) -> Lab {
    let folder = lab(name);
    folder.create("b.qcow2", 8 << 20, "");
    folder.io("qcow2", "b.qcow2", &["write -P 1 0 1M", "write -P 2 5M 100k"]);
    folder.img(&["snapshot", "-c", "one", "b.qcow2"]);
    folder.io("qcow2", "b.qcow2", &["write -P 3 512k 1M"]);
    let patch = Patch::of(&folder, "b.qcow2");
    patch.set_u64(patch.refcount_table_offset(), 0);
    folder
}

#[test]
fn a_repair_is_planned_backed_up_made_and_reported() {
    if !qemu_is_here() {
        return;
    }
    let folder = damaged("repair");
    let (disk, snapshot) = (folder.view("qcow2", "b.qcow2"), folder.snapshot_view("b.qcow2", "one"));
    let before = folder.files();
    let plan = folder.qmerge(&["check", "--repair", "all", "--dry-run", "b.qcow2"]).expect(2);
    assert!(plan.stdout.contains("refcounts made anew"), "{plan}");
    assert!(plan.stdout.contains("what remains: 0 corruptions"), "{plan}");
    folder.assert_unchanged(&before, &plan);
    // Lost space is not what is wrong.
    let leaks = folder.qmerge(&["check", "--repair", "leaks", "b.qcow2"]).expect(2);
    folder.assert_unchanged(&before, &leaks);

    let run = folder.qmerge(&["check", "--repair", "all", "--backup", "saved", "--json", "b.qcow2"]).ok();
    let json = run.json();
    assert!(json["corruptions-fixed"].as_u64().unwrap() > 10, "{run}");
    assert_eq!(json["repair"]["refcounts-rebuilt"], true, "{run}");
    assert!(json.get("corruptions").is_none() && json.get("leaks-fixed").is_none(), "{run}");
    assert!(std::fs::read(folder.join("saved")).unwrap().starts_with(b"qmerge-metadata2"));
    folder.check_clean("b.qcow2");
    folder.view("qcow2", "b.qcow2").assert_same(&disk, "the disk");
    folder.snapshot_view("b.qcow2", "one").assert_same(&snapshot, "the snapshot");
    // Nothing is left to do, and an existing backup is not overwritten.
    let run = folder.qmerge(&["check", "--repair", "all", "b.qcow2"]).ok();
    assert!(run.stdout.contains("No errors were found"), "{run}");
    folder.refused(&["check", "--repair", "all", "--backup", "saved", "b.qcow2"], &[1]);
}

#[test]
fn leaks_are_given_back() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("repair-leaks");
    folder.create("b.qcow2", 8 << 20, "");
    folder.io("qcow2", "b.qcow2", &["write -P 1 0 1M"]);
    // The L2 entry is gone, its cluster is not.
    let patch = Patch::of(&folder, "b.qcow2");
    patch.set_u64(patch.l2_table(0), 0);
    folder.qmerge(&["check", "b.qcow2"]).expect(3);
    let run = folder.qmerge(&["check", "--repair", "leaks", "--json", "b.qcow2"]).ok();
    assert_eq!((&run.json()["leaks-fixed"], &run.json()["repair"]["clusters-freed"]), (&1.into(), &1.into()));
    folder.check_clean("b.qcow2");
}

#[test]
fn what_only_could_be_guessed_is_left_and_reported() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("repair-left");
    folder.create("b.qcow2", 8 << 20, "");
    folder.io("qcow2", "b.qcow2", &["write -P 1 0 1M"]);
    let patch = Patch::of(&folder, "b.qcow2");
    patch.set_bits(patch.l2_table(0), 1 << 45);
    let before = folder.files();
    let run = folder.qmerge(&["check", "--repair", "all", "b.qcow2"]).expect(2);
    assert!(run.stdout.contains("nothing freed") && run.stdout.contains("1 corruption"), "{run}");
    folder.assert_unchanged(&before, &run);
}

#[test]
fn an_image_in_use_is_not_repaired() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("repair-in-use");
    folder.create("b.qcow2", 8 << 20, "");
    let holder = Holder::qemu_io(folder.dir(), &["-r", "-f", "qcow2"], "b.qcow2");
    let run = folder.refused(&["check", "--repair", "all", "b.qcow2"], &[5]);
    assert!(run.stderr.contains(&holder.pid().to_string()), "{run}");
}

#[test]
fn a_merge_into_a_dirty_base_names_the_repair_and_goes_on_after_it() {
    if !qemu_is_here() {
        return;
    }
    let folder = damaged("repair-merge");
    Patch::of(&folder, "b.qcow2").set_bits(72, 1);
    folder.overlay("c.qcow2", "b.qcow2", "qcow2", None, "");
    let run = folder.refused(&["commit", "c.qcow2"], &[9]);
    assert_eq!(run.last_line(), "hint: repair it first: qmerge check --repair all b.qcow2");
    folder.qmerge(&["check", "--repair", "all", "b.qcow2"]).ok();
    assert_eq!(Patch::of(&folder, "b.qcow2").u64(72), 0);
    folder.io("qcow2", "c.qcow2", &["write -P 7 3M 64k"]);
    let disk = folder.view("qcow2", "c.qcow2");
    folder.qmerge(&["commit", "c.qcow2"]).ok();
    folder.view("qcow2", "b.qcow2").assert_same(&disk, "the merged disk");
    folder.check_clean("b.qcow2");
}
