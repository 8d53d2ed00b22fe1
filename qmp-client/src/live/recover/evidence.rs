//! Collects the evidence about the files of an interrupted merge, for the judge.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use qcow2::chain::{OpenOptions, Policy};
use qcow2::error::FileOp;
use qcow2::merge::Progress;
use qcow2::retire::{BackingIs, Interrupted};
use qcow2::stamp::Stamp;
use qcow2::storage::OsHost;
use qcow2::{Error, ErrorKind, Refusal, Result};

use super::look;
use crate::live::verdict::{Compared, Header, Leads, Seen, Treated};
use crate::state::{Kind, Phase, Qemu, State, StateLayer, stamp_of};

/// What was seen, with the stamps that were taken first.
pub(super) struct Evidence {
    /// What the judge gets.
    pub(super) seen: Seen,
    /// The stamps of the files, in the order of the state's layers. A file that is changed later must still
    /// have its stamp.
    pub(super) stamps: Vec<Option<Stamp>>,
    /// An error about a file that must be readable only if something will be changed.
    pub(super) unread: Option<Error>,
    /// Why the images could not be compared.
    pub(super) not_compared: Option<Error>,
}

impl Evidence {
    /// Looks at all files of a merge, without locks.
    ///
    /// # Errors
    /// A file cannot be looked at, or the header that tells which chain stands cannot be read.
    pub(super) fn of(state: &State, qemu: Qemu) -> Result<Self> {
        // Take the stamps first, so that a write between this and the next look shows as a change.
        let stamps = state.layers.iter().map(stamp_now).collect::<Result<_>>()?;
        let seen = Seen::of(state, qemu, Header::Unread).map_err(|error| match error {
            crate::Error::File { file, source } => Error::io(&file, FileOp::Stat, None, source),
            other => Error::io(Path::new(&state.valid_top), FileOp::Stat, None, std::io::Error::other(other)),
        })?;
        let mut evidence = Self { seen, stamps, unread: None, not_compared: None };
        evidence.read_header(state)?;
        if state.kind != Kind::Pull {
            for (place, layer) in state.layers.iter().enumerate() {
                if let Err(error) = evidence.read_layer(state, place, layer) {
                    evidence.unread.get_or_insert(error);
                }
            }
        }
        Ok(evidence)
    }

    fn read_header(&mut self, state: &State) -> Result<()> {
        let Some(relink) = &state.backing else { return Ok(()) };
        let is_there = |layer: &&StateLayer| layer.index == relink.index && layer.stamp.is_some();
        if state.layers.iter().find(is_there).is_none_or(|layer| !Path::new(&layer.file).exists()) {
            return Ok(());
        }
        let (name, leads_to) = look::backing(Path::new(&relink.overlay))?;
        let is_it =
            |stamp: &Option<Stamp>| leads_to.is_some() && stamp.as_ref().map(|stamp| stamp.id) == leads_to;
        let mut layers = state.layers.iter().zip(&self.stamps);
        self.seen.leads = match layers.find(|(_, stamp)| is_it(stamp)) {
            Some((layer, _)) => Leads::To(layer.index),
            None if leads_to.is_some() => Leads::Elsewhere,
            None => Leads::Nowhere,
        };
        self.seen.header = name.map_or(Header::Nothing, Header::Names);
        Ok(())
    }

    fn read_layer(&mut self, state: &State, place: usize, layer: &StateLayer) -> Result<()> {
        let is_merged = layer.index > state.base && layer.index <= state.top;
        let is_base = layer.index == state.base;
        let is_here = layer.stamp.is_some() && self.seen.stamps.get(place).is_some_and(Option::is_some);
        if !is_here || !(is_merged || is_base) {
            return Ok(());
        }
        if look::has_data_file(layer)? {
            self.seen.tells_no_time(state, layer.index);
        }
        if is_base {
            self.seen.closing_writes_base = look::is_written_by_closing(layer)?;
            return Ok(());
        }
        let treated = treated(state, Path::new(&layer.file))?;
        if let Some(place) = self.seen.treated.get_mut(place) {
            *place = treated;
        }
        Ok(())
    }

    /// The obsolete layers that still exist, from the top, with the stamps that were taken.
    pub(super) fn obsolete<'s>(&self, state: &'s State) -> Vec<(&'s StateLayer, Stamp)> {
        let merged = state.layers.iter().zip(&self.stamps).filter(|(layer, _)| {
            layer.index > state.base && layer.index <= state.top && layer.stamp.is_some()
        });
        merged.filter_map(|(layer, stamp)| Some((layer, stamp.clone()?))).collect()
    }

    /// Compares base with what was merged into it, and notes the result. If they differ, returns the images
    /// still open and locked, so that nobody changes them before something is done about it.
    ///
    /// # Errors
    /// The images cannot be read, or have changed since they were seen.
    pub(super) fn compare(
        &mut self,
        state: &State,
        no_lock: bool,
        progress: &dyn Progress,
        cancel: &AtomicBool,
    ) -> Result<Option<Interrupted>> {
        let opened = self.open(state, no_lock).and_then(|opened| {
            let size = state.layer(state.base).map_or(0, |layer| layer.virtual_size);
            let is_switched = state.kind == Kind::ActiveCommit || opened.backing() == BackingIs::Base;
            // Whether data was never copied matters only if no pivot is noted: QEMU pivots only after
            // everything was copied.
            if state.kind == Kind::ActiveCommit
                && state.phase == Phase::Copying
                && let Some(at) = opened.never_copied(cancel)?
            {
                self.seen.never_copied = true;
                return Ok((opened, is_switched, Some(at)));
            }
            let difference =
                if is_switched { opened.first_difference(size, progress, cancel)? } else { None };
            Ok((opened, is_switched, difference))
        });
        let (opened, is_switched, difference) = match opened {
            Ok(opened) => opened,
            Err(error @ Error::InUse { .. }) => {
                self.seen.compared = Compared::InUse;
                self.not_compared = Some(error);
                return Ok(None);
            }
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                self.seen.compared = Compared::Unsupported;
                self.not_compared = Some(error);
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        if !is_switched {
            let overlay = state.backing.as_ref().map(|relink| relink.overlay.as_str()).unwrap_or_default();
            let what = "its backing file changed while it was looked at".to_owned();
            return Err(Error::refused(Path::new(overlay), Refusal::NotAsKnown { what }));
        }
        self.seen.compared = difference.map_or(Compared::Equal, |at| Compared::Differs(at.get()));
        Ok(difference.is_some().then_some(opened))
    }

    fn open(&self, state: &State, no_lock: bool) -> Result<Interrupted> {
        let stamp = |index: usize| {
            let mut all = state.layers.iter().zip(&self.stamps);
            all.find(|(layer, _)| layer.index == index).and_then(|(_, stamp)| stamp.clone())
        };
        let merged: Vec<Stamp> = self.obsolete(state).into_iter().map(|(_, stamp)| stamp).collect();
        let overlay = match state.kind {
            Kind::ActiveCommit => None,
            Kind::Commit | Kind::Pull => stamp(state.top + 1),
        };
        let base = match stamp(state.base) {
            Some(base) => base,
            None => {
                let path = Path::new(state.layer(state.base).map_or("", |base| &base.file));
                let nowhere = || Error::io(path, FileOp::Open, None, std::io::ErrorKind::NotFound.into());
                Stamp::now(&OsHost, path)?.ok_or_else(nowhere)?
            }
        };
        // Follow the headers wherever they lead, so that the comparison is about the chain as it is. Only the
        // format of top comes from the state.
        let active_format = state.layer(state.top).map(look::format);
        let (policy, no_locks) = (Policy::local_files(), no_lock);
        let mut options = OpenOptions::new(policy).with_format(active_format);
        options.no_locks = no_locks;
        Interrupted::open(&OsHost, overlay.as_ref(), &merged, &base, &options)
    }
}

/// The present stamp of a layer's file, if the file exists.
fn stamp_now(layer: &StateLayer) -> Result<Option<Stamp>> {
    let path = Path::new(&layer.file);
    stamp_of(path).map_err(|source| Error::io(path, FileOp::Stat, None, source))
}

/// What an earlier clean-up has done to a merged layer.
fn treated(state: &State, path: &Path) -> Result<Treated> {
    if look::is_sealed(path)? {
        return Ok(Treated::Sealed);
    }
    let base = state.layer(state.base).map(|base| look::id(Path::new(&base.file))).transpose()?.flatten();
    if let Some(base) = base
        && look::is_empty_on(path, base)?
    {
        return Ok(Treated::Emptied);
    }
    Ok(if look::is_marked(path)? { Treated::Marked } else { Treated::Not })
}
