//! Merging layers into a base: needs, operations, batches, and the switch of metadata.

mod cluster;
mod commit;
mod empty;
mod execute;
mod job;
mod link;
mod needs;
mod ops;
mod plan;
mod safety;
mod verify;

pub use commit::{BaseChoice, Commit, CommitOptions};
pub use execute::Report;
pub use job::Totals;
pub use ops::Progress;
pub use plan::{Afterwards, Plan};
