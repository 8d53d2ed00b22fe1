//! Handles images that somebody else (QEMU) has merged into base while a virtual machine ran on them: compares
//! them with base, marks them, removes them, or turns them into empty overlays on base. Base may be in use, and
//! is only read.

mod empty_all;
mod empty_onto;
mod interrupted;
#[cfg(test)]
mod look_tests;
mod mark;

pub use empty_all::{MergedLayers, empty_all_onto};
pub use empty_onto::{Emptied, EmptyOptions, can_be_emptied};
pub use interrupted::{BackingIs, Interrupted};
pub use mark::{RetireReport, mark_merged, remove, unused};
