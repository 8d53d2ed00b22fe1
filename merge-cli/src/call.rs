//! The command as the user typed it: errors answer in its words.

use std::path::PathBuf;

use crate::exit::Exit;
use crate::output::human::shell_word;

/// Which verb runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum VerbName {
    /// `qmerge info`
    Info,
    /// `qmerge map`
    Map,
    /// `qmerge check`
    Check,
    /// `qmerge check --restore`, which answers as the verbs that change something
    Restore,
    /// `qmerge compare`
    Compare,
    /// `qmerge commit`
    Commit,
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
            Self::Abort => "abort",
            Self::Flatten => "flatten",
            Self::Demo => "demo",
            Self::Recover => "live recover",
        }
    }

    /// The code of every failure, for verbs whose other codes are answers.
    pub(crate) fn failure_exit(self) -> Option<Exit> {
        match self {
            Self::Check => Some(Exit::CHECK_FAILED),
            Self::Compare => Some(Exit::COMPARE_FAILED),
            _ => None,
        }
    }

    /// The code of bad arguments. `check` answers 2 for corruption, so a typing error must not.
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
    pub(crate) words: Vec<String>,
}

impl Call {
    /// The same command, to be typed again.
    pub(crate) fn again(&self) -> String {
        self.again_with(&[])
    }

    /// The same command with more words at its end.
    pub(crate) fn again_with(&self, more: &[&str]) -> String {
        let words = self.words.iter().map(String::as_str).chain(more.iter().copied());
        words.fold("qmerge".to_owned(), |line, word| line + " " + &shell_word(word))
    }

    /// The same command with another value of `option`, which may be given once.
    pub(crate) fn again_with_value(&self, option: &str, value: &str) -> String {
        Self { words: without(&self.words, option), ..self.clone() }.again_with(&[option, value])
    }

    /// The command that prints the verb's help.
    pub(crate) fn help(&self) -> String {
        format!("qmerge {} --help", self.verb.as_str())
    }
}

/// A command line without an option and its value.
pub(crate) fn without(words: &[String], option: &str) -> Vec<String> {
    let mut left = Vec::new();
    let mut rest = words.iter();
    while let Some(word) = rest.next() {
        if word == option {
            rest.next();
        } else if word.strip_prefix(option).is_none_or(|value| !value.starts_with('=')) {
            left.push(word.clone());
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_that_was_given_is_not_given_twice() {
        for words in ["commit a --journal-dir x -q", "commit a --journal-dir=x -q", "commit a -q"] {
            let words = words.split(' ').map(str::to_owned).collect();
            let call = Call { verb: VerbName::Commit, image: "a".into(), words };
            assert_eq!(call.again_with_value("--journal-dir", "DIR"), "qmerge commit a -q --journal-dir DIR");
        }
    }
}
