//! Work on an image that was stopped: its journal, and what that means for the present image.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::emptied;
use super::obsolete::ObsoleteLayers;
use super::samples;
use super::unfinished;
use super::unfinished::{UnfinishedMerge, UnfinishedUp};
use super::work::{Inherited, Work, is_dirty};
use crate::chain::{Chain, Layer};
use crate::error::{Error, FileOp, Refusal, Result};
use crate::image::Image;
use crate::journal;
use crate::journal::record::{Guard, Header, Phase, Purpose, Record, Sample};
use crate::journal::{FoundJournal, Journal, JournalVerdict, Judgement, Now};
use crate::merge::plan::BeginsAnew;
use crate::stamp::Stamp;
use crate::storage::{Access, FileId, Host, Storage, if_there};

/// Work that was stopped: its journal, and what that means for the present image.
#[derive(Debug)]
pub(crate) struct UnfinishedWork {
    journal: Arc<Journal>,
    judgement: Judgement,
    /// Whether the image is marked dirty.
    is_dirty: bool,
    last: Option<Record>,
}

/// An image for which unfinished work is searched.
#[derive(Clone, Copy, Debug)]
pub(super) struct FoundImage<'a> {
    pub(super) path: &'a Path,
    pub(super) file: &'a dyn Storage,
    /// Its external data file, if it has one.
    pub(super) data: Option<(&'a Path, &'a dyn Storage)>,
    pub(super) access: Access,
    /// Whether it is marked dirty.
    pub(super) is_dirty: bool,
}

impl UnfinishedWork {
    /// Looks for the journal of a layer, whose file is held under lock, and judges it.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn find(host: &dyn Host, layer: &Layer, dir: Option<&Path>) -> Result<Option<Self>> {
        let data = match (&layer.data_file, layer.image.as_qcow2()) {
            (Some(data), Some(image)) => Some((&*data.path, &**image.data_file())),
            _ => None,
        };
        let found = FoundImage {
            path: &layer.path,
            file: &**layer.image.file(),
            data,
            access: layer.access,
            is_dirty: is_dirty(&layer.image),
        };
        Self::of(host, &found, dir)
    }

    /// As [`UnfinishedWork::find`], for an image that need not be a layer of a chain.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn of(host: &dyn Host, image: &FoundImage<'_>, dir: Option<&Path>) -> Result<Option<Self>> {
        let FoundImage { path, file, data, access, is_dirty } = *image;
        let found = journal::find(host, path, file, dir, access, journal::JOURNAL)?;
        let Some(FoundJournal { journal, last, .. }) = found else { return Ok(None) };
        // The journal also covers writes to the data file.
        if let Some((data_path, data)) = data {
            let stat = data.stat().map_err(|e| Error::io(data_path, FileOp::Stat, None, e))?;
            if !journal.owner()?.may_speak_for(&stat.owner, host.user()) {
                return Ok(None);
            }
        }
        if journal.is_held()? {
            return Err(journal.in_use(host));
        }
        let mut stamps = vec![Stamp::of(host, path, file)?];
        if let Some((data_path, data)) = data {
            stamps.push(Stamp::of(host, data_path, data)?);
        }
        let files = [Some(file), data.map(|(_, data)| data)].into_iter().flatten().collect();
        let now = Now { stamps, files, dirty: Some(is_dirty) };
        let judgement = journal::judge(host, &journal, last.as_ref(), &now)?;
        Ok(Some(Self { journal: Arc::new(journal), judgement, is_dirty, last }))
    }

    /// Whether the stopped work explains the image as it is, including the dirty bit.
    pub(crate) fn is_ours(&self) -> bool {
        match self.judgement.verdict {
            JournalVerdict::Unfinished | JournalVerdict::Unsure | JournalVerdict::Finished => true,
            JournalVerdict::PutBack | JournalVerdict::Copied => self.is_dirty,
            JournalVerdict::Over | JournalVerdict::Foreign => false,
        }
    }

    /// Whether a power cut has torn blocks of the last record. Until they are written again, the image shows
    /// wrong data.
    pub(crate) fn is_torn(&self) -> bool {
        self.is_ours() && self.judgement.replays && self.judgement.is_torn
    }

    /// Whether it is certain that nobody has written to the image since the work was stopped.
    pub(crate) fn is_certain(&self) -> bool {
        self.judgement.verdict == JournalVerdict::Unfinished && !self.needs_proof()
    }

    /// Whether the image may be another one than the stopped work wrote. A file that was restored within a
    /// second of the kill has times that fit. So without a dirty bit, only the times in the last record count.
    pub(crate) fn is_doubtful(&self) -> bool {
        match self.judgement.verdict {
            JournalVerdict::Unfinished => self.needs_proof() && !self.judgement.is_as_known,
            JournalVerdict::Finished => false,
            _ => true,
        }
    }

    /// Why nothing that the stopped work did counts as done; `None` if it does count.
    pub(crate) fn begins_anew(&self) -> Option<BeginsAnew> {
        match self.judgement.verdict {
            JournalVerdict::PutBack => Some(BeginsAnew::PutBack),
            JournalVerdict::Copied => Some(BeginsAnew::Copied),
            _ => None,
        }
    }

    /// Refuses if the journal belongs to another file, which was renamed and lies beside the image at `path`.
    ///
    /// # Errors
    /// [`Refusal::JournalOfRenamed`]; the system's.
    pub(crate) fn refuse_renamed(&self, host: &dyn Host, path: &Path) -> Result<()> {
        match self.judgement.verdict {
            JournalVerdict::Copied => journal::refuse_renamed(host, path, &self.journal),
            _ => Ok(()),
        }
    }

    /// Whether the data that is done must be read back before it counts. Without a dirty bit, nothing proves
    /// that nobody has written to the image. With one, a copy that was made in the middle of the merge may have
    /// been restored within a second of the kill; and the bit tells nothing about a data file.
    pub(crate) fn needs_proof(&self) -> bool {
        self.judgement.verdict == JournalVerdict::Unsure
            || self.journal.header().guard == Guard::Stamp
            || !self.judgement.is_as_known
    }

    /// Whether somebody may have written to the image since, as far as its times tell.
    pub(crate) fn may_be_newer(&self) -> bool {
        self.judgement.may_be_newer
    }

    /// Whether somebody has written to the image since.
    pub(crate) fn is_foreign(&self) -> bool {
        // A write to an image that was being emptied is harmless: the disk showed the right bytes at every
        // moment.
        self.judgement.verdict == JournalVerdict::Foreign && self.journal.header().purpose == Purpose::Merge
    }

    /// The pull or the rebase, if it is one.
    pub(crate) fn up(&self) -> Option<UnfinishedUp> {
        unfinished::up_of(&self.journal)
    }

    /// The kind of work.
    pub(crate) fn purpose(&self) -> Purpose {
        self.journal.header().purpose
    }

    /// Whether base held everything when the work was stopped, and the layers above it were being changed.
    pub(crate) fn is_switching(&self) -> bool {
        self.journal.state().phase >= Phase::Switching
    }

    /// Whether the work, or an earlier run of it, may have emptied layers. A merge that goes on moves only what
    /// was written since.
    pub(crate) fn may_have_emptied(&self) -> bool {
        self.purpose() == Purpose::Merge
            && (self.is_switching() || self.journal_has_emptied())
            && self.judgement.verdict != JournalVerdict::Over
    }

    /// Whether layers were empty already when the journal was made.
    pub(crate) fn journal_has_emptied(&self) -> bool {
        self.journal.header().has_emptied
    }

    /// The samples of what the image holds when the work is done.
    pub(crate) fn samples(&self) -> &[Sample] {
        &self.journal.header().samples
    }

    /// Whether the layer at `base` shows what the work's samples say, as far as the work had come.
    ///
    /// # Errors
    /// Whatever reading reports.
    pub(crate) fn holds_samples(&self, images: &[&Image], base: usize) -> Result<bool> {
        samples::are_held(images, base, self.samples(), self.is_switching())
    }

    /// Whether base may lack merged data, like a base that was restored: then the layers above must still hold
    /// it. The times of a device tell nothing, and after a power cut base need not have the time of its last
    /// write.
    pub(crate) fn may_lack_merged(&self) -> bool {
        let targets = &self.journal.header().targets;
        // The dirty bit is the merge's own, and there is no data file.
        let has_bit = self.is_dirty && targets.len() == 1;
        match self.judgement.verdict {
            JournalVerdict::Foreign | JournalVerdict::PutBack => true,
            JournalVerdict::Copied => !has_bit && !self.judgement.is_as_known,
            JournalVerdict::Unfinished | JournalVerdict::Unsure => {
                let is_device = targets.iter().any(|target| target.is_device);
                // While data moves, the work itself writes to base after its last note.
                self.is_switching() && !has_bit && !is_device && self.judgement.may_be_newer
            }
            JournalVerdict::Over | JournalVerdict::Finished => false,
        }
    }

    /// Whether the image at `base` is an older one now, although it held everything when the work was stopped.
    /// If an older copy was written over the file, its times do not tell this.
    ///
    /// # Errors
    /// Whatever reading reports.
    pub(super) fn was_put_back(&self, images: &[&Image], base: usize) -> Result<bool> {
        if self.journal.header().purpose != Purpose::Merge {
            return Ok(false);
        }
        match self.judgement.verdict {
            JournalVerdict::PutBack => Ok(true),
            JournalVerdict::Copied if !self.judgement.is_as_known => Ok(true),
            // A guest that has used the finished base may have written over some of the samples, but hardly over all.
            JournalVerdict::Over if self.journal.state().phase == Phase::Done => {
                samples::are_all_lost(images, base, self.samples())
            }
            JournalVerdict::Over => Ok(false),
            // Layers are removed when everything is done, and a guest may have written to base since.
            _ if self.journal.state().phase >= Phase::Removing => Ok(false),
            _ => Ok(!self.holds_samples(images, base)?),
        }
    }

    /// Whether the work merged a file that is not among `files`, and so was another merge. In a copied folder
    /// every file is a new one.
    pub(crate) fn is_of_others(&self, files: &[FileId]) -> bool {
        self.judgement.verdict != JournalVerdict::Copied
            && self.journal.header().layers.iter().any(|layer| !files.contains(&layer.id))
    }

    /// Whether the image was being emptied when the work was stopped, and nobody has written to it since.
    pub(crate) fn is_emptying(&self) -> bool {
        let is_begun = self.journal.state().phase >= Phase::Moving;
        self.journal.header().purpose == Purpose::Empty && is_begun && self.is_ours()
    }

    /// Whether a layer with the stamp `now` has changed since the merge began.
    pub(crate) fn has_changed(&self, now: &Stamp) -> bool {
        let then = self.journal.header().layers.iter().find(|then| then.is_same_file(now));
        then.is_none_or(|then| !then.is_unchanged(now))
    }

    /// The progress of the work, in percent.
    pub(crate) fn percent(&self) -> u64 {
        unfinished::percent(self.journal.state().done, self.journal.header().total)
    }

    /// The merge that was stopped.
    pub(crate) fn merge(&self) -> Option<UnfinishedMerge> {
        unfinished::of(&self.journal)
            .filter(|unfinished| unfinished.is_removing || self.judgement.verdict != JournalVerdict::Over)
    }

    /// The files of layers that the work has merged, and that nobody has written to since. Not all of them have
    /// room for a mark.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn merged(&self, host: &dyn Host) -> Result<Vec<FileId>> {
        let header = self.journal.header();
        let mut merged = Vec::new();
        if header.purpose != Purpose::Merge || self.journal.state().phase < Phase::Switching {
            return Ok(merged);
        }
        for was in &header.layers {
            let opened = if_there(host.open(&was.path, Access::Read));
            let opened = opened.map_err(|e| Error::io(&was.path, FileOp::Open, None, e))?;
            let Some(file) = opened else { continue };
            let now = Stamp::of(host, &was.path, &*file)?;
            // A layer that the merge has emptied has changed by that, and is empty.
            if was.is_unwritten(&now) || (was.is_same_file(&now) && emptied::is_empty(&was.path, file)?) {
                merged.push(now.id);
            }
        }
        Ok(merged)
    }

    /// The files that the work still had to remove when it was stopped, and that are not part of `chain`.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn obsolete_layers(&self, host: &dyn Host, chain: &Chain) -> Result<Option<ObsoleteLayers>> {
        // If base was restored, only these files hold the merged data.
        let is_doubtful = self.judgement.verdict == JournalVerdict::Foreign || self.judgement.is_older;
        ObsoleteLayers::of(host, &self.journal, Some(chain), is_doubtful)
    }

    /// The layers that have stopped being restore points.
    pub(crate) fn restore_points_lost(&self) -> Vec<PathBuf> {
        self.journal.header().restore_points_lost.clone()
    }

    /// The same, with its journal as it was found when the image was opened for writing.
    pub(super) fn reopened(self, journal: Journal, last: Option<Record>) -> Self {
        Self { journal: Arc::new(journal), last, ..self }
    }

    /// Removes the journal, which is not needed any more.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn discard(&self, host: &dyn Host) -> Result<()> {
        self.journal.remove(host)
    }

    /// Where the same work continues: the guest offset below which everything is done, and the bytes that were
    /// written for that. `None` if this is other work, or a layer has changed since.
    pub(crate) fn resume(&self, wanted: &Header) -> Option<(u64, u64)> {
        let then = self.journal.header();
        let state = self.journal.state();
        let same = then.purpose == wanted.purpose
            && then.layers.len() == wanted.layers.len()
            && then.layers.iter().zip(&wanted.layers).all(|(then, now)| then.is_unchanged(now))
            && (then.new_size, then.zero_until) == (wanted.new_size, wanted.zero_until);
        let may =
            same && matches!(self.judgement.verdict, JournalVerdict::Unfinished | JournalVerdict::Unsure);
        (may && state.watermark > 0).then_some((state.watermark, state.done))
    }

    /// The planned size of base's disk, if the same merge was stopped. The layers may have grown since.
    pub(crate) fn size_of_same(&self, wanted: &Header) -> Option<u64> {
        let then = self.journal.header();
        let same = then.purpose == wanted.purpose
            && (&then.base, &then.top, &then.active) == (&wanted.base, &wanted.top, &wanted.active);
        (same && then.new_size > 0).then_some(then.new_size)
    }

    /// Puts the image under its journal again, which is locked. Blocks that a power cut may have torn read as
    /// they should, and the next barrier writes them. With `as_it_is`, the last record is used only if one of
    /// its sectors is torn: the state after the record may hold less than the image does now.
    ///
    /// # Errors
    /// [`Error::InUse`]; a header that cannot be read even so.
    pub(crate) fn take_up(&self, host: &dyn Host, image: &mut Image, as_it_is: bool) -> Result<Work> {
        self.journal.hold(host)?;
        let replays = self.judgement.replays && (self.judgement.is_torn || !as_it_is);
        let last = self.last.as_ref().filter(|_| replays);
        Work::wrap(image, &self.journal, last)
    }

    /// What the next work on the image takes over.
    pub(crate) fn inherited(&self) -> Inherited {
        let lazy = match self.journal.header().guard {
            Guard::DirtyBit { lazy } if self.is_ours() && self.is_dirty => Some(lazy),
            _ => None,
        };
        Inherited { journal: Arc::clone(&self.journal), lazy }
    }
}

/// The refusal for an image that somebody has written to since a merge into it was stopped.
pub(crate) fn written_since(path: &Path, unfinished: &UnfinishedWork) -> Error {
    Error::refused(path, Refusal::WrittenSince { percent: unfinished.percent() })
}
