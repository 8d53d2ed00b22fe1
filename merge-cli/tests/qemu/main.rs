//! The built `qmerge` judged by QEMU's own tools: chains made by `qemu-img` and `qemu-io`, merged by us,
//! read and checked by QEMU.
//!
//! Without QEMU every test here says `SKIPPED` on standard error and passes, except where `CI` is set:
//! there a missing tool is a failure. Environment:
//!
//! - `QMERGE_TEST_BINARY`: another `qmerge` to judge, such as a release build;
//! - `QMERGE_TEST_SEED`, `QMERGE_TEST_CASES`: first seed and number of random chains (`differential`);
//! - `QMERGE_TEST_DIR`: the folder for the images, `/tmp` if unset;
//! - `QMERGE_TEST_HINTS=all`: type every hint that any command prints, not each kind once (`kit::shell`);
//! - `QMERGE_TEST_KEEP`: keep the folder of a failed test.

// Helpers of tests fail by panicking, as tests do; clippy's allowance covers only the test functions themselves.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

mod article;
mod deletion;
mod devices;
mod differential;
mod engines;
mod fates;
mod faults;
mod flatten;
mod formats;
mod hints;
mod interrupts;
mod iotests;
mod journal;
mod kills;
mod locks;
mod malformed;
mod neighbours;
mod obsolete;
mod pull;
mod put_back;
mod rebase;
mod recorded;
mod relink;
mod repair;
mod restore;
mod resume;
mod siblings;
mod told_truly;
mod traps;
mod unfinished;
mod user_errors;
mod words;
