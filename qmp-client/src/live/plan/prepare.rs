//! Turns a request into what must be done: a merge, the end of an earlier one, or nothing.

use std::path::{Path, PathBuf};

use super::{Plan, Request, Room, checks, make, obstacle, range, same};
use crate::block::graph::{Disk, Layer};
use crate::block::merge::{Direction, Procedure};
use crate::error::Result;
use crate::live::discover::{Files, Place, Unfinished, absolute, search, states};
use crate::live::hindrance::Hindrance;
use crate::live::machine::Machine;
use crate::live::tidy::TidyOptions;
use crate::live::{Merge, Throttle, Wishes, noted};
use crate::qmp::connection::Connection;
use crate::state::{Kind, Phase, State, StateFile};

/// What is to be done for a request.
#[derive(Debug)]
#[non_exhaustive]
pub enum Prepared<'m> {
    /// This merge is to be begun.
    Merge(Box<Planned<'m>>),
    /// It was begun before, and its job is there.
    UnderWay(Box<Merge<'m, Connection>>),
    /// It was begun before, and has switched; it must be tidied up after: [`Machine::tidy_up`].
    Finish(Box<Unfinished>),
    /// Nothing, and why.
    Nothing(Nothing),
}

/// Why there is nothing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Nothing {
    /// The chain has one layer.
    OneLayer,
    /// No layer lies between those that stay.
    NothingBetween,
    /// The layer was merged before.
    MergedBefore {
        /// Into this image.
        into: PathBuf,
    },
}

/// A merge that can be begun.
#[derive(Debug)]
pub struct Planned<'m> {
    machine: &'m Machine<'m>,
    procedure: Procedure,
    file: StateFile,
    wishes: Wishes,
    /// What will be done.
    pub plan: Plan,
    /// Whether there is room for it.
    pub room: Room,
    /// What slows the guest down, if that was asked for.
    pub throttle: Option<Throttle>,
    /// The jobs of earlier merges that ended without a switch: nothing is lost, this one begins anew.
    pub begins_anew: Vec<String>,
}

impl<'m> Machine<'m> {
    /// Finds out what must be done for a request, and changes nothing. A merge that an earlier call has begun
    /// comes first, because the chain may be the one that it has left.
    ///
    /// # Errors
    /// [`crate::Error::Hindered`] where the merge would do harm or be futile; those of planning and of the queries.
    pub fn prepare(&'m self, disk: &Disk, request: &Request) -> Result<Prepared<'m>> {
        let state_dir = request.state_dir.as_deref();
        if !request.dry_run {
            self.sweep(std::slice::from_ref(disk), state_dir);
        }
        let known = self.unfinished(std::slice::from_ref(disk), state_dir)?;
        let is_meant = |state: &State| same::is_asked_for(state, disk, request);
        let found = Merge::attach(self.monitor(), self.graph(), disk, &states(&known))?;
        if let Some(mut merge) = found.filter(|merge| is_meant(merge.state())) {
            if !request.dry_run {
                merge.go_on()?;
            }
            if request.pivot {
                let mut options = TidyOptions::new(request.delete, &request.scan);
                options.no_lock = request.no_lock;
                self.may_pivot(disk, &mut merge, request.allow_stale, &options)?;
            }
            return Ok(Prepared::UnderWay(Box::new(merge)));
        }
        if let Some(left) = self.switched(disk, &known, &is_meant) {
            return match request.dry_run {
                true => Err(recover_first(left)),
                false => Ok(Prepared::Finish(Box::new(left.clone()))),
            };
        }
        if let Some(unnoted) = known.iter().find(|merge| self.is_switched_unnoted(merge, disk)) {
            return Err(recover_first(unnoted));
        }
        let nothing = |why: Nothing| match self.switched(disk, &known, &|_| true) {
            Some(left) => Err(recover_first(left)),
            None => Ok(Prepared::Nothing(why)),
        };
        let (procedure, plan) = if request.direction == Direction::Up {
            let Some(base) = range::base_of_pull(disk, request)? else {
                return nothing(Nothing::NothingBetween);
            };
            checks::no_other_job(self.monitor(), self.graph(), disk)?;
            make::pull(self.files(), disk, base, request)?
        } else {
            if let Some(into) = request.top.as_ref().and_then(|top| range::merged_before(disk, top)) {
                return Ok(Prepared::Nothing(Nothing::MergedBefore { into }));
            }
            let Some(range) = range::of_commit(disk, request)? else { return nothing(Nothing::OneLayer) };
            checks::no_other_job(self.monitor(), self.graph(), disk)?;
            make::commit(self.files(), self.graph(), disk, &range, request)?
        };
        let room = checks::room(&plan)?;
        let file = place(self.files(), disk, state_dir)?;
        let begins_anew = self.left_over(disk, &known, &file)?;
        if !request.dry_run {
            // Before the limits are asked for, and before the note of the former ones is replaced.
            begins_anew.iter().try_for_each(|merge| self.relax(merge))?;
        }
        let begins_anew = begins_anew.into_iter().map(|merge| merge.state.job).collect();
        let throttle = if request.converge { Some(self.throttle(disk)?) } else { None };
        let wishes = Wishes {
            delete: request.delete,
            allow_stale: request.allow_stale,
            scan: absolute(&request.scan),
            pivot: request.pivot,
            keep_overlay: request.keep_overlay,
            data_files: plan.data_files_emptied().collect(),
            files_are_elsewhere: !self.files().strangers(disk).is_empty(),
        };
        let machine = self;
        let planned = Planned { machine, procedure, file, wishes, plan, room, throttle, begins_anew };
        Ok(Prepared::Merge(Box::new(planned)))
    }

    /// Whether a state belongs to another image, or to a QEMU with another monitor. In a folder that several
    /// machines share, images of the same name have the same state file.
    fn is_of_another(&self, merge: &Unfinished, disk: &Disk) -> bool {
        merge.state.top_before() != disk.active().file || merge.state.address != noted(self.address())
    }

    /// Earlier merges of this disk whose jobs are gone and that had not switched. One that may have switched is refused.
    fn left_over(&self, disk: &Disk, known: &[Unfinished], file: &StateFile) -> Result<Vec<Unfinished>> {
        let here = file.load()?.map(|state| Unfinished { file: file.clone(), state });
        let shown = |merge: &Unfinished| merge.disk(self.graph()).is_some_and(|on| on.name() == disk.name());
        if let Some(other) = here.as_ref().filter(|here| !shown(here) && self.is_of_another(here, disk)) {
            let (state_file, state) = (other.file.path().to_owned(), &other.state);
            let (disk, image) = (state.disk.clone(), state.top_before());
            return Err(Hindrance::StateOfAnother { state_file, disk, image }.into());
        }
        let of_disk = known.iter().filter(|merge| merge.file != *file && shown(merge));
        let mut begins_anew = Vec::new();
        for merge in here.iter().chain(of_disk) {
            if merge.state.phase != Phase::Copying {
                return Err(recover_first(merge));
            }
            begins_anew.push(merge.clone());
        }
        Ok(begins_anew)
    }
}

impl Machine<'_> {
    /// Refuses the pivot of a merge that was begun without the question whether the old active image may stay as it is, as one is
    /// that was to keep the overlay; unless that is `allowed`, or was when it began.
    ///
    /// # Errors
    /// [`Hindrance::StaleActive`]; [`Hindrance::NotSearched`] if a folder cannot be read; [`crate::Error::File`] if it cannot be noted
    /// that it is allowed.
    pub fn may_pivot(
        &self,
        disk: &Disk,
        merge: &mut Merge<'_, Connection>,
        allowed: bool,
        options: &TidyOptions,
    ) -> Result<()> {
        if allowed {
            return merge.accept_stale();
        }
        let state = merge.state();
        let is_open = state.keep_overlay && state.kind == Kind::ActiveCommit && state.phase == Phase::Copying;
        let base = disk.layers().iter().find(|layer| layer.index == state.base);
        let Some(base) = base.filter(|_| is_open && !state.allow_stale) else { return Ok(()) };
        let merged: Vec<Layer> =
            disk.layers().iter().filter(|layer| layer.index > base.index).cloned().collect();
        let touched: Vec<&Layer> = merged.iter().chain([base]).collect();
        let scan = [&state.scan[..], &options.scan[..]].concat();
        // Users were refused before the job began. Here they only decide which layers stay.
        let searched = search(self.files(), self.graph(), disk, &touched, &scan, true)?;
        let leaves = obstacle::of_merged(self.files(), disk, base, &merged, &searched.users, options.no_lock);
        checks::old_active(&leaves, options.delete || state.delete)
    }
}

impl<'m> Planned<'m> {
    /// Tries what QEMU may refuse, notes the merge in its state file, and has QEMU begin.
    ///
    /// # Errors
    /// [`crate::Error::Command`] if QEMU cannot write what it must; those of [`Merge::begin`]. Nothing was changed then.
    pub fn begin(mut self) -> Result<Merge<'m, Connection>> {
        let monitor = self.machine.monitor();
        self.procedure.preflight(monitor)?;
        Merge::begin(monitor, self.procedure, self.file, self.machine.address(), &self.wishes)
    }
}

/// An earlier merge is to be put right first.
pub(crate) fn recover_first(merge: &Unfinished) -> crate::Error {
    Hindrance::RecoverFirst { unfinished: Box::new(merge.outline()) }.into()
}

/// Where the state file of a merge that begins now lies.
fn place(files: &Files, disk: &Disk, state_dir: Option<&Path>) -> Result<StateFile> {
    let active = disk.active();
    if let Some(dir) = state_dir {
        let dir = std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
        return writable(StateFile::in_folder(&dir, Path::new(&active.file)), &active.file);
    }
    let beside = match files.place(active) {
        Place::Here(path, _) => StateFile::beside(&path),
        _ => None,
    };
    let none = || Hindrance::NoStateFolder { file: active.file.clone(), folder: None, source: None };
    beside.ok_or_else(|| none().into()).and_then(|file| writable(file, &active.file))
}

fn writable(file: StateFile, active: &str) -> Result<StateFile> {
    let folder = file.path().parent().unwrap_or(Path::new(".")).to_owned();
    // Only a try shows what the file system allows. The file is temporary.
    match tempfile::tempfile_in(&folder) {
        Ok(_) => Ok(file),
        Err(source) => {
            let (file, folder, source) = (active.to_owned(), Some(folder), Some(source));
            Err(Hindrance::NoStateFolder { file, folder, source }.into())
        }
    }
}
