//! A pull: an image takes in what the layers below it show, and then reads through a base further down, or through nothing.
//!
//! What lies between is taken in as it is, without a comparison: see [`super::rebase`] for what copies only what would show
//! something else.

mod plan;
mod prepare;
#[cfg(test)]
mod tests;

use std::sync::atomic::AtomicBool;

pub use plan::{PullOptions, PullPlan};

use super::up::{Up, UpReport};
use crate::chain::Chain;
use crate::error::Result;
use crate::transfer::Progress;
use crate::transfer::workers::on_workers;

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
    plan: PullPlan,
    up: Up,
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
            Self::Ready(pull) => Some(&pull.up.chain),
            Self::Nothing(_) => None,
        }
    }

    /// Carries the pull out.
    ///
    /// # Errors
    /// The system's; [`Error::Verify`](crate::Error::Verify); [`Error::Cancelled`](crate::Error::Cancelled). The guest's view
    /// is what it was, and the same pull goes on.
    pub fn execute(self, progress: &dyn Progress, cancel: &AtomicBool) -> Result<UpReport> {
        match self {
            Self::Ready(pull) => on_workers(|| pull.up.execute(progress, cancel)),
            Self::Nothing(_) => Ok(UpReport::default()),
        }
    }
}
