//! Reads the stamps of a merge's files: whether each is still the same file, and whether somebody has written
//! to it.

use qcow2::stamp::Stamp;

use super::{Doubt, Doubtful, Seen, Treated};
use crate::state::{Kind, Phase, State, StateLayer};

/// Facts about the merged layers.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct MergedFacts {
    /// How many of them an earlier clean-up has emptied or marked.
    pub(super) treated: usize,
    /// How many are gone, whoever removed them.
    pub(super) gone: usize,
    /// Whether the times of one that exists do not show its writes.
    pub(super) is_timeless: bool,
}

impl State {
    /// The indexes of layers that are other files now, or were written though nobody should have written to
    /// them. The user must see them before anything that depends on them is changed or deleted. A mark that the
    /// engine has set counts as a write, too.
    pub(crate) fn touched(&self, seen: &Seen) -> Vec<usize> {
        let active = self.layers.len();
        let may_be_written = |index: usize| match (self.kind, self.phase) {
            (Kind::ActiveCommit, Phase::Switched) => index == self.base,
            (Kind::Commit, Phase::Switched) => index == active,
            (Kind::ActiveCommit, _) => index == self.base || index == active,
            // QEMU also writes when it closes base, and to the header of the overlay above top.
            (Kind::Commit, _) => [self.base, self.top.saturating_add(1), active].contains(&index),
            (Kind::Pull, _) => index == active,
        };
        let is_touched = |layer: &&StateLayer| match (&layer.stamp, seen.stamp(self, layer.index)) {
            (None, _) => false,
            (Some(_), None) => true,
            (Some(before), Some((now, tells_time))) => {
                let written = tells_time && before.is_written(now) == Some(true);
                (written && !may_be_written(layer.index)) || !before.is_same_file_after(now, seen.same_boot)
            }
        };
        self.layers.iter().filter(is_touched).map(|layer| layer.index).collect()
    }

    /// What an earlier clean-up has done to the layer of this index.
    pub(super) fn treated(&self, seen: &Seen, index: usize) -> Treated {
        let mut all = self.layers.iter().zip(&seen.treated);
        all.find(|(layer, _)| layer.index == index).map_or(Treated::Not, |(_, treated)| *treated)
    }

    /// When a layer was last written, at the latest, in nanoseconds since 1970. `Some(None)` if it was not
    /// written since its stamp was taken; `None` if that is unknown.
    pub(super) fn written(&self, seen: &Seen, index: usize) -> Option<Option<i128>> {
        let (now, tells_time) = seen.stamp(self, index)?;
        if self.treated(seen, index) == Treated::Sealed {
            // Only the clean-up has written to it: any other writer would have cleared the seal.
            return Some(None);
        }
        let before = self.layer(index)?.stamp.as_ref().filter(|_| tells_time)?;
        Some(before.is_written(now)?.then_some(now.last_written_ns()))
    }

    /// Checks that these layers are the same files as before, as far as they were files on this host.
    pub(super) fn are_there<'a>(
        &self,
        seen: &Seen,
        needed: impl IntoIterator<Item = &'a StateLayer>,
    ) -> Doubtful<()> {
        for needed in needed {
            let Some(before) = &needed.stamp else { continue };
            let now = seen.stamp(self, needed.index);
            let is_it = now.map(|(now, _)| before.is_same_file_after(now, seen.same_boot));
            if is_it != Some(true) {
                return Err(Doubt::Moved { file: needed.file.clone(), gone: is_it.is_none() });
            }
        }
        Ok(())
    }

    /// Looks at merged layers. If one is another file, or somebody has written to it, that is a doubt: its
    /// present content was never merged.
    pub(super) fn look_at_merged<'a>(
        &self,
        seen: &Seen,
        layers: impl Iterator<Item = &'a StateLayer>,
    ) -> Doubtful<MergedFacts> {
        let mut merged = MergedFacts::default();
        for layer in layers {
            if layer.stamp.is_none() {
                return Err(Doubt::Moved { file: layer.file.clone(), gone: false });
            }
            let mut all = self.layers.iter().zip(&seen.stamps);
            if all.any(|(other, now)| other.index == layer.index && now.is_none()) {
                merged.gone += 1;
                continue;
            }
            self.are_there(seen, [layer])?;
            let written = self.written(seen, layer.index);
            if self.treated(seen, layer.index) != Treated::Not {
                merged.treated += 1;
            } else if let Some(Some(_)) = written {
                return Err(Doubt::Written { file: layer.file.clone() });
            }
            merged.is_timeless |= written.is_none();
        }
        Ok(merged)
    }
}

impl Seen {
    /// The present stamp of the layer with this index, if its file exists; and whether its times show when the
    /// image was written.
    fn stamp(&self, state: &State, index: usize) -> Option<(&Stamp, bool)> {
        let place = state.layers.iter().position(|layer| layer.index == index)?;
        let now = self.stamps.get(place)?.as_ref()?;
        Some((now, !self.timeless.get(place).copied().unwrap_or(false)))
    }
}
