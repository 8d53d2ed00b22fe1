//! A simulated disk: files in memory that remember what was done to them, so that every state which a power
//! cut may leave can be looked at, and that can fail any operation. Production code runs on it unchanged.
//!
//! - [`SimHost`] is a [`Host`](super::Host) over files in memory; its [`log`](SimHost::log) holds each write
//!   (cut at sectors), each change of a length or a name, and each barrier, in order.
//! - [`power_cuts`] goes through a log, and gives every [`State`] that a power cut before one of its barriers
//!   may leave.
//! - [`Fault`] makes the N-th operation fail, once or for ever after.
//!
//! Everything follows from a seed. What is legal: a file's writes may reach the disk in any order until the
//! file is synced, those to one sector only in theirs; a longer file may still have its old length; names are
//! as they were until their directory is synced; sectors that were being written may hold garbage, where
//! [`Cuts::garbage`] asks for it. Nothing here is part of the library's interface.

mod disk;
mod faults;
mod masks;
mod record;
mod state;
mod states;

pub use disk::{SimFile, SimHost};
pub use faults::{Fault, FaultKind};
pub use record::DiskOp;
pub use state::State;
pub use states::{Cut, Cuts, Garbage, Tear, power_cuts};

/// A power cut leaves a sector of this many bytes as it was or as it was to be.
pub const SECTOR: u64 = 512;

/// The unit of devices with large sectors, and of the page cache, in bytes.
pub const BLOCK: u64 = 4096;

#[cfg(test)]
mod tests;
