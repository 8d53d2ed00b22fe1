//! A qcow2 engine that reads, checks and merges disk image chains. It knows images and chains, and
//! nothing of QEMU processes or terminals.
//!
//! # Where to start
//!
//! Every call takes a [`storage::Host`], by which files are opened: [`storage::OsHost`] is the system's,
//! [`storage::MemHost`] is in memory. No file that an image only names is opened unless a [`chain::Policy`] allows it.
//!
//! | to | begin with |
//! | --- | --- |
//! | read the disk of a chain | [`chain::Chain::open`], [`chain::Chain::reader`] |
//! | merge layers into a base | [`merge::heal`], then [`merge::Commit::prepare`], which plans; [`merge::Prepared::execute`] |
//! | give a stopped merge up | [`merge::heal_image`], then [`merge::abort`] |
//! | correct names in headers after a move | [`relink::Relink::prepare`], [`relink::find_renamed`] |
//! | write a chain into one new file | [`convert::Flatten::prepare`] |
//! | compare two chains | [`compare::compare`] |
//! | check an image, or repair it | [`by_name`], or [`check::check`] and [`repair::plan`] on an opened file |
//! | make an image | [`image::create`] |
//! | tidy up what QEMU has merged | [`retire`] |
//! | know what an image is, or what would succeed next | [`facts`], [`ways`] |
//!
//! ```no_run
//! use std::{path::Path, sync::Arc, sync::atomic::AtomicBool};
//! use qcow2::chain::{OpenOptions, Policy};
//! use qcow2::merge::{self, Commit, CommitOptions, Silent};
//! use qcow2::storage::OsHost;
//!
//! let active = Path::new("vm.qcow2");
//! let open = OpenOptions::new(Policy::local_files());
//! let options = CommitOptions::new(open).verified();
//! let cancel = AtomicBool::new(false);
//! for image in merge::heal(&OsHost, active, &options)? {
//!     println!("{}: its header was torn, and is whole again", image.display());
//! }
//! // Opens and locks all layers, judges them, and plans; nothing is written.
//! let merge = Commit::prepare(Arc::new(OsHost), active, &options, &cancel)?;
//! if let Some(plan) = merge.plan() {
//!     println!("{plan}");
//! }
//! let report = merge.execute(&Silent, &cancel)?;
//! println!("{} bytes were copied", report.totals.bytes_to_copy);
//! # Ok::<(), qcow2::Error>(())
//! ```
//!
//! `examples/merge.rs` is the same as a program.
//!
//! # Errors
//!
//! An [`Error`] says which file, where, what was found and what was expected. [`ErrorKind`] is what a caller decides by;
//! a rule that refuses is a variant of [`Refusal`]. Setting the flag that most calls take as `cancel` ends them with
//! [`Error::Cancelled`]; what was merged by then stays, and the same merge goes on from there.

pub mod by_name;
pub mod chain;
pub mod check;
pub mod compare;
pub mod convert;
pub mod error;
pub mod facts;
mod format;
#[cfg(feature = "testing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod image;
mod journal;
pub mod merge;
pub mod relink;
pub mod repair;
pub mod retire;
mod serial;
pub mod stamp;
pub mod storage;
#[cfg(test)]
mod testing;
mod transfer;
pub mod units;
pub mod ways;

pub use error::{Error, ErrorKind, FileOp, Refusal, Result};
