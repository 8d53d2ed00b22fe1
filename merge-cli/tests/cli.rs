//! The contract of the command line: exit codes, which stream says what, hints, JSON errors.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

fn qmerge(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_qmerge")).args(args).current_dir(dir).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Runs what must fail with `code`: nothing but the error on standard error, the hint as its last line.
#[track_caller]
fn fails(dir: &Path, args: &[&str], code: i32) -> String {
    let output = qmerge(dir, args);
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{args:?}: {err}");
    assert!(out.is_empty(), "{args:?} printed a result: {out}");
    assert!(err.starts_with("qmerge: "), "{args:?}: {err}");
    let hint = err.lines().last().unwrap();
    assert!(hint.len() > "hint: ".len() && hint.starts_with("hint: "), "{args:?}: {err}");
    err.to_owned()
}

/// A folder with `disk.raw`, 1 MiB with data in its first and last 64 KiB.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut disk = vec![0; 1 << 20];
    disk[..65536].fill(1);
    disk[(15 << 16)..].fill(2);
    fs::write(dir.path().join("disk.raw"), disk).unwrap();
    dir
}

#[test]
fn help_goes_to_standard_output() {
    let dir = folder();
    for args in [&["--help"][..], &["-h"], &["--version"], &["info", "--help"], &["map", "-h"]] {
        let output = qmerge(dir.path(), args);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert!(!output.stdout.is_empty() && output.stderr.is_empty(), "{args:?}");
    }
    assert!(text(&qmerge(dir.path(), &["info", "--help"]).stdout).contains("Examples:"));
    assert!(text(&qmerge(dir.path(), &["--help"]).stdout).contains("130, 143"));
}

#[test]
fn bad_usage_exits_2_with_a_hint() {
    let dir = folder();
    for args in [
        &[][..],
        &["nonsense"],
        &["info"],
        &["info", "--no-such-option", "disk.raw"],
        &["info", "disk.raw", "another"],
        &["info", "-f", "vmdk", "disk.raw"],
        &["info", "--backing-format", "disk.raw", "disk.raw"],
    ] {
        fails(dir.path(), args, 2);
    }
    let message = fails(dir.path(), &["info", "--bogus", "disk.raw"], 2);
    assert!(message.contains("--bogus") && message.ends_with("hint: qmerge info --help\n"), "{message}");
}

#[test]
fn a_missing_image_is_named() {
    let dir = folder();
    for verb in ["info", "map"] {
        let message = fails(dir.path(), &[verb, "nope.qcow2"], 1);
        assert!(message.contains("nope.qcow2") && message.contains("ls -l ."), "{message}");
    }
}

#[test]
fn what_is_no_file_is_refused() {
    let dir = folder();
    fails(dir.path(), &["info", "."], 1);
    fails(dir.path(), &["map", "/dev/null"], 1);
}

#[test]
fn a_broken_header_is_damage_and_says_where() {
    let dir = folder();
    let mut header = vec![0; 512];
    header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x09");
    fs::write(dir.path().join("odd.qcow2"), header).unwrap();
    for verb in ["info", "map"] {
        let output = qmerge(dir.path(), &[verb, "odd.qcow2"]);
        let code = output.status.code().unwrap();
        assert!([7, 9].contains(&code), "{code}");
        let err = text(&output.stderr);
        assert!(err.contains("version at offset 0x4: found 9"), "{err}");
    }
}

#[test]
fn json_errors_have_kind_message_hint_and_exit_code() {
    let dir = folder();
    for args in [&["info", "--json", "nope.qcow2"][..], &["info", "--json"], &["--json", "map", "nope"]] {
        let output = qmerge(dir.path(), args);
        let event: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(event["event"], "error", "{event}");
        assert_eq!(event["exit-code"].as_i64(), output.status.code().map(i64::from), "{event}");
        for key in ["kind", "message", "hint"] {
            assert!(event[key].as_str().is_some_and(|s| !s.is_empty()), "{key}: {event}");
        }
        assert!(text(&output.stderr).contains("hint: "), "people are told too");
    }
}

#[test]
fn quiet_prints_nothing_but_errors() {
    let dir = folder();
    for verb in ["info", "map"] {
        let output = qmerge(dir.path(), &[verb, "-q", "disk.raw"]);
        assert_eq!(output.status.code(), Some(0));
        assert!(output.stdout.is_empty() && output.stderr.is_empty());
    }
    fails(dir.path(), &["info", "-q", "nope"], 1);
    let json = qmerge(dir.path(), &["info", "-q", "--json", "disk.raw"]);
    assert!(!json.stdout.is_empty(), "JSON that was asked for is printed");
}

#[test]
fn info_tells_sizes_in_words_and_bytes() {
    let dir = folder();
    let output = qmerge(dir.path(), &["info", "disk.raw"]);
    assert_eq!(output.status.code(), Some(0));
    let out = text(&output.stdout);
    assert!(out.contains("virtual size:  1 MiB (1048576 bytes)"), "{out}");
    assert!(out.contains("format:        raw"), "{out}");
    let json: Value =
        serde_json::from_slice(&qmerge(dir.path(), &["info", "--json", "disk.raw"]).stdout).unwrap();
    assert_eq!(json["virtual-size"], 1 << 20);
    assert_eq!(json["format"], "raw");
    assert_eq!(json["in-use"], false);
}

#[test]
fn check_answers_with_the_codes_of_qemu_img() {
    let dir = folder();
    let message = fails(dir.path(), &["check", "disk.raw"], 63);
    assert!(message.contains("raw"), "{message}");
    fails(dir.path(), &["check", "nope"], 1);
    // 2 would mean corruption.
    fails(dir.path(), &["check", "--bogus", "disk.raw"], 1);
    fails(dir.path(), &["check", "-f", "qcow2", "disk.raw"], 1);
}

#[test]
fn compare_answers_with_the_codes_of_qemu_img() {
    let dir = folder();
    let compare = |a: &str, b: &str| {
        let output = qmerge(dir.path(), &["compare", "--json", a, b]);
        let json: Value = serde_json::from_slice(&output.stdout).unwrap();
        (output.status.code(), json)
    };
    let mut disk = fs::read(dir.path().join("disk.raw")).unwrap();
    fs::write(dir.path().join("same.raw"), &disk).unwrap();
    let (code, json) = compare("disk.raw", "same.raw");
    assert_eq!((code, &json["same"]), (Some(0), &Value::Bool(true)));
    disk[70000] = 9;
    fs::write(dir.path().join("other.raw"), &disk).unwrap();
    let (code, json) = compare("disk.raw", "other.raw");
    assert_eq!((code, &json["same"]), (Some(1), &Value::Bool(false)));
    assert_eq!(json["first-difference"], 70000);
    assert_eq!(qmerge(dir.path(), &["compare", "-q", "disk.raw", "other.raw"]).status.code(), Some(1));
    // A tail of zeros is no difference, as for qemu-img.
    disk[70000] = 0;
    disk.resize(2 << 20, 0);
    fs::write(dir.path().join("longer.raw"), &disk).unwrap();
    assert_eq!(compare("disk.raw", "longer.raw").0, Some(0));
    fails(dir.path(), &["compare", "disk.raw", "nope"], 2);
    fails(dir.path(), &["compare", "disk.raw"], 2);
}

#[test]
fn maps_cover_the_disk_without_gaps() {
    let dir = folder();
    let output = qmerge(dir.path(), &["map", "--json", "disk.raw"]);
    let map: Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut at = 0;
    for entry in map.as_array().unwrap() {
        assert_eq!(entry["start"], at);
        assert_eq!(entry["depth"], 0);
        at += entry["length"].as_u64().unwrap();
    }
    assert_eq!(at, 1 << 20);
    fs::write(dir.path().join("empty.raw"), b"").unwrap();
    let output = qmerge(dir.path(), &["map", "--json", "empty.raw"]);
    assert_eq!(text(&output.stdout).trim(), "[]");
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let dir = folder();
    // Enough ranges that the output does not fit into a pipe.
    let mut disk = vec![0; 64 << 20];
    for block in disk.chunks_mut(8192) {
        block[..4096].fill(7);
    }
    let path = dir.path().join("holes.raw");
    let file = fs::File::create(&path).unwrap();
    file.set_len(disk.len() as u64).unwrap();
    for (n, block) in disk.chunks(8192).enumerate() {
        std::os::unix::fs::FileExt::write_all_at(&file, &block[..4096], n as u64 * 8192).unwrap();
    }
    let mut child = Command::new(env!("CARGO_BIN_EXE_qmerge"))
        .args(["map", "--json"])
        .arg(&path)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0; 1];
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut first).unwrap();
    drop(stdout);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stderr.is_empty(), "{}", text(&output.stderr));
}

#[test]
fn a_full_standard_output_is_a_failure() {
    let dir = folder();
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_qmerge"))
        .args(["info", "disk.raw"])
        .current_dir(dir.path())
        .stdout(full)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
        .wait_with_output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("standard output"), "{}", text(&output.stderr));
}

fn demo(tmp: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qmerge"));
    command.arg("demo").args(args).env("TMPDIR", tmp).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

#[test]
fn the_demo_proves_and_cleans_up() {
    let tmp = tempfile::tempdir().unwrap();
    let output = demo(tmp.path(), &["--size", "1M"]).output().unwrap();
    let out = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(out.contains("base.raw and whole.raw show the same bytes"), "{out}");
    assert!(out.contains("nothing to do"), "{out}");
    assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 0, "the folder is left behind");

    let output = demo(tmp.path(), &["--size", "1M", "--json"]).output().unwrap();
    let events: Vec<Value> =
        text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(events.iter().any(|e| e["event"] == "plan" && e["bytes-to-copy"].as_u64() > Some(0)));
    let last = events.last().unwrap();
    assert_eq!((&last["event"], &last["same"]), (&"result".into(), &true.into()), "{last}");

    let output = demo(tmp.path(), &["--size", "1M", "-q"]).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stdout.is_empty() && output.stderr.is_empty());

    let output = demo(tmp.path(), &["--size", "1M", "--keep"]).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 1, "the folder was to be kept");
}

#[test]
fn the_demo_refuses_a_size_that_makes_no_sense() {
    let dir = folder();
    fails(dir.path(), &["demo", "--size", "1K"], 2);
    fails(dir.path(), &["demo", "--size", "many"], 2);
    let message = fails(dir.path(), &["demo", "--size", "4000T"], 8);
    assert!(message.contains("df -h"), "{message}");
}

#[test]
fn a_signal_stops_tidily() {
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let tmp = tempfile::tempdir().unwrap();
        let child = demo(tmp.path(), &[]).spawn().unwrap();
        while fs::read_dir(tmp.path()).unwrap().count() == 0 {
            std::thread::yield_now();
        }
        kill_process(Pid::from_child(&child), signal).unwrap();
        let output = child.wait_with_output().unwrap();
        let err = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{err}");
        assert!(err.lines().last().unwrap().starts_with("hint: "), "{err}");
        assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 0, "the folder is left behind");
    }
}

/// The words between back quotes.
fn quoted(text: &str) -> BTreeSet<String> {
    text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// The kinds of errors that a source file names.
fn kinds_in(file: &Path, found: &mut BTreeSet<String>) {
    let text = fs::read_to_string(file).unwrap();
    let code = text.split("#[cfg(test)]").next().unwrap();
    let mut starts = vec!["kind: \"", "refuse(\""];
    // The words of each library stand in one function, those for live merges with their class.
    let code = match code.split_once("pub fn code(&self)") {
        Some((_, rest)) if rest.contains("fn class(&self)") => {
            starts = vec!["(\""];
            rest
        }
        Some((_, rest)) => {
            starts = vec!["=> \""];
            rest.split("\n    }\n").next().unwrap()
        }
        None => code,
    };
    for start in starts {
        found.extend(code.split(start).skip(1).filter_map(|rest| rest.split('"').next()).map(str::to_owned));
    }
    found.retain(|word| is_kind(word));
}

fn is_kind(word: &str) -> bool {
    !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-')
}

/// Scripts decide by the kind of an error.
#[test]
fn the_readme_lists_every_kind_of_error() {
    let mut found = BTreeSet::new();
    let mut folders = vec![PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/src"))];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => kinds_in(&path, &mut found),
            }
        }
    }
    for file in ["qcow2/src/error.rs", "qcow2/src/error/refusal.rs", "qmp-client/src/error/code.rs"] {
        kinds_in(&Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(file), &mut found);
    }
    let readme = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md")).unwrap();
    let table = readme.split("| `kind` |").nth(1).unwrap().split("\n\n").next().unwrap();
    let listed: BTreeSet<String> =
        table.lines().skip(2).flat_map(|line| quoted(line.split(" | ").next().unwrap())).collect();
    let listed: BTreeSet<String> = listed.into_iter().filter(|word| is_kind(word)).collect();
    let missing: Vec<_> = found.difference(&listed).collect();
    let gone: Vec<_> = listed.difference(&found).collect();
    assert!(missing.is_empty() && gone.is_empty(), "not in the README: {missing:?}; only there: {gone:?}");
    assert!(found.len() > 50, "{found:?}");
}
