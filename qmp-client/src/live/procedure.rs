//! Commit and pull as one kind of thing, for what is the same with both.

use std::path::PathBuf;

use serde_json::Value;

use crate::block::commit::Commit;
use crate::block::graph::Layer;
use crate::block::jobs::{Goal, Job};
use crate::block::procedure::{Merged, chain};
use crate::block::pull::Pull;
use crate::error::Result;
use crate::qmp::monitor::Monitor;
use crate::state::{Kind, Rename, State};

/// What a merge does.
#[derive(Clone, Debug)]
pub enum Procedure {
    /// Data moves down.
    Commit(Box<Commit>),
    /// Data moves up.
    Pull(Box<Pull>),
}

impl From<Commit> for Procedure {
    fn from(commit: Commit) -> Self {
        Self::Commit(Box::new(commit))
    }
}

impl From<Pull> for Procedure {
    fn from(pull: Pull) -> Self {
        Self::Pull(Box::new(pull))
    }
}

impl Procedure {
    /// What is merged which way.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Commit(commit) if commit.is_active() => Kind::ActiveCommit,
            Self::Commit(_) => Kind::Commit,
            Self::Pull(_) => Kind::Pull,
        }
    }

    /// The layers that the disk no longer needs afterwards, from the top.
    pub fn merged(&self) -> &[Layer] {
        match self {
            Self::Commit(commit) => commit.merged(),
            Self::Pull(pull) => pull.pulled(),
        }
    }

    /// The layers that the disk has afterwards, from the top.
    pub fn left(&self) -> &[Layer] {
        match self {
            Self::Commit(commit) => commit.left(),
            Self::Pull(pull) => pull.left(),
        }
    }

    /// The commands that carry it out, in their order, each with its arguments.
    ///
    /// # Errors
    /// [`crate::Error::Request`] if a command cannot be written as JSON.
    pub fn commands(&self) -> Result<Vec<(&'static str, Value)>> {
        match self {
            Self::Commit(commit) => commit.commands(),
            Self::Pull(pull) => pull.commands(),
        }
    }

    /// The whole chain before the merge, from the active layer down.
    pub(super) fn chain(&self) -> Vec<Layer> {
        chain(self.merged(), self.left())
    }

    /// What the job reaches when all is copied.
    pub(super) fn goal(&self) -> Goal {
        if self.kind() == Kind::ActiveCommit { Goal::Ready } else { Goal::Pending }
    }

    pub(super) fn disk(&self) -> &str {
        match self {
            Self::Commit(commit) => commit.disk(),
            Self::Pull(pull) => pull.disk(),
        }
    }

    pub(super) fn job_id(&self) -> &str {
        match self {
            Self::Commit(commit) => commit.job_id(),
            Self::Pull(pull) => pull.job_id(),
        }
    }

    /// The indexes of base and of the uppermost layer that goes.
    pub(super) fn range(&self) -> (usize, usize) {
        match self {
            Self::Commit(commit) => (commit.base().index, commit.top().index),
            Self::Pull(pull) => {
                (pull.base().map_or(0, |base| base.index), pull.active().index.saturating_sub(1))
            }
        }
    }

    /// The header that the switch changes.
    pub(super) fn rename(&self) -> Option<Rename> {
        let (overlay, new) = match self {
            Self::Commit(commit) => (commit.above()?, commit.backing_file()),
            Self::Pull(pull) => (pull.active(), pull.backing_file()),
        };
        let backing = overlay.backing.as_ref();
        Some(Rename {
            overlay: overlay.file.clone(),
            index: overlay.index,
            old: backing.map(|backing| backing.name.clone()).unwrap_or_default(),
            old_format: backing.and_then(|backing| backing.format.clone()),
            new: new.map(str::to_owned),
        })
    }

    pub(super) fn nbd_socket(&self) -> Option<PathBuf> {
        let options = match self {
            Self::Commit(commit) => commit.options(),
            Self::Pull(pull) => pull.options(),
        };
        options.nbd_socket.clone()
    }

    pub(super) fn start<'m, M: Monitor + ?Sized>(&self, monitor: &'m M) -> Result<Job<'m, M>> {
        match self {
            Self::Commit(commit) => commit.start(monitor),
            Self::Pull(pull) => pull.start(monitor),
        }
    }

    /// The procedure that a state describes, whose job runs or has run.
    pub(super) fn recall(state: &State) -> Option<Self> {
        match state.kind {
            Kind::Pull => Pull::recall(state).map(Self::from),
            Kind::Commit | Kind::ActiveCommit => Commit::recall(state).map(Self::from),
        }
    }

    /// Finds out how the layer that was written can be flushed, where its preflight has not done so: for a procedure
    /// that is recalled.
    pub(super) fn find_means(&mut self, monitor: &(impl Monitor + ?Sized)) -> Result<()> {
        match self {
            Self::Commit(commit) => commit.find_means(monitor),
            Self::Pull(pull) => pull.find_means(monitor),
        }
    }

    /// Looks whether the merge has been carried out by a job that is gone, and closes what is no longer needed.
    pub(super) fn verify<M: Monitor + ?Sized>(&self, job: &Job<'_, M>, monitor: &M) -> Result<Merged> {
        match self {
            Self::Commit(commit) => commit.verify(job, monitor),
            Self::Pull(pull) => pull.verify(job, monitor),
        }
    }

    /// Switches: the end of a merge of any kind, whose job is pending or, for an active commit, ready.
    pub(super) fn switch<M: Monitor + ?Sized>(
        &self,
        job: &Job<'_, M>,
        monitor: &M,
        before_switch: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Merged> {
        match self {
            Self::Commit(commit) if commit.is_active() => commit.pivot(job, monitor, before_switch),
            Self::Commit(commit) => commit.finish(job, monitor, before_switch),
            Self::Pull(pull) => pull.finish(job, monitor, before_switch),
        }
    }
}
