//! The two scenarios of libvirt's article on merging disk image chains, on images at rest.

use std::fs;
use std::os::unix::fs::FileExt;

use kit::{Lab, View, are_here, qemu_is_here, run};

use crate::support::{Article, binary, lab};

const M: u64 = 1 << 20;

/// Reduces the chain to `base <- c` with the given options and judges the result.
#[track_caller]
fn reduce(format: &'static str, options: &[&str]) {
    let chain = Article::new("reduce", format);
    let folder = &chain.folder;
    let view_at_top = folder.view("qcow2", "b.qcow2");
    let (a, b) = (folder.view("qcow2", "a.qcow2"), &view_at_top);
    assert!(a.first_difference(b, 0, 8 * M).is_some(), "the layers do not differ");

    let mut args = vec!["commit", "c.qcow2"];
    args.extend(options);
    folder.qmerge(&args).ok();

    assert_eq!(folder.chain_of("c.qcow2"), ["c.qcow2", chain.base]);
    assert_eq!(folder.backing_of("c.qcow2"), Some((chain.base.to_owned(), format.to_owned())));
    chain.assert_guest_unchanged();
    chain.base_view().assert_same(&view_at_top, "base holds what top showed");
    chain.check_clean(&["a.qcow2", "b.qcow2", "c.qcow2"]);
}

#[test]
fn a_raw_base_takes_two_layers_by_path() {
    if qemu_is_here() {
        reduce("raw", &["--base", "base.raw", "--top", "b.qcow2"]);
    }
}

#[test]
fn a_raw_base_takes_two_layers_by_index() {
    if qemu_is_here() {
        reduce("raw", &["--base", "[1]", "--top", "[3]"]);
    }
}

#[test]
fn a_raw_base_takes_two_layers_by_disk_and_index() {
    if qemu_is_here() {
        reduce("raw", &["--base=vda[1]", "--top=vda[3]"]);
    }
}

#[test]
fn a_qcow2_base_takes_two_layers_by_path() {
    if qemu_is_here() {
        reduce("qcow2", &["--base", "base.qcow2", "--top", "b.qcow2"]);
    }
}

#[test]
fn a_qcow2_base_takes_two_layers_by_index() {
    if qemu_is_here() {
        reduce("qcow2", &["--base", "vda[1]", "--top", "[3]"]);
    }
}

#[test]
fn base_defaults_to_the_bottom() {
    if qemu_is_here() {
        reduce("qcow2", &["--top", "b.qcow2"]);
    }
}

#[test]
fn verified_layers_merge_alike() {
    if qemu_is_here() {
        reduce("qcow2", &["--top", "b.qcow2", "--verify"]);
        reduce("raw", &["--top", "b.qcow2", "--verify"]);
    }
}

#[test]
fn reducing_again_answers_already_merged_and_changes_nothing() {
    if !qemu_is_here() {
        return;
    }
    for format in ["raw", "qcow2"] {
        let chain = Article::new("again", format);
        let folder = &chain.folder;
        let args = ["commit", "c.qcow2", "--base", chain.base, "--top", "b.qcow2"];
        folder.qmerge(&args).ok();
        let before = folder.files();
        let again = folder.qmerge(&args).ok().says("already merged");
        folder.assert_unchanged(&before, &again);
        for merged in ["a.qcow2", "b.qcow2"] {
            let stale = folder.qmerge(&["commit", merged]).ok().says("already merged");
            folder.assert_unchanged(&before, &stale);
        }
        chain.assert_guest_unchanged();
    }
}

#[test]
fn merging_a_marked_layer_never_brings_old_data_back() {
    if !qemu_is_here() {
        return;
    }
    for format in ["raw", "qcow2"] {
        let chain = Article::new("stale", format);
        let folder = &chain.folder;
        folder.qmerge(&["commit", "c.qcow2", "--top", "b.qcow2"]).ok();
        folder.io("qcow2", "c.qcow2", &["write -P 0x99 0 8M"]);
        folder.qmerge(&["commit", "c.qcow2"]).ok();
        let newer = chain.base_view();
        newer.assert_all(0, 8 * M, 0x99, "base after the second merge");
        for stale in ["a.qcow2", "b.qcow2", "c.qcow2"] {
            folder.qmerge(&["commit", stale]).ok();
            chain.base_view().assert_same(&newer, "base after merging a stale layer");
        }
    }
}

/// Consolidates the whole chain with the given options and judges what is common to all of them.
#[track_caller]
fn consolidate(format: &'static str, options: &[&str]) -> Article {
    let chain = Article::new("consolidate", format);
    let mut args = vec!["commit", "c.qcow2"];
    args.extend(options);
    chain.folder.qmerge(&args).ok();
    chain.base_view().assert_same(&chain.before, "base holds what the guest saw");
    chain.check_clean(&[]);
    chain
}

#[test]
fn after_consolidation_both_names_boot_the_same_disk() {
    if !qemu_is_here() {
        return;
    }
    for format in ["raw", "qcow2"] {
        let chain = consolidate(format, &[]);
        let folder = &chain.folder;
        chain.assert_guest_unchanged();
        assert_eq!(folder.chain_of("c.qcow2"), ["c.qcow2", chain.base]);
        assert_eq!(folder.backing_of("c.qcow2"), Some((chain.base.to_owned(), format.to_owned())));
        chain.check_clean(&["a.qcow2", "b.qcow2", "c.qcow2"]);
        let map = folder.img(&["map", "--output=json", "-f", "qcow2", "c.qcow2"]).json();
        let own = map.as_array().unwrap().iter().filter(|e| e["depth"] == 0 && e["present"] == true);
        assert_eq!(own.count(), 0, "the active image is not empty: {map}");

        let before = folder.files();
        let again = folder.qmerge(&["commit", "c.qcow2"]).ok();
        folder.assert_unchanged(&before, &again);

        // The guest goes on through the name it always had, and that can be merged again.
        folder.io("qcow2", "c.qcow2", &["write -P 0x77 1M 1M"]);
        let newer = chain.active();
        folder.qmerge(&["commit", "c.qcow2"]).ok();
        chain.base_view().assert_same(&newer, "base after the second merge");
        chain.active().assert_same(&newer, "the active image after the second merge");
        chain.check_clean(&["c.qcow2"]);
    }
}

#[test]
fn delete_leaves_only_base() {
    if !qemu_is_here() {
        return;
    }
    for format in ["raw", "qcow2"] {
        let chain = consolidate(format, &["--delete"]);
        assert_eq!(chain.folder.names(), [chain.base]);
    }
}

#[test]
fn delete_of_an_intermediate_merge_leaves_base_and_the_overlay() {
    if !qemu_is_here() {
        return;
    }
    for format in ["raw", "qcow2"] {
        let chain = Article::new("delete", format);
        chain.folder.qmerge(&["commit", "c.qcow2", "--top", "b.qcow2", "--delete"]).ok();
        assert_eq!(chain.folder.names(), [chain.base, "c.qcow2"]);
        chain.assert_guest_unchanged();
        chain.check_clean(&["c.qcow2"]);
    }
}

#[test]
fn keep_active_leaves_the_active_image_as_it_was() {
    if !qemu_is_here() {
        return;
    }
    for format in ["raw", "qcow2"] {
        let chain = Article::new("keep", format);
        let before = chain.folder.files();
        chain.folder.qmerge(&["commit", "c.qcow2", "--keep-active"]).ok();
        assert_eq!(chain.folder.files()["c.qcow2"], before["c.qcow2"]);
        chain.assert_guest_unchanged();
        chain.base_view().assert_same(&chain.before, "base holds what the guest saw");
        chain.check_clean(&["a.qcow2", "b.qcow2", "c.qcow2"]);
    }
}

#[test]
fn shallow_merges_into_the_next_layer_only() {
    if !qemu_is_here() {
        return;
    }
    for format in ["raw", "qcow2"] {
        let chain = Article::new("shallow", format);
        let folder = &chain.folder;
        let before = folder.files();
        folder.qmerge(&["commit", "c.qcow2", "--shallow"]).ok();
        assert_eq!(folder.chain_of("c.qcow2"), ["c.qcow2", "b.qcow2", "a.qcow2", chain.base]);
        chain.assert_guest_unchanged();
        folder.view("qcow2", "b.qcow2").assert_same(&chain.before, "b holds what the guest saw");
        for untouched in ["a.qcow2", chain.base] {
            assert_eq!(folder.files()[untouched], before[untouched], "{untouched}");
        }
        chain.check_clean(&["a.qcow2", "b.qcow2", "c.qcow2"]);
    }
}

#[test]
fn shallow_below_the_active_image_takes_tops_backing_file() {
    if !qemu_is_here() {
        return;
    }
    let chain = Article::new("shallow-top", "qcow2");
    let folder = &chain.folder;
    let before = folder.files();
    let at_top = folder.view("qcow2", "b.qcow2");
    folder.qmerge(&["commit", "c.qcow2", "--top", "b.qcow2", "--shallow"]).ok();
    assert_eq!(folder.chain_of("c.qcow2"), ["c.qcow2", "a.qcow2", chain.base]);
    assert_eq!(folder.files()[chain.base], before[chain.base]);
    folder.view("qcow2", "a.qcow2").assert_same(&at_top, "a holds what b showed");
    chain.assert_guest_unchanged();
    chain.check_clean(&["a.qcow2", "b.qcow2", "c.qcow2"]);
}

#[test]
fn a_dry_run_prints_the_plan_and_changes_nothing() {
    if !qemu_is_here() {
        return;
    }
    for format in ["raw", "qcow2"] {
        let chain = Article::new("dry", format);
        let folder = &chain.folder;
        let before = folder.files();
        for extra in [&[][..], &["--top", "b.qcow2"], &["--shallow"], &["--delete"], &["--keep-active"]] {
            let mut args = vec!["commit", "c.qcow2", "--dry-run"];
            args.extend(extra);
            let plan = folder.qmerge(&args).ok();
            folder.assert_unchanged(&before, &plan);
            assert!(!plan.stdout.trim().is_empty(), "no plan:\n{plan}");
        }
        let plan = folder.qmerge(&["commit", "c.qcow2", "--top", "b.qcow2", "--dry-run"]).ok();
        let plan = plan.says("a.qcow2").says("b.qcow2").says(chain.base);
        assert!(plan.text().contains("restore point"), "restore points are not named:\n{plan}");
    }
}

#[test]
fn json_events_tell_the_plan_and_the_result() {
    if !qemu_is_here() {
        return;
    }
    for format in ["raw", "qcow2"] {
        let chain = Article::new("json", format);
        let run = chain.folder.qmerge(&["commit", "c.qcow2", "--top", "b.qcow2", "--verify", "--json"]).ok();
        let events = run.json_lines();
        let of_kind = |kind: &str| events.iter().filter(|event| event["event"] == kind).collect::<Vec<_>>();
        let plan = of_kind("plan");
        assert_eq!(plan.len(), 1, "{run}");
        for (key, name) in [("base", chain.base), ("top", "b.qcow2"), ("active", "c.qcow2")] {
            let value = plan[0][key].as_str().unwrap_or_else(|| panic!("no {key}:\n{run}"));
            assert!(value.ends_with(name), "{key} is {value}:\n{run}");
        }
        for key in ["bytes-to-copy", "bytes-to-zero", "clusters-to-allocate", "base-file-size-after"] {
            assert!(plan[0][key].is_u64(), "no {key}:\n{run}");
        }
        assert!(plan[0]["bytes-to-copy"].as_u64().unwrap() > 0, "{run}");
        let obsolete = plan[0]["obsolete"].as_array().unwrap_or_else(|| panic!("no obsolete:\n{run}"));
        assert_eq!(obsolete.len(), 2, "{run}");
        let result = events.last().unwrap();
        assert_eq!(result["event"], "result", "{run}");
        assert!(result["seconds"].is_number() && result["digest"].is_string(), "{run}");
    }
}

#[test]
fn json_errors_carry_kind_message_hint_and_exit_code() {
    if !qemu_is_here() {
        return;
    }
    let chain = Article::new("json-error", "qcow2");
    fs::remove_file(chain.folder.join("a.qcow2")).unwrap();
    let run = chain.folder.qmerge(&["commit", "c.qcow2", "--json"]);
    assert_ne!(run.code, 0, "{run}");
    let events = run.json_lines();
    let error = events.last().unwrap();
    assert_eq!(error["event"], "error", "{run}");
    assert_eq!(error["exit-code"].as_i64(), Some(run.code.into()), "{run}");
    for key in ["kind", "message", "hint"] {
        assert!(error[key].as_str().is_some_and(|text| !text.is_empty()), "no {key}:\n{run}");
    }
    assert!(error["message"].as_str().unwrap().contains("a.qcow2"), "{run}");
}

#[test]
fn the_chain_is_found_from_any_folder() {
    if !qemu_is_here() {
        return;
    }
    let chain = Article::new("elsewhere", "raw");
    let elsewhere = lab("cwd");
    let active = chain.folder.arg("c.qcow2");
    let (base, top) = (chain.folder.arg("base.raw"), chain.folder.arg("b.qcow2"));
    let args = ["commit", &active, "--base", &base, "--top", &top];
    run(elsewhere.dir(), binary(), &args).ok();
    assert_eq!(chain.folder.backing_of("c.qcow2"), Some(("base.raw".into(), "raw".into())));
    chain.assert_guest_unchanged();
    run(elsewhere.dir(), binary(), &["commit", &active]).ok();
    chain.assert_guest_unchanged();
    assert!(elsewhere.names().is_empty());
}

#[test]
fn info_lists_the_chain_with_indexes_from_the_bottom() {
    if !qemu_is_here() {
        return;
    }
    let chain = Article::new("info", "raw");
    let before = chain.folder.files();
    let run = chain.folder.qmerge(&["info", "c.qcow2", "--chain", "--json"]).ok();
    chain.folder.assert_unchanged(&before, &run);
    let layers = run.json();
    let layers = layers.as_array().unwrap_or_else(|| panic!("no array:\n{run}"));
    let found: Vec<_> = layers.iter().map(|layer| layer["index"].as_u64()).collect();
    assert_eq!(found, [Some(4), Some(3), Some(2), Some(1)], "{run}");
    let theirs = chain.folder.img(&["info", "--backing-chain", "--output=json", "c.qcow2"]).json();
    for (ours, theirs) in layers.iter().zip(theirs.as_array().unwrap()) {
        for key in ["format", "virtual-size", "cluster-size", "backing-filename", "backing-filename-format"] {
            assert_eq!(ours[key], theirs[key], "{key}:\n{run}");
        }
    }
    chain.folder.qmerge(&["info", "c.qcow2", "--chain"]).ok().says("base.raw").says("[1]").says("[4]");
}

/// The backing name that `c` has after `a` went into base, when it named `old` before.
#[track_caller]
fn renamed(base: &str, old: impl Fn(&Lab) -> String) -> (Lab, String) {
    let folder = lab("names");
    fs::create_dir(folder.join("sub")).unwrap();
    folder.create(base, M, "");
    folder.io("qcow2", &folder.arg(base), &["write -P 1 0 1M"]);
    folder.overlay("a.qcow2", &folder.arg(base), "qcow2", None, "");
    folder.io("qcow2", "a.qcow2", &["write -P 2 64k 64k"]);
    folder.overlay("c.qcow2", "a.qcow2", "qcow2", None, "");
    folder.img(&["rebase", "-u", "-b", &old(&folder), "-F", "qcow2", "c.qcow2"]);
    folder.io("qcow2", "c.qcow2", &["write -P 3 128k 64k"]);
    let before = folder.view("qcow2", "c.qcow2");
    folder.qmerge(&["commit", "c.qcow2", "--top", "[2]"]).ok();
    folder.view("qcow2", "c.qcow2").assert_same(&before, "the guest's view");
    folder.check_clean("c.qcow2");
    let (name, format) = folder.backing_of("c.qcow2").unwrap();
    assert_eq!(format, "qcow2");
    (folder, name)
}

#[test]
fn a_relative_name_stays_relative() {
    if qemu_is_here() {
        assert_eq!(renamed("base.qcow2", |_| "a.qcow2".into()).1, "base.qcow2");
        assert_eq!(renamed("sub/base.qcow2", |_| "a.qcow2".into()).1, "sub/base.qcow2");
        assert_eq!(renamed("base.qcow2", |_| "sub/../a.qcow2".into()).1, "base.qcow2");
    }
}

#[test]
fn an_absolute_name_stays_absolute() {
    if qemu_is_here() {
        let (folder, name) = renamed("base.qcow2", |folder| folder.arg("a.qcow2"));
        assert_eq!(name, folder.arg("base.qcow2"));
    }
}

#[test]
fn a_json_name_becomes_a_plain_path() {
    if qemu_is_here() {
        let json = |folder: &Lab| {
            let file = folder.arg("a.qcow2");
            format!("json:{{\"driver\":\"qcow2\",\"file\":{{\"driver\":\"file\",\"filename\":\"{file}\"}}}}")
        };
        let (_, name) = renamed("base.qcow2", json);
        assert!(!name.starts_with("json:"), "{name}");
    }
}

#[test]
fn a_file_name_with_protocol_becomes_a_plain_path() {
    if qemu_is_here() {
        let (_, name) = renamed("base.qcow2", |folder| format!("file:{}", folder.arg("a.qcow2")));
        assert!(!name.starts_with("file:"), "{name}");
    }
}

#[test]
fn a_name_with_a_colon_is_no_protocol() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("colon");
    folder.create("./ba:se.qcow2", M, "");
    folder.io("qcow2", "./ba:se.qcow2", &["write -P 1 0 1M"]);
    folder.overlay("a.qcow2", "./ba:se.qcow2", "qcow2", None, "");
    folder.io("qcow2", "a.qcow2", &["write -P 2 64k 64k"]);
    folder.overlay("c.qcow2", "a.qcow2", "qcow2", None, "");
    let before = folder.view("qcow2", "c.qcow2");
    folder.qmerge(&["commit", "c.qcow2", "--top", "a.qcow2"]).ok();
    folder.view("qcow2", "c.qcow2").assert_same(&before, "the guest's view");
    assert_eq!(folder.backing_of("c.qcow2"), Some(("./ba:se.qcow2".into(), "qcow2".into())));
}

#[test]
fn symlinks_resolve_from_the_overlay_as_named() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("symlink");
    fs::create_dir(folder.join("store")).unwrap();
    folder.create("store/base.qcow2", M, "");
    folder.io("qcow2", "store/base.qcow2", &["write -P 1 0 1M"]);
    std::os::unix::fs::symlink("store/base.qcow2", folder.join("link.qcow2")).unwrap();
    folder.overlay("a.qcow2", "link.qcow2", "qcow2", None, "");
    folder.overlay("c.qcow2", "a.qcow2", "qcow2", None, "");
    folder.io("qcow2", "a.qcow2", &["write -P 2 64k 64k"]);
    let before = folder.view("qcow2", "c.qcow2");
    folder.qmerge(&["commit", "c.qcow2", "--base", "link.qcow2", "--top", "a.qcow2"]).ok();
    folder.view("qcow2", "c.qcow2").assert_same(&before, "the guest's view");
    folder.view("qcow2", "store/base.qcow2").assert_same(&before, "base, c being empty");
    assert!(folder.join("link.qcow2").is_symlink());
    folder.check_clean("c.qcow2");
}

/// The article's chain with an ext4 file system inside, changed by adding, growing and removing files.
struct FileSystem {
    folder: Lab,
    base: &'static str,
    format: &'static str,
}

impl FileSystem {
    fn new(format: &'static str) -> Self {
        let folder = lab("ext4");
        let disk = folder.scratch();
        let disk_name = disk.to_str().unwrap().to_owned();
        let here = folder.dir();
        run(here, "truncate", &["-s", "24M", &disk_name]).ok();
        run(here, "mkfs.ext4", &["-q", "-F", &disk_name]).ok();
        let base = if format == "raw" { "base.raw" } else { "base.qcow2" };
        folder.img(&["convert", "-f", "raw", "-O", format, &disk_name, base]);
        let layers = [("a.qcow2", base), ("b.qcow2", "a.qcow2"), ("c.qcow2", "b.qcow2")];
        for (seq, (name, backing)) in layers.into_iter().enumerate() {
            folder.overlay(name, backing, if seq == 0 { format } else { "qcow2" }, None, "");
            let before = folder.view(if seq == 0 { format } else { "qcow2" }, backing);
            change_files(&folder, &disk_name, seq);
            write_difference(&folder, name, &before, &View::new(disk.clone()));
        }
        folder.view("qcow2", "c.qcow2").assert_same(&View::new(disk), "the chain holds the file system");
        Self { folder, base, format }
    }

    /// Fails unless `e2fsck` finds nothing to do, and the files are there.
    #[track_caller]
    fn check(&self, name: &str, format: &str, last: usize) {
        let view = self.folder.view(format, name);
        let here = self.folder.dir();
        run(here, "e2fsck", &["-fn", view.arg()]).ok();
        let stat = run(here, "debugfs", &["-R", &format!("cat note-{last}"), view.arg()]).ok();
        assert_eq!(stat.stdout, note(last), "note-{last} in {name}");
        if last > 0 {
            let removed = run(here, "debugfs", &["-R", &format!("stat big-{}", last - 1), view.arg()]);
            assert!(removed.text().contains("not found"), "big-{} is still there:\n{removed}", last - 1);
        }
    }
}

fn note(seq: usize) -> String {
    format!("written in layer {seq}\n").repeat(2000)
}

/// Adds a note and a large file, and removes the large file of the layer below.
fn change_files(folder: &Lab, disk: &str, seq: usize) {
    let (note_file, big_file) = (folder.scratch(), folder.scratch());
    fs::write(&note_file, note(seq)).unwrap();
    fs::write(&big_file, vec![seq as u8 + 1; 900_000]).unwrap();
    let mut commands = format!("write {} note-{seq}\n", note_file.display());
    commands += &format!("write {} big-{seq}\nmkdir folder-{seq}\n", big_file.display());
    if seq > 0 {
        commands += &format!("rm big-{}\n", seq - 1);
    }
    let script = folder.scratch();
    fs::write(&script, commands).unwrap();
    run(folder.dir(), "debugfs", &["-w", "-f", script.to_str().unwrap(), disk]).ok();
    run(folder.dir(), "e2fsck", &["-fn", disk]).ok();
}

/// Writes into an overlay the 4 KiB blocks in which two disks differ.
fn write_difference(folder: &Lab, overlay: &str, before: &View, after: &View) {
    const BLOCK: u64 = 4096;
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for block in 0..after.len() / BLOCK {
        let at = block * BLOCK;
        if before.bytes(at, BLOCK as usize) != after.bytes(at, BLOCK as usize) {
            match runs.last_mut() {
                Some((start, len)) if *start + *len == at => *len += BLOCK,
                _ => runs.push((at, BLOCK)),
            }
        }
    }
    assert!(!runs.is_empty(), "nothing changed for {overlay}");
    let mut commands = Vec::new();
    for (at, len) in runs {
        let piece = folder.scratch();
        let file = fs::File::create(&piece).unwrap();
        file.write_all_at(&after.bytes(at, len as usize), 0).unwrap();
        commands.push(format!("write -s {} {at} {len}", piece.display()));
    }
    let commands: Vec<_> = commands.iter().map(String::as_str).collect();
    folder.io("qcow2", overlay, &commands);
}

fn file_system_tools() -> bool {
    are_here(&["qemu-img", "qemu-io", "mkfs.ext4", "debugfs", "e2fsck"])
}

#[test]
fn a_file_system_survives_the_shorter_chain() {
    if !file_system_tools() {
        return;
    }
    for format in ["raw", "qcow2"] {
        let disk = FileSystem::new(format);
        let before = disk.folder.view("qcow2", "c.qcow2");
        disk.folder.qmerge(&["commit", "c.qcow2", "--base", disk.base, "--top", "b.qcow2"]).ok();
        disk.folder.view("qcow2", "c.qcow2").assert_same(&before, "the guest's view");
        disk.check("c.qcow2", "qcow2", 2);
        // Base by itself is what b showed: a sound file system without c's files.
        disk.check(disk.base, disk.format, 1);
        disk.folder.qmerge(&["commit", "c.qcow2"]).ok();
        disk.check("c.qcow2", "qcow2", 2);
        disk.check(disk.base, disk.format, 2);
    }
}

#[test]
fn a_file_system_survives_consolidation() {
    if !file_system_tools() {
        return;
    }
    for format in ["raw", "qcow2"] {
        let disk = FileSystem::new(format);
        let before = disk.folder.view("qcow2", "c.qcow2");
        disk.folder.qmerge(&["commit", "c.qcow2"]).ok();
        disk.folder.view(disk.format, disk.base).assert_same(&before, "base");
        disk.check("c.qcow2", "qcow2", 2);
        disk.check(disk.base, disk.format, 2);
    }
}

#[test]
fn a_file_system_survives_flattening() {
    if !file_system_tools() {
        return;
    }
    let disk = FileSystem::new("qcow2");
    let before = disk.folder.files();
    for format in ["raw", "qcow2"] {
        let run = disk.folder.qmerge(&["flatten", "c.qcow2", "-o", "flat", "--to", format]).ok();
        disk.check("flat", format, 2);
        fs::remove_file(disk.folder.join("flat")).unwrap();
        disk.folder.assert_unchanged(&before, &run);
    }
}
