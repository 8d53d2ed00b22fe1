//! What others put beside images, or name inside them: it is believed only from somebody who may write the image, and
//! nothing outside of the chain's folder is written or removed, however names are exchanged meanwhile.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::support::{Folder, Run, needs_tools, qemu_present, skipped};

const MIB: u64 = 1 << 20;
/// A user who owns none of the images.
const EVE: u32 = 65_534;
/// How many rounds the races have, if `QMERGE_TEST_RACES` does not say.
const ROUNDS: u64 = 12;

fn root() -> bool {
    let root = fs::metadata("/proc/self").is_ok_and(|me| me.uid() == 0);
    if !root {
        skipped("only root can give files to others");
    }
    root
}

/// A merge that was stopped in its middle, so that its journal lies beside base.
fn stopped(name: &str, format: &str) -> Folder {
    let folder = Folder::new(name);
    match format {
        "raw" => folder.raw("base", 64 * MIB, MIB, 1),
        _ => folder.create("base", 64 * MIB, ""),
    }
    folder.overlay("a.qcow2", "base", format, None, "");
    folder.io("qcow2", "a.qcow2", &["write -P 2 1M 3M", "write -P 3 8M 1M"]);
    for call in 4..40 {
        assert!(folder.killed_at_sync(call, &["commit", "a.qcow2"]), "the merge was over");
        if folder.names().iter().any(|name| name == ".base.qmerge-journal") {
            return folder;
        }
    }
    panic!("no merge could be stopped in the middle");
}

#[test]
fn a_journal_of_somebody_else_is_not_believed_and_not_removed() {
    if !needs_tools(&["qemu-img", "qemu-io", "strace"]) || !root() {
        return;
    }
    let folder = stopped("stranger", "raw");
    let journal = folder.join(".base.qmerge-journal");
    chown(&journal, Some(EVE), Some(EVE)).unwrap();
    let view = folder.view("qcow2", "a.qcow2");
    let before = folder.files();
    for args in
        [&["commit", "a.qcow2"][..], &["commit", "a.qcow2", "--dry-run"], &["abort", "base", "-f", "raw"]]
    {
        let run = folder.qmerge(args).expect(6).says(".base.qmerge-journal").says("user 65534");
        folder.assert_unchanged(&before, &run);
    }
    folder.qmerge(&["info", "-f", "raw", "base"]).ok();
    // One that is not in the way is named, and left alone.
    folder.create("other", MIB, "");
    let record = folder.join(".other.qmerge-switch");
    fs::rename(&journal, &record).unwrap();
    let dry = folder.qmerge(&["commit", "a.qcow2", "--dry-run"]).ok();
    dry.says(".other.qmerge-switch: it belongs to the user 65534");
    // With nothing in its way the merge begins anew: the overlay still holds everything.
    folder.qmerge(&["commit", "a.qcow2"]).ok();
    assert!(record.exists(), "it was not removed");
    folder.view("qcow2", "a.qcow2").assert_same(&view, "the view when the merge is done");
    folder.view("raw", "base").assert_same(&view, "base when the merge is done");
}

#[test]
fn a_journal_of_who_may_write_the_image_is_believed() {
    if !needs_tools(&["qemu-img", "qemu-io", "strace"]) || !root() {
        return;
    }
    let folder = stopped("owner", "qcow2");
    for name in [".base.qmerge-journal", "base"] {
        chown(folder.join(name), Some(EVE), Some(EVE)).unwrap();
    }
    folder.qmerge(&["info", "base"]).ok().says("merge pending");
    folder.qmerge(&["commit", "a.qcow2"]).ok();
    assert!(!folder.names().iter().any(|name| name.contains("qmerge")), "{:?}", folder.names());
    folder.check_clean("base");
}

/// The data files of the plan: file and what becomes of it.
fn planned(run: &Run) -> Vec<(String, String)> {
    let plan = run.json_lines().into_iter().find(|event| event["event"] == "plan").unwrap();
    let files = plan["data-files"].as_array().unwrap().iter();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    files.map(|file| (text(&file["file"]), text(&file["action"]))).collect()
}

#[test]
fn a_data_file_that_only_an_image_names_is_planned_and_stays() {
    if !qemu_present() {
        return;
    }
    for (named, delete, action) in [
        ("../else/data", false, "keep"),
        ("../else/data", true, "keep"),
        ("data", false, "empty"),
        ("data", true, "remove"),
    ] {
        let folder = Folder::new("data-file");
        for name in ["else", "vm"] {
            fs::create_dir(folder.join(name)).unwrap();
        }
        folder.raw("vm/base", MIB, MIB, 1);
        let data = folder.join("vm").join(named);
        let options = format!("data_file={}", data.display());
        folder.overlay("vm/a.qcow2", "base", "raw", None, &options);
        folder.io("qcow2", "vm/a.qcow2", &["write -P 2 0 512k"]);
        let (view, before) = (folder.view("qcow2", "vm/a.qcow2"), fs::read(&data).unwrap());
        let delete: &[&str] = if delete { &["--delete"] } else { &[] };
        let commit = |more: &[&str]| folder.qmerge(&[&["commit", "vm/a.qcow2"], more, delete].concat()).ok();
        commit(&["--dry-run"]).says("data file");
        let run = commit(&["--json"]);
        let planned = planned(&run);
        assert_eq!(planned.len(), 1, "{run}");
        assert!(planned[0].0.ends_with("data") && planned[0].1 == action, "{run}");
        match action {
            "keep" => assert!(fs::read(&data).unwrap() == before, "{named}"),
            "empty" => assert!(fs::read(&data).unwrap().iter().all(|byte| *byte == 0), "{named}"),
            _ => assert!(!data.exists(), "{named}"),
        }
        folder.view("raw", "vm/base").assert_same(&view, "base when the merge is done");
    }
}

#[test]
fn base_is_not_merged_into_a_data_file_that_its_owner_may_not_write() {
    if !qemu_present() || !root() {
        return;
    }
    let folder = Folder::new("data-owner");
    folder.create("base", MIB, &format!("data_file={}", folder.arg("data")));
    folder.overlay("a.qcow2", "base", "qcow2", None, "");
    folder.io("qcow2", "a.qcow2", &["write -P 2 0 512k"]);
    chown(folder.join("base"), Some(EVE), Some(EVE)).unwrap();
    let refused = folder.refused(&["commit", "a.qcow2"], &[6]).says("data file");
    assert!(refused.text().contains("--allow-dir"), "{refused}");
    // As the hint says.
    let here = folder.arg("");
    let run = folder.qmerge(&["commit", "a.qcow2", "--json", "--allow-dir", &here]).ok();
    assert_eq!(planned(&run)[0].1, "write", "{run}");
    // The same owner needs no option.
    folder.io("qcow2", "a.qcow2", &["write -P 3 0 512k"]);
    chown(folder.join("data"), Some(EVE), Some(EVE)).unwrap();
    folder.qmerge(&["commit", "a.qcow2"]).ok();
}

/// Everything below a folder, by names, with what it is.
fn tree(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        all.push((path.clone(), fs::read(&path).unwrap()));
    }
    all.sort();
    all
}

/// Exchanges what lies in `shared` for what lies outside of it, until it is told to stop.
fn exchange(shared: &Path, outside: &Path, journal: &Path, stop: &AtomicBool, times: &AtomicU64) {
    let at = |name: &str| shared.join(name);
    let link = |name: &str, to: &Path| {
        let _ = fs::remove_file(at(".link"));
        let _ = symlink(to, at(".link")).and_then(|()| fs::rename(at(".link"), at(name)));
    };
    while !stop.load(Ordering::Relaxed) {
        for (round, name) in
            [".base.qmerge-journal", ".a.qcow2.qmerge-switch", ".base.qmerge-journal.new"].iter().enumerate()
        {
            // The folder of the chain becomes a link to one outside, and back.
            link("d", Path::new("../outside"));
            link("d", Path::new("vm"));
            let real = format!("vm/{name}");
            // A link, or the journal of somebody else.
            match round {
                0 => {
                    let planted = at(".planted");
                    let made =
                        fs::copy(journal, &planted).and_then(|_| chown(&planted, Some(EVE), Some(EVE)));
                    let _ = made.and_then(|()| fs::rename(planted, at(&real)));
                }
                _ => link(&real, &outside.join("secret")),
            }
            // The folder itself, while names in it are used.
            let moved = fs::rename(at("vm"), at("vm2")).and_then(|()| symlink(outside, at("vm")));
            std::thread::yield_now();
            let _ = moved.and_then(|()| fs::remove_file(at("vm")));
            let _ = fs::rename(at("vm2"), at("vm"));
            // A layer.
            let _ = fs::rename(at("vm/a.qcow2"), at("vm/kept"));
            link("vm/a.qcow2", &outside.join("a.qcow2"));
            let _ = fs::rename(at("vm/kept"), at("vm/a.qcow2"));
            let _ = fs::remove_file(at(&real));
            times.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[test]
fn nothing_outside_is_touched_while_names_are_exchanged() {
    if !needs_tools(&["qemu-img", "qemu-io", "strace"]) || !root() {
        return;
    }
    let rounds = std::env::var("QMERGE_TEST_RACES").ok().and_then(|text| text.parse().ok()).unwrap_or(ROUNDS);
    let folder = stopped("races", "raw");
    let journal = folder.join(".base.qmerge-journal");
    let (shared, outside, made) = (folder.join("shared"), folder.join("outside"), folder.join("made"));
    for new in [&shared, &outside, &made] {
        fs::create_dir(new).unwrap();
    }
    for name in ["base", "a.qcow2", "b.qcow2", ".base.qmerge-journal", "new", "backup"] {
        fs::write(outside.join(name), vec![b'#'; 70_000]).unwrap();
    }
    fs::write(outside.join("secret"), b"of somebody else\n".repeat(1000)).unwrap();
    let before = tree(&outside);
    folder.create("q", 4 * MIB, "");
    folder.overlay("b.qcow2", "a.qcow2", "qcow2", None, "");
    folder.io("qcow2", "b.qcow2", &["write -P 5 2M 1M"]);
    let times = AtomicU64::new(0);
    let shown = shared.to_str().unwrap();
    for round in 0..rounds {
        let vm = shared.join("vm");
        let _ = fs::remove_dir_all(&vm);
        fs::create_dir(&vm).unwrap();
        for name in ["base", "a.qcow2", "b.qcow2"] {
            fs::copy(folder.join(name), vm.join(name)).unwrap();
        }
        let _ = symlink("vm", shared.join("d"));
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| exchange(&shared, &outside, &journal, &stop, &times));
            let new = made.join(round.to_string()).display().to_string();
            for args in [
                &["flatten", "shared/d/b.qcow2", "-o", &new][..],
                &["commit", "shared/d/b.qcow2", "--top", "shared/d/a.qcow2"],
                &["abort", "shared/d/base", "-f", "raw"],
                &["commit", "shared/vm/b.qcow2", "--delete"],
            ] {
                // What comes of it is not the question.
                let run = folder.qmerge(&[args, &["--allow-dir", shown]].concat());
                assert!(run.code != 101 && !run.text().contains("panicked"), "{run}");
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert!(tree(&outside) == before, "round {round}: something outside was written or removed");
    }
    println!(
        "races: {rounds} rounds, {} exchanges, nothing outside was touched",
        times.load(Ordering::Relaxed)
    );
}
