//! Hints what to do next, as values with a command line. They are made from typed errors; no text is parsed.
//!
//! Each hint is one line with the command at its end, so that it can be typed as it stands. A command that
//! would fail in the present state is not given; the text before it says what must be done first.

mod command;
mod in_use;
mod kind;
mod ways;

use std::fmt;
use std::path::Path;

use qcow2::ways::free_name_behind;
use serde_json::{Value, json};

pub(crate) use self::command::{Command, file_word, quoted};
pub(crate) use self::kind::HintKind;
pub(crate) use self::ways::{hints, limit, relink, words as reason};

/// One thing to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hint {
    kind: HintKind,
    /// Why, or what must be put right first.
    words: String,
    command: Option<Command>,
}

/// All that can be done next, the best first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Hints(Vec<Hint>);

impl Hint {
    /// What to do, in words alone.
    pub(crate) fn advice(words: impl Into<String>) -> Self {
        Self { kind: HintKind::Advice, words: words.into(), command: None }
    }

    /// The same, with other words.
    pub(crate) fn with_words(self, words: &str) -> Self {
        match self.command {
            Some(_) => Self { words: words.to_owned(), ..self },
            None => Self { words: format!("{words}: {}", self.words), ..self },
        }
    }

    /// A command, and why it or what before it.
    pub(crate) fn command(kind: HintKind, words: impl Into<String>, command: Command) -> Self {
        Self { kind, words: words.into(), command: Some(command) }
    }
}

impl Hints {
    /// With one more way.
    pub(crate) fn or(mut self, hint: impl Into<Option<Hint>>) -> Self {
        self.0.extend(hint.into());
        self
    }

    /// Before all others, and instead of any of its kind.
    pub(crate) fn first(mut self, hint: Hint) -> Self {
        self.0.retain(|other| other.kind != hint.kind);
        self.0.insert(0, hint);
        self
    }

    /// A line for each.
    pub(crate) fn lines(&self) -> impl Iterator<Item = String> {
        self.0.iter().map(Hint::to_string)
    }

    /// For programs: the kind, the words, and the command by its words.
    pub(crate) fn json(&self) -> Value {
        let hints = self.0.iter().map(|hint| {
            let words = |command: &Command| -> Value {
                command.words().iter().map(|word| Value::from(word.to_string_lossy())).collect()
            };
            json!({
                "kind": hint.kind.name(),
                "text": hint.to_string(),
                "command": hint.command.as_ref().map(words),
            })
        });
        hints.collect()
    }
}

impl From<Hint> for Hints {
    fn from(hint: Hint) -> Self {
        Self(vec![hint])
    }
}

impl fmt::Display for Hint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.command {
            None => f.write_str(&self.words),
            Some(command) if self.words.is_empty() => write!(f, "{command}"),
            Some(command) => write!(f, "{}: {command}", self.words),
        }
    }
}

impl fmt::Display for Hints {
    /// A line for each.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, hint) in self.0.iter().enumerate() {
            write!(f, "{}{hint}", if n > 0 { "\n" } else { "" })?;
        }
        Ok(())
    }
}

/// The command that moves what lies at `file` away, a folder too.
pub(crate) fn moved_away(file: &Path) -> Option<Command> {
    free_name_behind(file).map(|free| Command::of("mv").word("-T").file(file).file(free))
}

/// A path as one types it in a shell.
pub(crate) fn word(path: &Path) -> String {
    quoted(&file_word(path))
}
