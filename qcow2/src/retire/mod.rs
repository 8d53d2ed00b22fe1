//! Images that somebody else has merged, while a virtual machine ran on them: marked, removed, made empty overlays on
//! base, and compared with it. Base may be in use, and is only looked at.

mod empty_all;
mod empty_onto;
mod interrupted;
#[cfg(test)]
mod look_tests;
mod mark;

pub use empty_all::{MergedLayers, empty_all_onto};
pub use empty_onto::{Emptied, EmptyOptions, can_be_emptied, empty_onto};
pub use interrupted::{BackingIs, Interrupted};
pub use mark::{RetireReport, mark_merged, remove, unused};
