//! Merging layers into a base: needs, operations, batches, and the switch of metadata.

mod cluster;
mod job;
mod needs;
mod ops;

pub use job::Totals;
pub use ops::Progress;
