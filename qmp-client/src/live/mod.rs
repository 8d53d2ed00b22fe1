//! A live merge as a whole: its procedure, its job in QEMU, and its state file, always in the right order.

pub(crate) mod counterpart;
pub(crate) mod discover;
mod held;
mod hindrance;
pub(crate) mod machine;
pub(crate) mod outline;
mod paused;
pub(crate) mod plan;
mod procedure;
pub(crate) mod recover;
pub(crate) mod run;
#[cfg(test)]
mod tests;
mod throttle;
pub(crate) mod tidy;
pub(crate) mod verdict;

use std::path::PathBuf;
use std::time::Duration;

use qapi::qmp::JobStatus;

use crate::block::graph::{Disk, Graph, Layer};
use crate::block::jobs::{Job, Progress, Waited, Watch, cancel, jobs};
use crate::block::merge::{Merged, Procedure, with_chain};
use crate::error::{Error, Refusal, Result};
use crate::qmp::address::Address;
use crate::qmp::monitor::Monitor;
use crate::state::{Kind, Phase, Pointer, State, StateFile, StateLayer, boot, now_ns};

use held::{is_written_while_held, note_switching};
pub use hindrance::Hindrance;
pub use throttle::Throttle;

/// What a user wants of a merge, beyond the merge itself.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Wishes {
    /// Delete the merged files afterwards. The library only keeps this wish; who calls it deletes.
    pub delete: bool,
    /// Where else to look for other users of these files before; absolute paths. Kept as the wish itself.
    pub scan: Vec<PathBuf>,
    /// Merged layers that cannot become empty overlays on base may stay as they are. Kept as the wish itself.
    pub allow_stale: bool,
    /// Pivot as soon as an active commit is ready.
    pub pivot: bool,
    /// End an active commit without a pivot as soon as it is ready.
    pub keep_overlay: bool,
    /// The indexes of the layers whose external data file is emptied with them: those files are noted. Others stay.
    pub data_files: Vec<usize>,
    /// The names of files that QEMU tells mean other files here, as from inside a container: no stamp is taken.
    pub files_are_elsewhere: bool,
}

/// A merge that is under way, or switched and not yet cleaned up after.
///
/// Every step writes the state file before it does what the file then says, so that [`State::valid_top`] is true
/// whenever QEMU, this program or the host ends.
#[derive(Debug)]
pub struct Merge<'m, M: Monitor + ?Sized> {
    monitor: &'m M,
    procedure: Procedure,
    job: Job<'m, M>,
    file: StateFile,
    state: State,
    pointer: Pointer,
}

impl<'m, M: Monitor + ?Sized> Merge<'m, M> {
    /// Writes the state file, and then starts the job. The commit or pull must have passed its preflight.
    ///
    /// # Errors
    /// [`Error::File`] if the file cannot be written, and [`Error::Refused`] if it speaks of a merge that has switched
    /// and is not cleaned up after: nothing is begun then. Those of the start: the file is removed again.
    pub fn begin(
        monitor: &'m M,
        procedure: Procedure,
        file: StateFile,
        address: &Address,
        wishes: &Wishes,
    ) -> Result<Self> {
        if let Some(left) = file.load()?
            && left.phase != Phase::Copying
        {
            let state_file = file.path().to_owned();
            return Err(Refusal::NotCleanedUp { state_file, disk: left.disk }.into());
        }
        let mut state = new_state(&procedure, address, wishes)?;
        let pointer = Pointer::of(address);
        file.save(&mut state)?;
        pointer.add(&file);
        match procedure.start(monitor) {
            Ok(job) => Ok(Self { monitor, procedure, job, file, state, pointer }),
            // It may have been started all the same.
            Err(error @ (Error::TimedOut { .. } | Error::Disconnected { .. } | Error::Unreadable { .. })) => {
                Err(error)
            }
            Err(error) => {
                file.remove()?;
                pointer.remove(&file);
                Err(error)
            }
        }
    }

    /// Finds the merge of this disk among `states` (see [`crate::find_states`]) whose job QEMU still has, and gets ready
    /// to go on with it. A merge that QEMU has carried out, but whose job is gone, is found too: it can be
    /// finished or pivoted at once, which only records it.
    ///
    /// `None` if there is no such merge.
    ///
    /// # Errors
    /// Those of the queries.
    pub fn attach(
        monitor: &'m M,
        graph: &Graph,
        disk: &Disk,
        states: &[(StateFile, State)],
    ) -> Result<Option<Self>> {
        let all = graph.jobs(monitor)?;
        for (file, state) in states {
            let job = all.iter().find(|(job, _)| job.id == state.job);
            let is_it = match job {
                Some((_, Some(at))) => at.name() == disk.name(),
                Some((_, None)) => state.disk == disk.name() || has_chain(disk, state.layers_after()),
                None => state.phase == Phase::Switching && has_chain(disk, state.layers_after()),
            };
            if !is_it {
                continue;
            }
            let Some(procedure) = Procedure::recall(state) else { continue };
            let address = state.address.parse();
            let pointer = address.map_or_else(|_| Pointer::default(), |address| Pointer::of(&address));
            let job = Job::new(monitor, state.job.clone());
            let (file, state) = (file.clone(), state.clone());
            return Ok(Some(Self { monitor, procedure, job, file, state, pointer }));
        }
        Ok(None)
    }

    /// What the state file says.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The state file.
    pub(crate) fn file(&self) -> &StateFile {
        &self.file
    }

    /// What is merged.
    pub fn procedure(&self) -> &Procedure {
        &self.procedure
    }

    /// The monitor of that QEMU.
    pub(crate) fn monitor(&self) -> &'m M {
        self.monitor
    }

    /// The job in QEMU.
    pub fn job(&self) -> &Job<'m, M> {
        &self.job
    }

    /// Waits until all is copied: an active commit is ready then, any other merge pending. As [`Job::wait`] does.
    ///
    /// # Errors
    /// Those of [`Job::wait`].
    pub fn wait(
        &self,
        timeout: Option<Duration>,
        watch: &mut dyn FnMut(&Progress<'_>) -> Watch,
    ) -> Result<Waited> {
        self.noting_loss(self.job.wait(self.procedure.goal(), timeout, watch))
    }

    /// Ends an intermediate commit or a pull: flushes what was written, notes that QEMU is about to switch, has it
    /// switch, and notes that it has. The state file stays until [`Merge::done`].
    ///
    /// # Errors
    /// [`Error::Refused`] for an active commit, or if not all is copied; those of the flush and of the state file:
    /// nothing is switched then. [`Error::Job`] if the switch fails: the job is gone then, and the state file says
    /// what the graph shows. If QEMU does not answer any more, the state file tells what to look at.
    pub fn finish(&mut self) -> Result<Merged> {
        if self.state.kind == Kind::ActiveCommit {
            return Err(Refusal::EndOfActiveCommit.into());
        }
        self.switch()
    }

    /// Ends an active commit: the guest writes to base then. While QEMU holds its writes, and base equals the active
    /// layer, the state file is told that base is the valid top. The file stays until [`Merge::done`].
    ///
    /// # Errors
    /// As [`Merge::finish`]. If the state file cannot be written, the job is cancelled and the guest stays on the active
    /// layer.
    pub fn pivot(&mut self) -> Result<Merged> {
        if self.state.kind != Kind::ActiveCommit {
            return Err(Refusal::OnlyActiveCommit { step: "pivots" }.into());
        }
        self.switch()
    }

    /// Ends an active commit without a pivot. Base then is exactly what the disk was at one moment, and durable; the
    /// guest stays on the active layer. The state file is removed.
    ///
    /// # Errors
    /// [`Error::Refused`] for other merges, or if the job is not ready; [`Error::Job`] if it failed.
    pub fn keep_overlay(&mut self) -> Result<Disk> {
        if self.state.kind != Kind::ActiveCommit {
            return Err(Refusal::OnlyActiveCommit { step: "can keep the overlay" }.into());
        }
        self.stay()?;
        let kept = self.noting_loss(self.procedure.keep_overlay(&self.job, self.monitor));
        self.relax_after(kept).and_then(|disk| self.done().map(|()| disk))
    }

    /// Cancels the job, waits until it is gone, and removes the state file. The chain is as it was; what was copied
    /// stays copied.
    ///
    /// # Errors
    /// Those of the commands; [`Error::Job`] if the job was done before. The state file stays then.
    pub fn cancel(&mut self) -> Result<()> {
        self.stay()?;
        let mut cancelled = self.noting_loss(cancel(&self.job));
        if matches!(self.now_after(), Ok(Some(_))) {
            self.enter(Phase::Switched, self.state.top_after())?;
            let why = "it had switched before it was cancelled".to_owned();
            cancelled = Err(Error::Job { id: self.job.id().to_owned(), why });
        }
        self.relax_after(cancelled)?;
        self.done()
    }

    /// Notes that merged layers may stay as they are, with old data.
    pub(crate) fn accept_stale(&mut self) -> Result<()> {
        if self.state.allow_stale {
            return Ok(());
        }
        self.state.allow_stale = true;
        self.file.save_as_it_is(&self.state)
    }

    /// Everything is done, what was merged is cleaned up: removes the state file.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be removed; those of `Merge::relax`.
    pub fn done(&mut self) -> Result<()> {
        self.relax()?;
        self.file.remove()?;
        self.pointer.remove(&self.file);
        Ok(())
    }

    fn switch(&mut self) -> Result<Merged> {
        let status = self.job.state()?.map(|job| job.status);
        let unseen = status.is_none() && self.state.phase == Phase::Switching;
        // The job is gone, and nobody saw how it ended; the graph shows it.
        let switched = if unseen { self.switch_unseen() } else { self.switch_job(status) };
        let switched = match switched {
            Ok(merged) => self.note_switched(unseen).map(|()| merged),
            Err(error) => {
                if let Error::Disconnected { .. } = error {
                    self.note_lost();
                    self.note_gone();
                }
                // The error that is returned is the first one; the note stays, and the next call does it.
                let _ = self.go_on();
                self.after_failure();
                Err(error)
            }
        };
        self.relax_after(switched)
    }

    fn switch_unseen(&mut self) -> Result<Merged> {
        self.note_pause()?;
        self.procedure.verify(&self.job, self.monitor)
    }

    fn switch_job(&mut self, status: Option<JobStatus>) -> Result<Merged> {
        if status == Some(JobStatus::pending) {
            self.procedure.find_means(self.monitor)?;
        }
        self.note_pause()?;
        let (state, file, monitor) = (&mut self.state, &self.file, self.monitor);
        self.procedure.finish(&self.job, monitor, &mut || {
            note_switching(state, file)?;
            if state.kind != Kind::ActiveCommit {
                return Ok(());
            }
            let why = match is_written_while_held(monitor, state) {
                Ok(false) => return Ok(()),
                Ok(true) => {
                    let why = "somebody has written to the disk while QEMU held it; without the pivot nothing is lost";
                    Error::Job { id: state.job.clone(), why: why.to_owned() }
                }
                Err(error) => error,
            };
            // The guest stays where it is: the active layer is the valid top again before the job is cancelled.
            let valid_top = state.top_before();
            state.enter(Phase::Copying, valid_top);
            file.save(state)?;
            Err(why)
        })
    }

    /// The disk with the chain that the merge leaves, if QEMU shows it.
    fn now_after(&self) -> Result<Option<Disk>> {
        with_chain(self.monitor, self.procedure.layers_after())
    }

    /// If nobody saw the switch, somebody may have started base by hand, and the guest have gone on in the old active image:
    /// that one must be as it was when the switch was noted, or it is not touched.
    fn note_switched(&mut self, unseen: bool) -> Result<()> {
        let before = self.state.active().and_then(|layer| layer.stamp.clone());
        self.state.paused = false;
        self.state.enter(Phase::Switched, self.state.top_after());
        if let (true, Kind::ActiveCommit, Some(active)) =
            (unseen, self.state.kind, self.state.layers.first_mut())
        {
            active.stamp = before;
        }
        self.file.save(&mut self.state)
    }

    /// If QEMU has gone while this client waited for the copy, or before it had QEMU switch: the time of that tells that what was
    /// written to base before was no guest's.
    fn noting_loss<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(Error::Disconnected { .. }) = &result {
            self.note_lost();
        }
        result
    }

    fn note_lost(&self) {
        let is_noted = |state: &State| state.job == self.state.job && state.phase == Phase::Copying;
        if let Ok(Some(mut state)) = self.file.load()
            && is_noted(&state)
        {
            state.gone_ns = Some(now_ns());
            // Without it there is only more doubt.
            let _ = self.file.save_as_it_is(&state);
        }
    }

    /// QEMU has gone between the note of the switch and its success. The time of that tells which writes were its own.
    fn note_gone(&mut self) {
        let is_noted = |state: &State| state.job == self.state.job && state.phase == Phase::Switching;
        if self.state.phase == Phase::Switching && matches!(self.file.load(), Ok(Some(s)) if is_noted(&s)) {
            self.state.gone_ns = Some(now_ns());
            // Without it there is only more doubt.
            let _ = self.file.save_as_it_is(&self.state);
        }
    }

    /// A switch has failed. If QEMU shows that the disk is where it was, the state file says so again. If it does not
    /// answer, or shows something else, the file stays as it is: there is doubt, and it helps to resolve it.
    fn after_failure(&mut self) {
        if self.state.phase != Phase::Switching {
            return;
        }
        let gone = jobs(self.monitor).is_ok_and(|all| all.iter().all(|job| job.id != self.job.id()));
        let before = self.procedure.chain();
        let stands = gone && matches!(with_chain(self.monitor, &before), Ok(Some(_)));
        if stands {
            // The error that is returned is the first one; this one leaves the doubt that the file speaks of.
            let _ = self.stay();
        }
    }

    /// Notes that nothing is switched, and nothing will be: before a pending job is cancelled, or after a switch that
    /// failed.
    fn stay(&mut self) -> Result<()> {
        if self.state.phase == Phase::Copying {
            return Ok(());
        }
        if let Some(JobStatus::concluded) | None = self.job.state()?.map(|job| job.status)
            && !matches!(with_chain(self.monitor, &self.procedure.chain()), Ok(Some(_)))
        {
            return Err(Refusal::OtherChain { job: self.job.id().to_owned() }.into());
        }
        self.enter(Phase::Copying, self.state.top_before())
    }

    fn enter(&mut self, phase: Phase, valid_top: String) -> Result<()> {
        self.state.enter(phase, valid_top);
        self.file.save(&mut self.state)
    }

    /// Puts former limits back, whatever the result was; an error of its own is told if there is no other.
    fn relax_after<T>(&mut self, result: Result<T>) -> Result<T> {
        let relaxed = self.relax();
        result.and_then(|value| relaxed.map(|()| value))
    }
}

/// An address as a state file names it: it means the same in another folder.
fn noted(address: &Address) -> String {
    match address {
        Address::Unix(path) => {
            Address::Unix(std::path::absolute(path).unwrap_or_else(|_| PathBuf::from(path))).to_string()
        }
        tcp @ Address::Tcp { .. } => tcp.to_string(),
    }
}

fn new_state(procedure: &Procedure, address: &Address, wishes: &Wishes) -> Result<State> {
    let chain = procedure.chain();
    let span = procedure.span();
    let layers = chain.iter().map(|layer| {
        let here = !wishes.files_are_elsewhere;
        let mut noted = StateLayer::of(layer, here)?;
        if here && wishes.data_files.contains(&layer.index) {
            noted.note_data_file()?;
        }
        Ok(noted)
    });
    Ok(State {
        version: crate::state::VERSION,
        created_ns: now_ns(),
        changed_ns: now_ns(),
        gone_ns: None,
        boot: boot(),
        address: noted(address),
        disk: procedure.disk().to_owned(),
        job: procedure.job_id().to_owned(),
        kind: procedure.kind(),
        phase: Phase::Copying,
        valid_top: chain.first().map(|layer| layer.file.clone()).unwrap_or_default(),
        layers: layers.collect::<Result<_>>()?,
        base: span.base,
        top: span.top,
        backing: procedure.relink(),
        delete: wishes.delete,
        allow_stale: wishes.allow_stale,
        scan: wishes.scan.clone(),
        pivot: wishes.pivot,
        keep_overlay: wishes.keep_overlay,
        nbd_socket: procedure.options().nbd_socket.clone(),
        throttled: None,
        paused: false,
    })
}

fn has_chain<'a>(disk: &Disk, layers: impl Iterator<Item = &'a StateLayer>) -> bool {
    let same = |(now, then): (&Layer, &StateLayer)| now.node == then.node && now.file == then.file;
    let then: Vec<&StateLayer> = layers.collect();
    disk.layers().len() == then.len() && disk.layers().iter().zip(then).all(same)
}
