//! A commit that is ready: its chain, open and locked, and its plan.

use std::sync::Arc;

use super::options::CommitOptions;
use super::plan::Plan;
use super::resume::before;
use super::stack::Stack;
use crate::chain::Chain;
use crate::error::Result;
use crate::image::bitmaps;
use crate::journal::Journal;
use crate::journal::record::Header;
use crate::storage::{FileId, Host};
use crate::transfer::ask::Span;
use crate::units::GuestOffset;

/// A commit that is ready to be carried out: its chain is open and locked.
#[derive(Debug)]
pub struct Commit {
    pub(super) host: Arc<dyn Host>,
    pub(super) options: CommitOptions,
    pub(super) chain: Chain,
    pub(super) base: usize,
    pub(super) top: usize,
    pub(super) plan: Plan,
    /// What the bitmaps of a qcow2 base need, until it is carried out.
    pub(super) bitmaps: Option<bitmaps::BitmapPlan>,
    /// Files that images outside the chain use: never removed.
    pub(super) shared: Vec<FileId>,
    /// Positions of the layers below the active image that become empty overlays on base, from the bottom up.
    pub(super) empties: Vec<usize>,
    /// What stopped merges have left in the images that are written, and these images under their journals.
    pub(super) unfinished: before::UnfinishedInChain,
    /// What a journal says of this merge.
    pub(super) header: Header,
    /// Where the merge begins: what lies below was merged before.
    pub(super) from: GuestOffset,
    /// Clusters of base that nothing refers to.
    pub(super) leaks: u64,
    /// The journal of an active image that is removed at the end.
    pub(super) removing: Option<Arc<Journal>>,
}

impl Commit {
    /// What will be done.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The chain, open and locked.
    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    pub(super) fn span(&self) -> Span {
        Span { base: self.base, top: self.top, active: self.chain.active() }
    }

    /// The layers of the merge.
    ///
    /// # Errors
    /// [`Error::Broken`](crate::Error::Broken): they were found when it was prepared.
    pub(super) fn stack(&self) -> Result<Stack<'_>> {
        Stack::of(&self.chain, self.span())
    }
}
