//! A monitor that answers anything.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use serde_json::Value;

use super::{TRANSCRIPTS, assert_short};
use crate::block::graph::{Disk, Graph};
use crate::block::jobs::{Goal, Job, Watch, jobs};
use crate::error::{Error, Result};
use crate::qmp::message::{Event, Failure, Message};
use crate::qmp::monitor::Monitor;
use crate::{MergeOptions, Procedure};

/// The lines of the input are what a monitor answers, whatever it is asked; then it knows no command any more. Disks are looked for, merges of every range planned, tried and followed: each comes to
/// an end, with a success or with an error in few words.
pub fn peer(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let monitor = Peer::of(&text);
    let graph = match Graph::ask(&monitor) {
        Ok(graph) => graph,
        Err(error) => return assert_short(&error.to_string()),
    };
    report(jobs(&monitor));
    for disk in graph.disks().iter().take(4) {
        assert_sound(disk, &text);
        report(graph.disk(disk.name()));
        report(graph.jobs(&monitor));
        for (base, top) in [(0, 1), (1, 2), (0, 2)] {
            let layers = disk.layers();
            // Layers are listed from the top.
            let at = |n: usize| layers.len().checked_sub(n + 1).and_then(|place| layers.get(place));
            let (Some(base), Some(top)) = (at(base), at(top)) else { continue };
            report(merge(disk, base.index, top.index, &monitor));
        }
        report(pull(disk, &monitor));
    }
    report(follow(&monitor));
}

fn report<T>(result: Result<T>) {
    if let Err(error) = result {
        assert_short(&error.to_string());
    }
}

/// A disk has layers, numbered from the bottom; all that is said of them stands in what the monitor said.
fn assert_sound(disk: &Disk, text: &str) {
    let depth = disk.layers().len();
    assert!(depth > 0, "a disk without layers");
    assert!(depth <= text.len(), "more layers than were told of");
    for (place, layer) in disk.layers().iter().enumerate() {
        assert_eq!(layer.index, depth - place, "the layers are not numbered from the bottom");
        assert_eq!(disk.layer(&numbered(layer.index)).map(|l| l.index).ok(), Some(layer.index));
    }
}

fn merge(disk: &Disk, base: usize, top: usize, monitor: &Peer) -> Result<()> {
    let (base, top) = (disk.layer(&numbered(base))?, disk.layer(&numbered(top))?);
    let mut commit = Procedure::commit(disk, &disk.range(base, top)?, MergeOptions::default())?;
    commit.preflight(monitor)?;
    let job = commit.start(monitor)?;
    // What comes behind this talks to a server that QEMU opens.
    job.wait(Goal::Pending, None, &mut |_| Watch::GoOn).map(drop)
}

fn numbered(index: usize) -> String {
    format!("[{index}]")
}

fn pull(disk: &Disk, monitor: &Peer) -> Result<()> {
    let mut pull = Procedure::pull(disk, None, MergeOptions::default())?;
    pull.preflight(monitor)?;
    pull.start(monitor).map(drop)
}

fn follow(monitor: &Peer) -> Result<()> {
    let job = Job::new(monitor, "job");
    job.wait(Goal::Concluded, None, &mut |progress| {
        assert_short(&format!("{progress:?}"));
        Watch::GoOn
    })?;
    job.take_result().map(drop)
}

/// A monitor with a fixed list of things to say. A conversation that was recorded has the commands too: then an
/// answer is given to the next command of that name. Other answers are given to whoever asks next.
struct Peer {
    named: RefCell<HashMap<String, VecDeque<Message>>>,
    others: RefCell<VecDeque<Message>>,
    events: RefCell<VecDeque<Event>>,
    asked: Cell<u64>,
}

impl Peer {
    fn of(text: &str) -> Self {
        let (mut names, mut named) = (HashMap::new(), HashMap::<_, VecDeque<_>>::new());
        let (mut others, mut events) = (VecDeque::new(), VecDeque::new());
        for line in text.lines() {
            match Message::parse(line) {
                Ok(Message::Event(event)) => events.push_back(event),
                Ok(message) => {
                    let id = match &message {
                        Message::Return { id, .. } | Message::Failure { id: Some(id), .. } => Some(id),
                        _ => None,
                    };
                    match id.and_then(|id| names.get(id)).cloned() {
                        Some(name) => named.entry(name).or_default().push_back(message),
                        None => others.push_back(message),
                    }
                }
                Err(_) => {
                    let command = serde_json::from_str::<Value>(line).unwrap_or_default();
                    if let (Some(id), Some(name)) = (command["id"].as_u64(), command["execute"].as_str()) {
                        names.insert(id, name.to_owned());
                    }
                }
            }
        }
        let (named, others, events) = (RefCell::new(named), RefCell::new(others), RefCell::new(events));
        Self { named, others, events, asked: Cell::new(0) }
    }
}

impl Monitor for Peer {
    fn execute_raw(&self, command: &str, _: Value, _: Duration) -> Result<Value> {
        self.asked.set(self.asked.get() + 1);
        assert!(self.asked.get() < 1_000_000, "asked without end");
        let named = self.named.borrow_mut().get_mut(command).and_then(VecDeque::pop_front);
        let answer = named.or_else(|| self.others.borrow_mut().pop_front());
        let failed = |failure| Err(Error::Command { command: command.to_owned(), failure });
        match answer {
            Some(Message::Return { value, .. }) => Ok(value),
            Some(Message::Failure { failure, .. }) => failed(failure),
            // As from a QEMU that is older than the command.
            Some(Message::Greeting(_) | Message::Event(_)) | None => {
                failed(Failure { class: "CommandNotFound".into(), description: "it knows no more".into() })
            }
        }
    }

    fn next_event(&self, _: Duration) -> Result<Option<Event>> {
        Ok(self.events.borrow_mut().pop_front())
    }
}

/// Conversations with a real QEMU.
pub(super) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let mut seeds: Vec<_> =
        TRANSCRIPTS.iter().map(|(name, text)| (*name, text.as_bytes().to_vec())).collect();
    // Discovery, then the merge.
    let text =
        |wanted: &str| TRANSCRIPTS.iter().find(|(name, _)| *name == wanted).map_or("", |(_, text)| text);
    // For questions that were not recorded.
    let rest = "{\"return\": [], \"id\": 9000}\n".repeat(6);
    let both = |a: &str, b: &str| [text(a), text(b), &rest].concat().into_bytes();
    seeds.push(("drive-and-active", both("discovery-drive", "commit-active")));
    seeds.push(("blockdev-and-manual", both("discovery-blockdev", "commit-manual")));
    seeds.push(("drive-and-enospc", both("discovery-drive", "enospc-stop")));
    seeds
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Conversations that end before a merge is planned would find little.
    #[test]
    fn some_conversations_lead_to_a_merge() {
        let (mut disks, mut merged) = (0, 0);
        for (_, bytes) in seeds() {
            let monitor = Peer::of(std::str::from_utf8(&bytes).unwrap());
            let Ok(graph) = Graph::ask(&monitor) else { continue };
            for disk in graph.disks() {
                disks += 1;
                merged += usize::from(merge(disk, 1, disk.layers().len(), &monitor).is_ok());
            }
        }
        assert!(disks > 5 && merged > 0, "{disks} disks, {merged} merges");
    }
}
