//! The library that drives a running QEMU over QMP, its control socket.
//!
//! What is here is the ground floor, tested on lines that QEMU 10.0.2 sent:
//!
//! - [`Address`]: where a monitor listens, as a user writes it.
//! - [`Message`]: one line from QEMU, sorted into greeting, event, reply and failure. Unknown events,
//!   fields and error classes are data, never a reason to lose the connection.
//! - [`request`] and [`reply`]: a numbered command to a line, and the answer back to a type.
//!
//! The types of commands and answers are those of the `qapi` crate ([`qapi::qmp`]). Its transports are
//! not used: a QMP connection of theirs is lost on an unknown event, and out of step after a time-out.
//! Replies here carry the number of their command, so a late one is recognised and dropped.
//!
//! Not here yet: the connection itself, the block graph (disks and chains), jobs, and the live merge
//! that they serve.

mod address;
mod connection;
mod error;
mod graph;
mod message;
mod monitor;
#[cfg(test)]
mod replay;

pub use address::Address;
pub use connection::{Connection, Options};
pub use error::{Error, Result};
pub use graph::{Backing, Disk, Graph, Layer, Range};
pub use message::{Event, Failure, Message, reply, request};
pub use monitor::{Execute, Monitor, patience};
pub use qapi;
