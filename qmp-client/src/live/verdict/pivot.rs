//! Merges of the active layer: no header changes, so the files tell whether the guest went on with base.

use super::{Compared, Doubt, Doubtful, Seen, Verdict};
use crate::live::plan::Obstacle;
use crate::state::{Phase, Qemu, State};

impl State {
    /// A commit of all layers above base, the active one too.
    pub(super) fn judge_active(&self, seen: &Seen) -> Doubtful<Verdict> {
        let (Some(old), Some(base)) = (self.active(), self.layer(self.base)) else {
            return Err(Doubt::NoHeader);
        };
        // If only QEMU can look at base, its file tells nothing. Then the old active image alone decides.
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
            // The old active image is not there any more, so it cannot be the disk; and base held all of it when the switch
            // was noted.
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
            // Where nobody has written to base, comparing is cheaper than being wrong.
            _ => self.judge_superseded(seen, rest.treated + rest.gone > 0),
        }
    }

    /// The state notes no pivot. Another client may have pivoted all the same, by QEMU's own commands, and then base alone
    /// holds what the guest wrote afterwards. So the old chain counts as the disk only where base cannot have been.
    fn judge_unnoted(&self, seen: &Seen, base_is_known: bool) -> Doubtful<Verdict> {
        if seen.qemu == Qemu::ShowsBefore {
            return Ok(Verdict::NotSwitched);
        }
        let base = self.written(seen, self.base);
        let unwritten = base == Some(None);
        // QEMU pivots only when all is copied. A client that waited for the copy saw QEMU go before that.
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
            // Both hold the same, so the old chain loses nothing.
            Compared::Equal => Ok(Verdict::NotSwitched),
            // QEMU pivots only when all was copied once.
            Compared::Differs(_) if seen.never_copied => Ok(Verdict::NotSwitched),
            Compared::Differs(_) | Compared::Unsupported => Err(Doubt::PivotUnseen),
            Compared::InUse => Ok(Verdict::NotComparable),
        }
    }

    /// Whether base holds all that the old active image shows, or held it when the guest moved there. `is_begun`: an earlier
    /// clean-up has changed the layers between, so that there is no old chain any more to compare base with.
    fn judge_superseded(&self, seen: &Seen, is_begun: bool) -> Doubtful<Verdict> {
        let old = self.layers.len();
        // If QEMU has closed it since, its time has changed, and only a comparison tells: any program can set a time.
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
            // Base was whole and durable when the state was noted.
            Compared::InUse | Compared::Unsupported if quiet => Ok(Verdict::Switched),
            Compared::InUse => Ok(Verdict::NotComparable),
            Compared::Unsupported | Compared::Differs(_) => Err(two_disks()),
        }
    }

    /// Where the guest went, from the times of the two files alone.
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
                // Nobody wrote to the old active image, and base held all of it: base loses nothing.
                (_, Some(None)) => Ok(Verdict::Switched),
                // QEMU has flushed base before it holds the guest, so only the guest writes there now, and only
                // behind the pivot. The old active image gets its tables when QEMU closes it. What was written to
                // either once QEMU was seen to be gone is somebody else's.
                (Some(Some(base)), Some(Some(active)))
                    if !seen.closing_writes_base
                        && seen.same_boot
                        && self.gone_ns.is_some_and(|gone| base.max(active) <= i128::from(gone)) =>
                {
                    Ok(Verdict::Switched)
                }
                // Where nothing was written to base, the active layer is base's equal, or newer. A power cut may
                // have lost the time of a write, though.
                (Some(None), Some(Some(_))) if seen.same_boot && seen.qemu != Qemu::ShowsAfter => {
                    Ok(Verdict::NotSwitched)
                }
                _ => Err(Doubt::Unseen),
            },
        }
    }
}
