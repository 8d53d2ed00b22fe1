//! Says that tests cannot run here. libtest hides what a test prints that passes, so this goes past it.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::sync::Mutex;

/// Says it on standard error, once for each reason: the tests that it concerns pass without having tried anything.
pub(crate) fn skipped(why: &str) {
    static TOLD: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let is_new = TOLD.lock().is_ok_and(|mut told| told.insert(why.to_owned()));
    if is_new {
        let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
    }
}
