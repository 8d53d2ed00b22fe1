//! Hostile images through the command: the exit code tells the class of the answer, the error names the
//! file, the last line says what to type, no file changes, and nothing ends in a panic or a signal.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use kit::Random;
use qcow2::fuzzing::mutate::mutate;
use qcow2::fuzzing::sample::{Content, Image, Sample, field, incompatible};
use serde_json::Value;

const COPIED: u64 = 1 << 63;

fn base() -> Sample {
    (0..8).fold(Sample::new(200), |sample, n| sample.with(n * 9, Content::Data(0xb0 + n as u8)))
}

fn top() -> Sample {
    Sample::new(200).with(0, Content::Data(1)).with(100, Content::Data(2)).over("base.qcow2", "qcow2")
}

/// A folder with `base.qcow2` and `top.qcow2`.
fn folder(base: &Image, top: &Image) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("base.qcow2"), &base.bytes).unwrap();
    fs::write(dir.path().join("top.qcow2"), &top.bytes).unwrap();
    dir
}

fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

fn qmerge(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_qmerge")).args(args).current_dir(dir).output().unwrap()
}

/// The call must end with `code`; what it says on standard error.
#[track_caller]
fn ends_with(dir: &Path, args: &[&str], code: i32) -> String {
    let output = qmerge(dir, args);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
    said
}

/// The call must be refused with `code`, name the file, end with a hint, and change nothing.
#[track_caller]
fn refused(dir: &Path, args: &[&str], code: i32, file: &str) -> String {
    let before = files(dir);
    let said = ends_with(dir, args, code);
    assert!(said.contains(file), "{args:?} does not name {file}: {said}");
    let hint = said.lines().last().unwrap_or_default();
    assert!(hint.starts_with("hint: ") && hint.len() > 10, "{args:?} gives no hint: {said}");
    assert!(files(dir) == before, "{args:?} was refused, and has changed something");
    said
}

/// Half a megabyte of tables that are named again and again would be followed for hours.
#[test]
fn tables_that_the_file_has_no_room_for_are_not_followed() {
    let mut endless = Sample::new(64 * 2000).with(0, Content::Data(1)).over("base.qcow2", "qcow2").build();
    let (l1, table) = (endless.at.l1, endless.get_u64(endless.at.l1));
    for entry in 1..2000 {
        endless.put_u64(l1 + entry * 8, table);
    }
    let as_base = Sample::new(64 * 2000).with(0, Content::Data(1)).over("top.qcow2", "qcow2").build();
    let dir = folder(&base().build(), &endless);
    fs::write(dir.path().join("above.qcow2"), &as_base.bytes).unwrap();
    for image in ["top.qcow2", "above.qcow2"] {
        let flatten = ["flatten", image, "-o", "new.raw", "--to", "raw"];
        for (args, code) in [
            (&["commit", image][..], 9),
            (&["commit", image, "--shallow", "--dry-run"], 9),
            (&flatten, 9),
            (&["compare", image, "base.qcow2"], 2),
            (&["map", image], 9),
            (&["info", "--chain", image], 9),
        ] {
            let said = refused(dir.path(), args, code, "top.qcow2");
            assert!(said.contains("2000 L2 tables"), "{said}");
        }
    }
}

#[test]
fn damage_ends_with_9() {
    type Damage = fn(&mut Image);
    let of_base: [(&str, Damage); 6] = [
        ("a refcount of zero", |image| image.set_refcount(image.at.hosts[&0], 0)),
        ("data in its own L2 table", |image| {
            let at = image.l2_entry(0);
            image.put_u64(at, COPIED | image.at.l2[&0]);
        }),
        ("a truncated file", |image| image.bytes.truncate(image.at.hosts[&27] as usize)),
        ("dirty", |image| image.put_u64(field::INCOMPATIBLE, incompatible::DIRTY)),
        ("corrupt", |image| image.put_u64(field::INCOMPATIBLE, incompatible::CORRUPT)),
        ("an L1 table of 4 GiB", |image| image.put_u32(field::L1_SIZE, u32::MAX)),
    ];
    for (case, damage) in of_base {
        let mut base = base().build();
        damage(&mut base);
        let dir = folder(&base, &top().build());
        println!("{case}");
        refused(dir.path(), &["commit", "top.qcow2"], 9, "base.qcow2");
        refused(dir.path(), &["commit", "top.qcow2", "--dry-run"], 9, "base.qcow2");
    }
    let of_top: [(&str, Damage); 3] = [
        ("a reserved bit in an L2 entry", |image| {
            let at = image.l2_entry(100);
            image.put_u64(at, image.get_u64(at) | 1 << 60);
        }),
        ("data past the end", |image| {
            let at = image.l2_entry(100);
            image.put_u64(at, COPIED | 0x1000_0000);
        }),
        ("an L2 table past the end", |image| image.put_u64(image.at.l1 + 8, COPIED | 0x1000_0000)),
    ];
    for (case, damage) in of_top {
        let mut top = top().build();
        damage(&mut top);
        let dir = folder(&base().build(), &top);
        println!("{case}");
        refused(dir.path(), &["commit", "top.qcow2"], 9, "top.qcow2");
        // What lies behind the end of a file that was cut short is zeros to flatten, as to QEMU.
        let flatten = ["flatten", "top.qcow2", "-o", "new.raw", "--to", "raw"];
        match case {
            "a reserved bit in an L2 entry" => refused(dir.path(), &flatten, 9, "top.qcow2"),
            _ => ends_with(dir.path(), &flatten, 0),
        };
        refused(dir.path(), &["map", "top.qcow2"], 9, "top.qcow2");
        refused(dir.path(), &["compare", "top.qcow2", "base.qcow2"], 2, "top.qcow2");
        ends_with(dir.path(), &["check", "top.qcow2"], 2);
    }
}

#[test]
fn what_is_not_supported_ends_with_7() {
    type Damage = fn(&mut Image);
    let cases: [(&str, Damage, &str); 4] = [
        ("a feature of tomorrow", |image| image.put_u64(field::INCOMPATIBLE, 1 << 40), "bit 40"),
        ("AES", |image| image.put_u32(field::CRYPT_METHOD, 1), "AES"),
        ("LUKS", |image| image.put_u32(field::CRYPT_METHOD, 2), "LUKS"),
        ("version 4", |image| image.put_u32(field::VERSION, 4), "version"),
    ];
    for (case, damage, word) in cases {
        for file in ["base.qcow2", "top.qcow2"] {
            let (mut base, mut top) = (base().build(), top().build());
            damage(if file == "base.qcow2" { &mut base } else { &mut top });
            let dir = folder(&base, &top);
            for args in [&["commit", "top.qcow2"][..], &["map", "top.qcow2"]] {
                let said = refused(dir.path(), args, 7, file);
                assert!(said.contains(word), "{case}: {said}");
            }
        }
    }
}

#[test]
fn what_an_image_may_not_ask_for_ends_with_6() {
    let named = |name: &str, format: &str| folder(&base().build(), &top().over(name, format).build());
    for (name, word) in [
        ("nbd:localhost:10809", "nbd"),
        ("https://example.org/base.qcow2", "https"),
        ("json:{\"driver\":\"nbd\",\"host\":\"localhost\"}", "json"),
        ("fat:rw:/tmp", "fat"),
        ("/dev/zero", "/dev/zero"),
        ("top.qcow2", "loop"),
        ("/proc/self/mem", "/proc"),
    ] {
        let dir = named(name, "raw");
        for args in [&["commit", "top.qcow2"][..], &["info", "--chain", "top.qcow2"], &["map", "top.qcow2"]] {
            let said = refused(dir.path(), args, 6, "top.qcow2");
            assert!(said.contains(word), "{name}: {said}");
        }
        // Without the chain, what an image is can always be seen.
        ends_with(dir.path(), &["info", "top.qcow2"], 0);
    }
    // A raw disk into which the guest wrote a qcow2 header.
    let said = refused(named("base.qcow2", "raw").path(), &["commit", "top.qcow2"], 6, "base.qcow2");
    assert!(said.contains("raw") && said.contains("qcow2"), "{said}");
    // A name without a format.
    let mut top = top();
    top.backing = Some(("base.qcow2".into(), None));
    let dir = folder(&base().build(), &top.build());
    let said = refused(dir.path(), &["commit", "top.qcow2"], 6, "base.qcow2");
    assert!(said.contains("--backing-format"), "{said}");
}

#[test]
fn allow_dir_confines_the_files_that_images_name() {
    let dir = folder(&base().build(), &top().build());
    let (inside, outside) = (dir.path().join("in"), dir.path().join("out"));
    fs::create_dir(&inside).unwrap();
    fs::create_dir(&outside).unwrap();
    fs::rename(dir.path().join("top.qcow2"), inside.join("top.qcow2")).unwrap();
    fs::rename(dir.path().join("base.qcow2"), outside.join("base.qcow2")).unwrap();
    std::os::unix::fs::symlink("../out/base.qcow2", inside.join("base.qcow2")).unwrap();
    ends_with(&inside, &["map", "top.qcow2"], 0);
    let said = ends_with(&inside, &["map", "--allow-dir", ".", "top.qcow2"], 6);
    assert!(said.contains("out/base.qcow2"), "{said}");
    ends_with(&inside, &["map", "--allow-dir", ".", "--allow-dir", "../out", "top.qcow2"], 0);
}

#[test]
fn errors_are_events_for_programs() {
    let mut base = base().build();
    base.put_u64(field::INCOMPATIBLE, incompatible::DIRTY);
    let dir = folder(&base, &top().build());
    let output = qmerge(dir.path(), &["commit", "--json", "top.qcow2"]);
    assert_eq!(output.status.code(), Some(9));
    let out = String::from_utf8(output.stdout).unwrap();
    let last: Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
    assert_eq!(last["event"], "error", "{out}");
    assert_eq!(last["exit-code"], 9, "{out}");
    assert!(last["message"].as_str().unwrap().contains("base.qcow2"), "{out}");
    assert!(last["kind"].is_string() && last["hint"].is_string(), "{out}");
}

// Whatever the bytes are: an answer, never a panic (101) or a signal.
#[test]
fn mutated_images_never_end_in_a_panic() {
    let mut random = Random::new(5);
    for n in 0..60 {
        let (mut base, mut top) = (base().build(), top().build());
        mutate(if n % 2 == 0 { &mut base.bytes } else { &mut top.bytes }, &mut random);
        let dir = folder(&base, &top);
        for args in [
            &["info", "top.qcow2"][..],
            &["info", "--chain", "--json", "top.qcow2"],
            &["map", "top.qcow2"],
            &["check", "top.qcow2"],
            &["check", "base.qcow2", "-f", "qcow2"],
            &["compare", "top.qcow2", "base.qcow2"],
            &["flatten", "top.qcow2", "-o", "new.qcow2"],
            &["commit", "top.qcow2", "--verify"],
        ] {
            let output = qmerge(dir.path(), args);
            let said = String::from_utf8_lossy(&output.stderr);
            let code = output.status.code();
            assert!(code.is_some_and(|code| code <= 9 || code == 63), "{n}: {args:?}: {code:?}: {said}");
            assert!(!said.contains("panicked"), "{n}: {args:?}: {said}");
        }
    }
}

#[test]
fn a_name_in_an_image_does_not_command_the_terminal() {
    let name = "ba\u{1b}[31mse\u{7}.raw";
    let mut top = top();
    top.backing = Some((name.into(), Some("raw".into())));
    let dir = folder(&base().build(), &top.build());
    std::fs::write(dir.path().join(name), vec![0; 65536]).unwrap();
    for args in [
        &["info", "top.qcow2"][..],
        &["info", "--chain", "top.qcow2"],
        &["map", "top.qcow2"],
        &["commit", "top.qcow2", "--dry-run"],
        &["commit", "top.qcow2", "--allow-dir", "/etc"],
        &["commit", "top.qcow2", "--json", "--dry-run"],
    ] {
        let output = qmerge(dir.path(), args);
        let said = [output.stdout, output.stderr].concat();
        assert!(!said.is_empty(), "{args:?}");
        assert!(!said.contains(&0x1b) && !said.contains(&7), "{args:?}: {}", String::from_utf8_lossy(&said));
    }
}
