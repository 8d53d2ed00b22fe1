//! What the files of a merge tell: whether each is still the file of its stamp, and whether somebody has written to it.

use qcow2::stamp::Stamp;

use super::{Doubt, Doubtful, Seen, Treated};
use crate::state::{Kind, Phase, State, StateLayer};

/// What is seen of layers that were merged.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct MergedFacts {
    /// How many of them an earlier clean-up has emptied, or marked.
    pub(super) treated: usize,
    /// How many are not there any more, whoever removed them.
    pub(super) gone: usize,
    /// Whether one that is there keeps no time of its writes.
    pub(super) is_timeless: bool,
}

impl State {
    /// The layers, by index, that are other files now, or to which somebody has written who should not have. The user must
    /// see them before anything that rests on them is put right or deleted. A mark that the engine has set counts as a
    /// write too.
    pub fn touched(&self, seen: &Seen) -> Vec<usize> {
        let active = self.layers.len();
        let may_be_written = |index: usize| match (self.kind, self.phase) {
            (Kind::ActiveCommit, Phase::Switched) => index == self.base,
            (Kind::Commit, Phase::Switched) => index == active,
            (Kind::ActiveCommit, _) => index == self.base || index == active,
            // Closing base, and the overlay above top for its header, write too.
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

    /// When a layer was written last, at the latest, in nanoseconds since 1970, if that is after its stamp was taken; none if
    /// it was not, and none at all if that cannot be known.
    pub(super) fn written(&self, seen: &Seen, index: usize) -> Option<Option<i128>> {
        let (now, tells_time) = seen.stamp(self, index)?;
        if self.treated(seen, index) == Treated::Sealed {
            // Only the clean-up has written there: nobody has opened the layer for writing after it.
            return Some(None);
        }
        let before = self.layer(index)?.stamp.as_ref().filter(|_| tells_time)?;
        Some(before.is_written(now)?.then_some(now.last_written_ns()))
    }

    /// Whether these layers are the files that they were, as far as they were files here.
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

    /// Looks at layers that were merged. If one is another file, or somebody has written to it, that is a doubt: what it
    /// holds now was never merged.
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
    /// The stamp of the layer of this index as its file is now, if it is there, and whether its times tell when the image was
    /// written.
    fn stamp(&self, state: &State, index: usize) -> Option<(&Stamp, bool)> {
        let place = state.layers.iter().position(|layer| layer.index == index)?;
        let now = self.stamps.get(place)?.as_ref()?;
        Some((now, !self.timeless.get(place).copied().unwrap_or(false)))
    }
}
