//! Images outside the chain that read through what a merge writes.

use std::fs;

use kit::{Lab, qemu_is_here};

use crate::support::lab;

const M: u64 = 1 << 20;

/// `base <- a <- c`, and a sibling made by `add`.
fn family(name: &str, add: impl Fn(&Lab)) -> Lab {
    let folder = lab(name);
    folder.create("base.qcow2", M, "");
    folder.io("qcow2", "base.qcow2", &["write -P 1 0 1M"]);
    folder.overlay("a.qcow2", "base.qcow2", "qcow2", None, "");
    folder.overlay("c.qcow2", "a.qcow2", "qcow2", None, "");
    folder.io("qcow2", "a.qcow2", &["write -P 2 0 128k"]);
    folder.io("qcow2", "c.qcow2", &["write -P 3 64k 128k"]);
    add(&folder);
    folder
}

/// Every way of merging into base is refused and names the sibling.
#[track_caller]
fn all_merges_name(folder: &Lab, sibling: &str) {
    folder.refused(&["commit", "c.qcow2"], &[6]).says(sibling).says("--allow-shared-base");
    folder.refused(&["commit", "c.qcow2", "--top", "a.qcow2"], &[6]).says(sibling);
}

#[test]
fn an_overlay_beside_the_chain_that_uses_base_is_found() {
    if qemu_is_here() {
        let folder =
            family("sibling", |folder| folder.overlay("other.qcow2", "base.qcow2", "qcow2", None, ""));
        all_merges_name(&folder, "other.qcow2");
        folder.refused(&["commit", "c.qcow2", "--dry-run"], &[0, 6]);
    }
}

#[test]
fn an_overlay_of_a_merged_layer_is_found() {
    if qemu_is_here() {
        let folder = family("cousin", |folder| folder.overlay("other.qcow2", "a.qcow2", "qcow2", None, ""));
        all_merges_name(&folder, "other.qcow2");
    }
}

#[test]
fn an_overlay_of_the_active_image_goes_on_to_see_the_same() {
    if qemu_is_here() {
        let folder = family("child", |folder| folder.overlay("d.qcow2", "c.qcow2", "qcow2", None, ""));
        // It reads through the active image, which becomes an empty overlay on base: it sees the same as before.
        let before = folder.view("qcow2", "d.qcow2");
        folder.refused(&["commit", "c.qcow2", "--delete"], &[6]).says("d.qcow2");
        folder.qmerge(&["commit", "c.qcow2"]).ok();
        folder.view("qcow2", "d.qcow2").assert_same(&before, "the overlay above");
    }
}

#[test]
fn siblings_are_found_however_they_name_base() {
    if !qemu_is_here() {
        return;
    }
    let json = |path: String| {
        format!("json:{{\"driver\":\"qcow2\",\"file\":{{\"driver\":\"file\",\"filename\":\"{path}\"}}}}")
    };
    for style in ["absolute", "dots", "symlink", "json", "file", "version 2", "no format"] {
        let folder = family("names", |folder| {
            let mut compat = "compat=1.1";
            let backing = match style {
                "absolute" => folder.arg("base.qcow2"),
                "dots" => "../images/./base.qcow2".to_owned(),
                "symlink" => {
                    std::os::unix::fs::symlink("base.qcow2", folder.join("link.qcow2")).unwrap();
                    "link.qcow2".to_owned()
                }
                "json" => json(folder.arg("base.qcow2")),
                "file" => format!("file:{}", folder.arg("base.qcow2")),
                "version 2" => {
                    compat = "compat=0.10";
                    "base.qcow2".to_owned()
                }
                _ => "base.qcow2".to_owned(),
            };
            folder.overlay("other.img", &backing, "qcow2", None, compat);
            if style == "no format" {
                crate::traps::forget_backing_format(folder, "other.img");
            }
        });
        let run = folder.refused(&["commit", "c.qcow2"], &[6]);
        assert!(run.text().contains("other.img"), "{style}:\n{run}");
    }
}

#[test]
fn a_hard_link_of_base_is_base() {
    if qemu_is_here() {
        let folder = family("hard-link", |folder| {
            fs::hard_link(folder.join("base.qcow2"), folder.join("same.qcow2")).unwrap();
            folder.overlay("other.qcow2", "same.qcow2", "qcow2", None, "");
        });
        folder.refused(&["commit", "c.qcow2"], &[6]).says("other.qcow2");
    }
}

#[test]
fn the_sibling_guard_can_be_told_otherwise() {
    if qemu_is_here() {
        let folder =
            family("allowed", |folder| folder.overlay("other.qcow2", "base.qcow2", "qcow2", None, ""));
        folder.merge("c.qcow2", &["--allow-shared-base"]);
    }
}

#[test]
fn other_folders_are_searched_when_named() {
    if !qemu_is_here() {
        return;
    }
    let elsewhere = lab("elsewhere");
    let folder = family("scan", |folder| {
        elsewhere.overlay("other.qcow2", &folder.arg("base.qcow2"), "qcow2", None, "");
    });
    let scan = elsewhere.dir().to_str().unwrap();
    folder.refused(&["commit", "c.qcow2", "--scan", scan], &[6]).says("other.qcow2");
    folder.merge("c.qcow2", &[]);
}

#[test]
fn layers_in_other_folders_bring_their_folders_into_the_search() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("folders");
    fs::create_dir(folder.join("templates")).unwrap();
    fs::create_dir(folder.join("vm")).unwrap();
    folder.create("templates/base.qcow2", M, "");
    folder.overlay("vm/c.qcow2", "../templates/base.qcow2", "qcow2", Some(M), "");
    folder.io("qcow2", "vm/c.qcow2", &["write -P 3 0 64k"]);
    folder.overlay("templates/other.qcow2", "base.qcow2", "qcow2", Some(M), "");
    folder.refused(&["commit", "vm/c.qcow2"], &[6]).says("other.qcow2");
}

#[test]
fn flatten_is_the_way_out_when_base_is_shared() {
    if !qemu_is_here() {
        return;
    }
    let folder = family("way-out", |folder| folder.overlay("other.qcow2", "base.qcow2", "qcow2", None, ""));
    folder.refused(&["commit", "c.qcow2"], &[6]).says("flatten");
    let before = folder.files();
    let gold = folder.view("qcow2", "c.qcow2");
    let run = folder.qmerge(&["flatten", "c.qcow2", "-o", "new.qcow2"]).ok();
    folder.view("qcow2", "new.qcow2").assert_same(&gold, "the new image");
    folder.check_clean("new.qcow2");
    assert_eq!(folder.backing_of("new.qcow2"), None);
    fs::remove_file(folder.join("new.qcow2")).unwrap();
    folder.assert_unchanged(&before, &run);
}

#[test]
fn flatten_above_base_keeps_the_shared_base() {
    if !qemu_is_here() {
        return;
    }
    let folder =
        family("above-base", |folder| folder.overlay("other.qcow2", "base.qcow2", "qcow2", None, ""));
    let gold = folder.view("qcow2", "c.qcow2");
    folder.qmerge(&["flatten", "c.qcow2", "-o", "new.qcow2", "--base", "base.qcow2", "--to", "qcow2"]).ok();
    folder.view("qcow2", "new.qcow2").assert_same(&gold, "the new image");
    assert_eq!(folder.chain_of("new.qcow2"), ["new.qcow2", "base.qcow2"]);
    folder.check_clean("new.qcow2");
}

#[test]
fn flatten_never_replaces_an_input() {
    if !qemu_is_here() {
        return;
    }
    let folder = family("inputs", |_| {});
    for input in ["c.qcow2", "a.qcow2", "base.qcow2", "../images/base.qcow2"] {
        folder.refused(&["flatten", "c.qcow2", "-o", input], &[1, 2, 6]);
    }
}

#[test]
fn delete_spares_what_another_image_uses() {
    if !qemu_is_here() {
        return;
    }
    let folder = family("spare", |folder| folder.overlay("other.qcow2", "a.qcow2", "qcow2", None, ""));
    let run = folder.qmerge(&["commit", "c.qcow2", "--top", "a.qcow2", "--allow-shared-base", "--delete"]);
    assert!(folder.join("a.qcow2").exists(), "a file that other.qcow2 uses was deleted:\n{run}");
    assert!(folder.join("other.qcow2").exists(), "{run}");
}

#[test]
fn merged_layers_left_on_disk_are_no_siblings() {
    if !qemu_is_here() {
        return;
    }
    let folder = family("marked", |_| {});
    folder.merge("c.qcow2", &["--top", "a.qcow2"]);
    folder.io("qcow2", "c.qcow2", &["write -P 4 256k 64k"]);
    folder.merge("c.qcow2", &[]);
    folder.overlay("d.qcow2", "c.qcow2", "qcow2", None, "");
    folder.io("qcow2", "d.qcow2", &["write -P 5 512k 64k"]);
    folder.merge("d.qcow2", &[]);
}

#[test]
fn unrelated_files_beside_the_chain_are_no_siblings() {
    if !qemu_is_here() {
        return;
    }
    let folder = family("unrelated", |folder| {
        folder.create("unrelated.qcow2", M, "");
        folder.overlay("its-overlay.qcow2", "unrelated.qcow2", "qcow2", None, "");
        folder.overlay("orphan.qcow2", "unrelated.qcow2", "qcow2", None, "");
        folder.img(&["rebase", "-u", "-b", "missing.qcow2", "-F", "qcow2", "orphan.qcow2"]);
        fs::write(folder.join("notes.txt"), "base.qcow2\n").unwrap();
        fs::write(folder.join("cut.qcow2"), b"QFI\xfb\0\0\0\x03").unwrap();
        fs::write(folder.join("empty.qcow2"), b"").unwrap();
        fs::create_dir(folder.join("folder.qcow2")).unwrap();
    });
    folder.qmerge(&["commit", "c.qcow2"]).ok();
}

#[test]
fn a_fifo_beside_the_chain_does_not_hang_the_search() {
    if !qemu_is_here() {
        return;
    }
    let folder = family("fifo", |folder| {
        kit::run(folder.dir(), "mkfifo", &["pipe.qcow2"]).ok();
    });
    folder.qmerge(&["commit", "c.qcow2"]).ok();
}

/// Each machine's disk in a folder of its own, and a base for all: `base/b`, `vm1/disk`, `vm2/disk`.
fn machines(name: &str) -> Lab {
    let folder = lab(name);
    for dir in ["base", "vm1", "vm2"] {
        fs::create_dir(folder.join(dir)).unwrap();
    }
    folder.create("base/b", M, "");
    for disk in ["vm1/disk", "vm2/disk"] {
        folder.overlay(disk, "../base/b", "qcow2", Some(M), "");
    }
    folder.io("qcow2", "vm1/disk", &["write -P 3 0 64k"]);
    folder
}

#[test]
fn disks_in_the_folders_beside_are_found_where_base_lies_in_another() {
    if qemu_is_here() {
        machines("machines").refused(&["commit", "vm1/disk"], &[6]).says("vm2/disk");
    }
}

#[test]
fn a_scan_goes_down_into_folders() {
    if !qemu_is_here() {
        return;
    }
    let folder = machines("deep-scan");
    fs::create_dir_all(folder.join("far/a/b")).unwrap();
    fs::rename(folder.join("vm2/disk"), folder.join("far/a/b/disk")).unwrap();
    let run = folder.qmerge(&["commit", "vm1/disk", "-n"]).ok();
    assert!(run.text().contains("searched") && run.text().contains("--scan DIR"), "{run}");
    // Its name leads nowhere from there, and says by its end whose disk it was.
    folder.refused(&["commit", "vm1/disk", "--scan", "far"], &[6]).says("disk");
    let new = folder.arg("base/b");
    folder.img(&["rebase", "-u", "-F", "qcow2", "-b", &new, "far/a/b/disk"]);
    folder.refused(&["commit", "vm1/disk", "--scan", "far"], &[6]).says("far/a/b/disk");
}

#[test]
fn signs_of_other_users_are_told() {
    if !qemu_is_here() {
        return;
    }
    let folder = family("signs", |folder| {
        fs::create_dir(folder.join("backup")).unwrap();
        fs::hard_link(folder.join("base.qcow2"), folder.join("backup/base.qcow2")).unwrap();
    });
    let run = folder.qmerge(&["commit", "c.qcow2", "-n"]).ok();
    assert!(run.text().contains("1 other name, by a hard link"), "{run}");
    let run = folder.qmerge(&["commit", "c.qcow2", "-n", "--scan", "backup"]).ok();
    assert!(run.text().contains("backup/base.qcow2"), "{run}");
}

/// An empty overlay that nobody has marked may be a new disk of another machine: it is a user, which the refusal says. QEMU's
/// own `json:` name of the active image has nothing to do with it.
#[test]
fn an_empty_user_is_told_and_every_way_out_can_be_typed() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("empty-user");
    folder.create("base.qcow2", 4 << 20, "");
    folder.overlay("a.qcow2", "base.qcow2", "qcow2", None, "");
    folder.io("qcow2", "a.qcow2", &["write -P 2 0 64k"]);
    folder.overlay("b.qcow2", "a.qcow2", "qcow2", None, "");
    folder.overlay("c.qcow2", "b.qcow2", "qcow2", None, "");
    folder.io("qcow2", "c.qcow2", &["write -P 4 128k 64k"]);
    let file = |name: &str| {
        let path = folder.arg(name);
        format!(r#""driver":"qcow2","file":{{"driver":"file","filename":"{path}"}}"#)
    };
    let name = format!("json:{{{},\"backing\":{{{}}}}}", file("a.qcow2"), file("base.qcow2"));
    folder.img(&["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", &name, "c.qcow2"]);
    let gold = folder.view("qcow2", "c.qcow2");
    let run = folder.refused(&["commit", "c.qcow2"], &[6]).says("b.qcow2").says("they hold nothing");
    let hints: Vec<&str> =
        run.stderr.lines().filter_map(|line| kit::shell::command(line.strip_prefix("hint: ")?)).collect();
    assert!(hints.len() == 3 && hints.iter().any(|hint| hint.contains("qmerge relink")), "{run}");
    for hint in &hints {
        if let Some(typed) = kit::shell::type_line(&folder, hint) {
            assert_eq!(typed.code, 0, "{typed:?}");
        }
    }
    // A plain name changes nothing of that; the user's word does.
    folder.img(&["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "a.qcow2", "c.qcow2"]);
    let run = folder.refused(&["commit", "c.qcow2"], &[6]).says("b.qcow2");
    assert!(!run.text().contains("relink"), "{run}");
    folder.qmerge(&["commit", "c.qcow2", "--allow-shared-base"]).ok();
    folder.view("qcow2", "c.qcow2").assert_same(&gold, "the disk");
}
