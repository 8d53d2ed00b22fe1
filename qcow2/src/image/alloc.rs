//! Allocates clusters in an image that is being written.
//!
//! The allocator goes through the refcounts once, and hands out free clusters in the order of the file: gaps
//! first, then the room behind the last cluster. A cluster that is freed ahead of it will be handed out again.
//! So clusters are freed only behind the barrier that made them unused, and holes are punched into them before
//! anything else is allocated.

use std::ops::Range;

use super::Qcow2;
use super::refcounts::{ClusterIndex, Refcounts};
use crate::error::{Error, Result};
use crate::format::FormatError;

/// Hands out free clusters.
#[derive(Debug)]
pub(crate) struct Allocator {
    next: ClusterIndex,
    /// The refcount block that covers `next`, if it was read, and its number.
    block: Option<(u64, Vec<u8>)>,
    /// The end of the clusters that may be handed out: only clusters with a refcount block may.
    limit: ClusterIndex,
}

impl Allocator {
    /// An allocator that begins at the start of the file.
    pub(crate) fn new(refcounts: &Refcounts) -> Self {
        let blocks = refcounts.table().iter().rposition(|e| e.block().is_some()).map_or(0, |n| n as u64 + 1);
        // Cluster 0 holds the header, whatever its refcount says.
        Self { next: 1, block: None, limit: blocks * refcounts.per_block() }
    }

    /// The end of the clusters that may be handed out.
    pub(crate) fn limit(&self) -> ClusterIndex {
        self.limit
    }

    /// The next run of free clusters, at most `most` long.
    ///
    /// # Errors
    /// A refcount block that cannot be read; no free cluster left, which means that too few were
    /// prepared (see [`super::grow`]).
    pub(crate) fn take(
        &mut self,
        image: &Qcow2,
        refcounts: &Refcounts,
        most: u64,
    ) -> Result<Range<ClusterIndex>> {
        let run = self.try_take(image, refcounts, most)?;
        run.ok_or_else(|| {
            let found = format!("no free cluster below {}", self.limit);
            Error::format(
                image.path(),
                FormatError::malformed("refcount table", 48, found, "room for new clusters"),
            )
        })
    }

    /// The first run of `len` free clusters, or `None`. Nothing is allocated.
    ///
    /// # Errors
    /// A refcount block that cannot be read.
    pub(crate) fn find_run(
        image: &Qcow2,
        refcounts: &Refcounts,
        len: u64,
    ) -> Result<Option<Range<ClusterIndex>>> {
        let mut scout = Self::new(refcounts);
        loop {
            match scout.try_take(image, refcounts, len)? {
                Some(run) if run.end - run.start < len => {}
                other => return Ok(other),
            }
        }
    }

    /// What taking `clusters` free clusters would give: how many of them there are, and where the last one
    /// ends. Nothing is allocated.
    ///
    /// # Errors
    /// A refcount block that cannot be read.
    pub(crate) fn last_taken(
        image: &Qcow2,
        refcounts: &Refcounts,
        clusters: u64,
    ) -> Result<(u64, ClusterIndex)> {
        let mut scout = Self::new(refcounts);
        let (mut free, mut end) = (0, 0);
        while free < clusters {
            let Some(run) = scout.try_take(image, refcounts, clusters - free)? else { break };
            free += run.end - run.start;
            end = run.end;
        }
        Ok((free, end))
    }

    /// As [`Allocator::take`], but `None` if no cluster is free.
    ///
    /// # Errors
    /// A refcount block that cannot be read.
    pub(crate) fn try_take(
        &mut self,
        image: &Qcow2,
        refcounts: &Refcounts,
        most: u64,
    ) -> Result<Option<Range<ClusterIndex>>> {
        let per_block = refcounts.per_block();
        let width = refcounts.width();
        let mut run: Option<Range<ClusterIndex>> = None;
        while self.next < self.limit {
            let index = self.next / per_block;
            if self.block.as_ref().is_none_or(|(have, _)| *have != index) {
                let mut bytes = self.block.take().map(|(_, bytes)| bytes).unwrap_or_default();
                if !refcounts.read_block(image, index, &mut bytes)? {
                    // Clusters without a refcount block are not handed out: their refcount could not be raised.
                    if run.is_some() {
                        return Ok(run);
                    }
                    self.next = (index + 1) * per_block;
                    continue;
                }
                self.block = Some((index, bytes));
            }
            let Some((_, bytes)) = &self.block else { break };
            let end = (index + 1) * per_block;
            while self.next < end {
                let free = width.get(bytes, (self.next % per_block) as usize) == Some(0);
                match &mut run {
                    Some(run) if free => run.end += 1,
                    None if free => run = Some(self.next..self.next + 1),
                    Some(_) => return Ok(run),
                    None => {}
                }
                self.next += 1;
                if run.as_ref().is_some_and(|r| r.end - r.start >= most) {
                    return Ok(run);
                }
            }
        }
        Ok(run)
    }
}
