//! Moves data between layers, in every direction: the question to the layers, the needs of the target, the
//! outcome for each cluster, and the operations, in batches on all cores.

pub(crate) mod ask;
pub(crate) mod changes;
pub(crate) mod cluster;
pub(crate) mod job;
pub(crate) mod needs;
pub(crate) mod ops;
pub(crate) mod origin;
mod pace;
mod put;
pub(crate) mod target;
pub(crate) mod unread;
pub(crate) mod verify;
pub(crate) mod workers;
pub(crate) mod zeros;

pub use job::Totals;
pub(crate) use job::{Job, Writer};
pub(crate) use needs::Question;
pub(crate) use ops::Run;
pub use ops::{Progress, Silent};
pub use put::put;
pub(crate) use zeros::Zeros;
