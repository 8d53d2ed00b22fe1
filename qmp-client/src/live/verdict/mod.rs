//! Judges interrupted merges: active commits, commits below the active layer, and pulls.
//!
//! [`State::judge`] is pure: it gets the state file and what is seen of the images and of QEMU, and asks for
//! nothing itself. If the images must be compared, it says so, and is called again with the result. Code that
//! acts on a merge without having watched it to its end needs a [`Ruling`], and only this module makes one.

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

/// The truth, or why it cannot be told.
type Doubtful<T> = std::result::Result<T, Doubt>;

/// What can be seen now of the merge in a state file.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Seen {
    /// What QEMU says.
    pub qemu: Qemu,
    /// The backing name in the header that the switch changes, see [`State::backing`].
    pub header: Header,
    /// Where that name leads.
    pub leads: Leads,
    /// The present stamps of the files, in the order of [`State::layers`].
    pub stamps: Vec<Option<Stamp>>,
    /// For each layer in the same order, whether its times do not show writes, because the data goes to an
    /// external data file.
    pub timeless: Vec<bool>,
    /// For each layer in the same order, what an earlier clean-up has done to it.
    pub treated: Vec<Treated>,
    /// Whether QEMU may write to base when it closes it, even if the guest wrote nothing: for lazy refcounts or
    /// bitmaps.
    pub closing_writes_base: bool,
    /// Whether the host has not restarted since the state was written.
    pub same_boot: bool,
    /// Whether base holds what was merged into it.
    pub compared: Compared,
    /// Whether there is a place where the layers above base hold data, and base was never written.
    pub never_copied: bool,
}

/// What the header of an overlay names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Header {
    /// It was not read: it cannot be, or there is none to read, as for an active commit.
    Unread,
    /// It names no backing file.
    Nothing,
    /// It names this one.
    Names(String),
}

/// Where a backing name leads, with links followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leads {
    /// To no file here: then only the name itself can be compared.
    Nowhere,
    /// To the file of the layer with this index.
    To(usize),
    /// To another file.
    Elsewhere,
}

/// What an interrupted clean-up has done to a layer.
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
    /// Whether it is empty, or is being emptied. A clean-up begins that only when base holds everything that
    /// the layer held.
    fn is_begun(self) -> bool {
        matches!(self, Self::Emptied | Self::Sealed)
    }
}

/// The result of comparing base with the layers that were merged into it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compared {
    /// They were not compared: it is costly, and often not needed.
    NotYet,
    /// Base holds everything that they show.
    Equal,
    /// Base differs; this is the first byte of the disk that does.
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
    /// The merge did not switch. The valid top is the active layer from before the merge, with the whole chain
    /// below it; the guest does not see what was copied. The state file can be removed, and the merge can begin
    /// anew.
    NotSwitched,
    /// The merge has switched, and the new chain holds everything. The merged layers are obsolete, after an
    /// active commit also the old active layer. They must still be cleaned up, then the state file.
    Switched,
    /// The header was switched, but base lacks data that the merged layers still hold: the overlay must be
    /// relinked to top.
    RelinkBack {
        /// The first byte of the disk that base lacks.
        at: u64,
    },
    /// The images must be compared first; then judge again with the result.
    Compare,
    /// The images must be compared, but cannot be now. Nothing may be written or deleted.
    NotComparable,
    /// The truth cannot be told. Nothing may be written or deleted.
    InDoubt {
        /// Why.
        doubt: Doubt,
        /// The file that most likely is the valid top.
        likely: String,
    },
}

/// A verdict with the permission to act on it. Only this module can make one, so whatever is done to the images
/// of an interrupted merge was judged here.
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

/// The permission to forget a merge that has not switched.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NotSwitched<'s>(&'s State);

/// The permission to tidy up after a merge that has switched, and to forget it then.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Switched<'s>(&'s State);

/// The permission to relink an overlay to its former backing file, and to forget the merge then.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RelinkBack<'s> {
    state: &'s State,
    /// The first byte of the disk that base lacks.
    pub(crate) at: u64,
}

impl<'s> Switched<'s> {
    /// The permission for a merge whose switch QEMU has reported as a success, if QEMU shows the chain that the
    /// merge leaves. A client that has just switched with [`crate::Merge`] has seen both.
    pub(crate) fn seen_in(state: &'s State, graph: &Graph) -> Option<Self> {
        (state.phase == Phase::Switched && state.disk_after(graph).is_some()).then_some(Self(state))
    }

    /// The permission for the client of a merge that has just noted the switch itself.
    pub(crate) fn noted(state: &'s State) -> Option<Self> {
        (state.phase == Phase::Switched).then_some(Self(state))
    }

    pub(crate) fn state(&self) -> &'s State {
        self.0
    }
}

impl<'s> NotSwitched<'s> {
    /// The permission to forget a merge that was never told to switch, if QEMU no longer has the job and shows
    /// the chain from before.
    pub(crate) fn seen_in(state: &'s State, graph: &Graph, has_job: bool) -> Option<Self> {
        (state.phase == Phase::Copying && !has_job && state.disk_before(graph).is_some())
            .then_some(Self(state))
    }

    /// The permission to forget a merge whose job, with this id, was cancelled before it was done.
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
    /// Looks at the files. The caller adds what QEMU says and what the images hold.
    ///
    /// # Errors
    /// [`crate::Error::File`] for a file that cannot be looked at. It must not count as gone.
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

    /// Notes that the times of the layer with this index do not show writes, because the data goes to an
    /// external data file.
    pub(crate) fn tells_no_time(&mut self, state: &State, index: usize) {
        for (layer, is_timeless) in state.layers.iter().zip(&mut self.timeless) {
            *is_timeless |= layer.index == index;
        }
    }
}

impl State {
    /// Decides what is true, from what is seen. This is pure: it asks and reads nothing.
    ///
    /// For a commit below the active layer and for a pull, the header of the overlay tells which chain stands:
    /// if it was written, the switch has begun. Whether base is complete then is another question, see
    /// `judge_switched`. For an active commit no header changes, so the times of the files must tell: base and
    /// the old active layer were equal, and locked by QEMU, when their stamps were taken. So the guest went on
    /// with the one that was written since. A QEMU that runs on base proves little: somebody may have started
    /// it there.
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

    /// Judges, and returns the verdict with the permission to act on it.
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
