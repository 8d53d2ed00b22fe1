//! Telling images whose clusters were allocated before they were written.

use super::Qcow2;
use super::refcounts::Refcounts;
use crate::error::{Error, FileOp, Result};

impl Qcow2 {
    /// Whether many more clusters are in use than the file system holds blocks for: then clusters were
    /// allocated ahead (`preallocation=metadata`), and holes of the file tell which of them were never
    /// written. The rule is QEMU's: a tenth more, and two at least.
    ///
    /// # Errors
    /// Refcounts that cannot be read.
    pub(crate) fn is_preallocated(&self) -> Result<bool> {
        let failed = |e| Error::io(self.path(), FileOp::Stat, None, e);
        let cluster_size = self.geometry().cluster_size();
        let held = self.file().stat().map_err(failed)?.allocated / cluster_size;
        let enough = (held.saturating_mul(10) / 9).max(held.saturating_add(2));
        let clusters = self.file_len().div_ceil(cluster_size);
        if clusters < enough {
            return Ok(false);
        }
        let refcounts = Refcounts::load(self)?;
        let (mut in_use, mut block) = (0, Vec::new());
        for index in 0..clusters.div_ceil(refcounts.per_block()) {
            if !refcounts.read_block(self, index, &mut block)? {
                continue;
            }
            let rest = clusters - index * refcounts.per_block();
            let slots = refcounts.per_block().min(rest) as usize;
            in_use += (0..slots)
                .filter(|&slot| refcounts.width().get(&block, slot).is_some_and(|n| n > 0))
                .count() as u64;
            if in_use >= enough {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
