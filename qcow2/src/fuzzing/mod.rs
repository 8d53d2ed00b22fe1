//! What the fuzzers run, as ordinary functions: the targets of `fuzz/` call them, and so does
//! `cargo test`, over the seeds and thousands of mutations of them.
//!
//! A body takes any bytes. It returns if the bytes are refused, and panics only if the engine breaks a
//! promise: that is what a fuzzer finds. Nothing here is part of the library's interface.

mod bodies;
mod chain;
mod commit;
mod crash;
mod fields;
mod image;
mod inflate;
mod journal;
mod model;
pub mod mutate;
mod names;
pub(crate) mod repair;
mod restore;
pub mod sample;
mod seeds;

pub use bodies::{BODIES, Body, header};
pub use chain::chain;
pub use commit::commit;
pub use crash::crash;
pub use fields::{damaged, fields};
pub use image::image;
pub use inflate::inflate;
pub use journal::journal;
pub use names::{name, set_backing, set_data_file};
pub use repair::repair;
pub use restore::restore;
pub use seeds::{chains, images};
