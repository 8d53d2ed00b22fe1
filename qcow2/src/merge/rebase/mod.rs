//! A rebase: an image gets another backing file, whatever that holds, or none. Where the guest would see something else, the
//! image takes in what it shows now.
//!
//! Both views are compared unit by unit, and what both read from the same place of the same file is not read: see
//! [`crate::chain::differences`]. The new backing file may be longer than the image, which does not show its tail, or
//! shorter, and shows zeros behind its end.

mod plan;
mod prepare;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

pub use plan::{RebaseOptions, RebasePlan};

use super::up::{Up, UpReport};
use crate::error::Result;
use crate::transfer::Progress;
use crate::transfer::workers::on_workers;

/// What a rebase comes to.
#[derive(Debug)]
#[non_exhaustive]
pub enum PreparedRebase {
    /// It is ready to be carried out.
    Ready(Box<Rebase>),
    /// There is nothing to do: the image has that backing file already, or has none.
    Nothing(Box<RebasePlan>),
}

/// A rebase that is ready to be carried out: both chains are open and locked.
#[derive(Debug)]
pub struct Rebase {
    plan: RebasePlan,
    up: Up,
}

impl PreparedRebase {
    /// What will be done.
    pub fn plan(&self) -> &RebasePlan {
        match self {
            Self::Ready(rebase) => &rebase.plan,
            Self::Nothing(plan) => plan,
        }
    }

    /// The layers whose file systems have no locks, though locks were asked for.
    pub fn unlocked(&self) -> Vec<PathBuf> {
        match self {
            Self::Ready(rebase) => rebase.up.unlocked(),
            Self::Nothing(_) => Vec::new(),
        }
    }

    /// Carries the rebase out.
    ///
    /// # Errors
    /// The system's; [`Error::Verify`](crate::Error::Verify); [`Error::Cancelled`](crate::Error::Cancelled). The guest's view
    /// is what it was, and the same rebase goes on.
    pub fn execute(self, progress: &dyn Progress, cancel: &AtomicBool) -> Result<UpReport> {
        match self {
            Self::Ready(rebase) => on_workers(|| rebase.up.execute(progress, cancel)),
            Self::Nothing(_) => Ok(UpReport::default()),
        }
    }
}
