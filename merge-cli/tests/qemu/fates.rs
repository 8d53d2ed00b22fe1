//! A table of unfinished work: each kind of base, stopped in each way, and what may become of base until the same command is typed
//! again, or the merge is given up. TESTING.md has the table; `qcow2/tests/crash/table.rs` has it on the simulated disk.

use std::process::Command;
use std::time::Duration;

use kit::{Lab, Run, View, are_here, skipped};

use crate::support::lab;

const MIB: u64 = 1 << 20;

/// What base is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Raw,
    Version2,
    Version3,
    DataFile,
    /// A raw disk on a block device.
    Device,
}

/// How the merge is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Interruption {
    Killed,
    /// In good order, by the first write to base for which there is no room; a signal does the same in `resume.rs`.
    FullDisk,
}

/// What becomes of a base behind a stopped merge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Untouched,
    /// QEMU writes to it.
    Newer,
    /// It is put back from a backup, in place and with its times.
    Older,
    /// The same from a backup that has another inode.
    Replaced,
    /// Other bytes, and its time of modification set back.
    OtherBytes,
    /// The folder is copied, and the command typed there.
    Copied,
    /// The folder is renamed.
    Moved,
    /// The folder is copied without the journal.
    CopiedWithoutJournal,
}

/// What is typed then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TypedVerb {
    Commit,
    Abort,
}

const KINDS: [Kind; 5] = [Kind::Raw, Kind::Version2, Kind::Version3, Kind::DataFile, Kind::Device];
const STOPS: [Interruption; 2] = [Interruption::Killed, Interruption::FullDisk];
const FATES: [Fate; 8] = [
    Fate::Untouched,
    Fate::Newer,
    Fate::Older,
    Fate::Replaced,
    Fate::OtherBytes,
    Fate::Copied,
    Fate::Moved,
    Fate::CopiedWithoutJournal,
];

impl Kind {
    fn format(self) -> &'static str {
        if matches!(self, Self::Raw | Self::Device) { "raw" } else { "qcow2" }
    }

    /// The options of `qemu-img create`.
    fn options(self) -> &'static str {
        match self {
            Self::Version2 => "compat=0.10",
            Self::DataFile => "compat=1.1,data_file=$PWD/base.data",
            _ => "compat=1.1",
        }
    }

    fn has_dirty_bit(self) -> bool {
        matches!(self, Self::Version3 | Self::DataFile)
    }

    /// What can happen to it.
    fn can(self, fate: Fate) -> bool {
        let in_place = matches!(fate, Fate::Untouched | Fate::Newer | Fate::Older | Fate::OtherBytes);
        match self {
            Self::Device => in_place,
            // A data file is named by its path.
            Self::DataFile => in_place || fate == Fate::Replaced,
            _ => true,
        }
    }
}

/// A chain in the folder `vm`, and a copy of base in `backup`.
struct CopiedChain {
    folder: Lab,
    kind: Kind,
    /// The block device, which is detached at the end.
    device: Option<String>,
}

impl Drop for CopiedChain {
    fn drop(&mut self) {
        if let Some(device) = &self.device {
            let _ = Command::new("losetup").args(["--detach", device]).status();
        }
    }
}

impl CopiedChain {
    fn new(kind: Kind) -> Option<Self> {
        let folder = lab("fates");
        folder.sh("mkdir vm journals");
        let mut device = None;
        match kind.format() {
            "raw" => folder.raw("vm/base", 16 * MIB, 16 * MIB, 1),
            _ => {
                let options = kind.options();
                folder.sh(&format!("cd vm; qemu-img create -q -f qcow2 -o {options} base 16M"));
                folder.io("qcow2", "vm/base", &["write -q -P 1 0 16M"]);
            }
        }
        if kind == Kind::Device {
            let made = Command::new("losetup").args(["--find", "--show", &folder.arg("vm/base")]).output();
            match made {
                Ok(made) if made.status.success() => {
                    device = Some(String::from_utf8(made.stdout).unwrap().trim().to_owned());
                }
                other => {
                    skipped(&format!("no loop device can be made: {other:?}"));
                    return None;
                }
            }
        }
        let below = device.as_deref().unwrap_or("base");
        folder.sh(&format!("cd vm; qemu-img create -q -f qcow2 -b {below} -F {} top 16M", kind.format()));
        folder.io("qcow2", "vm/top", &["write -q -P 2 4M 8M"]);
        folder.sh("sleep 0.02; mkdir backup; cp -a vm/base* backup");
        Some(Self { folder, kind, device })
    }

    /// Base as it is named when the chain lies in a folder.
    fn base(&self, at: &str) -> String {
        self.device.clone().unwrap_or(format!("{at}/base"))
    }

    /// A command with what it needs.
    fn typed<'a>(&self, words: &[&'a str]) -> Vec<&'a str> {
        let dir: &[&str] = if self.device.is_some() { &["--journal-dir", "journals"] } else { &[] };
        [words, dir].concat()
    }

    fn done(&self) -> u64 {
        let base = self.base("vm");
        let args = ["info", "--json", "-f", self.kind.format(), &base];
        let args: Vec<&str> = if self.device.is_some() {
            [&args[..], &["--journal-dir", "journals"]].concat()
        } else {
            args.into()
        };
        self.folder.qmerge(&args).ok().json()["merge-pending"]["bytes-done"].as_u64().unwrap_or(0)
    }

    /// Stops the merge: with a kill, when it has noted something.
    fn stop(&self, how: Interruption) {
        let commit = self.typed(&["commit", "vm/top", "-q"]);
        if how == Interruption::FullDisk {
            let name = if self.kind == Kind::DataFile { "vm/base.data" } else { "vm/base" };
            let written = self.device.clone().unwrap_or_else(|| self.folder.arg(name));
            // The first write to a version 3 image sets its dirty bit.
            let nth = if self.kind == Kind::Version3 { 2 } else { 1 };
            let calls = "copy_file_range,pwrite64,fallocate";
            let full = format!("inject={calls}:error=ENOSPC:when={nth}+");
            let options = ["-P", &written, "-e", &format!("trace={calls}"), "-e", &full];
            self.folder.traced(&options, &commit).expect(8);
            return;
        }
        for call in 3..40 {
            self.folder.signalled_at_sync("SIGKILL", call, &commit).expect(128 + 9);
            if self.done() > 0 {
                return;
            }
        }
        panic!("no merge could be stopped in the middle");
    }

    /// Lets it happen; returns the folder in which the command is typed.
    fn happen(&self, fate: Fate) -> &'static str {
        let folder = &self.folder;
        match fate {
            Fate::Untouched => "vm",
            Fate::Newer => {
                std::thread::sleep(Duration::from_millis(1300));
                folder.io(self.kind.format(), &self.base("vm"), &["write -q -P 9 6M 64k"]);
                "vm"
            }
            Fate::Older => {
                match &self.device {
                    Some(device) => {
                        folder.sh(&format!("dd if=backup/base of={device} bs=1M conv=fsync status=none"));
                    }
                    None => folder.sh("cd backup; for file in base*; do cp -p $file ../vm/$file; done"),
                }
                "vm"
            }
            Fate::Replaced => {
                folder.sh(
                    "cd backup; for file in base*; do cp -p $file ../vm/new; mv ../vm/new ../vm/$file; done",
                );
                "vm"
            }
            Fate::OtherBytes => {
                let (to, times) = match (&self.device, self.kind) {
                    (Some(device), _) => (device.as_str(), false),
                    (None, Kind::DataFile) => ("vm/base.data", true),
                    (None, _) => ("vm/base", true),
                };
                let (before, after) = if times {
                    (format!("cp -p {to} then;"), format!("; touch -r then {to}"))
                } else {
                    Default::default()
                };
                folder.sh(&format!(
                        "{before} head -c 14M /dev/zero | tr '\\0' '\\7' | dd of={to} bs=1M seek=1 count=14 iflag=fullblock conv=notrunc,fsync status=none {after}"
                    ),
                );
                "vm"
            }
            Fate::Copied => {
                folder.sh("cp -a vm copy");
                "copy"
            }
            Fate::Moved => {
                folder.sh("mv vm moved");
                "moved"
            }
            Fate::CopiedWithoutJournal => {
                folder.sh("cp -a vm copy; rm -f copy/.*.qmerge-*");
                "copy"
            }
        }
    }

    /// What is typed in the end, and that it says the right thing.
    fn judge(&self, at: &str, what: &str, fate: Fate, typed: TypedVerb, before: &View) {
        let folder = &self.folder;
        let (top, base) = (format!("{at}/top"), self.base(at));
        let damaged = fate == Fate::OtherBytes && self.kind != Kind::Raw && self.kind != Kind::Device;
        if !damaged && fate != Fate::OtherBytes {
            folder.view("qcow2", &top).assert_same(before, &format!("{what}: before"));
        }
        let run = match typed {
            // The hints of a run are typed on a copy of the folder, but there is no copy of the device.
            TypedVerb::Commit if self.device.is_some() => {
                folder.traced(&["-e", "trace=none"], &self.typed(&["commit", &top, "-q"]))
            }
            TypedVerb::Commit => folder.qmerge(&self.typed(&["commit", &top, "-q"])),
            TypedVerb::Abort => folder.qmerge(&self.typed(&["abort", "-f", self.kind.format(), &base])),
        };
        assert!(right(self.kind, fate, typed).contains(&run.code), "{what}: {run}");
        if fate == Fate::OtherBytes {
            return;
        }
        folder.view("qcow2", &top).assert_same(before, what);
        match typed {
            TypedVerb::Commit if run.code == 0 => {
                folder.view(self.kind.format(), &base).assert_same(before, &format!("{what}: base"));
            }
            TypedVerb::Abort if run.code == 0 => self.begin_again(&top, what, before),
            _ => {}
        }
        if fate == Fate::Newer {
            folder.io(self.kind.format(), &base, &["read -P 9 6M 64k"]);
        }
        if typed == TypedVerb::Commit && run.code == 6 {
            folder.traced(&["-e", "trace=none"], &self.typed(&["commit", &top, "--restart", "-q"])).ok();
            folder.view("qcow2", &top).assert_same(before, &format!("{what}: begun again"));
        }
        self.nothing_is_left(at, what, &run, fate);
    }

    /// What was given up can be merged.
    fn begin_again(&self, top: &str, what: &str, before: &View) {
        if self.kind.format() == "qcow2" {
            let folder = std::path::Path::new(top).parent().unwrap();
            self.folder.check_clean(folder.join("base").to_str().unwrap());
        }
        self.folder.view("qcow2", top).assert_same(before, &format!("{what}: given up"));
        self.folder.qmerge(&self.typed(&["commit", top, "-q"])).ok();
        self.folder.view("qcow2", top).assert_same(before, &format!("{what}: merged behind that"));
    }

    fn nothing_is_left(&self, at: &str, what: &str, run: &Run, fate: Fate) {
        let names =
            |at: &str| std::fs::read_dir(self.folder.join(at)).unwrap().flatten().map(|e| e.file_name());
        let journals = names(at).chain(names("journals"));
        let left = journals.filter(|name| name.to_string_lossy().contains("qmerge")).count();
        assert!((run.code != 0 && fate != Fate::Newer) || left == 0, "{what}: journals are left");
    }
}

/// The exit codes that are right. Where a code is not zero, nothing was written.
fn right(kind: Kind, fate: Fate, typed: TypedVerb) -> &'static [i32] {
    match (fate, typed) {
        (Fate::OtherBytes, _) => &[0, 6, 9],
        (Fate::CopiedWithoutJournal, TypedVerb::Commit) if kind.has_dirty_bit() => &[9],
        (Fate::Newer, TypedVerb::Commit) => &[6],
        // Its node tells that somebody has opened it for writing, not what was written.
        (Fate::Older, TypedVerb::Commit) if kind == Kind::Device => &[0, 6],
        // If it was stopped behind its last batch, it can only be finished.
        (_, TypedVerb::Abort) => &[0, 6],
        _ => &[0],
    }
}

fn row(kind: Kind, how: Interruption, fate: Fate, typed: TypedVerb) {
    let what = format!("{kind:?}, {how:?}, {fate:?}, {typed:?}");
    let Some(chain) = CopiedChain::new(kind) else { return };
    let before = chain.folder.view("qcow2", "vm/top");
    chain.stop(how);
    let at = chain.happen(fate);
    chain.judge(at, &what, fate, typed, &before);
}

/// Whether a row is run by default: each fate of a base whose merge was killed, and a sample of the others.
fn is_sampled(kind: Kind, how: Interruption, fate: Fate, typed: TypedVerb) -> bool {
    let nth = (fate as usize + kind as usize) % 4;
    match (how, typed) {
        (Interruption::Killed, TypedVerb::Commit) => true,
        (Interruption::FullDisk, TypedVerb::Commit) => nth == 2 && fate != Fate::OtherBytes,
        (Interruption::Killed, TypedVerb::Abort) => fate == Fate::Older,
        (Interruption::FullDisk, TypedVerb::Abort) => false,
    }
}

fn table(kind: Kind) {
    if !are_here(&["qemu-img", "qemu-io", "strace", "losetup"]) {
        return;
    }
    let all = std::env::var_os("QMERGE_TEST_FATES").is_some_and(|value| value == "all");
    for how in STOPS {
        for fate in FATES.into_iter().filter(|fate| kind.can(*fate)) {
            for typed in [TypedVerb::Commit, TypedVerb::Abort] {
                // A copy without a journal has nothing to give up.
                let is_possible = typed == TypedVerb::Commit || fate != Fate::CopiedWithoutJournal;
                if is_possible && (all || is_sampled(kind, how, fate, typed)) {
                    row(kind, how, fate, typed);
                }
            }
        }
    }
}

#[test]
fn a_raw_base() {
    table(KINDS[0]);
}

#[test]
fn a_base_of_version_2() {
    table(KINDS[1]);
}

#[test]
fn a_base_of_version_3() {
    table(KINDS[2]);
}

#[test]
fn a_base_with_a_data_file() {
    table(KINDS[3]);
}

#[test]
fn a_base_on_a_block_device() {
    table(KINDS[4]);
}
