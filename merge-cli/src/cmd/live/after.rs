//! What a live merge leaves: files that nobody needs any more, and a configuration that should change.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use qcow2::retire::Known;
use qcow2::storage::FileId;
use qmp_client::{FileIdentity, Kind, State};

use super::files::Files;
use super::tidy::{self, Tidied, Tidy, Wishes};
use crate::output::human::{printable, shell_word};

/// Removes or empties what a merge left, as far as QEMU has let go of it. Base is durable then, and the merge is
/// switched.
pub(super) fn tidy(state: &State, files: &Files, wishes: &Wishes) -> Tidied {
    let mut tidied = Tidied::default();
    let mut left = Vec::new();
    for layer in state.merged() {
        let path = PathBuf::from(&layer.file);
        if state.kind == Kind::Pull {
            // They were not written, and others may use them.
            tidied.unneeded.push(path);
        } else if !tidied.kept.is_empty() {
            // Whoever uses the layer that is kept reads through those below it.
            tidied.kept.push((path, "a layer above it is kept".to_owned()));
        } else if let Some(identity) = &layer.identity {
            if is_gone(&path) {
                // An earlier call has removed it, or the user.
                continue;
            }
            match tidy::id(layer) {
                None => tidied.kept.push((path, "it is another file by now".to_owned())),
                Some(id) if files.has_open(id) => {
                    tidied.kept.push((path, "QEMU still has it open".to_owned()));
                }
                Some(id) => left.push((layer, known(path, id, identity))),
            }
        } else {
            tidied.stale.push((path, "it is no file here".to_owned()));
        }
    }
    // It is short work, and half of it would have to be done again.
    let cancel = AtomicBool::new(false);
    Tidy { state, wishes, dry_run: false, cancel: &cancel }.run(&left, &mut tidied);
    tidied
}

fn is_gone(path: &Path) -> bool {
    path.symlink_metadata().is_err_and(|error| error.kind() == ErrorKind::NotFound)
}

fn known(path: PathBuf, id: FileId, identity: &FileIdentity) -> Known {
    Known {
        path,
        id,
        len: (identity.size > 0).then_some(identity.size),
        modified_ns: (identity.modified_ns > 0).then_some(identity.modified_ns.into()),
        no_locks: false,
    }
}

/// The layers that are no restore points any more once the job runs: base, and those between it and top.
pub(super) fn restore_points_lost(state: &State) -> String {
    if state.kind == Kind::Pull {
        return String::new();
    }
    let changed =
        state.layers.iter().rev().filter(|layer| layer.index >= state.base && layer.index < state.top);
    changed.map(|layer| printable(&layer.file)).collect::<Vec<_>>().join(", ")
}

/// The words of a process's command line that name an image, as they would be typed.
pub(super) fn words_that_name(pid: u32, image: &Path) -> Vec<String> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words: Vec<String> =
        line.split(|b| *b == 0).map(|w| String::from_utf8_lossy(w).into_owned()).collect();
    naming(&words, image)
}

fn naming(words: &[String], image: &Path) -> Vec<String> {
    let (whole, name) = (image.to_string_lossy(), image.file_name().unwrap_or_default().to_string_lossy());
    let names = |word: &String, what: &str| {
        // A name ends where its option does.
        word.match_indices(what).any(|(at, _)| {
            let before = word[..at].chars().next_back();
            let after = word[at + what.len()..].chars().next();
            let edge = |c: Option<char>| c.is_none_or(|c| "=,\"/: ".contains(c));
            edge(before) && edge(after)
        })
    };
    let found = |what: &str| -> Vec<String> {
        let options = words.iter().enumerate().filter(|(_, word)| names(word, what));
        let with_option = |(place, word): (usize, &String)| {
            let option =
                place.checked_sub(1).and_then(|before| words.get(before)).filter(|w| w.starts_with('-'));
            let word = shell_word(word);
            option.map_or(word.clone(), |option| format!("{option} {word}"))
        };
        options.map(with_option).collect()
    };
    let by_path = found(&whole);
    if by_path.is_empty() { found(&name) } else { by_path }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_that_name_an_image_are_found_with_their_option() {
        let words = [
            "qemu-system-x86_64",
            "-drive",
            "file=/vm/c.qcow2,if=virtio",
            "-drive",
            "file=/vm/xc.qcow2",
            "-m",
            "64",
        ];
        let words = words.map(str::to_owned);
        assert_eq!(naming(&words, Path::new("/vm/c.qcow2")), ["-drive file=/vm/c.qcow2,if=virtio"]);
        assert_eq!(naming(&words, Path::new("/other/c.qcow2")), ["-drive file=/vm/c.qcow2,if=virtio"]);
        assert!(naming(&words, Path::new("/vm/d.qcow2")).is_empty());
        let words = ["-hda".to_owned(), "c.qcow2".to_owned()];
        assert_eq!(naming(&words, Path::new("/vm/c.qcow2")), ["-hda c.qcow2"]);
        let json = [r#"{"driver":"qcow2","file":{"driver":"file","filename":"/vm/c.qcow2"}}"#.to_owned()];
        assert_eq!(naming(&json, Path::new("/vm/c.qcow2")).len(), 1);
    }
}
