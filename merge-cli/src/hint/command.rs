//! A command line, as a value and as it is typed.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use qcow2::error::is_harmful;

/// A command with its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Command(Vec<OsString>);

impl Command {
    /// A command of this program: `qmerge` and these words.
    pub(crate) fn qmerge<W: AsRef<OsStr>>(words: impl IntoIterator<Item = W>) -> Self {
        words.into_iter().fold(Self::of("qmerge"), |command, word| command.word(word))
    }

    /// Another program, without arguments.
    pub(crate) fn of(program: &str) -> Self {
        Self(vec![program.into()])
    }

    /// With one more word, which is not taken for a file.
    pub(crate) fn word(mut self, word: impl AsRef<OsStr>) -> Self {
        self.0.push(word.as_ref().to_owned());
        self
    }

    /// With the name of a file, which no program may take for an option.
    pub(crate) fn file(self, file: impl AsRef<Path>) -> Self {
        self.word(file_word(file.as_ref()))
    }

    /// With an option and its value, before the `--` that ends the options if there is one.
    pub(crate) fn option(self, option: &str, value: impl AsRef<OsStr>) -> Self {
        self.options([OsStr::new(option), value.as_ref()])
    }

    /// With words that are options, before the `--` that ends the options if there is one.
    pub(crate) fn options<W: AsRef<OsStr>>(mut self, words: impl IntoIterator<Item = W>) -> Self {
        let end = self.0.iter().position(|word| word == "--").unwrap_or(self.0.len());
        self.0.splice(end..end, words.into_iter().map(|word| word.as_ref().to_owned()));
        self
    }

    /// The same command as root types it for others.
    pub(crate) fn with_sudo(mut self) -> Self {
        self.0.insert(0, "sudo".into());
        self
    }

    /// Its words.
    pub(crate) fn words(&self) -> &[OsString] {
        &self.0
    }
}

impl fmt::Display for Command {
    /// As it is typed in a shell.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, word) in self.0.iter().enumerate() {
            f.write_str(if n > 0 { " " } else { "" })?;
            f.write_str(&quoted(word))?;
        }
        Ok(())
    }
}

/// The name of a file as an argument. A name that begins with `-` gets `./` in front.
pub(crate) fn file_word(file: &Path) -> OsString {
    if file.as_os_str().as_bytes().starts_with(b"-") {
        return Path::new(".").join(file).into();
    }
    file.as_os_str().to_owned()
}

/// A word for the shell, quoted if necessary. Control characters and bytes that are not UTF-8 are written as
/// `$'\x1b'`, which bash, zsh and ksh read back.
pub(crate) fn quoted(word: &OsStr) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%^".contains(c);
    let text = word.to_str();
    match text {
        Some(text) if !text.is_empty() && text.chars().all(is_plain) => text.to_owned(),
        Some(text) if !text.chars().any(is_harmful) => format!("'{}'", text.replace('\'', r"'\''")),
        _ => format!("$'{}'", escaped(word.as_bytes())),
    }
}

/// The inside of `$'…'`.
fn escaped(bytes: &[u8]) -> String {
    let mut out = String::new();
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\n' => out.push_str("\\n"),
                '\t' => out.push_str("\\t"),
                '\'' | '\\' => out.extend(['\\', c]),
                c if is_harmful(c) => c.encode_utf8(&mut [0; 4]).bytes().for_each(|b| push_byte(&mut out, b)),
                c => out.push(c),
            }
        }
        chunk.invalid().iter().for_each(|&byte| push_byte(&mut out, byte));
    }
    out
}

fn push_byte(out: &mut String, byte: u8) {
    *out += &format!("\\x{byte:02x}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process;

    #[test]
    fn plain_words_stay_plain() {
        assert_eq!(quoted(OsStr::new("a-b_c.qcow2")), "a-b_c.qcow2");
        assert_eq!(quoted(OsStr::new("my disk")), "'my disk'");
        assert_eq!(quoted(OsStr::new("[1]")), "'[1]'");
        assert_eq!(quoted(OsStr::new("it's")), r"'it'\''s'");
        assert_eq!(quoted(OsStr::new("")), "''");
        assert_eq!(quoted(OsStr::new("a\u{202e}b")), r"$'a\xe2\x80\xaeb'");
    }

    #[test]
    fn every_word_survives_a_shell() {
        for word in [
            &b"a b"[..],
            b"",
            b"it's",
            b"$HOME `x` \\ \"",
            b"*?[1]{a,b}~",
            b"~",
            b"#x",
            b"!x",
            b"a\nb\tc\rd",
            b"-x",
            b"\x1b[31m1",
            b"\xff\xfe9",
            b"\n'\\",
            "K\u{f6}ln\u{202e}8".as_bytes(),
            b"a;b|c&d>e<f(g)",
            b"^x",
            b"=x",
        ] {
            let line = Command::of("printf").word("%s").word(OsStr::from_bytes(word)).to_string();
            assert!(!line.contains(is_harmful), "{line:?}");
            let shell = process::Command::new("bash").args(["-c", &line]).output().unwrap();
            assert_eq!(shell.stdout, word, "{line}");
        }
    }

    #[test]
    fn files_are_no_options_and_options_come_before_files() {
        let command = Command::qmerge(["commit", "--", "-x.img"]).option("--top", "[2]").file("-y");
        assert_eq!(command.to_string(), "qmerge commit --top '[2]' -- -x.img ./-y");
        assert_eq!(Command::qmerge(["info"]).with_sudo().to_string(), "sudo qmerge info");
    }
}
