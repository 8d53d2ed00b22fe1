//! Programs that read `qemu-img info`, `map` and `check --output=json` can read ours: every key that we
//! print has QEMU's value, and every key of QEMU that concerns an image is there.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::Path;
use std::process::Command;

use serde_json::Value;

#[track_caller]
fn run(dir: &Path, program: &str, args: &[&str]) -> Vec<u8> {
    let output = Command::new(program).current_dir(dir).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

#[track_caller]
fn both(dir: &Path, verb: &str, image: &str) -> (Value, Value) {
    let ours = run(dir, env!("CARGO_BIN_EXE_qmerge"), &[verb, "--json", image]);
    let theirs = run(dir, "qemu-img", &[verb, "--output=json", image]);
    (serde_json::from_slice(&ours).unwrap(), serde_json::from_slice(&theirs).unwrap())
}

/// Makes `name` with `options` on what it names, and runs commands of qemu-io in it.
fn create(dir: &Path, name: &str, options: &[&str], commands: &[&str]) {
    run(dir, "qemu-img", &[&["create", "-q", "-f", "qcow2"], options].concat());
    for command in commands {
        run(dir, "qemu-io", &["-f", "qcow2", "-c", command, name]);
    }
}

fn images(dir: &Path) -> Vec<&'static str> {
    run(dir, "qemu-img", &["create", "-q", "-f", "raw", "base.raw", "3M"]);
    run(dir, "qemu-io", &["-f", "raw", "-c", "write -P 1 0 2M", "base.raw"]);
    create(dir, "old.qcow2", &["-o", "compat=0.10", "old.qcow2", "4M"], &["write -P 2 1M 64k"]);
    run(dir, "qemu-img", &["snapshot", "-c", "before", "old.qcow2"]);
    let overlay =
        ["-b", "base.raw", "-F", "raw", "-o", "extended_l2=on,lazy_refcounts=on", "mid.qcow2", "4M"];
    create(dir, "mid.qcow2", &overlay, &["write -P 3 100k 6k", "write -z 1M 64k", "write -c -P 4 256k 64k"]);
    run(dir, "qemu-img", &["bitmap", "--add", "-g", "32k", "mid.qcow2", "backup"]);
    run(dir, "qemu-img", &["bitmap", "--add", "--disable", "mid.qcow2", "done"]);
    let above =
        ["-b", "./mid.qcow2", "-F", "qcow2", "-o", "cluster_size=4k,refcount_bits=1", "top.qcow2", "6M"];
    create(dir, "top.qcow2", &above, &["write -P 5 0 12k", "write -P 6 5M 4k"]);
    let data = ["-o", "data_file=data.raw,data_file_raw=on", "data.qcow2", "2M"];
    create(dir, "data.qcow2", &data, &["write -P 7 64k 64k"]);
    create(dir, "ahead.qcow2", &["-o", "preallocation=metadata", "ahead.qcow2", "64M"], &["write 1M 3M"]);
    create(dir, "zstd.qcow2", &["-o", "compression_type=zstd", "zstd.qcow2", "2M"], &["write -c 0 128k"]);
    vec!["old.qcow2", "mid.qcow2", "top.qcow2", "data.qcow2", "ahead.qcow2", "zstd.qcow2"]
}

#[test]
fn info_has_the_keys_and_values_of_qemu_img() {
    if !kit::qemu_is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut names = images(dir.path());
    names.push("base.raw");
    for name in names {
        let (mut ours, mut theirs) = both(dir.path(), "info", name);
        for (key, value) in theirs.as_object_mut().unwrap() {
            // The file below the format is another node of QEMU's.
            if key == "children" {
                continue;
            }
            assert_eq!(sorted(&mut ours[key]), sorted(value), "{name}: {key}");
        }
    }
}

/// Lists of bitmaps have no order that means anything.
fn sorted(value: &mut Value) -> Value {
    if let Some(bitmaps) = value.pointer_mut("/data/bitmaps").and_then(Value::as_array_mut) {
        bitmaps.sort_by_key(|bitmap| bitmap["name"].to_string());
    }
    value.take()
}

#[test]
fn maps_are_those_of_qemu_img() {
    if !kit::qemu_is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for name in images(dir.path()) {
        let (ours, theirs) = both(dir.path(), "map", name);
        assert_eq!(bytes(&ours), bytes(&theirs), "{name}");
    }
}

/// What a map says of each range, whatever the pieces in which it says so.
fn bytes(map: &Value) -> Vec<Value> {
    let mut joined: Vec<Value> = Vec::new();
    for entry in map.as_array().unwrap() {
        let number = |entry: &Value, key: &str| entry[key].as_u64();
        let continues = joined.last().is_some_and(|last| {
            let len = number(last, "length").unwrap();
            let same = |key: &str| last[key] == entry[key];
            number(last, "start").unwrap() + len == number(entry, "start").unwrap()
                && ["depth", "present", "zero", "data", "compressed"].iter().all(|key| same(key))
                && number(last, "offset").map(|offset| offset + len) == number(entry, "offset")
        });
        match joined.last_mut() {
            Some(last) if continues => {
                last["length"] = (number(last, "length").unwrap() + number(entry, "length").unwrap()).into();
            }
            _ => joined.push(entry.clone()),
        }
    }
    joined
}

#[test]
fn checks_report_the_numbers_of_qemu_img() {
    if !kit::qemu_is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for name in images(dir.path()) {
        let (ours, theirs) = both(dir.path(), "check", name);
        for (key, value) in theirs.as_object().unwrap() {
            assert_eq!(&ours[key], value, "{name}: {key}");
        }
    }
}
