//! `qmerge live` on a real qemu-system, with a real Linux guest that writes without pause and keeps a list of the
//! writes that were acknowledged to it.
//!
//! The guest's only process is `testdata/guest/init.rs`; its kernel is fetched by `testdata/guest/fetch-kernel`. It
//! is booted once, under plain emulation, and saved to `target/guest`; every test goes on from there. Without QEMU or
//! the kernel each test says `SKIPPED` on standard error and passes, except where `CI` is set.

// Helpers of tests fail by panicking, as tests do; clippy's allowance covers only the test functions themselves.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

mod article;
mod convergence;
mod instants;
mod killed;
mod recorded;
mod styles;
mod switch;
