//! A running QEMU at present. Every live merge begins here.

use std::path::Path;

use super::discover::{Files, Unfinished, folders_of_disks, states, sweep_folders};
use super::hindrance::Hindrance;
use super::plan::recover_first;
use super::throttle::relax;
use super::tidy::{self, Tidied, TidyOptions};
use super::verdict::{NotSwitched, Switched};
use super::{Merge, Throttle};
use crate::block::graph::{Disk, Graph};
use crate::block::jobs::{Job, cancel};
use crate::error::Result;
use crate::qmp::address::Address;
use crate::qmp::connection::Connection;
use crate::state::{Phase, State};

/// A running QEMU: its disks at the time of the query, and the files that it has open.
#[derive(Debug)]
pub struct Machine<'m> {
    monitor: &'m Connection,
    address: &'m Address,
    graph: Graph,
    files: Files,
}

/// A merge that was tidied up after, and what was done with its files.
#[derive(Debug)]
#[non_exhaustive]
pub struct Settled {
    /// The merge.
    pub merge: super::outline::Outline,
    /// What was done with its files.
    pub tidied: Tidied,
}

impl<'m> Machine<'m> {
    /// Asks QEMU for its disks, with file names as they are valid here.
    ///
    /// # Errors
    /// Those of the queries.
    pub fn look(monitor: &'m Connection, address: &'m Address) -> Result<Self> {
        let files = Files::of(monitor);
        let graph = Graph::ask(monitor)?.with_files(&|name| files.absolute(name));
        Ok(Self { monitor, address, graph, files })
    }

    /// The monitor.
    pub fn monitor(&self) -> &'m Connection {
        self.monitor
    }

    /// Where the monitor listens.
    pub(crate) fn address(&self) -> &'m Address {
        self.address
    }

    /// The disks.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// The files that QEMU has open.
    pub(crate) fn files(&self) -> &Files {
        &self.files
    }

    /// The unfinished merges that may concern these disks. `state_dir` is searched besides the folders of the
    /// images.
    ///
    /// # Errors
    /// [`crate::Error::State`] for a state file that cannot be read or believed.
    pub fn unfinished(&self, disks: &[Disk], state_dir: Option<&Path>) -> Result<Vec<Unfinished>> {
        Unfinished::of_disks(self.address, disks, state_dir)
    }

    /// Removes the temporary files of clients that were killed while they wrote a state file.
    pub(crate) fn sweep(&self, disks: &[Disk], state_dir: Option<&Path>) {
        sweep_folders(Some(self.address), &folders_of_disks(disks, state_dir));
    }

    /// Finds the merge of this disk whose job QEMU has, or whose end is not noted; see [`Merge::attach`].
    ///
    /// # Errors
    /// Those of the queries.
    pub fn attach(&self, disk: &Disk, state_dir: Option<&Path>) -> Result<Option<Merge<'m, Connection>>> {
        let known = self.unfinished(std::slice::from_ref(disk), state_dir)?;
        let mut merge = Merge::attach(self.monitor, &self.graph, disk, &states(&known))?;
        merge.as_mut().map(Merge::go_on).transpose()?;
        Ok(merge)
    }

    /// The merge of this disk that has switched, but is not tidied up after.
    pub(crate) fn switched<'u>(
        &self,
        disk: &Disk,
        known: &'u [Unfinished],
        is_meant: &dyn Fn(&State) -> bool,
    ) -> Option<&'u Unfinished> {
        let is_it = |state: &State| {
            let shows = state.disk_after(&self.graph).is_some_and(|on| on.name() == disk.name());
            shows && Switched::seen_in(state, &self.graph).is_some() && is_meant(state)
        };
        known.iter().find(|merge| is_it(&merge.state))
    }

    /// The same, for whoever ends it: one that merges the active layer, or one that does not.
    ///
    /// # Errors
    /// As [`Machine::unfinished`].
    pub fn left_by(
        &self,
        disk: &Disk,
        merges_active: bool,
        state_dir: Option<&Path>,
    ) -> Result<Option<Unfinished>> {
        let known = self.unfinished(std::slice::from_ref(disk), state_dir)?;
        let fits = |state: &State| (state.kind == crate::state::Kind::ActiveCommit) == merges_active;
        Ok(self.switched(disk, &known, &fits).cloned())
    }

    /// Tidies up after a merge that has switched: its files are removed if the user asked for that then or now,
    /// or become empty overlays on base. When nothing remains to be done, the merge is forgotten.
    ///
    /// # Errors
    /// [`Hindrance::RecoverFirst`] if QEMU does not show the chain that it leaves; [`crate::Error::State`].
    pub fn tidy_up(&self, merge: &Unfinished, options: &TidyOptions) -> Result<Tidied> {
        let Some(leave) = Switched::seen_in(&merge.state, &self.graph) else {
            return Err(recover_first(merge));
        };
        let options = TidyOptions { delete: options.delete || merge.state.delete, ..options.clone() };
        let tidied = tidy::after(leave, &self.files, &options);
        self.relax(merge)?;
        if tidied.kept.is_empty() {
            merge.file.forget(&merge.state)?;
        }
        Ok(tidied)
    }

    /// Finishes earlier merges of a disk, because the chain is about to grow, and their states describe the
    /// chain as it is.
    ///
    /// # Errors
    /// [`Hindrance::UnderWay`] while the job of one runs; [`Hindrance::RecoverFirst`] where one cannot be ended now; those of
    /// the queries.
    pub fn settle(&self, disk: &Disk) -> Result<Option<Settled>> {
        let disks = std::slice::from_ref(disk);
        self.sweep(disks, None);
        let known = self.unfinished(disks, None)?;
        let mut settled = None;
        if let Some(open) = self.switched(disk, &known, &|_| true) {
            let tidied = self.tidy_up(open, &TidyOptions::default())?;
            if !tidied.kept.is_empty() {
                return Err(recover_first(open));
            }
            settled = Some(Settled { merge: open.outline(), tidied });
        }
        let jobs = self.graph.jobs(self.monitor)?;
        for merge in &known {
            let state = &merge.state;
            let of_disk = state.disk_before(&self.graph).or_else(|| state.disk_after(&self.graph));
            if of_disk.is_none_or(|of| of.name() != disk.name()) || state.phase == Phase::Switched {
                continue;
            }
            let has_job = jobs.iter().any(|(job, _)| job.id == state.job);
            if has_job {
                return Err(Hindrance::UnderWay { merge: Box::new(merge.outline()) }.into());
            }
            match NotSwitched::seen_in(state, &self.graph, has_job) {
                // The job is gone, and nothing was switched: there is nothing left to know.
                Some(leave) => {
                    self.relax(merge)?;
                    merge.file.forget(leave.state())?;
                }
                None => return Err(recover_first(merge)),
            }
        }
        Ok(settled)
    }

    /// Whether a disk has the chain that a merge leaves, though no switch is noted: another client has
    /// switched, or somebody has started base. Then the state is wrong about the disk.
    pub fn is_switched_unnoted(&self, merge: &Unfinished, disk: &Disk) -> bool {
        let shows = merge.state.disk_after(&self.graph).is_some_and(|on| on.name() == disk.name());
        shows && merge.state.phase == Phase::Copying
    }

    /// What can slow a guest down.
    ///
    /// # Errors
    /// [`Hindrance::NotSlowed`].
    pub fn throttle(&self, disk: &Disk) -> Result<Throttle> {
        Throttle::of(self.monitor, disk)
            .map_err(|error| Hindrance::NotSlowed { source: Box::new(error) }.into())
    }

    /// Cancels a job of a disk, whoever started it, and forgets its merge, which will never switch. Limits that
    /// were set for it are lifted.
    ///
    /// # Errors
    /// Those of [`crate::cancel`] and of putting the limits back: the merge is not forgotten then; [`crate::Error::State`].
    pub fn cancel(&self, disk: &Disk, job: &Job<'_, Connection>, state_dir: Option<&Path>) -> Result<()> {
        let known = self.unfinished(std::slice::from_ref(disk), state_dir)?;
        let of_job: Vec<_> = known.iter().filter(|merge| merge.state.job == job.id()).collect();
        // The limits of a removed device cannot be lifted; its job is cancelled all the same.
        let relaxed = of_job.iter().try_for_each(|merge| self.relax(merge));
        cancel(job)?;
        relaxed?;
        for merge in of_job {
            if let Some(leave) = NotSwitched::cancelled(&merge.state, job.id()) {
                merge.file.forget(leave.state())?;
            }
        }
        Ok(())
    }

    /// Restores the limits that a merge has noted, before the note is removed: a killed client may have left
    /// the disk limited.
    ///
    /// # Errors
    /// Those of the command and of the state file.
    pub(crate) fn relax(&self, merge: &Unfinished) -> Result<()> {
        relax(self.monitor, &mut merge.state.clone(), &merge.file)
    }
}
