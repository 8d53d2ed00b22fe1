//! A qcow2 engine that reads, checks and merges disk image chains. It knows images and chains, and
//! nothing of QEMU processes or terminals.
//!
//! The modules are floors; each imports only from those below it:
//!
//! - [`format`]: bytes to values and back. No I/O.
//! - [`storage`]: where bytes lie.
//! - [`image`]: one opened image.
//! - [`chain`]: names inside images made into files under a policy, layers, and the map through them.
//! - [`check`]: whether an image is consistent.
//! - [`merge`]: layers into a base below them.
//! - [`compare`]: whether a guest sees the same through two chains.
//! - [`convert`]: a chain as one new file.

pub mod chain;
pub mod check;
pub mod compare;
pub mod convert;
pub mod error;
pub mod format;
#[doc(hidden)]
pub mod fuzzing;
pub mod image;
pub mod merge;
pub mod storage;
pub mod units;

pub use error::{Error, ErrorKind, Refusal, Result};
