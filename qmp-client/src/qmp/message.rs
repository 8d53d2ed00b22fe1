//! Lines of QMP: what QEMU sends, and what it is sent.
//!
//! A line is read as JSON first and as a type of the schema second: QEMU is often newer than the
//! schema, and an event or a field that this side has never heard of is no error.

use qapi::Command;
use qapi::qmp::QapiCapabilities;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

/// One line from QEMU.
#[derive(Debug)]
pub enum Message {
    /// The first line of a connection: version and capabilities. It does not come while another client
    /// holds the monitor.
    Greeting(Box<QapiCapabilities>),
    /// Something happened. Events may come between a command and its reply, about the command too.
    Event(Event),
    /// The answer to the command with this number.
    Return {
        /// The command's number.
        id: u64,
        /// The answer, to be given to [`reply`].
        value: Value,
    },
    /// The command failed. QEMU answers a line that it could not read with a failure without a number.
    Failure {
        /// The command's number.
        id: Option<u64>,
        /// What QEMU says.
        failure: Failure,
    },
}

/// An event, known to the schema or not.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Event {
    /// The name, such as `JOB_STATUS_CHANGE`.
    pub name: String,
    /// What it carries.
    pub data: Map<String, Value>,
    /// When it happened, in microseconds since 1970 by the host's clock, where QEMU knows.
    pub timestamp_us: Option<i64>,
}

/// QEMU's words about a command that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Failure {
    /// The class, such as `GenericError`; nearly all are that one.
    pub class: String,
    /// The description, for people.
    pub description: String,
}

impl Message {
    /// Reads a line.
    ///
    /// # Errors
    /// [`Error::Protocol`] if the line is not a JSON object, or is none of the four kinds of message.
    pub(crate) fn parse(line: &str) -> Result<Self> {
        let bad = |why: String| Error::Protocol { why, line: shortened(line) };
        let value = read(line).map_err(bad)?;
        let Value::Object(mut object) = value else { return Err(bad("it is no object".into())) };
        if object.contains_key("QMP") {
            let greeting = serde_json::from_value(object.into()).map_err(|e| bad(e.to_string()))?;
            return Ok(Self::Greeting(Box::new(greeting)));
        }
        if let Some(name) = object.get("event") {
            let name = name.as_str().ok_or_else(|| bad("the event has no name".into()))?.to_owned();
            let timestamp_us = object.get("timestamp").and_then(timestamp_us);
            let data = match object.remove("data") {
                Some(Value::Object(data)) => data,
                None => Map::new(),
                Some(_) => return Err(bad("the event's data is no object".into())),
            };
            return Ok(Self::Event(Event { name, data, timestamp_us }));
        }
        let id = object.get("id").and_then(Value::as_u64);
        if let Some(error) = object.get("error") {
            let part = |key: &str| error.get(key).and_then(Value::as_str).map(str::to_owned);
            let description = part("desc").ok_or_else(|| bad("the error has no description".into()))?;
            let class = part("class").unwrap_or_else(|| "GenericError".into());
            return Ok(Self::Failure { id, failure: Failure { class, description } });
        }
        match (object.remove("return"), id) {
            (Some(value), Some(id)) => Ok(Self::Return { id, value }),
            (Some(_), None) => Err(bad("the reply does not carry its command's number".into())),
            (None, _) => Err(bad("it is no greeting, event, reply or error".into())),
        }
    }
}

/// How deep JSON may be nested: a chain is told with each layer inside the one above it.
const DEEPEST: usize = 2048;

/// Reads JSON that may be nested deeper than serde_json allows by itself.
fn read(line: &str) -> std::result::Result<Value, String> {
    if depth(line) > DEEPEST {
        return Err(format!("it is nested deeper than {DEEPEST} levels"));
    }
    let mut reader = serde_json::Deserializer::from_str(line);
    // The depth is bounded above.
    reader.disable_recursion_limit();
    let value = Value::deserialize(&mut reader).and_then(|value| reader.end().map(|()| value));
    value.map_err(|e| e.to_string())
}

/// How deep the brackets of a line are nested, those in strings left out.
fn depth(line: &str) -> usize {
    let (mut now, mut most, mut quoted, mut escaped) = (0_usize, 0, false, false);
    for byte in line.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'[' | b'{' if !quoted => {
                now = now.saturating_add(1);
                most = most.max(now);
            }
            b']' | b'}' if !quoted => now = now.saturating_sub(1),
            _ => {}
        }
    }
    most
}

/// The line that asks QEMU to execute `command`, with its line end; the reply will carry `id`.
///
/// # Errors
/// [`Error::Request`] if an argument has no JSON form.
pub fn request<C: Command>(command: &C, id: u64) -> Result<String> {
    let arguments = serde_json::to_value(command)
        .map_err(|source| Error::Request { command: C::NAME.to_owned(), source })?;
    Ok(raw_request(C::NAME, arguments, id))
}

/// The line that asks QEMU to execute the command of this name; `arguments` is left out if it is no
/// object, or empty.
pub(crate) fn raw_request(command: &str, arguments: Value, id: u64) -> String {
    let mut object = json!({ "execute": command, "id": id });
    if arguments.as_object().is_some_and(|a| !a.is_empty()) {
        object["arguments"] = arguments;
    }
    format!("{object}\r\n")
}

/// The answer to a command of type `C`, from [`Message::Return`]. Fields that the schema does not know
/// are passed over.
///
/// # Errors
/// [`Error::Answer`] if the answer has another shape: an error of this call, not of the connection.
pub fn reply<C: Command>(value: Value) -> Result<C::Ok> {
    serde_json::from_value(value).map_err(|source| Error::Answer { command: C::NAME.to_owned(), source })
}

fn timestamp_us(value: &Value) -> Option<i64> {
    let part = |key| value.get(key).and_then(Value::as_i64);
    // QEMU sends -1 for both where the host has no clock.
    let seconds = part("seconds").filter(|s| *s >= 0)?;
    seconds.checked_mul(1_000_000)?.checked_add(part("microseconds")?)
}

fn shortened(line: &str) -> String {
    const MOST: usize = 200;
    let line = line.trim_end();
    match line.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None => line.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use qapi::qmp;

    use super::*;

    /// The n-th line of the samples that QEMU 10.0.2 sent.
    fn sample(n: usize) -> Message {
        let lines = include_str!("../../testdata/qemu-10.0.2.jsonl");
        Message::parse(lines.lines().nth(n).unwrap()).unwrap()
    }

    #[test]
    fn a_reply_may_be_nested_as_deep_as_a_long_chain() {
        let nested = |depth: usize| {
            let level = "{\"node-name\":\"a[\\\"{\",\"backing\":";
            format!("{{\"return\":{}1{},\"id\":7}}", level.repeat(depth), "}".repeat(depth))
        };
        let Message::Return { value, .. } = Message::parse(&nested(DEEPEST - 1)).unwrap() else { panic!() };
        let depth = std::iter::successors(Some(&value), |level| level.get("backing")).count();
        assert_eq!(depth, DEEPEST);
        let error = Message::parse(&nested(DEEPEST)).unwrap_err().to_string();
        assert!(error.contains("nested deeper"), "{error}");
        assert!(Message::parse(&"[".repeat(1 << 20)).is_err());
        assert!(Message::parse("{\"return\": 1, \"id\": 7} {").is_err(), "more than one value");
    }

    #[test]
    fn the_greeting_tells_the_version() {
        let Message::Greeting(greeting) = sample(0) else { panic!("no greeting") };
        let qemu = &greeting.QMP.version.qemu;
        assert_eq!((qemu.major, qemu.minor, qemu.micro), (10, 0, 2));
    }

    #[test]
    fn a_job_is_read_with_the_types_of_the_schema() {
        let Message::Return { id: 9, value } = sample(1) else { panic!("no reply") };
        let jobs = reply::<qmp::query_jobs>(value).unwrap();
        assert_eq!(jobs.len(), 1);
        assert_eq!(jobs[0].id, "m2");
        assert_eq!(jobs[0].status, qmp::JobStatus::running);
    }

    #[test]
    fn events_carry_name_data_and_time() {
        let Message::Event(event) = sample(2) else { panic!("no event") };
        assert_eq!(event.name, "JOB_STATUS_CHANGE");
        assert_eq!(event.data["status"], "created");
        assert_eq!(event.timestamp_us, Some(1_795_384_500_368_016));
    }

    #[test]
    fn completed_is_also_the_event_of_a_failure() {
        let Message::Event(event) = sample(3) else { panic!("no event") };
        assert_eq!(event.name, "BLOCK_JOB_COMPLETED");
        assert_eq!(event.data["error"], "No space left on device");
    }

    #[test]
    fn a_failure_carries_the_number_of_its_command() {
        let Message::Failure { id, failure } = sample(4) else { panic!("no failure") };
        assert_eq!(id, Some(4));
        assert_eq!(failure.class, "GenericError");
        assert!(failure.description.contains("cannot accept command verb 'complete'"));
    }

    #[test]
    fn an_answer_with_a_field_newer_than_the_schema_is_read() {
        let Message::Return { value, .. } = sample(5) else { panic!("no reply") };
        assert!(value["running"].as_bool().is_some());
        let mut newer = value;
        newer["invented-later"] = json!([1, 2]);
        assert!(!reply::<qmp::query_status>(newer).unwrap().running);
    }

    #[test]
    fn an_unknown_event_is_an_event() {
        let line = r#"{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "INVENTED_LATER"}"#;
        let Message::Event(event) = Message::parse(line).unwrap() else { panic!("no event") };
        assert_eq!(event, Event { name: "INVENTED_LATER".into(), data: Map::new(), timestamp_us: None });
    }

    #[test]
    fn an_unknown_error_class_keeps_its_words() {
        let line = r#"{"id": 7, "error": {"class": "InventedLater", "desc": "not today"}}"#;
        let Message::Failure { id: Some(7), failure } = Message::parse(line).unwrap() else { panic!() };
        assert_eq!(failure, Failure { class: "InventedLater".into(), description: "not today".into() });
    }

    #[test]
    fn an_answer_of_another_shape_is_an_error_that_names_the_command() {
        let error = reply::<qmp::query_jobs>(json!([{"id": 5}])).unwrap_err().to_string();
        assert!(error.contains("query-jobs"), "{error}");
    }

    #[test]
    fn lines_that_are_no_messages_are_errors_of_bounded_length() {
        let long = format!("[{}]", "\"\u{e4}\",".repeat(10_000));
        for line in ["", "{", "[]", "7", "{}", r#"{"event": 5}"#, r#"{"return": {}}"#, &long] {
            let error = Message::parse(line).unwrap_err().to_string();
            assert!(error.len() < 1000, "{error}");
        }
        assert!(Message::parse(r#"{"event": "STOP", "data": 5}"#).is_err());
        assert!(Message::parse(r#"{"id": 1, "error": {}}"#).is_err());
        assert!(Message::parse(&"[".repeat(100_000)).is_err(), "deep nesting is refused");
    }

    #[test]
    fn requests_are_numbered_single_lines() {
        let line = request(&qmp::query_jobs {}, 3).unwrap();
        assert_eq!(line, "{\"execute\":\"query-jobs\",\"id\":3}\r\n");
        let speed = qmp::block_job_set_speed { device: "vda\n".into(), speed: 1 << 20 };
        let line = request(&speed, 4).unwrap();
        assert_eq!(line.matches('\n').count(), 1);
        let value: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(
            value,
            json!({"execute": "block-job-set-speed", "id": 4, "arguments": {"device": "vda\n", "speed": 1_048_576}})
        );
    }
}
