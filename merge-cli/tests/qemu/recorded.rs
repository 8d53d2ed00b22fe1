//! Chains that a configuration recorded layer by layer, as libvirt does: QEMU is given each layer with the one below it,
//! whatever the headers say.

use std::os::unix::fs::symlink;

use kit::{Lab, View, qemu_is_here};

use crate::support::lab;

const M: u64 = 1 << 20;
const NAMES: [&str; 6] = ["base", "a.qcow2", "b.qcow2", "c.qcow2", "d.qcow2", "e.qcow2"];

/// A base and `overlays` layers of every kind, each larger than the one below, all of which hide each other.
fn chain(name: &str, format: &str, overlays: usize) -> Lab {
    let folder = lab(name);
    folder.img(&["create", "-q", "-f", format, "base", &(8 * M).to_string()]);
    folder.io(format, "base", &["write -P 0x11 0 8M"]);
    let kinds = [
        "compat=0.10",
        "extended_l2=on",
        "data_file=c.data",
        "cluster_size=4k",
        "refcount_bits=1,compat=1.1",
    ];
    for n in 1..=overlays {
        let (below, below_format) = (NAMES[n - 1], if n == 1 { format } else { "qcow2" });
        folder.overlay(NAMES[n], below, below_format, Some((8 + 2 * n as u64) * M), kinds[n - 1]);
        let (pattern, end) = (0x20 + n, 8 + 2 * n);
        let write = |at: String| format!("write -P {pattern} {at}");
        let commands =
            [write("2M 1M".into()), write(format!("{n}M 192k")), write(format!("{}M 64k", end - 1))];
        folder.io("qcow2", NAMES[n], &commands.iter().map(String::as_str).collect::<Vec<_>>());
    }
    folder
}

/// What QEMU shows of a chain with each layer over the one before.
fn recorded(folder: &Lab, format: &str, overlays: usize) -> View {
    let node = |format: &str, name: &str| {
        let file = folder.arg(name);
        format!(r#""driver":"{format}","file":{{"driver":"file","filename":"{file}"}}"#)
    };
    let mut json = format!("{{{}}}", node(format, "base"));
    for (n, name) in NAMES.iter().enumerate().take(overlays + 1).skip(1) {
        let data = match n {
            3 => format!(r#","data-file":{{"driver":"file","filename":"{}"}}"#, folder.arg("c.data")),
            _ => String::new(),
        };
        json = format!(r#"{{{}{data},"backing":{json}}}"#, node("qcow2", name));
    }
    let out = folder.scratch();
    folder.img(&["convert", "-O", "raw", &format!("json:{json}"), out.to_str().unwrap()]);
    View::new(out)
}

/// The layers from the first to `top` are empty overlays on base, as large as the active image.
fn assert_emptied(folder: &Lab, top: usize, overlays: usize) {
    for name in &NAMES[1..=top] {
        let info = folder.img(&["info", "--output=json", name]).json();
        assert_eq!(info["backing-filename"], "base", "{name}");
        assert_eq!(info["virtual-size"], (8 + 2 * overlays as u64) * M, "{name}");
        let map = folder.img(&["map", "--output=json", name]).json();
        let own = map.as_array().unwrap().iter().filter(|range| range["depth"] == 0 && range["data"] == true);
        assert_eq!(own.count(), 0, "{name} holds data");
        folder.check_clean(name);
    }
}

#[test]
fn a_recorded_chain_of_any_length_shows_the_same() {
    if !qemu_is_here() {
        return;
    }
    for (format, overlays) in [("raw", 1), ("qcow2", 2), ("raw", 3), ("qcow2", 4), ("raw", 5)] {
        let folder = chain("recorded", format, overlays);
        let before = recorded(&folder, format, overlays);
        let active = NAMES[overlays];
        let plan = folder.qmerge(&["commit", active, "--dry-run", "--json"]).ok().json_lines().remove(0);
        assert_eq!(plan["emptied"].as_array().unwrap().len(), overlays, "{plan}");
        assert!(plan["bytes-freed"].as_u64().unwrap() > M && plan["not-emptied"] == serde_json::json!([]));
        folder.merge(active, &[]);
        before.assert_same(&recorded(&folder, format, overlays), "the recorded chain");
        assert_emptied(&folder, overlays, overlays);
        // The guest goes on through the chain of the headers, and is merged again.
        folder.io("qcow2", active, &["write -P 0x77 3M 1M"]);
        let after = folder.view("qcow2", active);
        after.assert_same(&recorded(&folder, format, overlays), "the recorded chain, written to");
        folder.merge(active, &[]);
        after.assert_same(&recorded(&folder, format, overlays), "the recorded chain, merged again");
    }
}

#[test]
fn layers_below_the_active_image_are_emptied_too() {
    if !qemu_is_here() {
        return;
    }
    for (format, overlays) in [("qcow2", 2), ("raw", 4)] {
        let folder = chain("reduced", format, overlays);
        let before = recorded(&folder, format, overlays);
        let (active, top) = (NAMES[overlays], NAMES[overlays - 1]);
        folder.merge(active, &["--top", top]);
        before.assert_same(&recorded(&folder, format, overlays), "the recorded chain");
        assert_emptied(&folder, overlays - 1, overlays);
        // What was emptied before cuts nothing off.
        folder.merge(active, &[]);
        before.assert_same(&recorded(&folder, format, overlays), "the recorded chain, merged");
    }
}

#[test]
fn a_merge_that_is_killed_while_it_empties_shows_the_same_and_can_be_finished() {
    if !qemu_is_here() {
        return;
    }
    let mut kills = 0;
    for call in (9..200).step_by(7) {
        let folder = chain("killed", "qcow2", 3);
        let before = recorded(&folder, "qcow2", 3);
        let killed = folder.killed_at_sync(call, &["commit", "c.qcow2"]);
        before.assert_same(&recorded(&folder, "qcow2", 3), "the recorded chain");
        before.assert_same(&folder.view("qcow2", "c.qcow2"), "the chain of the headers");
        if !killed {
            break;
        }
        kills += 1;
        folder.qmerge(&["commit", "c.qcow2"]).ok();
        before.assert_same(&recorded(&folder, "qcow2", 3), "the recorded chain, finished");
        assert_emptied(&folder, 3, 3);
    }
    assert!(kills > 3, "{kills}");
}

#[test]
fn a_layer_that_keeps_its_data_is_named_before_and_afterwards() {
    if !qemu_is_here() {
        return;
    }
    let folder = chain("kept", "raw", 3);
    folder.overlay("other.qcow2", "b.qcow2", "qcow2", None, "");
    let args = ["commit", "c.qcow2", "--allow-shared-base"];
    let plan = folder.qmerge(&[&args[..], &["--dry-run"]].concat()).ok();
    plan.says("b.qcow2: another image uses it").says("a.qcow2: another image reads through it");
    let lines = folder.qmerge(&[&args[..], &["--json"]].concat()).ok().json_lines();
    for line in [&lines[0], lines.last().unwrap()] {
        let kept: Vec<_> = line["not-emptied"].as_array().unwrap().iter().map(|kept| &kept["file"]).collect();
        assert_eq!(kept, ["b.qcow2", "a.qcow2"], "{line}");
    }
    assert_eq!(folder.backing_of("b.qcow2").unwrap().0, "a.qcow2");
}

#[test]
fn bitmaps_of_the_active_image_stay() {
    if !qemu_is_here() {
        return;
    }
    for args in [&[][..], &["--keep-active"]] {
        let folder = lab("bitmaps");
        folder.create("base.qcow2", M, "");
        folder.overlay("c.qcow2", "base.qcow2", "qcow2", None, "");
        folder.img(&["bitmap", "--add", "c.qcow2", "kept"]);
        folder.io("qcow2", "c.qcow2", &["write -P 1 0 64k"]);
        folder.refused(&["commit", "c.qcow2", "--delete"], &[6]).says("kept");
        folder.merge("c.qcow2", args);
        let info = folder.img(&["info", "--output=json", "c.qcow2"]).json();
        let bitmap = &info["format-specific"]["data"]["bitmaps"][0];
        assert_eq!((&bitmap["name"], &bitmap["flags"]), (&"kept".into(), &serde_json::json!(["auto"])));
        folder.check_clean("c.qcow2");
    }
}

#[test]
fn a_link_to_a_removed_image_goes_with_it() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("link");
    folder.create("base.qcow2", M, "");
    folder.overlay("c.qcow2", "base.qcow2", "qcow2", None, "");
    symlink("c.qcow2", folder.join("disk.qcow2")).unwrap();
    folder.qmerge(&["commit", "disk.qcow2", "--delete"]).ok().says("disk.qcow2").says("c.qcow2");
    assert_eq!(folder.names(), ["base.qcow2"]);
}
