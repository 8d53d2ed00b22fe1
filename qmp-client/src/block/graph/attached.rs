//! Finds out which job works on which disk.

use serde_json::json;

use super::nodes::Edges;
use super::{Disk, Graph};
use crate::block::ids::{MERGES, job_prefix};
use crate::block::jobs::{JobState, jobs};
use crate::error::Result;
use crate::qmp::monitor::{Execute, Monitor, read};

impl Graph {
    /// All jobs of this QEMU, whoever started them, each with the disk on which it works.
    ///
    /// A job does not tell its disk. The edge from the job to a node of the disk does. A job that has concluded
    /// has no edges any more; its disk is known only if the id is one that a [`crate::Procedure`] gives. Some
    /// jobs work on no disk.
    ///
    /// # Errors
    /// Those of the queries.
    pub fn jobs(&self, monitor: &(impl Monitor + ?Sized)) -> Result<Vec<(JobState, Option<&Disk>)>> {
        let jobs = jobs(monitor)?;
        if jobs.is_empty() {
            return Ok(Vec::new());
        }
        let command = "x-debug-query-block-graph";
        let edges: Edges = read(command, monitor.query(command, json!({}))?)?;
        let of = |job: &JobState| {
            let named = |d: &&Disk| MERGES.iter().any(|kind| job.id.starts_with(&job_prefix(kind, d.name())));
            // Take the job's first node that belongs to a disk: further down there may be a base that several
            // disks share.
            let works = |d: &&Disk, node: &String| {
                d.filters().contains(node) || d.layers().iter().any(|l| l.node == *node)
            };
            let at = |node: &String| self.disks.iter().find(|d| works(d, node));
            self.disks.iter().find(named).or_else(|| edges.works_on(&job.id).iter().find_map(at))
        };
        Ok(jobs.into_iter().map(|job| (of(&job), job)).map(|(disk, job)| (job, disk)).collect())
    }
}

/// The nodes of new overlays that belong to no disk yet, each with the node that holds its file.
///
/// # Errors
/// Those of the query.
pub(crate) fn are_alone(monitor: &(impl Monitor + ?Sized), pairs: &[(String, String)]) -> Result<Vec<bool>> {
    let command = "x-debug-query-block-graph";
    let edges: Edges = read(command, monitor.query(command, json!({}))?)?;
    let alone = |(node, storage): &(String, String)| {
        edges.is_alone(node, None) && edges.is_alone(storage, Some(node))
    };
    Ok(pairs.iter().map(alone).collect())
}

/// Whether a job holds all requests to its disk while it is pending.
///
/// # Errors
/// Those of the query.
pub(crate) fn holds_requests(monitor: &(impl Monitor + ?Sized), job: &str) -> Result<bool> {
    let command = "x-debug-query-block-graph";
    let edges: Edges = read(command, monitor.query(command, json!({}))?)?;
    Ok(edges.has_target(job))
}
