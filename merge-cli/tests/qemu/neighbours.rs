//! What others put beside images, or name inside them: it is believed only from somebody who may write the image, and
//! nothing outside of the chain's folder is written or removed, however names are exchanged meanwhile.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use kit::{Lab, Run, are_here, qemu_is_here, skipped};

use crate::support::lab;

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
fn stopped(name: &str, format: &str) -> Lab {
    let folder = lab(name);
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
    if !are_here(&["qemu-img", "qemu-io", "strace"]) || !root() {
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
    folder.qmerge(&["info", "-f", "raw", "base"]).ok().says("not believed").says("user 65534");
    folder.qmerge(&["info", "--chain", "a.qcow2"]).ok().says("[1] not believed: ");
    let told = folder.qmerge(&["info", "-f", "raw", "base", "--json"]).ok().stdout;
    let told: serde_json::Value = serde_json::from_str(&told).unwrap();
    assert_eq!(told["strangers"][0]["user"], EVE);
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
    if !are_here(&["qemu-img", "qemu-io", "strace"]) || !root() {
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
    if !qemu_is_here() {
        return;
    }
    for (named, delete, action) in [
        ("../else/data", false, "keep"),
        ("../else/data", true, "keep"),
        ("data", false, "empty"),
        ("data", true, "remove"),
    ] {
        let folder = lab("data-file");
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
    if !qemu_is_here() || !root() {
        return;
    }
    let folder = lab("data-owner");
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

/// Everything in a folder, by names, with what it is: whose, with which rights, and its bytes.
fn tree(folder: &Path) -> Vec<(PathBuf, [u32; 3], Vec<u8>)> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let meta = fs::symlink_metadata(&path).unwrap();
        all.push((path.clone(), [meta.uid(), meta.gid(), meta.mode()], fs::read(&path).unwrap()));
    }
    all.sort();
    all
}

/// A folder in which names are exchanged for those of what lies outside of it.
struct Shared<'a> {
    path: &'a Path,
    outside: &'a Path,
    /// A journal of somebody else, and the backup of a repair.
    planted: [&'a Path; 2],
}

impl Shared<'_> {
    fn at(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    fn link(&self, name: &str, to: &Path) {
        let _ = fs::remove_file(self.at(".link"));
        let _ = symlink(to, self.at(".link")).and_then(|()| fs::rename(self.at(".link"), self.at(name)));
    }

    /// A folder is a link to one outside for a moment, while names in it are used.
    fn flip_folder(&self, name: &str) {
        let aside = format!("{name}-aside");
        let moved =
            fs::rename(self.at(name), self.at(&aside)).and_then(|()| symlink(self.outside, self.at(name)));
        std::thread::yield_now();
        let _ = moved.and_then(|()| fs::remove_file(self.at(name)));
        let _ = fs::rename(self.at(&aside), self.at(name));
    }

    /// A file is a link to one outside for a moment.
    fn flip_file(&self, name: &str) {
        let kept = format!("{name}-kept");
        let _ = fs::rename(self.at(name), self.at(&kept));
        self.link(name, &self.outside.join(Path::new(name).file_name().unwrap()));
        std::thread::yield_now();
        let _ = fs::rename(self.at(&kept), self.at(name));
    }

    /// One exchange of each kind.
    fn exchange(&self) {
        for (kind, name) in PLANTED.iter().enumerate() {
            // The folder of the chain becomes a link to one outside, and back.
            self.link("d", Path::new("../outside"));
            self.link("d", Path::new("vm"));
            let real = format!("vm/{name}");
            // A link, or a file of somebody else.
            match self.planted.get(kind) {
                Some(file) => {
                    let planted = self.at(".planted");
                    let made = fs::copy(file, &planted).and_then(|_| chown(&planted, Some(EVE), Some(EVE)));
                    let _ = made.and_then(|()| fs::rename(planted, self.at(&real)));
                }
                None => self.link(&real, &self.outside.join("secret")),
            }
            for folder in ["vm", "new"] {
                self.flip_folder(folder);
            }
            for image in ["vm/a.qcow2", "vm/leaky"] {
                self.flip_file(image);
            }
            let _ = fs::remove_file(self.at(&real));
        }
    }
}

/// Names that the program writes or reads beside images: a journal, the backup of a repair, the record of an edit, a new journal.
const PLANTED: [&str; 4] =
    [".base.qmerge-journal", "backup", ".a.qcow2.qmerge-switch", ".base.qmerge-journal.new"];

#[test]
fn nothing_outside_is_touched_while_names_are_exchanged() {
    if !are_here(&["qemu-img", "qemu-io", "strace"]) || !root() {
        return;
    }
    let rounds = std::env::var("QMERGE_TEST_RACES").ok().and_then(|text| text.parse().ok()).unwrap_or(ROUNDS);
    let folder = stopped("races", "raw");
    let journal = folder.join(".base.qmerge-journal");
    let (shared, outside) = (folder.join("shared"), folder.join("outside"));
    for new in [&shared, &outside] {
        fs::create_dir(new).unwrap();
    }
    for name in ["base", "a.qcow2", "b.qcow2", "leaky", ".base.qmerge-journal", "backup", "disk"] {
        fs::write(outside.join(name), vec![b'#'; 70_000]).unwrap();
    }
    fs::write(outside.join("secret"), b"of somebody else\n".repeat(1000)).unwrap();
    let before = tree(&outside);
    folder.overlay("b.qcow2", "a.qcow2", "qcow2", None, "");
    folder.io("qcow2", "b.qcow2", &["write -P 5 2M 1M"]);
    folder.create("leaky", 4 * MIB, "");
    folder.io("qcow2", "leaky", &["write -P 6 0 1M"]);
    leak(&folder.join("leaky"));
    folder.qmerge(&["check", "leaky", "--repair", "all", "--backup", "backup"]);
    leak(&folder.join("leaky"));
    let backup = folder.join("backup");
    let files = Shared { path: &shared, outside: &outside, planted: [&journal, &backup] };
    let times = AtomicU64::new(0);
    let shown = shared.to_str().unwrap();
    for round in 0..rounds {
        for name in ["vm", "new"] {
            let _ = fs::remove_dir_all(shared.join(name));
            fs::create_dir(shared.join(name)).unwrap();
        }
        for name in ["base", "a.qcow2", "b.qcow2", "leaky"] {
            fs::copy(folder.join(name), shared.join("vm").join(name)).unwrap();
        }
        let _ = symlink("vm", shared.join("d"));
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    files.exchange();
                    times.fetch_add(PLANTED.len() as u64, Ordering::Relaxed);
                }
            });
            for args in [
                &["flatten", "shared/d/b.qcow2", "-o", "shared/new/disk"][..],
                &["check", "shared/vm/leaky", "--repair", "all", "--backup", "shared/vm/backup"],
                &["check", "shared/d/leaky", "--restore", "shared/vm/backup"],
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
    let times = times.load(Ordering::Relaxed);
    assert!(times >= rounds, "names were exchanged meanwhile: {times}");
    println!("races: {rounds} rounds, {times} exchanges, nothing outside was touched");
}

/// Linux before 5.6, and filters of system calls, do not have `openat2`.
#[test]
fn without_openat2_no_link_is_followed_either() {
    if !are_here(&["qemu-img", "qemu-io", "strace"]) {
        return;
    }
    for errno in ["ENOSYS", "EPERM"] {
        let folder = lab("no-openat2");
        for name in ["vm", "outside"] {
            fs::create_dir(folder.join(name)).unwrap();
        }
        folder.create("vm/base", MIB, "");
        folder.overlay("vm/a.qcow2", "base", "qcow2", None, "");
        folder.io("qcow2", "vm/a.qcow2", &["write -P 2 0 512k"]);
        fs::write(folder.join("outside/secret"), vec![b'#'; 70_000]).unwrap();
        symlink("../outside/secret", folder.join("vm/.base.qmerge-journal")).unwrap();
        symlink("vm", folder.join("d")).unwrap();
        let (gold, before) = (folder.view("qcow2", "vm/a.qcow2"), tree(&folder.join("outside")));
        let inject = format!("inject=openat2:error={errno}");
        let run = |args: &[&str]| folder.traced(&["-e", "trace=openat2", "-e", &inject], args);
        let refused = run(&["commit", "d/a.qcow2"]);
        assert!(refused.code != 0 && tree(&folder.join("outside")) == before, "{refused}");
        fs::remove_file(folder.join("vm/.base.qmerge-journal")).unwrap();
        run(&["commit", "d/a.qcow2"]).ok();
        folder.view("qcow2", "vm/a.qcow2").assert_same(&gold, "merged without openat2");
        assert!(
            !folder.join("vm").read_dir().unwrap().any(|e| e.unwrap().file_name() == ".base.qmerge-journal")
        );
    }
}

/// Leaks a cluster: its refcount becomes one, and nothing refers to it.
fn leak(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let word = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    let block = word(&bytes, word(&bytes, 48));
    let free = (0..1000).find(|n| bytes[block + 2 * n..block + 2 * n + 2] == [0, 0]).unwrap();
    bytes[block + 2 * free + 1] = 1;
    bytes.resize((free + 1) << 16, 0);
    fs::write(path, bytes).unwrap();
}
