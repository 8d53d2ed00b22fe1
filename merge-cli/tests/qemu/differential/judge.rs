//! What must hold of a random chain before and after its merge.

use serde_json::Value;

use super::generate::{MergeCase, RandomLayer};
use kit::{Files, Run, View};

/// Our reading of the chain equals QEMU's, and changes nothing.
#[track_caller]
pub(super) fn reading(case: &MergeCase) {
    let folder = &case.folder;
    let before = folder.files();
    let active = &case.active().name;
    let gold = folder.view("qcow2", active);

    let run = folder.qmerge(&["compare", active, gold.arg()]);
    assert!(run.code == 0, "{case}our reading differs from QEMU's:\n{run}");
    let run = folder.qmerge(&["map", active, "--json"]);
    assert!(run.code == 0, "{case}{run}");
    let theirs = folder.img(&["map", "--output=json", "-f", "qcow2", active]);
    assert_same_map(case, &run, &theirs);

    for layer in case.layers.iter().filter(|layer| layer.format == "qcow2") {
        let theirs = folder.try_img(&["check", "--output=json", "-f", "qcow2", &layer.name]);
        assert!(theirs.code == 0, "{case}the generator made a damaged image:\n{theirs}");
        let ours = folder.qmerge(&["check", &layer.name, "--json"]);
        assert!(ours.code == 0, "{case}{ours}");
        assert_same_check(case, layer, &ours, &theirs);
    }
    if let Some(format) = case.flatten {
        let target = folder.scratch();
        let target = target.to_str().unwrap();
        let run = folder.qmerge(&["flatten", active, "-o", target, "--to", format]);
        assert!(run.code == 0, "{case}{run}");
        if format == "qcow2" {
            folder.check_clean(target);
        }
        folder.view(format, target).assert_same(&gold, &format!("{case}the flattened image"));
    }
    let after = folder.files();
    assert!(before == after, "{case}reading changed the files");
}

/// The merge does what was asked, and nothing else.
#[track_caller]
pub(super) fn merging(case: &MergeCase) {
    let folder = &case.folder;
    let count = case.layers.len();
    let base = &case.layers[case.base];
    let views: Vec<_> = case.layers[case.top..].iter().map(|layer| view(case, layer)).collect();
    let base_before = view(case, base);
    let snapshots = snapshots(case);
    let files = folder.files();
    let args = case.arguments();
    let args: Vec<_> = args.iter().map(String::as_str).collect();

    if case.base_cannot_grow() {
        folder.refused(&args, &[6]);
        return;
    }
    if case.dry_run_first {
        let mut args = args.clone();
        args.push("--dry-run");
        let run = folder.qmerge(&args);
        assert!(run.code == 0, "{case}{run}");
        assert!(folder.files() == files, "{case}a dry run changed the files:\n{run}");
    }
    let run = folder.qmerge(&args);
    assert!(run.code == 0, "{case}{run}");

    // What the guest sees, through every name that is still good.
    let gone = case.delete;
    for (index, before) in (case.top..count).zip(&views) {
        if gone && index == case.top {
            continue;
        }
        let name = &case.layers[index].name;
        let (after, what) = (view(case, &case.layers[index]), format!("{case}the view through {name}"));
        if index == case.top && !case.consolidates() && after.len() > before.len() {
            // Emptied, it is as large as the active image.
            after.assert_same_range(before, 0, before.len(), &what);
        } else {
            after.assert_same(before, &what);
        }
    }
    judge_base(case, &base_before, &views[0]);
    for (layer, snapshot, before) in &snapshots {
        let what = format!("{case}snapshot {snapshot} of {layer}");
        // QEMU shows a snapshot in the size that the image has now.
        folder.snapshot_view(layer, snapshot).assert_same_range(before, 0, before.len(), &what);
    }
    judge_files(case, &files);
    judge_chain(case);
    for layer in kept_bitmaps(case) {
        judge_bitmaps(case, layer);
    }

    if !case.delete {
        let after = folder.files();
        let args = case.arguments_by_path();
        let args: Vec<_> = args.iter().map(String::as_str).collect();
        let again = folder.qmerge(&args);
        assert!(again.code == 0, "{case}the same command again:\n{again}");
        if case.keep_active {
            view(case, case.active()).assert_same(&views[0], &format!("{case}the same command again"));
        } else {
            assert!(folder.files() == after, "{case}the same command again changed the files:\n{again}");
        }
    }
}

fn view(case: &MergeCase, layer: &RandomLayer) -> View {
    case.folder.view(layer.format, &layer.name)
}

fn snapshots(case: &MergeCase) -> Vec<(&str, &str, View)> {
    let all = case.layers.iter().flat_map(|layer| layer.snapshots.iter().map(move |name| (layer, name)));
    all.map(|(layer, name)| (&*layer.name, &**name, case.folder.snapshot_view(&layer.name, name))).collect()
}

/// Base holds what top showed, and keeps its old tail where nothing lies over it.
#[track_caller]
fn judge_base(case: &MergeCase, before: &View, at_top: &View) {
    let after = view(case, &case.layers[case.base]);
    after.assert_same_range(at_top, 0, at_top.len(), &format!("{case}base against top's view"));
    let len = before.len().max(at_top.len());
    assert!(after.len() == len, "{case}base has {} bytes instead of {len}", after.len());
    if case.consolidates() {
        let what = format!("{case}base's old tail");
        after.assert_same_range(before, at_top.len(), len, &what);
    }
}

/// Files outside the plan are byte-identical, deleted ones are gone, what is left is sound.
#[track_caller]
fn judge_files(case: &MergeCase, before: &Files) {
    let after = case.folder.files();
    for (index, layer) in case.layers.iter().enumerate() {
        let merged = index > case.base && index <= case.top;
        let above_top = index == case.top + 1;
        let files = [Some(&layer.name), layer.data_file.as_ref()];
        for name in files.into_iter().flatten() {
            if merged && case.delete {
                if *name == layer.name {
                    assert!(!after.contains_key(name), "{case}{name} was not deleted");
                }
                continue;
            }
            assert!(after.contains_key(name), "{case}{name} is gone");
            // Base takes data, merged layers become empty overlays on it, with their data files, unless the active image is
            // kept, the overlay above top gets a new backing name; nothing else changes.
            let is_kept = case.keep_active && case.consolidates();
            let written = index == case.base || (merged && !is_kept) || (above_top && *name == layer.name);
            assert!(
                written || before[name] == after[name],
                "{case}{name} was not part of the plan and changed"
            );
        }
        if layer.format == "qcow2" && after.contains_key(&layer.name) {
            let run = case.folder.try_img(&["check", "-f", "qcow2", &layer.name]);
            assert!(run.code == 0, "{case}{run}");
        }
    }
    let known = |name: &String| {
        let mut names = case.layers.iter().flat_map(|layer| [Some(&layer.name), layer.data_file.as_ref()]);
        names.any(|known| known == Some(name))
    };
    let extra: Vec<_> = after.keys().filter(|name| !known(name)).collect();
    assert!(extra.is_empty(), "{case}the merge left {extra:?}");
}

#[track_caller]
fn judge_chain(case: &MergeCase) {
    let count = case.layers.len();
    let above = match case.consolidates() {
        true if case.delete => count..count,
        true if case.keep_active => case.base + 1..count,
        true => count - 1..count,
        false => case.top + 1..count,
    };
    let expected: Vec<_> =
        above.rev().chain((0..=case.base).rev()).map(|index| case.layers[index].name.clone()).collect();
    let first = case.layers.iter().find(|layer| layer.name == expected[0]).unwrap();
    if first.format == "qcow2" {
        let found = case.folder.chain_of(&first.name);
        assert!(found == expected, "{case}the chain is {found:?} instead of {expected:?}");
    }
}

fn kept_bitmaps(case: &MergeCase) -> impl Iterator<Item = &RandomLayer> {
    let kept = move |index: &usize| *index <= case.base || *index > case.top;
    (0..case.layers.len())
        .filter(kept)
        .map(|index| &case.layers[index])
        .filter(|layer| !layer.bitmaps.is_empty())
}

/// Bitmaps of base and of layers outside the merge are still there and consistent.
#[track_caller]
fn judge_bitmaps(case: &MergeCase, layer: &RandomLayer) {
    let info = case.folder.img(&["info", "-U", "--output=json", "-f", "qcow2", &layer.name]).json();
    let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
    for name in &layer.bitmaps {
        let found = bitmaps.iter().find(|bitmap| bitmap["name"] == Value::String(name.clone()));
        let found = found.unwrap_or_else(|| panic!("{case}bitmap {name} of {} is lost", layer.name));
        let in_use = found["flags"].as_array().unwrap().iter().any(|flag| flag == "in-use");
        assert!(!in_use, "{case}bitmap {name} of {} is inconsistent", layer.name);
    }
}

/// One entry of a map, as both programs print it.
struct MapEntry<'a> {
    start: u64,
    end: u64,
    fields: &'a Value,
}

fn entries(value: &Value) -> Vec<MapEntry<'_>> {
    let entry = |fields: &'_ Value| (fields["start"].as_u64().unwrap(), fields["length"].as_u64().unwrap());
    // QEMU prints one entry without length for an empty disk.
    let all = value.as_array().unwrap().iter().filter(|fields| fields["length"] != 0);
    all.map(|fields| {
        let (start, length) = entry(fields);
        MapEntry { start, end: start + length, fields }
    })
    .collect()
}

/// Both maps say the same of every byte; the holes of raw files are the file system's affair.
#[track_caller]
fn assert_same_map(case: &MergeCase, ours: &Run, theirs: &Run) {
    let (our_map, their_map) = (ours.json(), theirs.json());
    let (our_map, their_map) = (entries(&our_map), entries(&their_map));
    let (mut i, mut j, mut at) = (0, 0, 0);
    while i < our_map.len() && j < their_map.len() {
        let (a, b) = (&our_map[i], &their_map[j]);
        assert!(a.start <= at && b.start <= at, "{case}the map has a gap at {at}:\n{ours}\n{theirs}");
        let same = |key: &str| a.fields[key] == b.fields[key];
        let raw = case.layers.len() as u64 == b.fields["depth"].as_u64().unwrap() + 1
            && case.layers[0].format == "raw"
            && b.fields["present"] == true;
        let offset =
            |entry: &MapEntry<'_>| entry.fields["offset"].as_u64().map(|offset| offset + (at - entry.start));
        // Where no data is read from the file, a place in it tells nothing, and QEMU is of two minds about naming it.
        let placed = b.fields["present"] == true && b.fields["zero"] == false;
        let agree = if raw {
            same("depth") && same("present")
        } else {
            ["depth", "present", "zero", "data", "compressed"].iter().all(|key| same(key))
                && (!placed || offset(a) == offset(b))
        };
        let (a, b) = (a.fields, b.fields);
        assert!(agree, "{case}the maps differ at {at}: ours {a}, QEMU's {b}\n{ours}\n{theirs}");
        at = our_map[i].end.min(their_map[j].end);
        i += usize::from(our_map[i].end == at);
        j += usize::from(their_map[j].end == at);
    }
    assert!(i == our_map.len() && j == their_map.len(), "{case}the maps end apart:\n{ours}\n{theirs}");
}

#[track_caller]
fn assert_same_check(case: &MergeCase, layer: &RandomLayer, ours: &Run, theirs: &Run) {
    let (our_report, their_report) = (ours.json(), theirs.json());
    let keys = [
        "corruptions",
        "leaks",
        "check-errors",
        "total-clusters",
        "allocated-clusters",
        "compressed-clusters",
        "image-end-offset",
    ];
    for key in keys {
        let number = |report: &Value| report[key].as_u64().unwrap_or(0);
        let (a, b) = (number(&our_report), number(&their_report));
        // A zero cluster in the first place of a data file: QEMU cannot tell its place from none.
        let ambiguous = layer.data_file.is_some() && key == "allocated-clusters" && a == b + 1;
        assert!(a == b || ambiguous, "{case}check reports {key} {a}, QEMU {b}:\n{ours}\n{theirs}");
    }
    assert!(our_report["format"] == "qcow2", "{case}{ours}");
}
