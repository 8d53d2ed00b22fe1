//! Deterministic mutations of lines of JSON, for running fuzz bodies without a fuzzer.

/// Changes texts; the same seed, the same changes.
#[derive(Clone, Debug)]
pub struct Mutator(u64);

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

impl Mutator {
    /// A mutator; any seed will do.
    pub fn new(seed: u64) -> Self {
        Self((seed ^ 0x9e37_79b9_7f4a_7c15).max(1))
    }

    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let next = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16;
        next.checked_rem(limit as u64).unwrap_or(0) as usize
    }

    /// Changes `text` in one to four places.
    pub fn mutate(&mut self, text: &mut Vec<u8>) {
        for _ in 0..=self.below(4) {
            self.once(text);
        }
    }

    fn once(&mut self, text: &mut Vec<u8>) {
        let at = self.below(text.len() + 1);
        let end = (at + self.below(32)).min(text.len());
        match self.below(7) {
            0 => {
                text.splice(at..end, WORDS[self.below(WORDS.len())].bytes());
            }
            1 => {
                text.splice(at..at, WORDS[self.below(WORDS.len())].bytes());
            }
            2 => {
                text.drain(at..end);
            }
            3 => {
                if let Some(byte) = text.get_mut(at) {
                    *byte ^= 1 << self.below(8);
                }
            }
            4 => text.truncate(at),
            5 => self.swap_lines(text),
            _ => {
                // A piece of the text at another place.
                let from = self.below(text.len() + 1);
                let piece = text[from..(from + self.below(64)).min(text.len())].to_vec();
                text.splice(at..at, piece);
            }
        }
    }

    /// Brings two lines into another order, or one of them in twice.
    fn swap_lines(&mut self, text: &mut Vec<u8>) {
        let mut lines: Vec<Vec<u8>> = text.split(|b| *b == b'\n').map(<[u8]>::to_vec).collect();
        let (a, b) = (self.below(lines.len()), self.below(lines.len()));
        if self.below(2) == 0 {
            lines.swap(a, b);
        } else {
            let line = lines[a].clone();
            lines.insert(b, line);
        }
        *text = lines.join(&b'\n');
    }
}
