//! Judges merges that leave the active layer in place. The header of the overlay above top says which chain
//! stands.

use super::{Compared, Doubt, Doubtful, Header, Leads, Seen, Verdict};
use crate::live::plan::Obstacle;
use crate::state::{Kind, Phase, Qemu, RecordedRelink, State};

impl State {
    /// Judges a commit of layers below the active one, or a pull.
    pub(super) fn judge_relink(&self, seen: &Seen) -> Doubtful<Verdict> {
        let Some(relink) = &self.backing else { return Err(Doubt::NoHeader) };
        self.are_there(seen, self.layer(relink.index))?;
        if self.kind == Kind::Commit {
            self.are_there(seen, self.layer(self.base))?;
        }
        let overlay = || relink.overlay.clone();
        let old = names(seen, Some(&relink.old), self.top);
        let new = names(seen, relink.new.as_deref(), self.base);
        match (self.phase, old, new) {
            (_, false, false) => Err(names_other(seen, relink)),
            (_, true, true) => Err(Doubt::SameName { overlay: overlay() }),
            (_, true, _) if seen.qemu == Qemu::ShowsAfter => {
                Err(Doubt::QemuDisagrees { overlay: overlay(), shows_after: true })
            }
            (_, _, true) if seen.qemu == Qemu::ShowsBefore => {
                Err(Doubt::QemuDisagrees { overlay: overlay(), shows_after: false })
            }
            // Somebody has relinked the overlay to top. The merged layers are the disk again, but not as they
            // were merged.
            (Phase::Switched, true, _)
                if self.touched(seen).iter().any(|index| (self.base + 1..=self.top).contains(index)) =>
            {
                Err(Doubt::NamesAgain { overlay: overlay() })
            }
            (_, true, _) => self.are_there(seen, &self.layers).map(|()| Verdict::NotSwitched),
            (_, _, true) => {
                self.are_there(seen, self.layers_after())?;
                self.judge_switched(seen, relink)
            }
        }
    }

    /// Judges a merge whose overlay names base. It is not certain yet that base holds everything: QEMU writes
    /// the name before base's tables, and only this client flushes base before the switch.
    fn judge_switched(&self, seen: &Seen, relink: &RecordedRelink) -> Doubtful<Verdict> {
        let by_another = self.phase == Phase::Copying && seen.qemu != Qemu::ShowsAfter;
        let unproved = || match by_another {
            true => Err(Doubt::OtherClient { overlay: relink.overlay.clone() }),
            // QEMU runs on this chain, or this client flushed base before it noted the switch.
            false => Ok(Verdict::Switched),
        };
        if self.kind == Kind::Pull {
            return unproved();
        }
        let merged = self.look_at_merged(seen, self.merged())?;
        if merged.treated + merged.gone > 0 {
            // A clean-up begins only when base is known to be complete. But a missing layer may have been
            // removed by hand.
            let certain = self.phase == Phase::Switched || merged.gone == 0;
            return if certain { Ok(Verdict::Switched) } else { Err(Doubt::LayersMissing) };
        }
        if self.layer(self.base).is_none_or(|base| Obstacle::of_base(base).is_some()) {
            return unproved();
        }
        match seen.compared {
            Compared::NotYet => Ok(Verdict::Compare),
            Compared::Equal => Ok(Verdict::Switched),
            // QEMU reported a success, and base is in use: a machine runs on it.
            Compared::InUse if self.phase == Phase::Switched => Ok(Verdict::Switched),
            Compared::InUse | Compared::Unsupported => Ok(Verdict::NotComparable),
            // Base may have been written after a successful switch, so the difference may be wanted data.
            Compared::Differs(at)
                if merged.is_timeless
                    || (self.phase == Phase::Switched && self.written(seen, self.base) != Some(None)) =>
            {
                Err(Doubt::BaseDiffers { at })
            }
            Compared::Differs(at) => Ok(Verdict::RelinkBack { at }),
        }
    }
}

/// Whether the header names this layer: judged by the file to which the name leads, or by the name itself if it
/// leads to no file here.
fn names(seen: &Seen, name: Option<&str>, index: usize) -> bool {
    match (&seen.header, seen.leads) {
        (Header::Names(_), Leads::To(layer)) => layer == index,
        (Header::Names(_), Leads::Elsewhere) | (Header::Unread, _) => false,
        (Header::Names(now), Leads::Nowhere) => Some(now.as_str()) == name,
        (Header::Nothing, _) => name.is_none(),
    }
}

fn names_other(seen: &Seen, relink: &RecordedRelink) -> Doubt {
    let overlay = relink.overlay.clone();
    match &seen.header {
        Header::Unread => Doubt::Unread { overlay },
        Header::Nothing => Doubt::NamesOther { overlay, name: None },
        Header::Names(name) => Doubt::NamesOther { overlay, name: Some(name.clone()) },
    }
}
