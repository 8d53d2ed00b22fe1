//! A merge that has nothing to merge: unfinished work is completed, or nothing is done.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use super::commit::Commit;
use super::options::CommitOptions;
use super::plan::Plan;
use super::reason::NothingReason;
use super::removal::{Gone, finish_removed};
use super::report::Report;
use super::resume::before::UnfinishedInChain;
use super::resume::end::end_left;
use super::resume::obsolete::ObsoleteLayers;
use crate::chain::{Chain, Layer};
use crate::error::{Error, FileOp, Result};
use crate::journal;
use crate::storage::Host;
use crate::transfer::ops::Progress;
use crate::transfer::verify::whole_digest;
use crate::transfer::workers::on_workers;

/// What is to be done, ready: the images are open, and locked where they are written.
#[derive(Debug)]
pub enum Prepared {
    /// Layers are merged.
    Merge(Box<Commit>),
    /// Nothing is merged; an unfinished merge is completed.
    Finish(Box<Finish>),
    /// There is nothing to do.
    Nothing(Box<Nothing>),
}

/// Why there is nothing to merge.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Settled {
    /// The image that holds the data.
    pub base: PathBuf,
    /// The uppermost layer that was to be merged.
    pub top: PathBuf,
    /// The active image.
    pub active: PathBuf,
    /// The size of base's disk, in bytes, where it can be told.
    pub base_size: u64,
    /// The reason.
    pub reason: NothingReason,
    /// Files of layers that an unfinished merge still has to remove.
    pub unremoved: Vec<PathBuf>,
}

/// A merge that was stopped behind the switch of the chain, to be completed.
#[derive(Debug)]
pub struct Finish {
    pub(super) done: Done,
    pub(super) unfinished: Unfinished,
}

/// Nothing is to be done, but for reading the disk if it is to be verified.
#[derive(Debug)]
pub struct Nothing {
    pub(super) done: Done,
    pub(super) chain: Chain,
}

/// What both of them know.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) host: Arc<dyn Host>,
    pub(super) options: CommitOptions,
    pub(super) settled: Settled,
}

/// What remains of an unfinished merge.
#[derive(Debug)]
pub(super) enum Unfinished {
    /// The active image was removed: only its journal is there, and perhaps its data file.
    Removed(Box<Gone>),
    /// The chain was switched: the journals of its layers tell what is left to be done.
    Switched(Chain),
    /// The images are locked, and complete. Only their journals remain, and files that must be removed.
    Journals(Chain, Box<UnfinishedInChain>),
}

impl Prepared {
    /// Carries it out.
    ///
    /// # Errors
    /// An I/O error, or [`Error::Cancelled`]. What the guest sees is unchanged then; the same commit can be prepared
    /// again.
    pub fn execute(self, progress: &dyn Progress, cancel: &AtomicBool) -> Result<Report> {
        match self {
            Self::Merge(commit) => commit.execute(progress, cancel),
            Self::Finish(finish) => finish.execute(cancel),
            Self::Nothing(nothing) => nothing.execute(cancel),
        }
    }

    /// The merge, if there is one.
    pub fn merge(&self) -> Option<&Commit> {
        match self {
            Self::Merge(commit) => Some(commit),
            Self::Finish(_) | Self::Nothing(_) => None,
        }
    }

    /// The plan of the merge, if there is one.
    pub fn plan(&self) -> Option<&Plan> {
        self.merge().map(Commit::plan)
    }

    /// Why there is nothing to merge, if so.
    pub fn settled(&self) -> Option<&Settled> {
        match self {
            Self::Merge(_) => None,
            Self::Finish(finish) => Some(finish.settled()),
            Self::Nothing(nothing) => Some(nothing.settled()),
        }
    }

    /// The chain, if there is one yet: an active image that was removed has none.
    pub fn chain(&self) -> Option<&Chain> {
        match self {
            Self::Merge(commit) => Some(commit.chain()),
            Self::Nothing(nothing) => Some(&nothing.chain),
            Self::Finish(finish) => match &finish.unfinished {
                Unfinished::Removed(_) => None,
                Unfinished::Switched(chain) | Unfinished::Journals(chain, _) => Some(chain),
            },
        }
    }
}

impl Finish {
    /// What there is to complete.
    pub fn settled(&self) -> &Settled {
        &self.done.settled
    }

    fn execute(self, cancel: &AtomicBool) -> Result<Report> {
        let start = Instant::now();
        let mut report = Report::default();
        let Self { done, unfinished } = self;
        let (host, options) = (&*done.host, &done.options);
        match unfinished {
            Unfinished::Removed(gone) => finish_removed(host, &gone, options, &mut report)?,
            Unfinished::Switched(chain) => {
                done.sweep(&chain)?;
                for at in 0..chain.layers().len() {
                    end_left(host, &chain, at, options, &mut report)?;
                }
                done.look(&chain, &mut report, cancel)?;
            }
            Unfinished::Journals(chain, unfinished) => {
                done.sweep(&chain)?;
                if let Some(unremoved) = obsolete_of(host, &chain, &unfinished)? {
                    // Only base's journal lists these files, so it is removed last.
                    unremoved.settle(host, Some(&chain), options, &mut report)?;
                }
                let above = unfinished.above.values().map(|(unfinished, _)| unfinished);
                unfinished.base.iter().chain(above).try_for_each(|unfinished| unfinished.discard(host))?;
                done.look(&chain, &mut report, cancel)?;
            }
        }
        report.elapsed = start.elapsed();
        Ok(report)
    }
}

impl Nothing {
    /// Why there is nothing to do.
    pub fn settled(&self) -> &Settled {
        &self.done.settled
    }

    fn execute(self, cancel: &AtomicBool) -> Result<Report> {
        let start = Instant::now();
        let mut report = Report::default();
        self.done.sweep(&self.chain)?;
        self.done.look(&self.chain, &mut report, cancel)?;
        report.elapsed = start.elapsed();
        Ok(report)
    }
}

impl Done {
    /// Ends edits of headers that a power cut has left in the folders of the chain.
    fn sweep(&self, chain: &Chain) -> Result<()> {
        let dir = self.options.journal_dir.as_deref();
        journal::sweep(&*self.host, &chain.folders(&*self.host)?, dir, self.options.open.no_locks)
    }

    /// Notes how long base's file is, and what the guest sees, if that is asked for.
    fn look(&self, chain: &Chain, report: &mut Report, cancel: &AtomicBool) -> Result<()> {
        if self.options.verify {
            let images = chain.images();
            let size = images.last().map_or(0, |image| image.virtual_size());
            report.digest = on_workers(|| whole_digest(&images, size, cancel))?;
        }
        let is_base = |layer: &&Layer| layer.path == self.settled.base;
        if let Some(base) = chain.layers().iter().find(is_base) {
            let size = base.image.file().size();
            report.base_file_size = size.map_err(|e| Error::io(&base.path, FileOp::Stat, None, e))?;
        }
        Ok(())
    }
}

/// The files that an unfinished merge still has to remove, and that are not part of the chain.
///
/// # Errors
/// The system's.
pub(super) fn obsolete_of(
    host: &dyn Host,
    chain: &Chain,
    unfinished: &UnfinishedInChain,
) -> Result<Option<ObsoleteLayers>> {
    Ok(unfinished
        .base
        .as_ref()
        .map(|unfinished| unfinished.obsolete_layers(host, chain))
        .transpose()?
        .flatten())
}
