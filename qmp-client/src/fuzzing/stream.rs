//! What comes from a monitor, as bytes.

use std::io::BufReader;
use std::time::Duration;

use super::{TRANSCRIPTS, assert_short};
use crate::qmp::connection::reader::{Mailbox, Outcome, read_lines};
use crate::qmp::message::{Event, Message};

/// The numbers of the commands that wait for an answer.
const WAITING: std::ops::RangeInclusive<u64> = 1..=8;

/// The first byte says how the stream is cut into pieces, the second how long a line may be, the rest is the
/// stream. However it is cut, the same is heard; every event that stands in a line of its own is heard, in
/// order, up to the most that are kept; an answer goes to the command whose number it carries; a
/// text that says what is wrong is short; at the end everybody who waits is told.
pub fn stream(bytes: &[u8]) {
    let Some((&[piece, longest], stream)) = bytes.split_first_chunk::<2>() else { return };
    let longest = [64, 1024, 65536][usize::from(longest % 3)];
    let heard = hear(stream, usize::from(piece) + 1, longest);
    assert_eq!(heard, hear(stream, 8192, longest), "what is heard depends on how the stream is cut");
    let whole: Vec<Message> = stream
        .split_inclusive(|b| *b == b'\n')
        .filter_map(|line| line.strip_suffix(b"\n"))
        .filter(|line| line.len() <= longest)
        .filter_map(|line| Message::parse(&String::from_utf8_lossy(line)).ok())
        .collect();
    let events: Vec<&Event> =
        whole.iter().filter_map(|m| if let Message::Event(event) = m { Some(event) } else { None }).collect();
    assert_eq!(heard.events.iter().collect::<Vec<_>>(), events[events.len().saturating_sub(4096)..]);
    for (id, outcome) in WAITING.zip(&heard.outcomes) {
        let answers = |m: &&Message| match m {
            Message::Return { id: to, .. } => *to == id,
            Message::Failure { id: to, .. } => to.is_none_or(|to| to == id),
            Message::Greeting(_) | Message::Event(_) => false,
        };
        let is_answered = whole.iter().any(|m| answers(&m));
        let was_answered = matches!(outcome, Heard::Return(_) | Heard::Failure(_));
        assert!(!was_answered || is_answered, "an answer to {id} that nobody sent");
        if whole.iter().any(|m| matches!(m, Message::Return { id: to, .. } if *to == id)) {
            assert!(was_answered, "the answer to {id} was lost");
        }
    }
}

/// All that was heard.
#[derive(Debug, PartialEq)]
struct All {
    greeting: Option<String>,
    outcomes: Vec<Heard>,
    events: Vec<Event>,
}

#[derive(Debug, PartialEq)]
enum Heard {
    Return(String),
    Failure(String),
    Unreadable(String),
    Closed(String),
}

fn hear(stream: &[u8], piece: usize, longest: usize) -> All {
    let mailbox = Mailbox::default();
    WAITING.for_each(|id| mailbox.expect(id));
    read_lines(BufReader::with_capacity(piece, stream), &mailbox, longest);
    let greeting = mailbox.greeting(Duration::ZERO).ok().map(|greeting| format!("{greeting:?}"));
    let outcomes = WAITING.map(|id| match mailbox.outcome(id, Duration::ZERO) {
        Ok(Outcome::Return(value)) => Heard::Return(value.to_string()),
        Ok(Outcome::Failure(failure)) => Heard::Failure(format!("{failure:?}")),
        Ok(Outcome::Unreadable(why)) => {
            assert_short(&why);
            Heard::Unreadable(why)
        }
        Err(Some(why)) => Heard::Closed(why),
        Err(None) => unreachable!("the stream is at its end, and the reader does not say so"),
    });
    let outcomes = outcomes.collect();
    let events = std::iter::from_fn(|| mailbox.event(Duration::ZERO).ok()).collect();
    All { greeting, outcomes, events }
}

/// Conversations with a real QEMU, in pieces of several sizes.
pub(super) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let lines = include_str!("../../testdata/qemu-10.0.2.jsonl");
    let with = |piece: u8, text: &str| [&[piece, 2][..], text.as_bytes()].concat();
    let mut seeds = vec![("all-kinds", with(0, lines)), ("all-kinds-in-one", with(255, lines))];
    seeds.extend(TRANSCRIPTS.iter().map(|(name, text)| (*name, with(63, text))));
    seeds.push(("short-lines-only", [&[7, 0][..], lines.as_bytes()].concat()));
    seeds.push((
        "nameless-error",
        with(3, "{\"error\": {\"class\": \"GenericError\", \"desc\": \"what?\"}}\r\n"),
    ));
    seeds
        .push(("latin-1", [&[9, 1][..], b"{\"event\": \"E\", \"data\": {\"name\": \"\xe4\"}}\r\n"].concat()));
    seeds
}
