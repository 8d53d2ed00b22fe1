//! What a live merge leaves: files that nobody needs any more, and a configuration that should change.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use qcow2::chain::{OpenOptions, Policy};
use qcow2::image::ImageFormat;
use qcow2::merge::{EmptyOptions, Known, empty_onto, mark_merged, remove, unused};
use qcow2::storage::{FileId, OsHost};
use qmp_client::{FileIdentity, Kind, State, StateLayer};

use super::files::{Files, identity};
use crate::output::human::{printable, shell_word};

/// What to do with files that are no longer needed.
#[derive(Clone, Debug, Default)]
pub(super) struct Wishes {
    /// Remove them.
    pub(super) delete: bool,
    /// Where else to look for images that use them, beside the folders that the merge noted.
    pub(super) scan: Vec<PathBuf>,
}

/// What became of them.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Tidied {
    /// Files that were removed.
    pub(super) deleted: Vec<PathBuf>,
    /// Files that carry the mark of a merged image.
    pub(super) marked: Vec<PathBuf>,
    /// Files that the disk no longer needs, and that are still what they were.
    pub(super) unneeded: Vec<PathBuf>,
    /// The old active image, which is an empty overlay on base now.
    pub(super) emptied: Option<PathBuf>,
    /// Files that could not be treated, each with the reason.
    pub(super) kept: Vec<(PathBuf, String)>,
}

/// Removes, marks or empties what a merge left, as far as QEMU has let go of it. Base is durable then, and the
/// merge is switched.
pub(super) fn tidy(state: &State, files: &Files, wishes: &Wishes) -> Tidied {
    let mut tidied = Tidied::default();
    let ids: Vec<FileId> = state.layers.iter().filter_map(id).collect();
    for layer in state.merged() {
        let path = PathBuf::from(&layer.file);
        if state.kind == Kind::Pull {
            // They were not written, and others may use them.
            tidied.unneeded.push(path);
            continue;
        }
        if wishes.delete && !tidied.kept.is_empty() {
            // Whoever uses the layer that is kept reads through those below it.
            tidied.kept.push((path, "a layer above it is kept".to_owned()));
            continue;
        }
        let Some(identity) = &layer.identity else {
            tidied.kept.push((path, "it is no file here".to_owned()));
            continue;
        };
        let Some(id) = id(layer) else {
            tidied.kept.push((path, "it is another file by now".to_owned()));
            continue;
        };
        if files.has_open(id) {
            tidied.kept.push((path, "QEMU still has it open".to_owned()));
            continue;
        }
        let known = Known {
            path: path.clone(),
            id,
            len: (identity.size > 0).then_some(identity.size),
            modified_ns: (identity.modified_ns > 0).then_some(identity.modified_ns.into()),
        };
        if let Err(error) = treat(state, layer, known, &ids, wishes, &mut tidied) {
            tidied.kept.push((path, error.to_string()));
        }
    }
    tidied
}

fn treat(
    state: &State,
    layer: &StateLayer,
    known: Known,
    chain: &[FileId],
    wishes: &Wishes,
    tidied: &mut Tidied,
) -> qcow2::Result<()> {
    let base = state.target().filter(|_| state.kind != Kind::Pull);
    let base_path = base.map(|base| PathBuf::from(&base.file)).unwrap_or_default();
    if wishes.delete {
        let scan = [&state.scan[..], &wishes.scan[..]].concat();
        let (_, users) = unused(&OsHost, std::slice::from_ref(&known), chain, &scan)?;
        match users.first() {
            Some(user) => tidied.kept.push((known.path, format!("{} uses it", user.display()))),
            None => tidied.deleted.extend(remove(&OsHost, &[known], chain, &scan)?.deleted),
        }
    } else if state.kind == Kind::ActiveCommit && layer.index == state.top && layer.format == "qcow2" {
        let format =
            if base.is_some_and(|base| base.format == "raw") { ImageFormat::Raw } else { ImageFormat::Qcow2 };
        let open = OpenOptions { policy: Policy::local_files(), ..OpenOptions::default() };
        // What is lost has been accepted before the merge began.
        let options =
            EmptyOptions { open, drop_bitmaps: true, allow_snapshot_change: true, ..EmptyOptions::default() };
        // It is short work, and half of it would have to be done again.
        empty_onto(&OsHost, &known, &base_path, format, &options, &AtomicBool::new(false))?;
        tidied.emptied = Some(known.path);
    } else {
        let retired = mark_merged(&OsHost, &[known], &base_path)?;
        tidied.marked.extend(retired.marked);
        tidied.unneeded.extend(retired.unmarked);
    }
    Ok(())
}

/// The file of a layer, if its name still leads to it.
fn id(layer: &StateLayer) -> Option<FileId> {
    let path = Path::new(&layer.file);
    let same = FileIdentity::of(path)?.is_same_file(layer.identity.as_ref()?);
    same.then(|| identity(path)).flatten()
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
