//! Images that are not for this engine, at every place where raw could be assumed; file systems without locks; names
//! that are no UTF-8.

use std::fs;

use kit::{Lab, Run, are_here, qemu_is_here, run};

use crate::support::{binary, lab};

const M: u64 = 1 << 20;

/// The formats that `qemu-img` makes, and how it is asked for them.
const FORMATS: &[(&str, &[&str])] = &[
    ("vmdk", &[]),
    ("vmdk", &["-o", "subformat=twoGbMaxExtentFlat"]),
    ("vdi", &[]),
    ("vpc", &[]),
    ("vpc", &["-o", "subformat=fixed,force_size=on"]),
    ("vhdx", &[]),
    ("qed", &[]),
    ("qcow", &[]),
    ("parallels", &[]),
    ("luks", &["--object", "secret,id=s,data=x", "-o", "key-secret=s,iter-time=10"]),
];

/// Calls `f` with a folder that holds `x.img` of each format that this QEMU makes.
fn for_each_format(test: &str, f: impl Fn(&Lab, &str)) {
    let mut made = 0;
    for (format, options) in FORMATS {
        let folder = lab(test);
        let create = [&["create", "-q", "-f", format], *options, &["x.img", "4M"]].concat();
        if folder.try_img(&create).code == 0 {
            f(&folder, format);
            made += 1;
        }
    }
    assert!(made >= 5, "{made}");
}

#[test]
fn a_named_file_of_another_format_is_refused_by_name() {
    if !qemu_is_here() {
        return;
    }
    for_each_format("foreign", |folder, format| {
        for verb in [
            &["flatten", "x.img", "-o", "new.qcow2"][..],
            &["info", "x.img"],
            &["map", "x.img"],
            &["check", "x.img"],
            &["compare", "x.img", "x.img"],
            &["commit", "x.img"],
        ] {
            let run = folder.refused(verb, &[7]);
            assert!(
                run.text().contains(if format == "vpc" { "vhd" } else { format }) || format == "luks",
                "{run}"
            );
            run.says("-f raw");
        }
        folder.qmerge(&["flatten", "-f", "raw", "x.img", "-o", "new.raw", "--to", "raw"]).ok();
    });
}

#[test]
fn a_base_of_another_format_is_never_written() {
    if !qemu_is_here() {
        return;
    }
    for_each_format("foreign-base", |folder, format| {
        folder.img(&["create", "-q", "-f", "qcow2", "-u", "-b", "x.img", "-F", format, "top.qcow2", "4M"]);
        folder.refused(&["commit", "top.qcow2"], &[7]);
        crate::traps::forget_backing_format(folder, "top.qcow2");
        // A fixed VHD, and the parts of a flat VMDK, have no magic in front.
        folder.refused(&["commit", "top.qcow2"], &[6, 7]);
        folder.refused(&["commit", "top.qcow2", "--backing-format", "x.img=raw"], &[6, 7]);
    });
}

#[test]
fn layers_above_another_format_are_merged_into_one_another() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("foreign-bottom");
    folder.img(&["create", "-q", "-f", "vmdk", "x.vmdk", "4M"]);
    folder.io("vmdk", "x.vmdk", &["write -P 9 0 4M"]);
    folder.overlay("a.qcow2", "x.vmdk", "vmdk", None, "");
    folder.overlay("b.qcow2", "a.qcow2", "qcow2", Some(8 * M), "");
    folder.overlay("c.qcow2", "b.qcow2", "qcow2", None, "");
    folder.io("qcow2", "b.qcow2", &["write -P 1 0 128k", "write -z 1M 64k", "write -P 2 6M 64k"]);
    folder.io("qcow2", "c.qcow2", &["write -P 3 64k 64k"]);
    let gold = folder.view("qcow2", "c.qcow2");
    folder.qmerge(&["info", "--chain", "c.qcow2"]).ok().says("vmdk");
    folder.qmerge(&["flatten", "c.qcow2", "-o", "n.qcow2", "--base", "x.vmdk"]).ok();
    folder.view("qcow2", "n.qcow2").assert_same(&gold, "the layers above as one");
    fs::remove_file(folder.join("n.qcow2")).unwrap();
    folder.merge("c.qcow2", &["--base", "a.qcow2", "--top", "b.qcow2", "--verify"]);
    folder.merge("c.qcow2", &["--base", "a.qcow2"]);
    folder.refused(&["commit", "c.qcow2"], &[7]);
    // A cluster that is filled from below would need its bytes.
    folder.overlay("d.qcow2", "a.qcow2", "qcow2", None, "cluster_size=4k");
    folder.io("qcow2", "d.qcow2", &["write -P 4 3M 4k"]);
    folder.refused(&["commit", "d.qcow2", "--base", "a.qcow2", "--allow-shared-base"], &[7]);
}

#[test]
fn without_locks_readers_go_on_and_writers_want_a_word() {
    if !qemu_is_here() || !are_here(&["strace"]) {
        return;
    }
    let folder = lab("no-locks");
    folder.create("base.qcow2", M, "");
    folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, "");
    folder.io("qcow2", "top.qcow2", &["write -P 3 0 64k"]);
    let gold = folder.view("qcow2", "top.qcow2");
    for errno in ["ENOLCK", "EOPNOTSUPP", "ENOSYS", "EINVAL"] {
        let inject = format!("inject=fcntl:error={errno}");
        let qmerge = |args: &[&str]| folder.traced(&["-e", "trace=fcntl", "-e", &inject], args);
        qmerge(&["info", "top.qcow2"]).ok().says("has no locks");
        qmerge(&["map", "top.qcow2"]).ok();
        qmerge(&["check", "top.qcow2"]).ok();
        qmerge(&["compare", "top.qcow2", "top.qcow2"]).ok().says("has no locks");
        qmerge(&["flatten", "top.qcow2", "-o", "n.qcow2"]).ok().says("has no locks");
        fs::remove_file(folder.join("n.qcow2")).unwrap();
        let before = folder.files();
        let refused = qmerge(&["commit", "top.qcow2"]).expect(6).says("--no-lock");
        folder.assert_unchanged(&before, &refused);
    }
    let inject = ["-e", "trace=fcntl", "-e", "inject=fcntl:error=ENOLCK"];
    folder.traced(&inject, &["commit", "top.qcow2", "--no-lock"]).ok().says("has no locks");
    folder.view("qcow2", "top.qcow2").assert_same(&gold, "merged without locks");
    folder.all_clean();
}

/// Whatever point a merge was stopped at: without locks nothing is healed, ended or tidied without a word.
#[test]
fn without_locks_a_stopped_merge_wants_the_same_word() {
    if !qemu_is_here() || !are_here(&["strace"]) {
        return;
    }
    let folder = lab("no-locks-stopped");
    folder.create("base.qcow2", M, "");
    for (name, below) in [("mid.qcow2", "base.qcow2"), ("top.qcow2", "mid.qcow2")] {
        folder.overlay(name, below, "qcow2", None, "");
        folder.io("qcow2", name, &["write -P 3 128k 64k"]);
    }
    let gold = folder.view("qcow2", "top.qcow2");
    let read = |name: String| (name.clone(), fs::read(folder.join(&name)).unwrap());
    let start: Vec<(String, Vec<u8>)> = folder.names().into_iter().map(read).collect();
    let inject = ["-e", "trace=fcntl", "-e", "inject=fcntl:error=ENOLCK"];
    let mut stopped = 0;
    for call in (1..).step_by(3) {
        for name in folder.names() {
            fs::remove_file(folder.join(&name)).unwrap();
        }
        for (name, bytes) in &start {
            fs::write(folder.join(name), bytes).unwrap();
        }
        if !folder.killed_at_sync(call, &["commit", "top.qcow2"]) {
            break;
        }
        stopped += 1;
        let before = folder.files();
        for args in
            [&["commit", "top.qcow2"][..], &["commit", "top.qcow2", "--dry-run"], &["abort", "base.qcow2"]]
        {
            let run = folder.traced(&inject, args);
            assert!(
                run.code == 0 || (run.code == 6 && run.text().contains("--no-lock")),
                "sync {call}: {run}"
            );
            folder.assert_unchanged(&before, &run);
        }
        folder.traced(&inject, &["info", "--chain", "top.qcow2"]).ok();
        folder.traced(&inject, &["commit", "top.qcow2", "--no-lock"]).ok();
        folder.view("qcow2", "top.qcow2").assert_same(&gold, &format!("stopped at sync {call}"));
        folder.all_clean();
    }
    assert!(stopped > 3, "{stopped}");
}

#[test]
fn chains_of_many_layers_are_merged() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("many-layers");
    folder.create("000", M, "cluster_size=4k");
    folder.overlay("001", "000", "qcow2", None, "cluster_size=4k");
    folder.io("qcow2", "001", &["write -P 3 4k 4k"]);
    let first = fs::read(folder.join("001")).unwrap();
    for n in 2..400 {
        let (name, below) = (format!("{n:03}"), format!("{:03}", n - 1));
        let at = first.windows(3).position(|bytes| bytes == b"000").unwrap();
        let mut bytes = first.clone();
        bytes[at..at + 3].copy_from_slice(below.as_bytes());
        fs::write(folder.join(&name), bytes).unwrap();
    }
    folder.qmerge(&["info", "--chain", "399"]).ok().says("[400]");
    folder.qmerge(&["commit", "399"]).ok();
    folder.io("qcow2", "000", &["read -P 3 4k 4k"]);
    folder.io("qcow2", "399", &["read -P 3 4k 4k"]);
}

/// Runs lines of bash in the folder, where a name can be any bytes; `q` is the built command. Types the hints.
#[track_caller]
fn bash(folder: &Lab, lines: &str) -> Run {
    let script = format!("q() {{ {} \"$@\"; }}; set -e; {lines}", binary().display());
    let run = run(folder.dir(), "bash", &["-c", &script]);
    kit::shell::type_hints(folder, &run);
    run
}

/// A chain of four in a folder, no name of which is UTF-8, and what its active image shows.
fn latin1_chain(test: &str) -> Lab {
    let folder = lab(test);
    let create = r#"
        mkdir $'d\xe9' $'j\xe9'; cd $'d\xe9'; below=; n=0
        for name in $'b\xe9' $'m\xf4' $'n\xe9' $'t\xfc'; do
            qemu-img create -q -f qcow2 ${below:+-b $below -F qcow2} $name 4M; below=$name; n=$((n + 1))
            qemu-io -f qcow2 -c "write -P $n $((n * 64))k 128k" $name
        done
        qemu-img convert -O raw $'t\xfc' ../gold"#;
    bash(&folder, create).ok();
    folder
}

/// Fails unless QEMU reads the same from the active image as before, and finds the images sound.
#[track_caller]
fn latin1_same(folder: &Lab) {
    let check = r"for name in $'d\xe9'/*; do qemu-img check -q -f qcow2 $name; done
        qemu-img compare -f raw -F qcow2 gold $'d\xe9/t\xfc'";
    bash(folder, check).ok();
}

#[test]
fn layers_are_named_by_any_bytes() {
    if !qemu_is_here() {
        return;
    }
    let folder = latin1_chain("latin1");
    let merge = r"q commit $'d\xe9/t\xfc' --base $'d\xe9/b\xe9' --top $'m\xf4' --json --verify";
    let merged = bash(&folder, merge).ok().json_lines();
    assert_eq!(merged[0]["afterwards"]["backing-filename"], "b\u{fffd}");
    latin1_same(&folder);
    bash(&folder, r"LC_ALL=C grep -qa $'b\xe9' $'d\xe9/n\xe9'").ok();
    bash(&folder, r"q info $'d\xe9/m\xf4'").ok().says(r"d\xe9/b\xe9; no longer needed");
    bash(&folder, r"q commit $'d\xe9/t\xfc' --top $'d\xe9/m\xf4'")
        .ok()
        .says(r"m\xf4 was already merged into");
    bash(&folder, r"q commit $'d\xe9/t\xfc' --base $'no\xe9'").expect(2).says(r"no layer 'no\xe9'");
    bash(&folder, r"cd $'d\xe9'; qemu-img create -q -f qcow2 -b $'b\xe9' -F qcow2 $'u\xe9'").ok();
    bash(&folder, r"q commit $'d\xe9/t\xfc'")
        .expect(6)
        .says(r": qmerge commit $'d\xe9/t\xfc' --allow-shared-base");
    bash(&folder, r"rm $'d\xe9/u\xe9'; q flatten $'d\xe9/t\xfc' --base $'n\xe9' -o $'o\xe9'").ok();
    bash(&folder, r"qemu-img compare -f raw -F qcow2 gold $'o\xe9'; rm $'o\xe9'").ok();
    bash(&folder, r"q commit $'d\xe9/t\xfc' --delete").ok();
    bash(&folder, r"qemu-img compare -f raw -F qcow2 gold $'d\xe9/b\xe9'; test $(ls $'d\xe9' | wc -l) = 2")
        .ok();
}

#[test]
fn a_stopped_merge_of_any_names_goes_on() {
    if !qemu_is_here() || !are_here(&["strace"]) {
        return;
    }
    let folder = latin1_chain("latin1-stopped");
    let stop = r"strace -qq -f -o /dev/null -e trace=fdatasync -e inject=fdatasync:signal=SIGKILL:when=6 \
        BINARY commit $'d\xe9/t\xfc' --journal-dir $'j\xe9'";
    assert_ne!(bash(&folder, &stop.replace("BINARY", &binary().display().to_string())).code, 0);
    let pending =
        r"ls -A $'j\xe9' | LC_ALL=C grep -qa $'b\xe9'; q info $'d\xe9/b\xe9' --journal-dir $'j\xe9'";
    bash(&folder, pending).ok().says(r"/d\xe9/t\xfc is in");
    bash(&folder, r"q commit $'d\xe9/t\xfc' --journal-dir $'j\xe9' --verify; test -z $(ls -A $'j\xe9')").ok();
    latin1_same(&folder);
}
