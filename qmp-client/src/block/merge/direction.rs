//! The differences between a merge down and a merge up, in one place.

use qapi::qmp;
use serde_json::Value;

use super::{Procedure, Span, steps};
use crate::block::ids::MERGES;
use crate::block::jobs::{Job, failed};
use crate::error::Result;
use crate::qmp::monitor::Monitor;

/// Which way the data of the merged layers goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Direction {
    /// Into the layer below them: a commit, QEMU's `block-commit`.
    #[default]
    Down,
    /// Into the active layer above them: a pull, QEMU's `block-stream`.
    Up,
}

impl Direction {
    /// What the ids of its jobs begin with.
    pub(super) fn of_jobs(self) -> &'static str {
        let [down, up] = MERGES;
        if self == Self::Down { down } else { up }
    }

    /// The index of the uppermost layer that takes part, which the id of the job holds.
    pub(super) fn last(self, span: Span) -> usize {
        if self == Self::Down { span.top } else { span.top + 1 }
    }

    /// Whether QEMU is told to keep a job that has concluded, with its error, until it is dismissed.
    ///
    /// QEMU 10.0.2 crashes when it is asked for its nodes while it keeps a `stream` job that has concluded. So
    /// a pull is not kept, and the graph shows how it ended.
    pub(super) fn keeps_job(self) -> bool {
        self == Self::Down
    }

    /// The command that starts the job, with its arguments.
    pub(super) fn request(self, merge: &Procedure) -> Result<(&'static str, Value)> {
        match self {
            Self::Down => steps::written(&commit(merge)),
            Self::Up => steps::written(&stream(merge)),
        }
    }

    /// Lets a pending job switch, and waits until it has concluded.
    pub(super) fn switch<M: Monitor + ?Sized>(self, job: &Job<'_, M>, monitor: &M) -> Result<()> {
        match self {
            Self::Down => steps::switch(job),
            Self::Up => match steps::switch_unkept(job, monitor)? {
                Some(why) => Err(failed(job, why)),
                None => Ok(()),
            },
        }
    }
}

#[allow(deprecated, reason = "the struct of the schema has fields for file names, which stay empty")]
fn commit(merge: &Procedure) -> qmp::block_commit {
    qmp::block_commit {
        job_id: Some(merge.job_id.clone()),
        device: merge.root.clone(),
        base_node: Some(merge.receiver.node.clone()),
        // Give it for an active commit, too: without it QEMU takes the root as top, and drops a throttle or
        // other filter above the active layer at the pivot.
        top_node: merge.merged.first().map(|top| top.node.clone()),
        backing_file: merge.backing_file.clone(),
        backing_mask_protocol: masks_protocol(merge).filter(|_| !merge.is_active()),
        speed: speed(merge),
        on_error: Some(qmp::BlockdevOnError::stop),
        filter_node_name: Some(merge.filter.clone()),
        auto_finalize: Some(false),
        auto_dismiss: Some(!Direction::Down.keeps_job()),
        base: None,
        top: None,
    }
}

#[allow(deprecated, reason = "the struct of the schema has a field for a file name, which stays empty")]
fn stream(merge: &Procedure) -> qmp::block_stream {
    qmp::block_stream {
        job_id: Some(merge.job_id.clone()),
        device: merge.receiver.node.clone(),
        base_node: merge.base.as_ref().map(|base| base.node.clone()),
        backing_file: merge.backing_file.clone(),
        backing_mask_protocol: masks_protocol(merge),
        speed: speed(merge),
        on_error: Some(qmp::BlockdevOnError::stop),
        filter_node_name: Some(merge.filter.clone()),
        auto_finalize: Some(false),
        auto_dismiss: Some(!Direction::Up.keeps_job()),
        base: None,
        bottom: None,
    }
}

/// Without this, QEMU would write the protocol driver of a base that has no format node into the header as its
/// format.
fn masks_protocol(merge: &Procedure) -> Option<bool> {
    merge.base.as_ref().is_some_and(|base| base.protocol_node.is_none()).then_some(true)
}

fn speed(merge: &Procedure) -> Option<i64> {
    let speed = merge.options.speed;
    (speed > 0).then(|| i64::try_from(speed).unwrap_or(i64::MAX))
}
