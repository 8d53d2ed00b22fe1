//! Runs a body under libFuzzer with the limit that `cargo test` has: libFuzzer's own counts the whole process, or single
//! allocations.

#[path = "counting.rs"]
mod counting;

/// Runs one input.
pub(crate) fn run(body: fn(&[u8]), bytes: &[u8]) {
    let ((), held) = counting::counted(|| body(bytes));
    assert!(held <= counting::MEMORY, "it held {held} bytes");
}
