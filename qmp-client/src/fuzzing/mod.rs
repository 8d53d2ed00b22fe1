//! What the fuzzers run, as ordinary functions: the targets of `fuzz/` call them, and so does `cargo test`,
//! over the seeds and thousands of mutations of them.
//!
//! A body takes any bytes, and panics only if the library breaks a promise. Nothing here is part of the
//! library's interface.

mod mutate;
mod peer;
mod state;
mod stream;

pub use mutate::mutate;
pub use peer::peer;
pub use state::state;
pub use stream::stream;

/// A fuzz target: its name, and what it does with an input.
#[derive(Clone, Copy, Debug)]
pub struct Body {
    /// The name, as in `fuzz/fuzz_targets/NAME.rs`.
    pub name: &'static str,
    /// Runs one input.
    pub run: fn(&[u8]),
    /// Named inputs to start from.
    pub seeds: fn() -> Vec<(&'static str, Vec<u8>)>,
    /// How many mutations of them `cargo test` runs: a few seconds' worth.
    pub mutations: u64,
}

/// Every fuzz target.
pub const BODIES: [Body; 3] = [
    Body { name: "qmp-stream", run: stream, seeds: stream::seeds, mutations: 5_000 },
    Body { name: "qmp-peer", run: peer, seeds: peer::seeds, mutations: 10_000 },
    Body { name: "live-state", run: state, seeds: state::seeds, mutations: 20_000 },
];

/// What QEMU 10.0.2 said in conversations that were recorded.
const TRANSCRIPTS: [(&str, &str); 9] = [
    ("commit-active", include_str!("../../testdata/transcripts/commit-active.jsonl")),
    ("commit-manual", include_str!("../../testdata/transcripts/commit-manual.jsonl")),
    ("discovery-blockdev", include_str!("../../testdata/transcripts/discovery-blockdev.jsonl")),
    ("discovery-drive", include_str!("../../testdata/transcripts/discovery-drive.jsonl")),
    ("discovery-filters", include_str!("../../testdata/transcripts/discovery-filters.jsonl")),
    ("discovery-nbd", include_str!("../../testdata/transcripts/discovery-nbd.jsonl")),
    ("discovery-qsd", include_str!("../../testdata/transcripts/discovery-qsd.jsonl")),
    ("enospc-report", include_str!("../../testdata/transcripts/enospc-report.jsonl")),
    ("enospc-stop", include_str!("../../testdata/transcripts/enospc-stop.jsonl")),
];

/// A message, or the text of an error: bounded, whatever the other side sent.
fn assert_short(text: &str) {
    assert!(text.len() < 64 << 10, "a message of {} bytes", text.len());
}
