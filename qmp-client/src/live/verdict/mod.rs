//! The one judge of interrupted merges: active commits, commits below the active layer, and pulls.
//!
//! [`State::judge`] is pure: it is given what the state file says and what is seen of the images and of QEMU, and asks for
//! nothing itself. Where the images must be compared, it says so, and is asked again. Whoever acts on a merge that it has
//! not watched to its end needs a [`Ruling`], and only this module makes one.

mod doubt;
mod files;
mod pivot;
mod relink;
#[cfg(test)]
mod tests;

use std::path::Path;

use crate::block::graph::Graph;
use crate::error::{Error, Result};
use qcow2::stamp::Stamp;

use crate::state::{Kind, Phase, Qemu, State, StateLayer, stamp_of};

pub use doubt::Doubt;

/// What is true, or why that cannot be told.
type Doubtful<T> = std::result::Result<T, Doubt>;

/// What can be seen now of a merge that a state file speaks of.
#[derive(Clone, Debug)]
pub struct Seen {
    /// What QEMU says.
    pub qemu: Qemu,
    /// What the header names that the switch changes, see [`State::backing`].
    pub header: Header,
    /// Where that name leads.
    pub leads: Leads,
    /// The files as they are now, in the order of [`State::layers`].
    pub stamps: Vec<Option<Stamp>>,
    /// Whether their times tell nothing of their images, whose bytes go to another file; in the same order.
    pub timeless: Vec<bool>,
    /// What an earlier clean-up has done to them, in the same order.
    pub treated: Vec<Treated>,
    /// Whether QEMU writes to base when it closes it, without a write of the guest's: for lazy refcounts or bitmaps.
    pub closing_writes_base: bool,
    /// Whether the host has not been started since the state was written.
    pub same_boot: bool,
    /// Whether base holds what was merged into it.
    pub compared: Compared,
    /// Whether there is a place at which the layers above base hold data, and nothing was ever written to base.
    pub never_copied: bool,
}

/// What the header of an overlay names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Header {
    /// It was not read: there is none to be read for an active commit, or it cannot be.
    Unread,
    /// It names no backing file.
    Nothing,
    /// It names this one.
    Names(String),
}

/// Where a backing name leads, its folder and links followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leads {
    /// To no file here: then only its letters tell.
    Nowhere,
    /// To the file of the layer with this index.
    To(usize),
    /// To another file.
    Elsewhere,
}

/// What a clean-up that did not come to its end has done to a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Treated {
    /// Nothing that can be seen.
    Not,
    /// It carries the mark of a merged layer.
    Marked,
    /// It is an empty overlay on base.
    Emptied,
    /// It is being emptied, and nobody else has opened it for writing since.
    Sealed,
}

impl Treated {
    /// Whether it is empty, or is being emptied. Either begins only when base holds all that the layer held.
    fn is_begun(self) -> bool {
        matches!(self, Self::Emptied | Self::Sealed)
    }
}

/// What a comparison of base with the layers that were merged into it has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compared {
    /// Nothing was compared. It is costly, and often needless.
    NotYet,
    /// Base holds all that they show.
    Equal,
    /// It does not; this is the first byte of the disk that differs.
    Differs(u64),
    /// Somebody holds the images.
    InUse,
    /// Only QEMU can read one of them.
    Unsupported,
}

/// What is true of an interrupted merge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// QEMU has the job: [`crate::Merge::attach`] goes on with it.
    AtWork,
    /// Nothing is switched. The valid top is the active layer from before the merge, with the whole chain below it; what
    /// was copied is not seen by the guest. The state file can go, and the merge can begin anew.
    NotSwitched,
    /// It is switched, and what lies under the new chain is whole. The merged layers, and after an active commit the old
    /// active layer, are obsolete; they, and then the state file, are still to be cleaned up.
    Switched,
    /// The header was switched, and base lacks data that the merged layers hold as they held it: the overlay is to name top
    /// again.
    RelinkBack {
        /// The first byte of the disk that base lacks.
        at: u64,
    },
    /// The images must be compared; with the result this is to be judged again.
    Compare,
    /// They must be compared, and cannot be now. Nothing may be written or deleted.
    NotComparable,
    /// It cannot be told. Nothing may be written or deleted.
    InDoubt {
        /// Why.
        doubt: Doubt,
        /// The file that most likely is the valid top.
        likely: String,
    },
}

/// A verdict as the leave to act on it. Nobody but this module can make one, so what is done to the images of an interrupted
/// merge was judged here.
#[derive(Debug)]
pub(crate) enum Ruling<'s> {
    /// See [`Verdict::AtWork`].
    AtWork,
    /// See [`Verdict::NotSwitched`].
    NotSwitched(NotSwitched<'s>),
    /// See [`Verdict::Switched`].
    Switched(Switched<'s>),
    /// See [`Verdict::RelinkBack`].
    RelinkBack(RelinkBack<'s>),
    /// See [`Verdict::Compare`].
    Compare,
    /// See [`Verdict::NotComparable`].
    NotComparable,
    /// See [`Verdict::InDoubt`].
    InDoubt(Doubt),
}

/// Leave to forget a merge that has not switched.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NotSwitched<'s>(&'s State);

/// Leave to tidy up after a merge that has switched, and to forget it then.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Switched<'s>(&'s State);

/// Leave to give an overlay its former backing file back, and to forget the merge then.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RelinkBack<'s> {
    state: &'s State,
    /// The first byte of the disk that base lacks.
    pub(crate) at: u64,
}

impl<'s> Switched<'s> {
    /// Leave to tidy up after a merge whose switch QEMU has called a success, and that shows the chain which it leaves. Who
    /// has switched with [`crate::Merge`] just now has seen both.
    pub(crate) fn seen_in(state: &'s State, graph: &Graph) -> Option<Self> {
        (state.phase == Phase::Switched && state.disk_after(graph).is_some()).then_some(Self(state))
    }

    /// Leave to tidy up after a merge whose own client has just noted the switch.
    pub(crate) fn noted(state: &'s State) -> Option<Self> {
        (state.phase == Phase::Switched).then_some(Self(state))
    }

    pub(crate) fn state(&self) -> &'s State {
        self.0
    }
}

impl<'s> NotSwitched<'s> {
    /// Leave to forget a merge whose job QEMU has no more, and which was never told to switch; QEMU shows the chain from
    /// before.
    pub(crate) fn seen_in(state: &'s State, graph: &Graph, has_job: bool) -> Option<Self> {
        (state.phase == Phase::Copying && !has_job && state.disk_before(graph).is_some())
            .then_some(Self(state))
    }

    /// Leave to forget a merge whose job, which is this one, was cancelled before it was done.
    pub(crate) fn cancelled(state: &'s State, job: &str) -> Option<Self> {
        (state.job == job).then_some(Self(state))
    }

    pub(crate) fn state(&self) -> &'s State {
        self.0
    }
}

impl<'s> RelinkBack<'s> {
    pub(crate) fn state(&self) -> &'s State {
        self.state
    }
}

impl Seen {
    /// Looks at the files; what QEMU says, and what the images hold, comes from those who can ask and read.
    ///
    /// # Errors
    /// [`crate::Error::File`] for one that cannot be looked at: it is not gone.
    pub fn of(state: &State, qemu: Qemu, header: Header) -> Result<Self> {
        let look = |layer: &StateLayer| {
            let path = Path::new(&layer.file);
            stamp_of(path).map_err(|source| Error::File { file: path.to_owned(), source })
        };
        Ok(Self {
            qemu,
            header,
            leads: Leads::Nowhere,
            stamps: state.layers.iter().map(look).collect::<Result<_>>()?,
            timeless: vec![false; state.layers.len()],
            treated: vec![Treated::Not; state.layers.len()],
            closing_writes_base: true,
            same_boot: state.is_of_this_boot(),
            compared: Compared::NotYet,
            never_copied: false,
        })
    }

    /// The file of this layer, by index, does not tell when its image was written: the bytes go to another file.
    pub fn tells_no_time(&mut self, state: &State, index: usize) {
        for (layer, is_timeless) in state.layers.iter().zip(&mut self.timeless) {
            *is_timeless |= layer.index == index;
        }
    }
}

impl State {
    /// What is true, from what is seen. Pure: nothing is asked or looked at.
    ///
    /// Headers are believed before memory: a header that was written tells that the switch has begun, and what it names
    /// was made durable before. For an active commit no header changes, so files tell: base and the old active
    /// layer were equal, and held, when their stamps were taken, so whichever was written since is the one
    /// that the guest went on with. A QEMU that runs on base says little: somebody may have started it there.
    pub fn judge(&self, seen: &Seen) -> Verdict {
        if let Qemu::HasJob(_) = seen.qemu {
            return Verdict::AtWork;
        }
        let verdict = match self.kind {
            Kind::ActiveCommit => self.judge_active(seen),
            Kind::Commit | Kind::Pull => self.judge_relink(seen),
        };
        verdict.unwrap_or_else(|doubt| Verdict::InDoubt { doubt, likely: self.valid_top.clone() })
    }

    /// The same, as the leave to act on it.
    pub(crate) fn rule(&self, seen: &Seen) -> Ruling<'_> {
        match self.judge(seen) {
            Verdict::AtWork => Ruling::AtWork,
            Verdict::NotSwitched => Ruling::NotSwitched(NotSwitched(self)),
            Verdict::Switched => Ruling::Switched(Switched(self)),
            Verdict::RelinkBack { at } => Ruling::RelinkBack(RelinkBack { state: self, at }),
            Verdict::Compare => Ruling::Compare,
            Verdict::NotComparable => Ruling::NotComparable,
            Verdict::InDoubt { doubt, .. } => Ruling::InDoubt(doubt),
        }
    }
}
