//! What the fuzzers run, as ordinary functions: the targets of `fuzz/` call them, and so does
//! `cargo test`, over the seeds and thousands of mutations of them.
//!
//! A body takes any bytes. It returns if the bytes are refused, and panics only if the engine breaks a
//! promise: that is what a fuzzer finds. Nothing here is part of the library's interface.

mod bodies;
mod chain;
mod commit;
mod model;
pub mod mutate;
pub mod sample;
mod seeds;

pub use bodies::{BODIES, Body, header, image};
pub use chain::chain;
pub use commit::commit;
pub use seeds::{chains, images};
