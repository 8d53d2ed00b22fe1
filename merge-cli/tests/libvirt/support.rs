//! Commands that are run to their end.

use std::process::{Command, Output};

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
