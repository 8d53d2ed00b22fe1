//! What a state file says of a merge, and the merge that it describes.

use crate::block::graph::Layer;
use crate::block::merge::{Direction, MergeOptions, Procedure, Span};
use crate::state::{Kind, RecordedRelink, State, StateLayer};

impl Procedure {
    /// What is merged which way.
    pub(crate) fn kind(&self) -> Kind {
        match self.direction() {
            Direction::Down if self.is_active() => Kind::ActiveCommit,
            Direction::Down => Kind::Commit,
            Direction::Up => Kind::Pull,
        }
    }

    /// The header that the switch changes.
    pub(super) fn relink(&self) -> Option<RecordedRelink> {
        let overlay = self.overlay()?;
        let backing = overlay.backing.as_ref();
        Some(RecordedRelink {
            overlay: overlay.file.clone(),
            index: overlay.index,
            old: backing.map(|backing| backing.name.clone()).unwrap_or_default(),
            old_format: backing.and_then(|backing| backing.format.clone()),
            new: self.backing_file().map(str::to_owned),
        })
    }

    /// The procedure that a state describes, whose job runs or has run.
    pub(super) fn recall(state: &State) -> Option<Self> {
        let chain: Vec<Layer> = state.layers.iter().map(StateLayer::recall).collect();
        let direction = if state.kind == Kind::Pull { Direction::Up } else { Direction::Down };
        let span = Span { base: state.base, top: state.top };
        let options = MergeOptions {
            backing_file: state.backing.as_ref().and_then(|relink| relink.new.clone()),
            nbd_socket: state.nbd_socket.clone(),
            ..MergeOptions::default()
        };
        Self::of(direction, &state.disk, &chain, span, state.job.clone(), options)
    }
}
