//! Bytes to values and back, and nothing else: no I/O, no `unsafe`, no panic on any input.
//!
//! Everything here follows the qcow2 specification (QEMU's `docs/interop/qcow2.txt`); section names
//! in the documentation are that document's. Integers on disk are big-endian; `byteorder` is used in
//! this module and nowhere else. Limits that the specification leaves open are QEMU's.

mod error;
mod geometry;
mod l1;
mod l2;

pub use error::FormatError;
pub use geometry::Geometry;
pub use l1::L1Entry;
pub use l2::{L2Entry, SubclusterState, Subclusters};
