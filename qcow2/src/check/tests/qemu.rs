//! QEMU's tools, and a comparison with what they say.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use kit::Lab;
use serde_json::Value;

use super::super::{CheckReport, Verdict};

/// A directory for one test's images; `None`, said loudly, where QEMU's tools are missing.
pub(crate) struct Bench {
    lab: Lab,
}

impl Bench {
    pub(crate) fn new() -> Option<Self> {
        kit::qemu_is_here().then(|| Self { lab: Lab::new("check") })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.lab.join(name)
    }

    /// Runs a command line in the directory; it must succeed. Words are split at blanks, except inside
    /// single quotes.
    pub(crate) fn run(&self, line: &str) {
        let quoted = line.split('\'').enumerate();
        let words: Vec<String> = quoted
            .flat_map(|(n, part)| match n % 2 {
                0 => part.split_whitespace().map(str::to_owned).collect(),
                _ => vec![part.to_owned()],
            })
            .collect();
        kit::run(self.lab.dir(), &words[0], &words[1..]).ok();
    }

    /// Creates an image `name` with options, and fills it with qemu-io commands, one a line.
    pub(crate) fn image(&self, name: &str, create: &str, fill: &str) -> PathBuf {
        self.run(&format!("qemu-img create -q -f qcow2 {create}"));
        self.fill(name, fill);
        self.path(name)
    }

    /// Runs qemu-io commands, one a line, on an image.
    pub(crate) fn fill(&self, name: &str, commands: &str) {
        let commands: Vec<_> = commands.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        if commands.is_empty() {
            return;
        }
        let commands = commands.iter().map(|c| format!(" -c '{c}'")).collect::<String>();
        self.run(&format!("qemu-io -f qcow2{commands} {name}"));
    }
}

/// What `qemu-img check` says: its exit code and its report, if it made one.
pub(crate) fn theirs(path: &Path) -> (i32, Option<Value>) {
    let output = Command::new("qemu-img")
        .args(["check", "-f", "qcow2", "--output=json"])
        .arg(path) // QEMU looks for a data file with a relative name here, not beside the image.
        .current_dir(path.parent().unwrap())
        .output()
        .unwrap();
    (output.status.code().unwrap_or(-1), serde_json::from_slice(&output.stdout).ok())
}

/// Demands that every number of our report is that of `qemu-img check`.
pub(crate) fn assert_same(path: &Path, ours: &CheckReport) {
    let (code, json) = theirs(path);
    let json = json.unwrap_or_else(|| panic!("{}: exit code {code}, no report", path.display()));
    let number = |key: &str| json.get(key).map_or(0, |value| value.as_u64().unwrap());
    let told = [
        ("image-end-offset", ours.image_end_offset),
        ("total-clusters", ours.total_clusters),
        ("allocated-clusters", ours.allocated_clusters),
        ("fragmented-clusters", ours.fragmented_clusters),
        ("compressed-clusters", ours.compressed_clusters),
        ("check-errors", ours.check_errors),
        ("corruptions", ours.corruptions),
        ("leaks", ours.leaks),
    ];
    for (key, value) in told {
        assert_eq!(value, number(key), "{}: {key}: {:#?}", path.display(), ours.findings);
    }
    assert_eq!(code_of(ours), code, "{}", path.display());
}

/// The exit code that stands for our verdict.
pub(crate) fn code_of(report: &CheckReport) -> i32 {
    match report.verdict() {
        Verdict::Clean => 0,
        Verdict::Failed => 1,
        Verdict::Corrupt => 2,
        Verdict::Leaks => 3,
    }
}

/// Overwrites bytes of a file.
pub(crate) fn patch(path: &Path, offset: u64, bytes: &[u8]) {
    OpenOptions::new().write(true).open(path).unwrap().write_all_at(bytes, offset).unwrap();
}

/// Overwrites a 64-bit word.
pub(crate) fn patch_u64(path: &Path, offset: u64, value: u64) {
    patch(path, offset, &value.to_be_bytes());
}

/// A 64-bit word of a file.
pub(crate) fn word(path: &Path, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    File::open(path).unwrap().read_exact_at(&mut bytes, offset).unwrap();
    u64::from_be_bytes(bytes)
}

/// Where things lie in an image, for those who damage them.
pub(crate) struct Places {
    pub(crate) l1: u64,
    pub(crate) l2: u64,
    pub(crate) refcount_table: u64,
    pub(crate) refcount_block: u64,
    pub(crate) snapshots: u64,
}

pub(crate) fn places(path: &Path) -> Places {
    let offset = |at| word(path, at) & 0x00ff_ffff_ffff_fe00;
    let (l1, refcount_table) = (offset(40), offset(48));
    Places {
        l1,
        l2: offset(l1),
        refcount_table,
        refcount_block: offset(refcount_table),
        snapshots: offset(64),
    }
}
