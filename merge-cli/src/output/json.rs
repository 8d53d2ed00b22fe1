//! The shapes of JSON that programs read; keys are kebab-case as in QEMU.

use std::borrow::Cow;
use std::fmt::Write;
use std::path::Path;

use qcow2::error::is_harmful;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::failure::Report;

/// A line of the event stream: `fields` and `"event"` first.
pub(crate) fn event(name: &str, fields: Value) -> Value {
    let mut line = Map::new();
    line.insert("event".to_owned(), name.into());
    if let Value::Object(fields) = fields {
        line.extend(fields);
    }
    Value::Object(line)
}

/// The fields of the error event.
pub(crate) fn error(report: &Report) -> Value {
    json!({
        "kind": report.kind,
        "message": report.message,
        "hint": report.hint.to_string(),
        "hints": report.hint.json(),
        "exit-code": report.exit.code(),
    })
}

/// A value of a library as it says itself.
pub(crate) fn value(of: &impl Serialize) -> Value {
    // What the libraries write has strings for keys, and no names but lossy ones.
    serde_json::to_value(of).unwrap_or_default()
}

/// Merges two objects; the second one takes precedence.
pub(crate) fn merged(mut first: Value, second: Value) -> Value {
    if let (Value::Object(fields), Value::Object(more)) = (&mut first, second) {
        fields.extend(more);
    }
    first
}

/// What a library says of itself, of these keys alone.
pub(crate) fn only(of: &impl Serialize, keys: &[&str]) -> Value {
    let mut all = value(of);
    if let Value::Object(fields) = &mut all {
        fields.retain(|key, _| keys.contains(&key.as_str()));
    }
    all
}

/// A path; bytes that are no UTF-8 are replaced, as JSON has no way to write them.
pub(crate) fn path(path: &Path) -> Value {
    path.to_string_lossy().into()
}

/// An array of paths.
pub(crate) fn paths<P: AsRef<Path>>(list: &[P]) -> Value {
    list.iter().map(|p| path(p.as_ref())).collect()
}

/// Escapes characters in JSON text that a terminal would obey, as `\u202e`. A program reads the same text, and
/// a person who looks at it is not deceived. (JSON itself escapes only control characters below the blank.)
/// Such characters occur only inside strings, and all of them lie in the first plane; line ends are the
/// layout's own.
pub(crate) fn escaped(text: &str) -> Cow<'_, str> {
    if !text.contains(|c| c != '\n' && is_harmful(c)) {
        return text.into();
    }
    let mut out = String::with_capacity(text.len() + 64);
    for c in text.chars() {
        if c != '\n' && is_harmful(c) {
            // Writing to a string cannot fail.
            let _ = write!(out, "\\u{:04x}", u32::from(c));
        } else {
            out.push(c);
        }
    }
    out.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_obeys_no_string_and_a_reader_reads_the_same() {
        let value =
            json!({ "file": "a\u{202e}b\u{9b}31m\u{7f}\u{200b}\u{feff}\n\u{1b}", "plain": "K\u{f6}ln" });
        for text in [value.to_string(), format!("{value:#}")] {
            let shown = escaped(&text);
            assert!(!shown.contains(|c| c != '\n' && is_harmful(c)), "{shown}");
            assert!(shown.contains("K\u{f6}ln") && shown.contains("a\\u202eb\\u009b31m\\u007f"), "{shown}");
            assert_eq!(serde_json::from_str::<Value>(&shown).unwrap(), value);
        }
    }
}
