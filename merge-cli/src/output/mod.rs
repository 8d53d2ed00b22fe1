//! Prints results on standard output, and everything else on standard error.

pub(crate) mod human;
pub(crate) mod json;
pub(crate) mod progress;
pub(crate) mod size;

use std::borrow::Cow;
use std::io::{self, BufWriter, IsTerminal, StdoutLock, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use qcow2::error::{is_harmful, shown};
use serde_json::Value;

use crate::failure::{Failure, Report};

/// Where output goes and how it looks, as the options ask.
///
/// A reader of standard output that goes away is no failure: the command goes on without it, and its exit code tells what
/// was done. Otherwise work that was not done could end as if it were. Output that cannot be written for another reason
/// (a full disk) is a failure.
#[derive(Debug)]
pub(crate) struct Console {
    json: bool,
    quiet: bool,
    /// A document that is not a line of events was begun on standard output.
    document_begun: AtomicBool,
}

impl Console {
    /// A console for `--json` and `--quiet`.
    pub(crate) fn new(json: bool, quiet: bool) -> Self {
        Self { json, quiet, document_begun: AtomicBool::new(false) }
    }

    /// Whether results are JSON.
    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// Whether only errors (and the JSON that was asked for) are printed.
    pub(crate) fn is_quiet(&self) -> bool {
        self.quiet
    }

    /// Whether to show a progress line: only if standard error is a terminal.
    pub(crate) fn shows_progress(&self) -> bool {
        !self.json && !self.quiet && io::stderr().is_terminal()
    }

    /// Prints a result for people; nothing with `--json` or `--quiet`.
    pub(crate) fn result(&self, text: &str) -> Result<(), Failure> {
        if self.json || self.quiet {
            return Ok(());
        }
        write_stdout(&harmless(text))
    }

    /// Prints one JSON document, indented, as the whole result.
    pub(crate) fn document(&self, value: &Value) -> Result<(), Failure> {
        self.document_begun.store(true, Ordering::Relaxed);
        write_stdout(&json::escaped(&format!("{value:#}")))
    }

    /// Prints one line of a stream of events; `fields` must be an object.
    pub(crate) fn event(&self, name: &str, fields: Value) -> Result<(), Failure> {
        if !self.json {
            return Ok(());
        }
        write_stdout(&json::escaped(&json::event(name, fields).to_string()))
    }

    /// Standard output for a document that is written piece by piece. Here a reader that went away is an error, so that
    /// what only looks can end.
    pub(crate) fn stream(&self) -> BufWriter<StdoutLock<'static>> {
        self.document_begun.store(true, Ordering::Relaxed);
        BufWriter::with_capacity(1 << 16, io::stdout().lock())
    }

    /// Tells people on standard error something that is not an error.
    pub(crate) fn note(&self, text: &str) {
        if !self.quiet {
            write_stderr(text);
        }
    }

    /// Tells people on standard error something that needs their action now, even with `--quiet`.
    pub(crate) fn warn(&self, text: &str) {
        write_stderr(text);
    }

    /// Reports a failure: text on standard error, and with `--json` the error event on standard output.
    pub(crate) fn failure(&self, report: &Report) {
        write_stderr(&report.to_string());
        if self.json && !self.document_begun.load(Ordering::Relaxed) {
            // If the reader went away, the exit code still tells.
            let _ = self.event("error", json::error(report));
        }
    }
}

/// Writes a text and the end of its last line, and flushes. Where nobody reads any more, that is all.
fn write_stdout(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match writeln!(out, "{}", text.trim_end_matches('\n')).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure::stdout(&error)),
        _ => Ok(()),
    }
}

/// Writes to standard error; there is nobody left to tell if that fails.
fn write_stderr(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{}", harmless(text.trim_end_matches('\n')));
}

/// Makes a text safe for a terminal: it may contain names from images, and their authors may have put control
/// characters into them. Line ends stay: code that puts a name into a text must escape the name's own.
pub(crate) fn harmless(text: &str) -> Cow<'_, str> {
    if !text.contains(|c| c != '\n' && is_harmful(c)) {
        return text.into();
    }
    text.split('\n').map(shown).collect::<Vec<_>>().join("\n").into()
}
