//! Judges merges of the active layer. No header changes, so the files must tell whether the guest went on with
//! base.

use super::{Compared, Doubt, Doubtful, Seen, Verdict};
use crate::live::plan::Obstacle;
use crate::state::{Phase, Qemu, State};

impl State {
    /// Judges a commit of all layers above base, including the active one.
    pub(super) fn judge_active(&self, seen: &Seen) -> Doubtful<Verdict> {
        let (Some(old), Some(base)) = (self.active(), self.layer(self.base)) else {
            return Err(Doubt::NoHeader);
        };
        // If only QEMU can read base, its file tells nothing. Then the old active image alone decides.
        let base_is_known = Obstacle::of_base(base).is_none();
        if base_is_known {
            self.are_there(seen, [base])?;
        }
        if self.phase == Phase::Copying {
            if base_is_known && old.stamp.is_none() {
                return Err(Doubt::Moved { file: old.file.clone(), gone: false });
            }
            self.are_there(seen, [old])?;
            if seen.qemu == Qemu::ShowsAfter {
                return Err(Doubt::RunsOnBase);
            }
            self.are_there(seen, &self.layers)?;
            return self.judge_unnoted(seen, base_is_known);
        }
        let rest = self.look_at_merged(seen, self.merged().filter(|layer| layer.index != old.index))?;
        if old.stamp.is_none() && base_is_known {
            return Err(Doubt::Moved { file: old.file.clone(), gone: false });
        }
        if old.stamp.is_some() && seen.stamps.first().is_none_or(Option::is_none) {
            // The old active image is gone, so it cannot be the disk; and base held all its data when the
            // switch was noted.
            return self.are_there(seen, self.layers_after()).map(|()| Verdict::Switched);
        }
        self.are_there(seen, [old])?;
        let pivot = self.judge_pivot(seen);
        if pivot == Ok(Verdict::NotSwitched) {
            return self.are_there(seen, &self.layers).map(|()| Verdict::NotSwitched);
        }
        self.are_there(seen, self.layers_after())?;
        let base_is_written = matches!(self.written(seen, self.base), Some(Some(_)));
        match pivot {
            Ok(Verdict::Switched) if base_is_written || !base_is_known => Ok(Verdict::Switched),
            Err(doubt) if !base_is_known || doubt == Doubt::RunsOnOld => Err(doubt),
            _ if self.treated(seen, old.index).is_begun() => Ok(Verdict::Switched),
            // The times alone do not make it certain, so compare: that costs time, a wrong answer costs data.
            _ => self.judge_superseded(seen, rest.treated + rest.gone > 0),
        }
    }

    /// Judges a merge whose state notes no pivot. Another client may have pivoted all the same, with QEMU's own
    /// commands; then only base holds what the guest wrote afterwards. So the old chain counts as the disk only
    /// if base cannot be it.
    fn judge_unnoted(&self, seen: &Seen, base_is_known: bool) -> Doubtful<Verdict> {
        if seen.qemu == Qemu::ShowsBefore {
            return Ok(Verdict::NotSwitched);
        }
        let base = self.written(seen, self.base);
        let unwritten = base == Some(None);
        // QEMU pivots only when everything is copied. A client that was still waiting for the copy saw QEMU go,
        // and base was not written after that.
        let gone_before =
            matches!((base, self.gone_ns), (Some(Some(written)), Some(gone)) if written <= i128::from(gone));
        if seen.same_boot && (unwritten || gone_before) {
            return Ok(Verdict::NotSwitched);
        }
        if !base_is_known {
            return Err(Doubt::PivotUnseen);
        }
        match seen.compared {
            Compared::NotYet => Ok(Verdict::Compare),
            // Both show the same disk, so nothing is lost with the old chain.
            Compared::Equal => Ok(Verdict::NotSwitched),
            // QEMU pivots only after everything was copied, and here something was not.
            Compared::Differs(_) if seen.never_copied => Ok(Verdict::NotSwitched),
            Compared::Differs(_) | Compared::Unsupported => Err(Doubt::PivotUnseen),
            Compared::InUse => Ok(Verdict::NotComparable),
        }
    }

    /// Judges whether base holds everything that the old active image shows, or held it when the guest moved
    /// there. With `is_begun`, an earlier clean-up has changed the layers between them, so the old chain cannot
    /// be compared any more.
    fn judge_superseded(&self, seen: &Seen, is_begun: bool) -> Doubtful<Verdict> {
        let old = self.layers.len();
        // A time alone proves a write neither way: QEMU changes it when it closes the image, and any program
        // can set it. So an image whose time has changed is compared.
        let quiet = self.written(seen, old) == Some(None);
        let base = self.written(seen, self.base);
        let two_disks = || Doubt::TwoDisks {
            old_written: self.written(seen, old).map(|when| when.is_some()),
            base_written: base.map(|when| when.is_some()),
        };
        if quiet && (self.phase == Phase::Switched || base != Some(None)) {
            return Ok(Verdict::Switched);
        }
        match seen.compared {
            _ if is_begun => quiet.then_some(Verdict::Switched).ok_or_else(two_disks),
            Compared::NotYet => Ok(Verdict::Compare),
            Compared::Equal => Ok(Verdict::Switched),
            // Base was complete and durable when the state was noted.
            Compared::InUse | Compared::Unsupported if quiet => Ok(Verdict::Switched),
            Compared::InUse => Ok(Verdict::NotComparable),
            Compared::Unsupported | Compared::Differs(_) => Err(two_disks()),
        }
    }

    /// Judges from the times of the two files alone which of them the guest went on with.
    fn judge_pivot(&self, seen: &Seen) -> Doubtful<Verdict> {
        let (base, active) = (self.written(seen, self.base), self.written(seen, self.layers.len()));
        match (self.phase, seen.qemu) {
            (Phase::Copying, Qemu::ShowsAfter) => Err(Doubt::RunsOnBase),
            (Phase::Copying, _) => Ok(Verdict::NotSwitched),
            (_, Qemu::ShowsBefore)
                if self.phase == Phase::Switched || base.is_none_or(|when| when.is_some()) =>
            {
                Err(Doubt::RunsOnOld)
            }
            (Phase::Switching, Qemu::ShowsBefore) => Ok(Verdict::NotSwitched),
            (_, _) if self.treated(seen, self.layers.len()).is_begun() => Ok(Verdict::Switched),
            (Phase::Switched, _) => match active {
                Some(None) => Ok(Verdict::Switched),
                Some(Some(_)) => Err(Doubt::OldWritten),
                None if seen.stamps.first().is_none_or(Option::is_none) => Ok(Verdict::Switched),
                None => Err(Doubt::OldUnseen),
            },
            (Phase::Switching, _) => match (base, active) {
                // Nobody wrote to the old active image, and base held all its data: nothing is lost with base.
                (_, Some(None)) => Ok(Verdict::Switched),
                // QEMU flushed base before it held the guest's writes, so any later write to base is the guest's,
                // after the pivot. QEMU wrote the old active image's tables when it closed it. A write to
                // either file after QEMU was seen to be gone would be somebody else's.
                (Some(Some(base)), Some(Some(active)))
                    if !seen.closing_writes_base
                        && seen.same_boot
                        && self.gone_ns.is_some_and(|gone| base.max(active) <= i128::from(gone)) =>
                {
                    Ok(Verdict::Switched)
                }
                // Nothing was written to base, so the old active image equals it or is newer. This needs the
                // same boot: a power cut may have lost the time of a write.
                (Some(None), Some(Some(_))) if seen.same_boot && seen.qemu != Qemu::ShowsAfter => {
                    Ok(Verdict::NotSwitched)
                }
                _ => Err(Doubt::Unseen),
            },
        }
    }
}
