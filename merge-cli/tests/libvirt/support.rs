//! Commands that are run to their end.

use std::process::{Command, Output, Stdio};

/// Whether all of these programs are here; says so when they are not, and fails where `CI` is set.
pub(crate) fn are_here(programs: &[&str]) -> bool {
    let runs = |program: &&&str| {
        let run = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        run.is_ok_and(|status| status.success())
    };
    let missing: Vec<_> = programs.iter().filter(|program| !runs(program)).collect();
    if missing.is_empty() {
        return true;
    }
    assert!(std::env::var_os("CI").is_none(), "{missing:?} must be installed for the tests with libvirt");
    crate::skipped::skipped(&format!("{missing:?} not installed, so nothing was tried with libvirt"));
    false
}

/// What a program that must succeed prints.
#[track_caller]
pub(crate) fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

/// Bytes that are text.
pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The command that a hint of this kind gives.
#[track_caller]
pub(crate) fn hinted(output: &Output, with: &str) -> String {
    let err = text(&output.stderr);
    let hints = err.lines().filter_map(|line| line.strip_prefix("hint: "));
    let found =
        hints.filter_map(|hint| hint.find("virsh ").map(|at| &hint[at..])).find(|line| line.contains(with));
    assert!(found.is_some(), "no hint with {with}: {err}");
    found.unwrap().to_owned()
}
