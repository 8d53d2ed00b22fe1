//! One judge decides what is done about an interrupted merge. A file that acts without its leave, or a command that reads states
//! for itself, would be a second one.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::path::{Path, PathBuf};

/// All sources below a folder, with their names from there.
fn sources(folder: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(&next).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|end| end == "rs") {
                let name = path.strip_prefix(folder).unwrap().display().to_string();
                found.push((name, fs::read_to_string(&path).unwrap()));
            }
        }
    }
    assert!(found.len() > 20, "{} has few sources", folder.display());
    found
}

fn src(of: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(of).join("src")
}

/// Whether a word stands in a line that is no comment.
fn says(text: &str, word: &str) -> bool {
    let is_letter = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let lines = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    lines.into_iter().any(|line| {
        line.match_indices(word).any(|(at, _)| {
            let before = line[..at].chars().next_back();
            let after = line[at + word.len()..].chars().next();
            !before.is_some_and(is_letter) && !after.is_some_and(is_letter)
        })
    })
}

/// What changes or removes images of a merge, and the only files that do it: each function there takes a leave.
#[test]
fn images_are_changed_only_with_the_leave_of_the_judge() {
    for (deed, allowed) in [
        ("empty_all_onto", &["live/tidy/layers.rs"][..]),
        ("mark_merged", &["live/tidy/layers.rs"]),
        ("remove(&OsHost", &["live/tidy/layers.rs"]),
        ("opened.relink_back", &["live/recover/act.rs"]),
        ("Interrupted::open", &["live/recover/evidence.rs"]),
        ("Switched::noted", &["live/run/driver.rs"]),
        ("Switched::seen_in", &["live/machine.rs"]),
        ("Tidy {", &["live/tidy/mod.rs", "live/recover/act.rs", "live/tidy/layers.rs"]),
    ] {
        for (name, text) in sources(&src("qmp-client")) {
            let is_here =
                text.lines().any(|line| line.contains(deed) && !line.trim_start().starts_with("//"));
            assert!(!is_here || allowed.contains(&name.as_str()), "{name} has {deed}");
        }
        for (name, text) in sources(&src("merge-cli")) {
            let is_of_live = name.starts_with("cmd/live");
            assert!(!is_of_live || !text.contains(deed), "the command's {name} has {deed}");
        }
    }
    let layers = fs::read_to_string(src("qmp-client").join("live/tidy/layers.rs")).unwrap();
    assert!(layers.contains("pub(crate) switched: Switched<'a>"), "layers are tidied without a leave");
}

/// The fields of a leave are the judge's own, and so is the making of a ruling.
#[test]
fn a_leave_is_made_by_the_judge_alone() {
    let judge = fs::read_to_string(src("qmp-client").join("live/verdict/mod.rs")).unwrap();
    for leave in ["struct NotSwitched<'s>(&'s State);", "struct Switched<'s>(&'s State);"] {
        assert!(judge.contains(leave), "{leave}");
    }
    assert!(judge.contains("struct RelinkBack<'s> {\n    state: &'s State,"));
    for (name, text) in sources(&src("qmp-client")) {
        let asks = says(&text, ".judge") || text.contains(".judge(");
        let may = name.starts_with("live/verdict/") || name.starts_with("fuzzing/");
        let recovers = name == "live/recover/mod.rs" && text.contains("case.judge(qemu)");
        assert!(!asks || may || recovers, "{name} judges for itself");
    }
}

/// The most lines that the command may have. It has fewer whenever something moves down; then this goes down, too.
const MOST_LINES: usize = 8760;

/// What the command does not import: tables, stamps, journals, what states are made of, and the road of bytes.
#[test]
fn the_command_knows_no_states() {
    let mut lines = 0;
    for (name, text) in sources(&src("merge-cli")) {
        lines += text.lines().count();
        let states = ["StateFile", "StateLayer", "find_states", "states_in", "stamp_of", "Stamp"];
        let tables = ["L1Entry", "L2Entry", "RefcountTableEntry", "RefcountWidth", "Refcounts", "Geometry"];
        for word in states.iter().chain(&tables).chain(&["has_edit", "strangers_about"]) {
            assert!(!says(&text, word), "the command's {name} has {word}");
        }
        for module in ["journal::", "stamp::", "transfer::", "retire::"] {
            assert!(!text.contains(module), "the command's {name} imports from {module}");
        }
    }
    assert!(lines <= MOST_LINES, "the command has {lines} lines, and is to find words only");
}
