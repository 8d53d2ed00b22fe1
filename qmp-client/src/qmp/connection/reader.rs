//! The side of a connection that listens: lines from QEMU, sorted to those who wait for them.

use std::collections::{HashMap, VecDeque};
use std::io::{self, BufRead};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use qapi::qmp::QapiCapabilities;
use serde_json::Value;

use crate::qmp::message::{Event, Failure, Message};

/// As many events are kept until somebody takes them; then the oldest go. Events are hints.
const MOST_EVENTS: usize = 4096;

/// What came back for one command.
pub(crate) enum Outcome {
    Return(Value),
    Failure(Failure),
    /// A line that could not be read came while this command was waiting: its answer, perhaps.
    Unreadable(String),
}

/// Where the reader puts what it reads.
#[derive(Default)]
pub(crate) struct Mailbox {
    state: Mutex<ReaderState>,
    changed: Condvar,
}

#[derive(Default)]
struct ReaderState {
    greeting: Option<Box<QapiCapabilities>>,
    /// One entry for each command under way; a reply without one is late, and dropped.
    waiting: HashMap<u64, Option<Outcome>>,
    events: VecDeque<Event>,
    closed: Option<String>,
}

impl Mailbox {
    fn lock(&self) -> MutexGuard<'_, ReaderState> {
        // Nothing here can leave the state half-changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what `found` finds; `Err` says that the connection closed, or `None` that the time was up.
    fn wait<T>(
        &self,
        timeout: Duration,
        mut found: impl FnMut(&mut ReaderState) -> Option<T>,
    ) -> Result<T, Option<String>> {
        let deadline = Instant::now().checked_add(timeout);
        let mut state = self.lock();
        loop {
            if let Some(found) = found(&mut state) {
                return Ok(found);
            }
            if let Some(why) = &state.closed {
                return Err(Some(why.clone()));
            }
            // A time-out beyond what the clock can hold is none.
            let left = match deadline {
                Some(deadline) => deadline.saturating_duration_since(Instant::now()),
                None => Duration::from_secs(3600),
            };
            if left.is_zero() {
                return Err(None);
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub(crate) fn greeting(&self, timeout: Duration) -> Result<Box<QapiCapabilities>, Option<String>> {
        self.wait(timeout, |state| state.greeting.take())
    }

    /// From now on a reply with this number is expected.
    pub(crate) fn expect(&self, id: u64) {
        self.lock().waiting.insert(id, None);
    }

    /// The reply with this number. Whatever comes back, it is expected no longer.
    pub(crate) fn outcome(&self, id: u64, timeout: Duration) -> Result<Outcome, Option<String>> {
        let outcome = self.wait(timeout, |state| state.waiting.get_mut(&id).and_then(Option::take));
        self.forget(id);
        outcome
    }

    pub(crate) fn forget(&self, id: u64) {
        self.lock().waiting.remove(&id);
    }

    pub(crate) fn event(&self, timeout: Duration) -> Result<Event, Option<String>> {
        self.wait(timeout, |state| state.events.pop_front())
    }

    pub(crate) fn close(&self, why: String) {
        self.lock().closed.get_or_insert(why);
        self.changed.notify_all();
    }

    fn deliver(&self, message: Message) {
        let mut state = self.lock();
        match message {
            Message::Greeting(greeting) => state.greeting = Some(greeting),
            Message::Event(event) => {
                if state.events.len() >= MOST_EVENTS {
                    state.events.pop_front();
                }
                state.events.push_back(event);
            }
            Message::Return { id, value } => {
                if let Some(place) = state.waiting.get_mut(&id) {
                    *place = Some(Outcome::Return(value));
                }
            }
            Message::Failure { id: Some(id), failure } => {
                if let Some(place) = state.waiting.get_mut(&id) {
                    *place = Some(Outcome::Failure(failure));
                }
            }
            // QEMU could not read a line, so one of those that wait will never be answered. Which one is
            // not known; as long as one caller sends at a time there is only one.
            Message::Failure { id: None, failure } => {
                for place in state.waiting.values_mut().filter(|p| p.is_none()) {
                    *place = Some(Outcome::Failure(failure.clone()));
                }
            }
        }
        drop(state);
        self.changed.notify_all();
    }

    fn unreadable(&self, why: &str) {
        for place in self.lock().waiting.values_mut().filter(|p| p.is_none()) {
            *place = Some(Outcome::Unreadable(why.to_owned()));
        }
        self.changed.notify_all();
    }
}

/// Reads lines of at most `most` bytes until the end of the stream, and closes the mailbox.
pub(crate) fn read_lines(mut stream: impl BufRead, mailbox: &Mailbox, most: usize) {
    let mut line = Vec::new();
    let why = loop {
        match read_line(&mut stream, &mut line, most) {
            Ok(Line::Whole) if line.iter().all(u8::is_ascii_whitespace) => {}
            // Words in an encoding other than UTF-8 come as QEMU had them: a file name, perhaps.
            Ok(Line::Whole) => match Message::parse(&String::from_utf8_lossy(&line)) {
                Ok(message) => mailbox.deliver(message),
                Err(error) => mailbox.unreadable(&error.to_string()),
            },
            Ok(Line::TooLong) => mailbox.unreadable(&format!("QEMU sent a line of more than {most} bytes")),
            Ok(Line::End) => break "QEMU has closed it".to_owned(),
            Err(error) => break error.to_string(),
        }
    };
    mailbox.close(why);
}

enum Line {
    Whole,
    TooLong,
    End,
}

/// Reads up to and including the next line end. A line that is too long is passed over to its end.
fn read_line(stream: &mut impl BufRead, line: &mut Vec<u8>, most: usize) -> io::Result<Line> {
    line.clear();
    let mut too_long = false;
    loop {
        let available = match stream.fill_buf() {
            Ok(available) => available,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if available.is_empty() {
            // A line without its end is half a line: QEMU went away while it sent.
            return Ok(Line::End);
        }
        let end = available.iter().position(|b| *b == b'\n');
        let part = &available[..end.unwrap_or(available.len())];
        too_long |= part.len() > most - line.len();
        if too_long {
            line.clear();
        } else {
            line.extend_from_slice(part);
        }
        let used = part.len() + usize::from(end.is_some());
        stream.consume(used);
        if end.is_some() {
            return Ok(if too_long { Line::TooLong } else { Line::Whole });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;

    use super::*;

    fn lines(bytes: &[u8], buffer: usize, most: usize) -> Vec<Option<String>> {
        let mut stream = BufReader::with_capacity(buffer, bytes);
        let (mut line, mut all) = (Vec::new(), Vec::new());
        loop {
            match read_line(&mut stream, &mut line, most).unwrap() {
                Line::Whole => all.push(Some(String::from_utf8(line.clone()).unwrap())),
                Line::TooLong => all.push(None),
                Line::End => return all,
            }
        }
    }

    #[test]
    fn lines_are_the_same_however_they_are_cut() {
        for buffer in 1..20 {
            let got = lines(b"one\r\n\ntoo long a line\nfour\nhalf", buffer, 5);
            assert_eq!(got, [Some("one\r".into()), Some(String::new()), None, Some("four".into())]);
        }
    }

    #[test]
    fn the_oldest_events_go_when_nobody_takes_them() {
        let mailbox = Mailbox::default();
        let mut bytes = Vec::new();
        for n in 0..MOST_EVENTS + 3 {
            bytes.extend_from_slice(format!("{{\"event\": \"E{n}\"}}\r\n").as_bytes());
        }
        read_lines(&bytes[..], &mailbox, 100);
        assert_eq!(mailbox.event(Duration::ZERO).ok().unwrap().name, "E3");
        let left = std::iter::from_fn(|| mailbox.event(Duration::ZERO).ok()).count();
        assert_eq!(left, MOST_EVENTS - 1);
        assert!(matches!(mailbox.event(Duration::ZERO), Err(Some(why)) if why.contains("closed")));
    }
}
