//! The command as the user typed it, so that errors can repeat its words.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use qcow2::ways::{Asked, Task};

use crate::exit::Exit;
use crate::hint::{Command, file_word};

/// Which verb runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum VerbName {
    /// `qmerge info`
    Info,
    /// `qmerge map`
    Map,
    /// `qmerge check`
    Check,
    /// `qmerge check --restore`, whose exit codes are those of the verbs that change something
    Restore,
    /// `qmerge compare`
    Compare,
    /// `qmerge commit`
    Commit,
    /// `qmerge pull`
    Pull,
    /// `qmerge relink`
    Relink,
    /// `qmerge rebase`
    Rebase,
    /// `qmerge abort`
    Abort,
    /// `qmerge flatten`
    Flatten,
    /// `qmerge demo`
    Demo,
    /// `qmerge live recover`
    Recover,
}

impl VerbName {
    /// The verb with the given name.
    pub(crate) fn parse(word: &str) -> Option<Self> {
        Some(match word {
            "info" => Self::Info,
            "map" => Self::Map,
            "check" => Self::Check,
            "compare" => Self::Compare,
            "commit" => Self::Commit,
            "pull" => Self::Pull,
            "relink" => Self::Relink,
            "rebase" => Self::Rebase,
            "abort" => Self::Abort,
            "flatten" => Self::Flatten,
            "demo" => Self::Demo,
            _ => return None,
        })
    }

    /// The word on the command line.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Map => "map",
            Self::Check | Self::Restore => "check",
            Self::Compare => "compare",
            Self::Commit => "commit",
            Self::Pull => "pull",
            Self::Relink => "relink",
            Self::Rebase => "rebase",
            Self::Abort => "abort",
            Self::Flatten => "flatten",
            Self::Demo => "demo",
            Self::Recover => "live recover",
        }
    }

    /// The exit code of every failure, for verbs whose other codes are results.
    pub(crate) fn failure_exit(self) -> Option<Exit> {
        match self {
            Self::Check => Some(Exit::CHECK_FAILED),
            Self::Compare => Some(Exit::COMPARE_FAILED),
            _ => None,
        }
    }

    /// The exit code of bad arguments. `check` exits with 2 for corruption, so a typing error must have another
    /// code.
    pub(crate) fn usage_exit(self) -> Exit {
        self.failure_exit().unwrap_or(Exit::USAGE)
    }
}

/// One call of the command.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    /// The verb.
    pub(crate) verb: VerbName,
    /// The (first) image that the user named.
    pub(crate) image: PathBuf,
    /// All words after `qmerge`.
    pub(crate) words: Vec<OsString>,
}

impl Call {
    /// The call as the engine needs it to find out what can be done after an error.
    pub(crate) fn asked(&self) -> Asked<'_> {
        let task = match self.verb {
            VerbName::Info => Task::Info,
            VerbName::Map => Task::Look,
            VerbName::Check | VerbName::Restore => Task::Check,
            VerbName::Commit => Task::Commit,
            VerbName::Pull => Task::Pull,
            VerbName::Relink => Task::Relink,
            VerbName::Flatten if self.words.iter().any(|word| word == "--salvage") => Task::Salvage,
            VerbName::Rebase => Task::Rebase,
            VerbName::Flatten => Task::Flatten,
            _ => Task::Other,
        };
        let given = |option: &[u8]| self.words.iter().any(|word| word.as_bytes().starts_with(option));
        let states_format = given(b"--format") || self.words.iter().any(|word| word == "-f");
        Asked {
            task,
            image: &self.image,
            states_format,
            states_backing_format: given(b"--backing-format"),
            states_new_format: given(b"--onto-format") || given(b"-F"),
        }
    }

    /// The call of the same verb for one image of several; `words` is its command line.
    pub(crate) fn of_image(&self, image: &Path, words: &[OsString]) -> Self {
        Self { verb: self.verb, image: image.to_owned(), words: words.to_vec() }
    }

    /// The same command, to be typed again.
    pub(crate) fn again(&self) -> Command {
        Command::qmerge(&self.words)
    }

    /// The same command, not as a dry run.
    pub(crate) fn in_earnest(&self) -> Command {
        Command::qmerge(self.words.iter().filter(|word| *word != "--dry-run"))
    }

    /// The same command with more words, which are options.
    pub(crate) fn again_with<W: AsRef<OsStr>>(&self, more: &[W]) -> Command {
        self.again().options(more)
    }

    /// The same command with another file for an option that has a short and a long name.
    pub(crate) fn again_with_file(&self, short: &str, long: &str, file: &Path) -> Command {
        let words = without(&without(&self.words, long), short);
        Command::qmerge(words).option(short, file_word(file))
    }

    /// The command that prints the verb's help.
    pub(crate) fn help(&self) -> Command {
        Command::qmerge(self.verb.as_str().split(' ')).word("--help")
    }
}

/// A command line without an option and its value; a short option may have its value in the same word.
pub(crate) fn without<W: AsRef<OsStr>>(words: &[W], option: &str) -> Vec<OsString> {
    let mut left = Vec::new();
    let mut rest = words.iter().map(AsRef::as_ref);
    while let Some(word) = rest.next() {
        if word == "--" {
            left.push(word.to_owned());
            left.extend(rest.map(OsStr::to_owned));
            break;
        }
        let joined = word.as_bytes().strip_prefix(option.as_bytes());
        if word == option {
            rest.next();
        } else if joined.is_none_or(|value| option.starts_with("--") && !value.starts_with(b"=")) {
            left.push(word.to_owned());
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_output_replaces_the_first_however_it_was_given() {
        for words in ["flatten a -o x --to raw", "flatten a -ox --to raw", "flatten a --output=x --to raw"] {
            let words = words.split(' ').map(Into::into).collect();
            let call = Call { verb: VerbName::Flatten, image: "a".into(), words };
            let again = call.again_with_file("-o", "--output", Path::new("-y")).to_string();
            assert_eq!(again, "qmerge flatten a --to raw -o ./-y");
        }
    }
}
