//! The shapes of JSON that programs read; keys are kebab-case as in QEMU.

use std::path::Path;

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

/// A path; bytes that are no UTF-8 are replaced, as JSON has no way to write them.
pub(crate) fn path(path: &Path) -> Value {
    path.to_string_lossy().into()
}

/// An array of paths.
pub(crate) fn paths<P: AsRef<Path>>(list: &[P]) -> Value {
    list.iter().map(|p| path(p.as_ref())).collect()
}
