//! The words of a process's command line that name an image.

use std::fs;
use std::path::Path;

/// A word of a command line, with the option that it is the value of.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Named {
    /// The option before it, such as `-drive`.
    pub option: Option<String>,
    /// The word.
    pub word: String,
}

/// The words of a process's command line that name an image: by its whole path, or, where none does, by the name of its file.
pub fn words_naming(pid: u32, image: &Path) -> Vec<Named> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words: Vec<String> =
        line.split(|b| *b == 0).map(|w| String::from_utf8_lossy(w).into_owned()).collect();
    naming(&words, image)
}

fn naming(words: &[String], image: &Path) -> Vec<Named> {
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
    let found = |what: &str| -> Vec<Named> {
        let options = words.iter().enumerate().filter(|(_, word)| names(word, what));
        let with_option = |(place, word): (usize, &String)| {
            let option =
                place.checked_sub(1).and_then(|before| words.get(before)).filter(|w| w.starts_with('-'));
            Named { option: option.cloned(), word: word.clone() }
        };
        options.map(with_option).collect()
    };
    let by_path = found(&whole);
    if by_path.is_empty() { found(&name) } else { by_path }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn naming(words: &[String], image: &Path) -> Vec<String> {
        let named = super::naming(words, image).into_iter();
        named.map(|n| [n.option, Some(n.word)].into_iter().flatten().collect::<Vec<_>>().join(" ")).collect()
    }

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
