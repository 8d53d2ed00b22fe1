//! What the tests of all crates share. No crate of this workspace is imported here, so each of them can use it; nothing that
//! is shipped does.
//!
//! - [`Random`]: numbers that look random and follow from a seed.
//! - [`are_here`], [`skipped`]: whether what a test needs is on this machine. Without it the test says so and passes; where `CI`
//!   is set it fails.
//! - [`run()`], [`ok`], [`end`]: a program run to its end within a limit of time; [`Run`] is how that came out.
//! - [`Lab`]: a temporary folder with images, with QEMU's tools, the shell and the command under test at work in it.
//! - [`View`]: what a guest would read. [`Holder`]: a process that keeps an image open.
//! - [`shell`]: hints, typed as a user would.

// A test that cannot go on fails; clippy's own allowance covers only the test functions themselves.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod here;
mod holder;
mod lab;
pub mod random;
mod run;
pub mod shell;
mod view;

pub use here::{are_here, find, not_tried, qemu_is_here, skipped};
pub use holder::Holder;
pub use lab::{Files, Lab, under_test};
pub use random::Random;
pub use run::{Run, end, ok, run};
pub use view::View;
