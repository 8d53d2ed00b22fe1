//! Merging layers into a base: judged, planned, and carried out, each step durable before the next.

mod commit;
#[cfg(test)]
pub(crate) mod crash_tests;
mod emptying;
mod execute;
#[cfg(test)]
mod looking_tests;
mod make_plan;
#[cfg(test)]
mod model_tests;
mod options;
mod plan;
mod plan_of_nothing;
mod prepare;
mod pull;
mod read_back;
mod reason;
mod rebase;
mod removal;
mod report;
pub(crate) mod resume;
pub(crate) mod safety;
mod settled;
mod stack;
pub(crate) mod switch;
mod up;

pub use crate::journal::{Stranger, strangers_about};
pub use crate::transfer::{Progress, Silent, Totals, put};
pub use commit::Commit;
pub use options::{BaseChoice, CommitOptions};
pub use plan::{
    Afterwards, BeginsAnew, DataFileFate, Kept, LostBitmap, Plan, PlannedDataFile, Resumed, Signs,
};
pub use pull::{PreparedPull, Pull, PullOptions, PullPlan};
pub use reason::{KeptReason, NothingReason};
pub use rebase::{PreparedRebase, Rebase, RebaseOptions, RebasePlan};
pub use report::Report;
pub use resume::abort::{Aborted, abort};
pub use resume::heal::{heal, heal_image};
pub(crate) use resume::torn::refuse_to_check;
pub use resume::torn::{can_be_healed, open_whole};
pub(crate) use resume::unfinished::unfinished_emptying;
pub use resume::unfinished::{
    DirtyReason, UnfinishedMerge, UnfinishedUp, dirty_reason, unfinished_merge, unfinished_up,
};
pub use settled::{Finish, Nothing, Prepared, Settled};
pub use up::{UpOptions, UpReport};
