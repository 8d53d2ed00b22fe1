//! Deterministic mutations of lines of JSON, for running fuzz bodies without a fuzzer.

use kit::Random;

/// What stands in messages, and what parsers break at.
const WORDS: [&str; 24] = [
    "\n",
    "\r\n",
    "{}",
    "[]",
    "null",
    "true",
    "-1",
    "0",
    "18446744073709551615",
    "18446744073709551616",
    "1e999",
    "\"\"",
    "\"\\ud800\"",
    "\\u0000",
    "{\"return\":",
    "{\"error\":",
    "{\"event\":",
    "\"id\":",
    "\"backing\":",
    "\"status\":\"running\"",
    "\"status\":\"null\"",
    "\"status\":\"invented\"",
    "[[[[[[[[",
    "\u{fffd}",
];

/// Changes `text` in one to four places.
pub fn mutate(text: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..=random.below(4) {
        once(text, random);
    }
}

fn once(text: &mut Vec<u8>, random: &mut Random) {
    let at = below(random, text.len() + 1);
    let end = (at + below(random, 32)).min(text.len());
    match random.below(7) {
        0 => {
            text.splice(at..end, random.pick(&WORDS).bytes());
        }
        1 => {
            text.splice(at..at, random.pick(&WORDS).bytes());
        }
        2 => {
            text.drain(at..end);
        }
        3 => {
            if let Some(byte) = text.get_mut(at) {
                *byte ^= 1 << random.below(8);
            }
        }
        4 => text.truncate(at),
        5 => swap_lines(text, random),
        _ => {
            // A piece of the text at another place.
            let from = below(random, text.len() + 1);
            let piece = text[from..(from + below(random, 64)).min(text.len())].to_vec();
            text.splice(at..at, piece);
        }
    }
}

/// Brings two lines into another order, or one of them in twice.
fn swap_lines(text: &mut Vec<u8>, random: &mut Random) {
    let mut lines: Vec<Vec<u8>> = text.split(|b| *b == b'\n').map(<[u8]>::to_vec).collect();
    let (a, b) = (below(random, lines.len()), below(random, lines.len()));
    if random.one_in(2) {
        lines.swap(a, b);
    } else {
        let line = lines[a].clone();
        lines.insert(b, line);
    }
    *text = lines.join(&b'\n');
}

/// A place below `limit`.
fn below(random: &mut Random, limit: usize) -> usize {
    random.below(limit as u64) as usize
}
