//! Merging layers into a base: needs, operations, batches, and the switch of metadata.

mod abort;
mod before;
mod cluster;
mod commit;
#[cfg(test)]
mod crash_tests;
mod emptied;
mod empty;
mod empty_all;
mod empty_onto;
mod emptying;
mod execute;
mod interrupted;
mod job;
mod link;
#[cfg(test)]
mod model_tests;
mod needs;
mod ops;
mod options;
mod origin;
mod pace;
mod plan;
mod put;
mod record;
mod remains;
mod removal;
mod retire;
mod safety;
#[cfg(test)]
pub(crate) mod testing;
mod verify;
mod work;
mod workers;
mod zeros;

pub use abort::{Aborted, Pending, abort, pending};
pub use commit::Commit;
pub use empty_all::{LeftBehind, empty_all_onto};
pub use empty_onto::{Emptied, EmptyOptions, empty_onto};
pub use execute::Report;
pub use interrupted::{BackingIs, Interrupted};
pub use job::Totals;
pub(crate) use job::{Job, Writer};
pub(crate) use needs::Question;
pub use ops::Progress;
pub(crate) use ops::Run;
pub use options::{BaseChoice, CommitOptions};
pub use plan::{Afterwards, BeginsAnew, DataFileFate, Kept, Plan, PlannedDataFile, Resumed, Signs};
pub use put::put;
pub use retire::{Known, Retired, mark_merged, remove, unused};
pub(crate) use zeros::Zeros;
