//! Hints as a user types them: in a shell, in the folder where the command ran, on images that nobody misses.
//!
//! The folder is seen through an overlay file system of a mount namespace, so that what the hint changes is thrown away, and
//! costs no copy. That takes root; elsewhere no hint is typed here. Each hint is typed once in a process, by its words
//! without the command; `QMERGE_TEST_HINTS=all` types every one.

use std::collections::BTreeSet;
use std::process::Command;
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::{Lab, Run};

/// Programs that a hint may have typed here. `qemu-img` corrects names in headers.
const PROGRAMS: [&str; 2] = ["qmerge ", "qemu-img "];

/// Mounts an overlay over the folder, types the line there, and tells which files it changed.
const SCRIPT: &str = r#"
set -e
mount -t tmpfs tmpfs /mnt
mkdir /mnt/new /mnt/work /mnt/old /mnt/bin
mount --bind "$1" /mnt/old
ln -s "$2" /mnt/bin/qmerge
mount -t overlay -o "lowerdir=/mnt/old,upperdir=/mnt/new,workdir=/mnt/work" overlay "$1"
cd "$1"
set +e
PATH=/mnt/bin:$PATH timeout 120 bash -c "$3" >/mnt/out 2>&1
code=$?
cat /mnt/out
cd /mnt/new
changed=$(find . ! -name . ! -type d | while IFS= read -r name; do cmp -s "$name" "/mnt/old/$name" || echo "$name"; done)
printf '\n%s\n%s\n' "$code" "${changed//$'\n'/ }"
"#;

/// How a typed hint ended.
#[derive(Debug)]
pub struct Typed {
    /// The line.
    pub line: String,
    /// Its exit code.
    pub code: i32,
    /// The files that it changed.
    pub changed: String,
    /// All that it printed.
    pub text: String,
}

impl Typed {
    /// Fails unless the line did what it says, or changed nothing; and if it is no command at all.
    #[track_caller]
    pub fn assert_harmless(&self, of: &Run) {
        let misspelt = self.text.contains("--help") || self.code == 126 || self.code == 127;
        // Whoever salvages keeps what could be read, and is told with 9 that it is not all.
        let salvaged = self.code == 9 && self.line.contains(" --salvage");
        assert!(
            !misspelt && (self.code == 0 || self.changed.is_empty() || salvaged),
            "the hint '{}' ends with {} and changes '{}':\n{}\nafter:\n{of}",
            self.line,
            self.code,
            self.changed,
            self.text
        );
    }
}

/// The command of a hint, without `sudo`; `None` if it is advice alone, or a call for help.
pub fn command(hint: &str) -> Option<&str> {
    let starts = PROGRAMS.iter().filter_map(|program| {
        if hint.starts_with(program) { Some(0) } else { hint.find(&format!(": {program}")).map(|at| at + 2) }
    });
    let line = &hint[starts.min()?..];
    (!line.ends_with("--help")).then_some(line)
}

/// Types the hints that a run in the lab printed; see the module's head.
#[track_caller]
pub fn type_hints(lab: &Lab, run: &Run) {
    static DONE: OnceLock<Mutex<BTreeSet<String>>> = OnceLock::new();
    let all = std::env::var_os("QMERGE_TEST_HINTS").is_some_and(|value| value == "all");
    for hint in run.stderr.lines().filter_map(|line| line.strip_prefix("hint: ")) {
        let Some(line) = command(hint) else { continue };
        // Whoever waits for a QEMU to answer is no matter of the images.
        if line.starts_with("qmerge live") || line.starts_with("qmerge demo") {
            continue;
        }
        let verb = line.split(' ').nth(1).unwrap_or_default();
        let words = format!("{verb} {}", hint.strip_suffix(line).unwrap_or_default());
        let done = DONE.get_or_init(Mutex::default);
        let is_new = done.lock().unwrap_or_else(PoisonError::into_inner).insert(words);
        if (is_new || all)
            && let Some(typed) = type_line(lab, line)
        {
            typed.assert_harmless(run);
        }
    }
}

/// Types a line in the lab and throws away what it changes; `None` where that cannot be done.
#[track_caller]
pub fn type_line(lab: &Lab, line: &str) -> Option<Typed> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let output = Command::new("unshare")
        .args(["--mount", "bash", "-c", SCRIPT, "bash"])
        .arg(lab.dir())
        .arg(lab.command())
        .arg(line)
        .output()
        .ok()?;
    if !output.status.success() {
        // No mount namespace here, or no overlay file system.
        return None;
    }
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut lines = text.trim_end_matches('\n').rsplit('\n');
    let (last, before) = (lines.next()?, lines.next()?);
    let (changed, code) = match before.trim().parse::<i32>() {
        Ok(code) => (last.to_owned(), code),
        // Nothing changed: the last line is empty, and the code stands there.
        Err(_) => (String::new(), last.trim().parse().ok()?),
    };
    Some(Typed { line: line.to_owned(), code, changed, text })
}
