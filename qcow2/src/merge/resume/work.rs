//! An image that is written under a journal: how work on it begins, continues and ends.

use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::format::{features, parts};
use crate::image::Image;
use crate::journal;
use crate::journal::record::{Guard, Header, Phase, Record};
use crate::journal::{Journal, Journaled};
use crate::storage::{Access, Host, Storage};
use crate::units::GuestOffset;

/// An image that is written under a journal.
#[derive(Debug)]
pub(crate) struct Work {
    journal: Arc<Journal>,
    file: Arc<Journaled>,
    data: Option<Arc<Journaled>>,
}

/// What a work takes over from one that was stopped.
#[derive(Debug)]
pub(crate) struct Inherited {
    /// The journal of the stopped work.
    pub(super) journal: Arc<Journal>,
    /// Whether refcounts were lazy before that work; `None` if it does not explain the dirty bit.
    pub(super) lazy: Option<bool>,
}

impl Work {
    /// Puts the image under a journal; what a power cut may have torn of its last record is read as it should be.
    pub(super) fn wrap(image: &mut Image, journal: &Arc<Journal>, last: Option<&Record>) -> Result<Self> {
        let under = |file: &Arc<dyn Storage>, target: u8| {
            let (blocks, len) = match last.filter(|last| last.target == target) {
                Some(last) => (last.blocks.clone(), last.len),
                None => (Vec::new(), 0),
            };
            Arc::new(Journaled::replaying(Arc::clone(file), Arc::clone(journal), target, blocks, len))
        };
        let file = under(image.file(), 0);
        let data = image.as_qcow2().filter(|q| q.has_data_file()).map(|q| under(q.data_file(), 1));
        let targets = [Some(&file), data.as_ref()].into_iter().flatten().map(|file| Arc::clone(file.inner()));
        journal.watch(targets.collect());
        let work = Self { journal: Arc::clone(journal), file, data };
        let data = work.data.clone().map(|data| data as Arc<dyn Storage>);
        replace(image, work.file.clone(), data)?;
        Ok(work)
    }

    /// Begins a work on an image: makes the journal, and sets the dirty bit. `old` is what an earlier work
    /// has left, which is taken over.
    ///
    /// # Errors
    /// The system's; no place for a journal.
    pub(crate) fn begin(
        host: &dyn Host,
        image: &mut Image,
        mut header: Header,
        dir: Option<&Path>,
        old: Option<&Inherited>,
    ) -> Result<Self> {
        let place = journal::place(host, image.path(), &**image.file(), dir, journal::JOURNAL)?;
        let inherited = old.and_then(|old| old.lazy);
        if let (Guard::DirtyBit { lazy }, Some(inherited)) = (&mut header.guard, inherited) {
            *lazy = inherited;
        }
        let is_here = old.is_some_and(|old| *old.journal.path() == *place.path());
        if !is_here
            && let Some((theirs, _)) = Journal::open(host, &place, Access::Read)?
            && theirs.is_held()?
        {
            return Err(theirs.in_use(host));
        }
        // The new journal needs a record at once. Without one, it does not explain a dirty bit that is already
        // set, nor tell that empty layers depend on this base.
        let begun = inherited.is_some() || (header.has_emptied && header.guard == Guard::Stamp);
        let make = if begun { Journal::take_over } else { Journal::create };
        let journal = Arc::new(make(host, &place, header)?);
        if let Some(old) = old.filter(|_| !is_here) {
            old.journal.remove(host)?;
        }
        let work = Self::wrap(image, &journal, None)?;
        if let (Image::Qcow2(qcow2), Guard::DirtyBit { .. }) = (image, journal.header().guard)
            && inherited.is_none()
        {
            // This changes one sector, and so takes effect at once: from now on a foreign write to the image is
            // noticed.
            qcow2.switch_header(parts::FEATURES, |header| {
                header.incompatible |= features::DIRTY;
                header.compatible &= !features::LAZY_REFCOUNTS;
                header.autoclear &= features::KNOWN_AUTOCLEAR;
            })?;
            qcow2.barrier()?;
        }
        journal.note(Phase::Moving, 0, 0)?;
        Ok(work)
    }

    /// The journal.
    pub(crate) fn journal(&self) -> &Arc<Journal> {
        &self.journal
    }

    /// Writes the blocks that a power cut may have torn, and notes that the work continues from the guest
    /// offset `from`, or begins anew.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn replay(&self, image: &Image, from: Option<GuestOffset>) -> Result<()> {
        self.write_back(image)?;
        let state = self.journal.state();
        // The image was released, so its dirty bit is clear. A record of the phase "moving" would not fit that.
        let is_released = state.phase == Phase::Done && !is_dirty(image);
        match from {
            None if is_released => self.journal.note(Phase::Done, 0, 0),
            Some(from) => self.journal.note(state.phase.max(Phase::Moving), from.get(), state.done),
            // From here on the journal accepts the present image, whatever it holds. So nothing may count as
            // done.
            None => self.journal.note(Phase::Moving, 0, 0),
        }
    }

    /// As [`Work::replay`], if layers were emptied: nothing counts as done, though base holds all their data.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn replay_emptied(&self, image: &Image) -> Result<()> {
        self.write_back(image)?;
        self.journal.note(self.journal.state().phase, 0, 0)
    }

    /// Writes the blocks that a power cut may have torn.
    fn write_back(&self, image: &Image) -> Result<()> {
        let io = |e| Error::barrier(image.path(), e);
        let files = [self.data.as_ref(), Some(&self.file)].into_iter().flatten();
        files.into_iter().try_for_each(|file| file.sync().map_err(io))
    }

    /// Gives the image its own files back; nothing more is written under the journal.
    ///
    /// # Errors
    /// A header that cannot be read.
    pub(crate) fn unwrap(&self, image: &mut Image) -> Result<()> {
        let data = self.data.as_ref().map(|data| Arc::clone(data.inner()));
        replace(image, Arc::clone(self.file.inner()), data)
    }

    /// Notes that the work stops in good order. Nothing depends on that.
    pub(crate) fn stop(&self) {
        // An error of the note does not matter: another error is under way. Nothing is synced, because a sync
        // may be what has failed.
        let _ = self.journal.stop();
    }

    /// Releases the image: the dirty bit is cleared, and nothing more is written under the journal. The journal
    /// stays; if files must be removed, it says that the image is released.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn release(&self, image: &mut Image) -> Result<()> {
        let state = self.journal.state();
        match (&mut *image, self.journal.header().guard) {
            (Image::Qcow2(qcow2), Guard::DirtyBit { lazy }) => {
                self.journal.enter(Phase::Done);
                qcow2.switch_header(parts::LASTING_FEATURES, |header| {
                    header.incompatible &= !features::DIRTY;
                    if lazy {
                        header.compatible |= features::LAZY_REFCOUNTS;
                    }
                })?;
                qcow2.barrier()?;
            }
            _ => self.journal.note(Phase::Done, state.watermark, state.done)?,
        }
        self.unwrap(image)?;
        match self.journal.obsolete() {
            Some(_) => self.journal.note(Phase::Removing, state.watermark, state.done),
            None => Ok(()),
        }
    }

    /// Ends the work: the image is released, and the journal removed.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn finish(&self, host: &dyn Host, image: &mut Image) -> Result<()> {
        self.release(image)?;
        self.journal.remove(host)
    }
}

/// Whether an image is marked dirty.
pub(super) fn is_dirty(image: &Image) -> bool {
    image.as_qcow2().is_some_and(|image| image.header().is_dirty())
}

fn replace(image: &mut Image, file: Arc<dyn Storage>, data: Option<Arc<dyn Storage>>) -> Result<()> {
    match image {
        Image::Raw(raw) => raw.replace_file(file),
        Image::Qcow2(qcow2) => qcow2.replace_files(file, data),
        Image::Foreign(foreign) => Err(foreign.refuse()),
    }
}
