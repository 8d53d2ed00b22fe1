//! Finds the disk of a running QEMU to which a state belongs, and which of its two chains it shows.

use qapi::qmp::JobStatus;

use super::{State, StateLayer};
use crate::block::graph::{Disk, Graph};
use crate::block::jobs::jobs;
use crate::error::Result;
use crate::qmp::monitor::Monitor;

/// What QEMU shows of a disk and its merge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Qemu {
    /// It does not answer, or has ended.
    Gone,
    /// It has the job.
    HasJob(JobStatus),
    /// It has no such job, and the disk's chain is the one from before the merge.
    ShowsBefore,
    /// It has no such job, and the disk's chain is the one that the merge leaves.
    ShowsAfter,
    /// It has neither the job nor a disk with one of the two chains.
    ShowsNeither,
}

impl Qemu {
    /// Asks QEMU for its jobs, and looks for the disk in the present graph.
    ///
    /// # Errors
    /// Those of the queries.
    pub(crate) fn ask(monitor: &(impl Monitor + ?Sized), graph: &Graph, state: &State) -> Result<Self> {
        if let Some(job) = jobs(monitor)?.into_iter().find(|job| job.id == state.job) {
            return Ok(Self::HasJob(job.status));
        }
        Ok(if state.disk_after(graph).is_some() {
            Self::ShowsAfter
        } else if state.disk_before(graph).is_some() {
            Self::ShowsBefore
        } else {
            Self::ShowsNeither
        })
    }
}

impl State {
    /// The disk with the chain from before the merge, which may have new overlays on top by now.
    pub(crate) fn disk_before<'g>(&self, graph: &'g Graph) -> Option<&'g Disk> {
        self.disk_on(graph, &self.layers.iter().collect::<Vec<_>>())
    }

    /// The disk with the chain that the merge leaves, which may have new overlays on top by now.
    pub(crate) fn disk_after<'g>(&self, graph: &'g Graph) -> Option<&'g Disk> {
        // The chain from before the merge ends with base, too, and must not be taken for this one.
        let before = self.disk_before(graph).map(Disk::name);
        self.disk_on(graph, &self.layers_after().collect::<Vec<_>>())
            .filter(|disk| Some(disk.name()) != before)
    }

    fn disk_on<'g>(&self, graph: &'g Graph, layers: &[&StateLayer]) -> Option<&'g Disk> {
        let is_it = |disk: &&Disk| {
            let above = disk.layers().len().checked_sub(layers.len());
            let Some(now) = above.and_then(|above| disk.layers().get(above..)) else { return false };
            // Another disk may have an overlay on the same base.
            let same_disk = disk.name() == self.disk
                || (above == Some(0) && now.iter().map(|l| &l.node).eq(layers.iter().map(|l| &l.node)));
            same_disk && now.iter().map(|l| &l.file).eq(layers.iter().map(|l| &l.file))
        };
        graph.disks().iter().find(is_it)
    }
}
