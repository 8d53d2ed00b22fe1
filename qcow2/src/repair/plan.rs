//! The plan and the report of a repair.

use std::fmt;

use serde::{Serialize, Serializer};

use super::RepairMode;
use crate::check::{CheckReport, Severity};

/// What a repair does, or did.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RepairPlan {
    /// What is repaired.
    pub mode: RepairMode,
    /// The refcounts that are raised.
    pub raised: u64,
    /// The refcounts that are lowered.
    pub lowered: u64,
    /// How many clusters become free by that.
    pub freed: u64,
    /// The entries of zero clusters whose unaligned host offset is dropped.
    pub offsets_dropped: u64,
    /// The entries of the snapshot table that are mended.
    pub snapshots: u64,
    /// The entries whose COPIED flag is corrected.
    pub flags: u64,
    /// Why the refcount structures cannot be used as they are; `None` if they can.
    pub broken: Option<&'static str>,
    /// The clusters of the new refcount table and of the new blocks; `None` if the structures are not rebuilt.
    pub rebuilt: Option<(u64, u64)>,
    /// Why the refcount structures cannot be rebuilt, though they should be.
    pub not_rebuilt: Option<&'static str>,
    /// Whether no cluster is freed, because damaged structures may refer to clusters that look unused.
    pub withheld: bool,
    /// The check before the repair.
    pub before: CheckReport,
    /// The check after the repair: what remains.
    pub after: CheckReport,
}

impl RepairPlan {
    pub(super) fn nothing(mode: RepairMode, report: CheckReport) -> Self {
        Self {
            mode,
            raised: 0,
            lowered: 0,
            freed: 0,
            offsets_dropped: 0,
            snapshots: 0,
            flags: 0,
            broken: None,
            rebuilt: None,
            not_rebuilt: None,
            withheld: false,
            before: report.clone(),
            after: report,
        }
    }

    /// Whether anything is written.
    pub fn is_empty(&self) -> bool {
        self.raised == 0
            && self.lowered == 0
            && self.offsets_dropped == 0
            && self.snapshots == 0
            && self.flags == 0
            && self.rebuilt.is_none()
            && !self.clears_dirty()
            && !self.clears_corrupt()
    }

    /// Whether the dirty bit is cleared.
    pub fn clears_dirty(&self) -> bool {
        self.before.dirty && !self.after.dirty
    }

    /// Whether the corrupt bit is cleared.
    pub fn clears_corrupt(&self) -> bool {
        self.before.marked_corrupt && !self.after.marked_corrupt
    }

    /// By how many the corruptions decrease.
    pub fn corruptions_fixed(&self) -> u64 {
        self.before.corruptions.saturating_sub(self.after.corruptions)
    }

    /// By how many the leaked clusters decrease.
    pub fn leaks_fixed(&self) -> u64 {
        self.before.leaks.saturating_sub(self.after.leaks)
    }
}

impl RepairPlan {
    /// The steps in their order, one line each. What is wrong with the refcount structures comes first.
    pub fn steps(&self) -> Vec<String> {
        let mut steps = Vec::new();
        if let Some(why) = self.broken {
            steps.push(format!("refcounts cannot be used as they are: {why}"));
        }
        if let Some((table, blocks)) = self.rebuilt {
            let clusters = table.saturating_add(blocks);
            steps.push(format!("refcounts made anew: table and blocks take {clusters} clusters"));
        }
        if let Some(why) = self.not_rebuilt {
            steps.push(format!("refcounts cannot be made anew: {why}"));
        }
        for (count, step) in [
            (self.offsets_dropped, "unaligned host offsets of zeros dropped"),
            (self.snapshots, "entries of the snapshot table mended"),
            (self.raised, "refcounts raised"),
            (self.lowered, "refcounts lowered"),
            (self.freed, "clusters freed"),
            (self.flags, "COPIED flags corrected"),
        ] {
            if count > 0 {
                steps.push(format!("{step}: {count}"));
            }
        }
        if self.clears_dirty() {
            steps.push("dirty bit cleared".to_owned());
        }
        if self.clears_corrupt() {
            steps.push("corrupt bit cleared".to_owned());
        }
        if self.withheld && self.after.leaks > 0 {
            steps.push(
                "nothing freed: clusters that look unused may be what damaged structures meant".to_owned(),
            );
        }
        steps
    }
}

/// Serialised as counts, with the steps as text.
impl Serialize for RepairPlan {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        #[serde(rename_all = "kebab-case")]
        struct RepairShape {
            refcounts_raised: u64,
            refcounts_lowered: u64,
            clusters_freed: u64,
            flags_corrected: u64,
            refcounts_rebuilt: bool,
            dirty_bit_cleared: bool,
            corrupt_bit_cleared: bool,
            corruptions_left: u64,
            leaks_left: u64,
            steps: Vec<String>,
        }
        RepairShape {
            refcounts_raised: self.raised,
            refcounts_lowered: self.lowered,
            clusters_freed: self.freed,
            flags_corrected: self.flags,
            refcounts_rebuilt: self.rebuilt.is_some(),
            dirty_bit_cleared: self.clears_dirty(),
            corrupt_bit_cleared: self.clears_corrupt(),
            corruptions_left: self.after.corruptions,
            leaks_left: self.after.leaks,
            steps: self.steps(),
        }
        .serialize(to)
    }
}

impl fmt::Display for RepairPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            writeln!(f, "nothing to repair")?;
        }
        for step in self.steps() {
            writeln!(f, "{step}")?;
        }
        let (corruptions, errors, leaks) =
            (self.after.corruptions, self.after.check_errors, self.after.leaks);
        write!(f, "what remains: {corruptions} corruptions, {leaks} leaked clusters, {errors} read errors")?;
        for finding in self.after.findings.iter().filter(|f| f.severity != Severity::Leak) {
            write!(f, "\n  {finding}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_reads_as_steps() {
        let mut report = CheckReport {
            data: None,
            corruptions: 3,
            leaks: 1,
            check_errors: 0,
            image_end_offset: 0,
            total_clusters: 0,
            allocated_clusters: 0,
            fragmented_clusters: 0,
            compressed_clusters: 0,
            findings: Vec::new(),
            references_complete: true,
            dirty: true,
            marked_corrupt: false,
        };
        let mut plan = RepairPlan::nothing(RepairMode::All, report.clone());
        assert!(plan.is_empty() && plan.to_string().starts_with("nothing to repair\nwhat remains: 3 corr"));
        (report.corruptions, report.leaks, report.dirty) = (0, 0, false);
        (plan.after, plan.broken, plan.rebuilt, plan.flags) = (report, Some("it is gone"), Some((1, 2)), 4);
        assert!(!plan.is_empty());
        assert_eq!((plan.corruptions_fixed(), plan.leaks_fixed()), (3, 1));
        assert_eq!(
            plan.to_string(),
            "refcounts cannot be used as they are: it is gone\n\
             refcounts made anew: table and blocks take 3 clusters\n\
             COPIED flags corrected: 4\n\
             dirty bit cleared\n\
             what remains: 0 corruptions, 0 leaked clusters, 0 read errors"
        );
    }
}
