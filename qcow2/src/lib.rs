//! A qcow2 engine that reads, checks and merges disk image chains. It knows images and chains, and
//! nothing of QEMU processes or terminals.
//!
//! [`chain::Chain::open`] opens a chain, [`chain::Chain::reader`] reads its disk, [`merge::heal`] and
//! [`merge::Commit::prepare`] begin a merge; `examples/merge.rs` does all of that. Errors say which file, where, what was
//! found and what was expected; [`ErrorKind`] is what a caller decides by.
//!
//! The modules are floors; each imports only from those below it:
//!
//! - [`mod@format`]: bytes to values and back. No I/O.
//! - [`storage`]: where bytes lie: files, block devices, memory; locks.
//! - [`mod@stamp`]: a file as it was when somebody looked, known again.
//! - [`journal`]: what is written in place, kept aside until it is durable.
//! - [`image`]: one opened image, its map and its bytes.
//! - [`chain`]: layers opened by name under a policy, and the map through them.
//! - [`check`], [`repair`]: whether an image is consistent; what follows from its references, put right.
//! - [`transfer`]: the road of bytes from layers into an image.
//! - [`merge`]: layers merged down into a base: planned, carried out, verified.
//! - [`retire`]: layers that QEMU has merged: marked, removed, made empty overlays, compared with base.
//! - [`compare`] and [`convert`]: two views compared; a chain as one new file.
//! - [`by_name`]: an image checked, repaired or restored by its name, under the lock that this needs.
//! - [`facts`]: what an image, or each layer of a chain, is; [`ways`]: what would succeed next, where something has failed.
//!
//! ```no_run
//! use std::{path::Path, sync::Arc, sync::atomic::AtomicBool};
//! use qcow2::chain::{OpenOptions, Policy};
//! use qcow2::merge::{Commit, CommitOptions, Silent};
//! use qcow2::storage::OsHost;
//!
//! // Nothing that an image names is opened unless the caller allows it.
//! let open = OpenOptions { policy: Policy::local_files(), ..OpenOptions::default() };
//! let options = CommitOptions { open, verify: true, ..CommitOptions::default() };
//! let cancel = AtomicBool::new(false);
//! let commit = Commit::prepare(Arc::new(OsHost), Path::new("vm.qcow2"), &options, &cancel)?;
//! if let Some(plan) = commit.plan() {
//!     println!("{plan}");
//! }
//! let report = commit.execute(&Silent, &cancel)?;
//! println!("{} bytes were copied", report.totals.bytes_to_copy);
//! # Ok::<(), qcow2::Error>(())
//! ```

pub mod by_name;
pub mod chain;
pub mod check;
pub mod compare;
pub mod convert;
pub mod error;
pub mod facts;
pub mod format;
#[cfg(feature = "testing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod image;
pub mod journal;
pub mod merge;
pub mod repair;
pub mod retire;
mod serial;
pub mod stamp;
pub mod storage;
#[cfg(test)]
mod testing;
pub mod transfer;
pub mod units;
pub mod ways;

pub use error::{Error, ErrorKind, FileOp, Refusal, Result};
