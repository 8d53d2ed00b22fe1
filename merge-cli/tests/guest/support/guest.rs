//! A guest that goes on from its saved state, with the disks of a test.

use std::fs;
use std::io::{BufRead, BufReader, Write as _};
use std::ops::Deref;
use std::path::Path;
use std::process::{ChildStdin, ChildStdout};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Instant;

use serde_json::json;
use tempfile::TempDir;

use super::process::{Run, qmerge, run};
use super::qemu::{PATIENCE, Qemu};
use super::saved;

/// Of each of the guest's disks.
pub(crate) const DISK_SIZE: &str = "64M";

/// The guest's side of its disks `vda` and `vdb`, and `vdc` for its journal: the same at all times, or the saved
/// state does not fit.
pub(crate) fn frontends() -> [&'static str; 6] {
    [
        "-device",
        "virtio-blk-pci,drive=drive-vda,id=vda,addr=0x4",
        "-device",
        "virtio-blk-pci,drive=drive-vdb,id=vdb,addr=0x5",
        "-device",
        "virtio-blk-pci,drive=drive-vdc,id=vdc,addr=0x6",
    ]
}

/// A folder with the images of a machine.
pub(crate) struct Lab {
    folder: TempDir,
}

impl Lab {
    /// With empty files for the second disk and the journal.
    pub(crate) fn new() -> Self {
        let lab = Self { folder: tempfile::tempdir().unwrap() };
        for disk in ["vdb.raw", "journal.raw"] {
            lab.run(&["qemu-img", "create", "-q", "-f", "raw", disk, DISK_SIZE]);
        }
        lab
    }

    /// Makes a chain of these files, the base first, each with bytes of its own.
    pub(crate) fn chain(&self, files: &[&str]) {
        for (n, file) in files.iter().enumerate() {
            let format = if file.ends_with(".raw") { "raw" } else { "qcow2" };
            let mut line = vec!["qemu-img", "create", "-q", "-f", format];
            if let Some(below) = n.checked_sub(1).map(|below| files[below]) {
                line.extend(["-b", below, "-F", if below.ends_with(".raw") { "raw" } else { "qcow2" }]);
            }
            self.run(&[&line[..], &[file, DISK_SIZE]].concat());
            // Some that the layers above hide, some that they do not, and some across clusters.
            let (common, own) =
                (format!("write -q -P {} 1M 4M", n + 1), format!("write -q -P {0} {0}1M 3000k", n + 1));
            self.run(&["qemu-io", "-f", format, "-c", &common, "-c", &own, file]);
        }
    }

    pub(crate) fn dir(&self) -> &Path {
        self.folder.path()
    }

    /// Runs a program of QEMU's; it must succeed.
    #[track_caller]
    pub(crate) fn run(&self, line: &[&str]) -> String {
        run(self.dir(), line)
    }

    /// Runs the built command.
    #[track_caller]
    pub(crate) fn qmerge(&self, args: &[&str]) -> Run {
        qmerge(self.dir(), args)
    }

    /// What a guest sees in the image, by `qemu-img`. No QEMU may hold it.
    pub(crate) fn bytes(&self, image: &str) -> Vec<u8> {
        let format = if image.ends_with(".raw") { "raw" } else { "qcow2" };
        self.run(&["qemu-img", "convert", "-f", format, "-O", "raw", image, "bytes.tmp"]);
        let bytes = fs::read(self.dir().join("bytes.tmp")).unwrap();
        fs::remove_file(self.dir().join("bytes.tmp")).unwrap();
        bytes
    }

    /// The options for an image as the back end of a disk. The name is absolute, so that everybody can use it.
    pub(crate) fn drive(&self, disk: &str, image: &str) -> [String; 2] {
        let format = if image.ends_with(".raw") { "raw" } else { "qcow2" };
        let file = self.dir().join(image);
        ["-drive".into(), format!("file={},if=none,id=drive-{disk},format={format}", file.display())]
    }

    /// Starts the guest with this image as `vda`, and `vdb.raw` as `vdb`.
    pub(crate) fn start(&self, image: &str) -> Guest {
        self.start_with(&[self.drive("vda", image), self.drive("vdb", "vdb.raw")].concat())
    }

    /// Starts the guest with disks that these options make, as `drive-vda` and `drive-vdb`.
    pub(crate) fn start_with(&self, disks: &[String]) -> Guest {
        let (machine, state) = saved::state();
        let disks: Vec<&str> = disks.iter().map(String::as_str).collect();
        let journal = self.drive("vdc", "journal.raw");
        let journal: Vec<&str> = journal.iter().map(String::as_str).collect();
        let incoming = format!("file:{}", state.display());
        let machine = machine.clone().with(&disks).with(&journal).with(&frontends());
        let (qemu, input, output) = Qemu::start(self.dir(), &machine.with(&["-incoming", &incoming]));
        let serial = Serial::new(input, output);
        qemu.until("the running guest", |q| q.ask("query-status", json!({}))["status"] == "running");
        Guest { qemu, serial }
    }
}

/// A running guest.
pub(crate) struct Guest {
    qemu: Qemu,
    serial: Serial,
}

impl Deref for Guest {
    type Target = Qemu;

    fn deref(&self) -> &Qemu {
        &self.qemu
    }
}

impl Guest {
    /// Lets the guest write to these disks, and waits until it does.
    #[track_caller]
    pub(crate) fn go(&mut self, seed: u64, disks: &str) {
        self.go_within(seed, u64::MAX, disks);
    }

    /// The same, for the first so many blocks of each disk.
    #[track_caller]
    pub(crate) fn go_within(&mut self, seed: u64, blocks: u64, disks: &str) {
        self.serial.say(&format!("go {seed} {blocks} {disks}"));
        self.writes(1);
    }

    /// Waits until that many writes more have been acknowledged.
    #[track_caller]
    pub(crate) fn writes(&self, count: u64) {
        let target = self.serial.seq() + count;
        self.serial.wait("more writes", |lines| {
            lines
                .iter()
                .rev()
                .find_map(|l| l.strip_prefix("seq "))
                .is_some_and(|n| n.parse::<u64>().unwrap() >= target)
        });
    }

    /// Lets the guest finish its batch; the time of the longest write since it began, in milliseconds.
    #[track_caller]
    pub(crate) fn pause(&mut self) -> u64 {
        self.serial.say("pause");
        let answer = self.serial.answer("paused");
        answer.rsplit_once("stall-ms=").unwrap().1.parse().unwrap()
    }

    /// Has the guest read back what was acknowledged to it; all of it must be there.
    #[track_caller]
    pub(crate) fn verify(&mut self) -> u64 {
        self.serial.say("verify");
        let answer = self.serial.answer("verified");
        let blocks = answer.strip_prefix("verified blocks=").and_then(|a| a.strip_suffix(" bad=0"));
        blocks.unwrap_or_else(|| panic!("{}", self.serial.text())).parse().unwrap()
    }

    /// Has the guest take the journal's word for what was acknowledged, and read that back.
    #[track_caller]
    pub(crate) fn verify_journal(&mut self) -> u64 {
        self.serial.say("replay");
        self.serial.answer("replayed");
        self.verify()
    }

    /// Ends the machine as its power button does.
    #[track_caller]
    pub(crate) fn quit(mut self) {
        self.serial.say("quit");
        assert!(self.qemu.ended().success());
    }

    /// As `kill -9` does.
    pub(crate) fn kill(mut self) {
        self.qemu.kill();
    }
}

/// The guest's serial line.
pub(crate) struct Serial {
    input: ChildStdin,
    heard: Arc<Heard>,
}

/// What came over the line so far.
#[derive(Default)]
struct Heard {
    lines: Mutex<Lines>,
    changed: Condvar,
}

#[derive(Default)]
struct Lines {
    lines: Vec<String>,
    ended: bool,
}

impl Serial {
    pub(crate) fn new(input: ChildStdin, output: ChildStdout) -> Self {
        let heard = Arc::new(Heard::default());
        let hearing = Arc::clone(&heard);
        thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line);
                let line = line.trim();
                // Other lines are the kernel's.
                let answer = line.strip_prefix("guest: ").unwrap_or(line).to_owned();
                hearing.lines.lock().unwrap().lines.push(answer);
                hearing.changed.notify_all();
            }
            hearing.lines.lock().unwrap().ended = true;
            hearing.changed.notify_all();
        });
        Self { input, heard }
    }

    fn say(&mut self, command: &str) {
        writeln!(self.input, "{command}").unwrap();
    }

    /// Waits for an answer that begins with this word, and takes it.
    #[track_caller]
    pub(crate) fn answer(&self, word: &str) -> String {
        self.wait(word, |lines| lines.iter().any(|l| l.starts_with(word)));
        let lines = &mut self.heard.lines.lock().unwrap().lines;
        let at = lines.iter().position(|l| l.starts_with(word)).unwrap();
        lines.remove(at)
    }

    fn seq(&self) -> u64 {
        let lines = &self.heard.lines.lock().unwrap().lines;
        lines.iter().rev().find_map(|l| l.strip_prefix("seq ")).map_or(0, |n| n.parse().unwrap())
    }

    fn text(&self) -> String {
        self.heard.lines.lock().unwrap().lines.join("\n")
    }

    #[track_caller]
    fn wait(&self, what: &str, wanted: impl Fn(&[String]) -> bool) {
        let start = Instant::now();
        let mut heard = self.heard.lines.lock().unwrap();
        while !wanted(&heard.lines) {
            let left = PATIENCE.saturating_sub(start.elapsed());
            let failed = heard.ended || heard.lines.iter().any(|l| l.starts_with("failed"));
            assert!(!failed && !left.is_zero(), "no {what}: {}", heard.lines.join("\n"));
            heard = self.heard.changed.wait_timeout(heard, left).unwrap().0;
        }
    }
}
