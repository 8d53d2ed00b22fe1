//! What a new user gets wrong: every answer names the file, ends with a hint, and leaves all files as they were.

use std::fs;

use kit::{Lab, Run, are_here, qemu_is_here, run, skipped};

use crate::support::{Article, binary, lab};

const M: u64 = 1 << 20;

#[test]
fn names_that_do_not_exist() {
    if !qemu_is_here() {
        return;
    }
    let chain = Article::new("names", "raw");
    let folder = &chain.folder;
    for verb in ["info", "map", "check", "commit"] {
        folder.refused(&[verb, "nothing.qcow2"], &[1, 2]).says("nothing.qcow2");
    }
    folder.refused(&["compare", "c.qcow2", "nothing.qcow2"], &[2]).says("nothing.qcow2");
    folder.refused(&["flatten", "nothing.qcow2", "-o", "new.raw"], &[1, 2]).says("nothing.qcow2");
    folder.refused(&["flatten", "c.qcow2", "-o", "no-folder/new.raw"], &[1, 2, 6]).says("no-folder");
    folder.refused(&["commit", "."], &[1, 2, 6]);
}

#[test]
fn layers_that_are_not_in_the_chain() {
    if !qemu_is_here() {
        return;
    }
    let chain = Article::new("layers", "qcow2");
    let folder = &chain.folder;
    folder.create("stranger.qcow2", M, "");
    for layer in ["stranger.qcow2", "nothing.qcow2", "[0]", "[5]", "vda[99]", "[x]", "[-1]", "[]", ""] {
        let run = folder.refused(&["commit", "c.qcow2", "--base", layer], &[2]);
        // The answer shows which layers there are.
        assert!(run.text().contains("a.qcow2"), "{run}");
        folder.refused(&["commit", "c.qcow2", "--top", layer], &[2]);
    }
}

#[test]
fn ranges_that_make_no_sense() {
    if !qemu_is_here() {
        return;
    }
    let chain = Article::new("ranges", "qcow2");
    let folder = &chain.folder;
    for (base, top) in
        [("b.qcow2", "a.qcow2"), ("[3]", "[2]"), ("[2]", "[2]"), ("c.qcow2", "c.qcow2"), ("[4]", "[1]")]
    {
        folder.refused(&["commit", "c.qcow2", "--base", base, "--top", top], &[2]);
    }
    folder.refused(&["commit", "c.qcow2", "--top", "base.qcow2"], &[2]);
    folder.refused(&["commit", "c.qcow2", "--base", "c.qcow2"], &[2]);
    folder.refused(&["commit", "c.qcow2", "--shallow", "--base", "a.qcow2"], &[2]);
    folder.refused(&["commit", "c.qcow2", "--delete", "--keep-active"], &[2]);
}

#[test]
fn arguments_that_the_command_does_not_know() {
    if !qemu_is_here() {
        return;
    }
    let chain = Article::new("arguments", "qcow2");
    for args in [
        &["comit", "c.qcow2"][..],
        &["commit"],
        &["commit", "c.qcow2", "--bas", "x"],
        &["info", "c.qcow2", "-f", "vmdk"],
        &[],
    ] {
        let before = chain.folder.files();
        let run = chain.folder.qmerge(args).expect(2);
        chain.folder.assert_unchanged(&before, &run);
        assert!(!run.stderr.trim().is_empty(), "{run}");
    }
    chain.folder.qmerge(&["--help"]).ok().says("commit");
    chain.folder.qmerge(&["commit", "--help"]).ok().says("--shallow");
    chain.folder.qmerge(&["--version"]).ok();
}

#[test]
fn a_missing_layer_is_named_with_the_image_that_names_it() {
    if !qemu_is_here() {
        return;
    }
    for missing in ["a.qcow2", "b.qcow2", "base.raw"] {
        let chain = Article::new("missing", "raw");
        let folder = &chain.folder;
        fs::remove_file(folder.join(missing)).unwrap();
        for args in [&["commit", "c.qcow2"][..], &["map", "c.qcow2"], &["info", "c.qcow2", "--chain"]] {
            let run = folder.refused(args, &[1, 6]);
            let overlay = match missing {
                "base.raw" => "a.qcow2",
                "a.qcow2" => "b.qcow2",
                _ => "c.qcow2",
            };
            assert!(run.text().contains(missing) && run.text().contains(overlay), "{run}");
        }
        folder.qmerge(&["info", "c.qcow2"]).ok();
        folder.refused(&["flatten", "c.qcow2", "-o", "new.raw", "--to", "raw"], &[1, 6]);
    }
}

#[test]
fn an_image_without_backing_file_has_nothing_to_merge() {
    if !qemu_is_here() {
        return;
    }
    let chain = Article::new("single", "qcow2");
    chain.folder.refused_or_ok(&["commit", "base.qcow2"], 2);
    let chain = Article::new("single-raw", "raw");
    chain.folder.refused_or_ok(&["commit", "base.raw"], 2);
}

#[test]
fn files_that_are_no_images() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("no-image");
    fs::write(folder.join("notes.txt"), "not an image\n").unwrap();
    fs::write(folder.join("empty"), "").unwrap();
    fs::write(folder.join("cut.qcow2"), b"QFI\xfb\0\0\0\x03\0\0").unwrap();
    folder.refused(&["info", "cut.qcow2"], &[9]).says("cut.qcow2");
    folder.refused(&["commit", "cut.qcow2"], &[9]).says("cut.qcow2");
    for name in ["notes.txt", "empty"] {
        folder.refused(&["commit", name], &[2, 6, 7]);
        folder.qmerge(&["info", name]).ok().says("raw");
        folder.qmerge(&["check", name]).expect(63);
        folder.refused(&["info", "-f", "qcow2", name], &[7, 9]);
    }
}

#[test]
fn a_base_that_nobody_may_write_is_refused() {
    if !are_here(&["qemu-img", "qemu-io", "chattr"]) {
        return;
    }
    for (victim, options) in
        [("base.raw", &[][..]), ("base.raw", &["--top", "b.qcow2"]), ("c.qcow2", &["--top", "b.qcow2"])]
    {
        let chain = Article::new("immutable", "raw");
        let folder = &chain.folder;
        if run(folder.dir(), "chattr", &["+i", victim]).code != 0 {
            return skipped("files cannot be made immutable here");
        }
        let mut args = vec!["commit", "c.qcow2"];
        args.extend(options);
        let before = folder.files();
        let answer = folder.qmerge(&args);
        let after = folder.files();
        run(folder.dir(), "chattr", &["-i", victim]).ok();
        assert!([1, 6].contains(&answer.code), "{answer}");
        assert!(before == after, "files changed:\n{answer}");
        assert!(answer.text().contains(victim) && answer.last_line().starts_with("hint: "), "{answer}");
    }
}

/// Runs a script as root of a mount namespace of its own, where it may mount what it likes; `None` where it may not.
fn with_mounts(folder: &Lab, script: &str) -> Option<Run> {
    let probe = run(folder.dir(), "unshare", &["-rm", "mount", "-t", "tmpfs", "none", "/mnt"]);
    if probe.code != 0 {
        skipped("mount namespaces are not available here");
        return None;
    }
    Some(run(folder.dir(), "unshare", &["-rm", "sh", "-ec", script]))
}

#[test]
fn a_read_only_file_system_is_refused_before_anything_is_written() {
    if !are_here(&["qemu-img", "qemu-io", "unshare"]) {
        return;
    }
    let chain = Article::new("read-only", "qcow2");
    let before = chain.folder.files();
    let script = format!(
        "mount --bind '{0}' '{0}'; mount -o remount,bind,ro '{0}'; cd '{0}'; exec '{1}' commit c.qcow2",
        chain.folder.dir().display(),
        binary().display()
    );
    let Some(run) = with_mounts(&chain.folder, &script) else { return };
    assert!([1, 6].contains(&run.code), "{run}");
    assert!(run.last_line().starts_with("hint: "), "{run}");
    chain.folder.assert_unchanged(&before, &run);
}

#[test]
fn a_full_disk_is_refused_before_the_first_write() {
    if !are_here(&["qemu-img", "qemu-io", "unshare"]) {
        return;
    }
    for format in ["raw", "qcow2"] {
        // Base lies on a file system of 3 MiB, its overlay of 8 MiB elsewhere.
        let folder = lab("full");
        fs::create_dir(folder.join("small")).unwrap();
        folder.img(&["create", "-q", "-f", format, "base", "8M"]);
        folder.io(format, "base", &["write -P 1 0 64k"]);
        folder.img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-u",
            "-b",
            &folder.arg("small/base"),
            "-F",
            format,
            "top.qcow2",
            "8M",
        ]);
        fs::copy(folder.join("base"), folder.join("small/base")).unwrap();
        folder.io("qcow2", "top.qcow2", &["write -P 2 0 8M"]);
        fs::remove_file(folder.join("small/base")).unwrap();
        let script = format!(
            "mount -t tmpfs -o size=3m none small; cp --sparse=always base small/base
             cksum small/base top.qcow2 > before
             set +e; '{0}' commit top.qcow2; code=$?; set -e
             cksum small/base top.qcow2 > after; cmp before after; exit $code",
            binary().display()
        );
        let Some(run) = with_mounts(&folder, &script) else { return };
        let run = run.expect(8);
        assert!(run.text().contains("small/base"), "{run}");
        assert!(run.last_line().starts_with("hint: "), "{run}");
    }
}

#[test]
fn a_disk_that_is_just_large_enough_is_not_refused() {
    if !are_here(&["qemu-img", "qemu-io", "unshare"]) {
        return;
    }
    let folder = lab("fits");
    fs::create_dir(folder.join("small")).unwrap();
    folder.create("base", 64 * M, "");
    folder.io("qcow2", "base", &["write -P 1 0 2M"]);
    folder.overlay("top.qcow2", &folder.arg("base"), "qcow2", None, "");
    // Over base's own clusters: nothing new is allocated.
    folder.io("qcow2", "top.qcow2", &["write -P 2 0 2M"]);
    folder.img(&["rebase", "-u", "-b", &folder.arg("small/base"), "-F", "qcow2", "top.qcow2"]);
    let script = format!(
        "mount -t tmpfs -o size=3m none small; cp base small/base; '{0}' commit top.qcow2
         qemu-io -r -f qcow2 -c 'read -P 2 0 2M' small/base | grep -v 'verification failed'
         qemu-img check small/base",
        binary().display()
    );
    if let Some(run) = with_mounts(&folder, &script) {
        run.ok();
    }
}

#[test]
fn a_header_without_room_for_the_new_name_is_known_before_any_copying() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("room");
    let long = "x".repeat(200);
    fs::create_dir(folder.join(&long)).unwrap();
    let base = format!("{long}/{}.qcow2", "y".repeat(190));
    folder.create(&base, M, "");
    folder.io("qcow2", &base, &["write -P 1 0 1M"]);
    folder.overlay("a.qcow2", &base, "qcow2", Some(M), "");
    folder.io("qcow2", "a.qcow2", &["write -P 2 0 64k"]);
    folder.overlay("c.qcow2", "a.qcow2", "qcow2", None, "cluster_size=512");
    folder.io("qcow2", "c.qcow2", &["write -P 3 64k 64k"]);
    folder.refused(&["commit", "c.qcow2", "--top", "a.qcow2"], &[6]).says("c.qcow2").says("room");
    // A merge of everything would point c at base, too.
    folder.refused(&["commit", "c.qcow2"], &[6]).says("c.qcow2");
    folder.qmerge(&["commit", "c.qcow2", "--keep-active"]).ok();
}

#[test]
fn quiet_says_nothing() {
    if !qemu_is_here() {
        return;
    }
    let chain = Article::new("quiet", "raw");
    let run = chain.folder.qmerge(&["commit", "c.qcow2", "--top", "b.qcow2", "-q"]).ok();
    assert!(run.text().trim().is_empty(), "{run}");
}

#[test]
fn progress_stays_away_from_standard_output_and_from_pipes() {
    if !qemu_is_here() {
        return;
    }
    let chain = Article::new("progress", "raw");
    let run = chain.folder.qmerge(&["commit", "c.qcow2"]).ok();
    assert!(!run.text().contains('\r') && !run.text().contains('\u{1b}'), "{run}");
}

#[test]
fn the_demo_needs_no_qemu_and_cleans_up() {
    let folder = lab("demo");
    let demo = std::process::Command::new(binary())
        .arg("demo")
        .env("PATH", "")
        .env("TMPDIR", folder.dir())
        .current_dir(folder.dir())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&demo.stdout).into_owned() + &String::from_utf8_lossy(&demo.stderr);
    assert!(demo.status.success(), "{text}");
    assert!(folder.names().is_empty(), "the demo left {:?}", folder.names());
    assert!(text.contains("base") && text.to_lowercase().contains("same"), "{text}");
}
