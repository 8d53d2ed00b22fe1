//! Data moves up: an image takes in what the layers below it show, and then reads through a base further down, or through
//! nothing.
//!
//! The guest sees the same bytes at every instant: the image takes in only bytes that it shows already. When
//! all of them are durable, its backing name changes with one write, or under the journal. So whatever stops a
//! pull, the same command takes in what is still missing. No other file is written, and other users of the
//! layers below see no change.

mod execute;
mod plan;
mod prepare;
#[cfg(test)]
mod tests;

use std::sync::Arc;

pub use plan::{PullOptions, PullPlan, PullReport};

use super::resume::unfinished_work::UnfinishedWork;
use super::resume::work::Work;
use crate::chain::Chain;
use crate::journal::record::Header;
use crate::storage::Host;

/// What a pull comes to.
#[derive(Debug)]
#[non_exhaustive]
pub enum PreparedPull {
    /// It is ready to be carried out.
    Ready(Box<Pull>),
    /// There is nothing to do: the image reads through base, or through nothing, already.
    Nothing(Box<PullPlan>),
}

/// A pull that is ready to be carried out: its chain is open and locked.
#[derive(Debug)]
pub struct Pull {
    host: Arc<dyn Host>,
    options: PullOptions,
    chain: Chain,
    /// The position of the base; `None` if nothing is to lie below.
    base: Option<usize>,
    plan: PullPlan,
    /// What a journal says of this pull.
    header: Header,
    /// What a pull that was stopped has left, and the image under its journal.
    unfinished: Option<(UnfinishedWork, Option<Work>)>,
    /// Clusters of the image that nothing refers to.
    leaks: u64,
}

impl PreparedPull {
    /// What will be done.
    pub fn plan(&self) -> &PullPlan {
        match self {
            Self::Ready(pull) => &pull.plan,
            Self::Nothing(plan) => plan,
        }
    }

    /// The chain, open and locked, if there is something to do.
    pub fn chain(&self) -> Option<&Chain> {
        match self {
            Self::Ready(pull) => Some(&pull.chain),
            Self::Nothing(_) => None,
        }
    }
}
