//! What the files of a merge tell: whether they are those that they were, and whether somebody has written to them.

use super::{Doubt, Doubtful, Seen, Treated};
use crate::state::{FileIdentity, Kind, Phase, State, StateLayer};

/// What is seen of layers that were merged.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct MergedFacts {
    /// How many of them an earlier clean-up has emptied, or marked.
    pub(super) treated: usize,
    /// How many are gone, by whomever.
    pub(super) gone: usize,
    /// Whether one that is there keeps no time of its writes.
    pub(super) is_timeless: bool,
}

impl State {
    /// The layers, by index, that somebody has written who should not have, or that are other files now: nothing that
    /// rests on them may be put right or deleted unseen. The marks that the engine for stopped images sets show
    /// here too.
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
        let is_touched = |(layer, now): &(&StateLayer, &Option<FileIdentity>)| match (&layer.identity, now) {
            (None, _) => false,
            (Some(_), None) => true,
            (Some(before), Some(now)) => {
                let written = now.is_written_since(before) == Some(true) && !may_be_written(layer.index);
                written || !is_same(before, now, seen.same_boot)
            }
        };
        let all = self.layers.iter().zip(&seen.identities).filter(is_touched);
        all.map(|(layer, _)| layer.index).collect()
    }

    /// What an earlier clean-up has done to the layer of this index.
    pub(super) fn treated(&self, seen: &Seen, index: usize) -> Treated {
        let mut all = self.layers.iter().zip(&seen.treated);
        all.find(|(layer, _)| layer.index == index).map_or(Treated::Not, |(_, treated)| *treated)
    }

    /// When a layer was written last, at the latest, if that is after its identity was taken; none if it was not, and none at all if
    /// that cannot be known.
    pub(super) fn written(&self, seen: &Seen, index: usize) -> Option<Option<u64>> {
        let (layer, now) =
            self.layers.iter().zip(&seen.identities).find(|(layer, _)| layer.index == index)?;
        let now = now.as_ref()?;
        if self.treated(seen, index) == Treated::Sealed {
            // The clean-up wrote there, and nobody behind it.
            return Some(None);
        }
        Some(now.is_written_since(layer.identity.as_ref()?)?.then_some(now.written_ns()))
    }

    /// Whether these layers are the files that they were, as far as they were files here.
    pub(super) fn are_there<'a>(
        &self,
        seen: &Seen,
        needed: impl IntoIterator<Item = &'a StateLayer>,
    ) -> Doubtful<()> {
        for needed in needed {
            let Some(before) = needed.identity else { continue };
            let mut all = self.layers.iter().zip(&seen.identities);
            let now = all.find(|(layer, _)| layer.index == needed.index).and_then(|(_, now)| now.as_ref());
            let is_it = now.map(|now| is_same(&before, now, seen.same_boot));
            if is_it != Some(true) {
                return Err(Doubt::Moved { file: needed.file.clone(), gone: is_it.is_none() });
            }
        }
        Ok(())
    }

    /// Looks at layers that were merged. One that is another file, or that somebody has written to, leaves a doubt: what
    /// it holds now was never merged.
    pub(super) fn look_at_merged<'a>(
        &self,
        seen: &Seen,
        layers: impl Iterator<Item = &'a StateLayer>,
    ) -> Doubtful<MergedFacts> {
        let mut merged = MergedFacts::default();
        for layer in layers {
            if layer.identity.is_none() {
                return Err(Doubt::Moved { file: layer.file.clone(), gone: false });
            }
            let mut all = self.layers.iter().zip(&seen.identities);
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

/// File systems get other numbers when the host starts again; files in them keep theirs.
pub(super) fn is_same(before: &FileIdentity, now: &FileIdentity, same_boot: bool) -> bool {
    if same_boot { now.is_same_file(before) } else { now.inode == before.inode }
}
