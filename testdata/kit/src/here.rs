//! Whether what a test needs is on this machine.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Mutex;

/// Where a program lies: in `PATH`, or where system tools lie, which is not in every user's `PATH`.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(system).map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// Whether all of these programs are here. Says which are not, and fails where `CI` is set.
pub fn are_here(programs: &[&str]) -> bool {
    let missing: Vec<_> = programs.iter().copied().filter(|program| find(program).is_none()).collect();
    if !missing.is_empty() {
        skipped(&format!("not installed: {}", missing.join(", ")));
    }
    missing.is_empty()
}

/// Whether the tools are here that make images and judge them: `qemu-img` and `qemu-io`. As [`are_here`].
pub fn qemu_is_here() -> bool {
    are_here(&["qemu-img", "qemu-io"])
}

/// A test cannot try anything for this reason: fails where `CI` is set, and says it otherwise.
pub fn skipped(why: &str) {
    let test = std::thread::current().name().unwrap_or("?").to_owned();
    assert!(std::env::var_os("CI").is_none(), "{test}: {why}; with CI set nothing may be skipped");
    not_tried(&format!("{why}: the tests that need it pass without having tried anything"));
}

/// Says on standard error, once for each reason, what is not tried here, also where `CI` is set. libtest hides what a test
/// prints that passes, so this goes past it.
pub fn not_tried(why: &str) {
    static TOLD: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let is_new = TOLD.lock().is_ok_and(|mut told| told.insert(why.to_owned()));
    if is_new {
        let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
    }
}
