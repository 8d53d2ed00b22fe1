//! A monitor that answers from a transcript: what a real QEMU said, in its order.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::qmp::message::{Event, Failure, Message};
use crate::qmp::monitor::Monitor;

/// Each command gets the next answer that QEMU gave to a command of that name; the events that came
/// before that answer are to be had from then on. A command that the transcript does not hold is unknown.
#[derive(Default)]
pub(crate) struct Replay {
    answers: RefCell<HashMap<String, VecDeque<(usize, Message)>>>,
    events: RefCell<VecDeque<(usize, Event)>>,
    reached: RefCell<usize>,
    /// What was asked, in order.
    pub(crate) asked: RefCell<Vec<(String, Value)>>,
}

impl Replay {
    pub(crate) fn of(transcript: &str) -> Self {
        let replay = Self::default();
        let mut names = HashMap::new();
        for (place, line) in transcript.lines().enumerate() {
            let value: Value = serde_json::from_str(line).unwrap();
            if let Some(name) = value["execute"].as_str() {
                names.insert(value["id"].as_u64().unwrap(), name.to_owned());
                continue;
            }
            let message = Message::parse(line).unwrap();
            let id = match &message {
                Message::Event(event) => {
                    replay.events.borrow_mut().push_back((place, event.clone()));
                    continue;
                }
                Message::Return { id, .. } | Message::Failure { id: Some(id), .. } => *id,
                _ => panic!("{line}"),
            };
            let mut answers = replay.answers.borrow_mut();
            answers.entry(names[&id].clone()).or_default().push_back((place, message));
        }
        replay
    }
}

impl Monitor for Replay {
    fn execute_raw(&self, command: &str, arguments: Value, _: Duration) -> Result<Value> {
        self.asked.borrow_mut().push((command.to_owned(), arguments));
        let mut answers = self.answers.borrow_mut();
        let Some(left) = answers.get_mut(command) else {
            // As from a QEMU that is older than the command.
            let (class, description) = ("CommandNotFound".into(), "not in this transcript".into());
            return Err(Error::Command { command: command.into(), failure: Failure { class, description } });
        };
        let (place, message) = left
            .pop_front()
            .ok_or_else(|| Error::Disconnected { why: format!("no more answers to {command}") })?;
        let reached = (*self.reached.borrow()).max(place);
        *self.reached.borrow_mut() = reached;
        match message {
            Message::Return { value, .. } => Ok(value),
            Message::Failure { failure, .. } => Err(Error::Command { command: command.to_owned(), failure }),
            _ => unreachable!("only answers are kept"),
        }
    }

    fn next_event(&self, _: Duration) -> Result<Option<Event>> {
        let mut events = self.events.borrow_mut();
        let due = events.front().is_some_and(|(place, _)| place <= &self.reached.borrow());
        Ok(if due { events.pop_front().map(|(_, event)| event) } else { None })
    }
}
