//! Drives a merge to its end: waiting, standing still, stopping, switching, tidying up.

mod driver;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use super::Throttle;
use super::machine::Machine;
use super::outline::Outline;
use super::plan::End;
use super::tidy::{Tidied, TidyOptions};
use crate::block::jobs::{JobState, Waited, Watch};
use crate::error::{Error, Result};
use crate::qmp::address::Address;
use crate::qmp::connection::{Connection, Options};
use crate::state::{Kind, Phase};

pub use driver::{Copying, Driver};

/// How long other clients have their turn while a job stands still, and how long they may take it.
const TURN: Duration = Duration::from_secs(1);
const LONGEST_TURN: Duration = Duration::from_secs(60);
/// How often is asked meanwhile whether to go on waiting.
const TICK: Duration = Duration::from_millis(50);

/// How a merge is driven to its end.
#[derive(Debug)]
#[non_exhaustive]
pub struct Run<'a> {
    /// Where QEMU's monitor listens.
    pub address: &'a Address,
    /// The disk.
    pub disk: &'a str,
    /// Where else the state file may lie.
    pub state_dir: Option<PathBuf>,
    /// What happens when all is copied.
    pub end: End,
    /// Whether the job is cancelled when nobody waits any longer: who has started it gives it up.
    pub owns: bool,
    /// How long to wait.
    pub timeout: Option<Duration>,
    /// What to do with the files that are no longer needed.
    pub tidy: TidyOptions,
    /// What slows the guest down if an active merge does not catch up with it.
    pub throttle: Option<Throttle>,
    began: Instant,
    is_stalled: bool,
    is_stopped: bool,
}

/// What is told while a merge runs. The answer says whether to go on.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// So many bytes are done, of so many.
    Copied {
        /// Bytes done.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// The guest's writes are limited to so many bytes per second.
    Limited(u64),
    /// The job has met an error, and stands still until somebody resumes it.
    Stalled {
        /// The merge.
        merge: &'a Outline,
        /// Its job.
        job: &'a JobState,
    },
    /// The job goes on.
    Resumed,
    /// Nothing new; other clients have their turn.
    Waiting,
}

/// How a stretch of waiting ended.
#[derive(Debug)]
pub enum Step {
    /// It is over.
    Over(Box<Ended>),
    /// The job stands still: [`Run::take_turns`] waits until somebody resumes it.
    Stalled,
}

/// How a merge ended.
#[derive(Debug)]
#[non_exhaustive]
pub struct Ended {
    /// The merge.
    pub merge: Outline,
    /// How.
    pub how: How,
    /// Bytes that the job has done, as QEMU counts them.
    pub copied: u64,
    /// Since this client began.
    pub took: Duration,
    /// The process of QEMU, where it runs on this host.
    pub process: Option<u32>,
}

/// How a merge ended.
#[derive(Debug)]
#[non_exhaustive]
pub enum How {
    /// The disk has its shorter chain; this became of the files that are no longer needed.
    Switched(Box<Tidied>),
    /// The guest stays, and base holds what the disk showed.
    KeptOverlay,
    /// All is copied, and the job goes on: the pivot or the end is still to come.
    Ready,
}

/// Why a merge was not driven to its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Stopped {
    /// The connection broke off while the job ran; it goes on if QEMU does.
    #[error("{0}")]
    Lost(Error),
    /// The job failed, or the switch did.
    #[error("{error}")]
    Failed {
        /// The merge.
        merge: Outline,
        /// Why.
        error: Error,
        /// What stands.
        after: AfterFailure,
    },
    /// Another client has ended the job, and nobody saw how.
    #[error(
        "the job {} of {} has vanished: another client has ended it; how it ended is not known",
        qcow2::error::shown(&.merge.job), qcow2::error::shown(&.merge.disk)
    )]
    Vanished {
        /// The merge.
        merge: Outline,
    },
    /// Another client has ended the merge while this one let others have their turn.
    #[error("another client has ended the merge of {} meanwhile", qcow2::error::shown(.disk))]
    EndedByAnother {
        /// The disk.
        disk: String,
    },
    /// Nobody waits any longer.
    #[error("stopped waiting for the merge of {}", qcow2::error::shown(&.merge.disk))]
    GivenUp {
        /// The merge.
        merge: Outline,
        /// Bytes done, and in all.
        done: (u64, u64),
        /// After this time, where it was up; none where the watcher said so.
        after: Option<Duration>,
        /// Whether the job was cancelled: the chain is as it was. Otherwise it goes on.
        cancelled: bool,
    },
    /// Anything else.
    #[error("{0}")]
    Other(#[from] Error),
}

/// What a merge that failed leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AfterFailure {
    /// The job is gone, and nothing is switched: the chain is as it was.
    AsItWas,
    /// Nothing is switched, and the job waits for another try.
    Waiting,
    /// It was about to switch: what is valid is to be found out, by recovery.
    InDoubt,
    /// Not known.
    Unknown,
}

type RunResult<T> = std::result::Result<T, Box<Stopped>>;

impl<'a> Run<'a> {
    /// A run that waits without end, and leaves the job to others when nobody waits any longer.
    pub fn new(address: &'a Address, disk: &'a str, end: End) -> Self {
        Self {
            address,
            disk,
            state_dir: None,
            end,
            owns: false,
            timeout: None,
            tidy: TidyOptions::default(),
            throttle: None,
            began: Instant::now(),
            is_stalled: false,
            is_stopped: false,
        }
    }

    /// Takes turns with other clients as long as the job stands still: a monitor serves one client at a time, and
    /// whoever makes room must be able to resume the job. `step` is how [`Run::follow`] ended, and its
    /// connection must be closed.
    ///
    /// # Errors
    /// As [`Run::follow`].
    pub fn take_turns(
        &mut self,
        mut step: Step,
        watch: &mut dyn FnMut(Event<'_>) -> Watch,
    ) -> RunResult<Ended> {
        loop {
            match step {
                Step::Over(ended) => return Ok(*ended),
                Step::Stalled => step = self.take_turn(watch)?,
            }
        }
    }

    fn take_turn(&mut self, watch: &mut dyn FnMut(Event<'_>) -> Watch) -> RunResult<Step> {
        let begin = Instant::now();
        while begin.elapsed() < TURN && self.gives_up(watch).is_none() {
            thread::sleep(TICK);
        }
        let monitor = self.reconnect()?;
        let machine = Machine::look(&monitor, self.address).map_err(other)?;
        let disk = machine.graph().disk(self.disk).map_err(other)?;
        let merge = machine.attach(disk, self.state_dir.as_deref()).map_err(other)?;
        let ended = || Stopped::EndedByAnother { disk: disk.name().to_owned() };
        let mut merge = merge.ok_or_else(ended)?;
        self.follow(&mut merge, watch)
    }

    fn reconnect(&self) -> Result<Connection> {
        let begin = Instant::now();
        let options = Options { allow_tcp: true, ..Options::default() };
        loop {
            match Connection::connect(self.address, &options) {
                Err(Error::NoGreeting { .. }) if begin.elapsed() < LONGEST_TURN => {}
                done => return done,
            }
        }
    }

    /// Stays with the merge until it is over, stands still, or nobody wants to wait any longer.
    ///
    /// # Errors
    /// [`Stopped`].
    pub fn follow(
        &mut self,
        merge: &mut dyn Driver,
        watch: &mut dyn FnMut(Event<'_>) -> Watch,
    ) -> RunResult<Step> {
        let after = self.timeout.map(|timeout| timeout.saturating_sub(self.began.elapsed()));
        let outline = merge.outline();
        let throttle = self.throttle.as_ref().filter(|_| outline.merges_active());
        let (is_stalled, is_stopped) = (&mut self.is_stalled, &mut self.is_stopped);
        let mut tell = |copying: Copying<'_>| {
            let answer = match copying {
                Copying::Limited(limit) => watch(Event::Limited(limit)),
                Copying::Job(job) => {
                    if !job.is_stalled() && std::mem::take(is_stalled) {
                        watch(Event::Resumed);
                    }
                    match job.total > 0 && !job.is_stalled() {
                        true => watch(Event::Copied { done: job.done, total: job.total }),
                        false => watch(Event::Waiting),
                    }
                }
            };
            *is_stopped |= answer == Watch::Stop;
            answer
        };
        let waited = merge.wait(throttle, after, &mut tell).map_err(|error| match error {
            Error::Disconnected { .. } => Box::new(Stopped::Lost(error)),
            error => other(error),
        })?;
        match waited {
            Waited::Reached(job) => self.end(merge, job.done),
            // Somebody else ended it, or it failed: what the merge says of it is the truth.
            Waited::Concluded(job) => self.end(merge, job.done),
            // An earlier client was lost when QEMU had switched; only the end is to be noted.
            Waited::Vanished if outline.phase == Phase::Switching && self.ends_with_a_switch(&outline) => {
                self.end(merge, 0)
            }
            Waited::Vanished => Err(Box::new(Stopped::Vanished { merge: outline })),
            Waited::Stalled(job) => match self.gives_up(watch) {
                Some(after) => Err(self.give_up(merge, &job, after)),
                None => {
                    if !std::mem::replace(&mut self.is_stalled, true) {
                        watch(Event::Stalled { merge: &outline, job: &job });
                    }
                    Ok(Step::Stalled)
                }
            },
            Waited::TimeUp(job) | Waited::Stopped(job) => {
                let after = self.gives_up(watch).unwrap_or_else(|| Some(self.began.elapsed()));
                Err(self.give_up(merge, &job, after))
            }
        }
    }

    fn ends_with_a_switch(&self, merge: &Outline) -> bool {
        merge.kind != Kind::ActiveCommit || self.end == End::Pivot
    }

    /// Everything is copied: does what is wanted then.
    fn end(&self, merge: &mut dyn Driver, copied: u64) -> RunResult<Step> {
        let ended = match (merge.outline().kind, self.end) {
            (Kind::ActiveCommit, End::Pivot) => merge.pivot(),
            (Kind::ActiveCommit, End::KeepOverlay) => {
                merge.keep_overlay().map_err(|error| failed(merge, error))?;
                return Ok(self.over(merge, How::KeptOverlay, copied));
            }
            (Kind::ActiveCommit, _) => return Ok(self.over(merge, How::Ready, copied)),
            _ => merge.finish(),
        };
        ended.map_err(|error| failed(merge, error))?;
        let tidied = merge.tidy(&self.tidy);
        let step = |tidied| self.over(merge, How::Switched(Box::new(tidied)), copied);
        if !tidied.kept.is_empty() {
            return Ok(step(tidied));
        }
        let step = step(tidied);
        merge.done().map_err(other)?;
        Ok(step)
    }

    fn over(&self, merge: &dyn Driver, how: How, copied: u64) -> Step {
        let (took, process) = (self.began.elapsed(), merge.process());
        Step::Over(Box::new(Ended { merge: merge.outline(), how, copied, took, process }))
    }

    /// Whether nobody waits any longer; inside, the time that is up, or none where the watcher said so.
    fn gives_up(&mut self, watch: &mut dyn FnMut(Event<'_>) -> Watch) -> Option<Option<Duration>> {
        self.is_stopped = self.is_stopped || watch(Event::Waiting) == Watch::Stop;
        if self.is_stopped {
            return Some(None);
        }
        self.timeout.filter(|timeout| self.began.elapsed() >= *timeout).map(Some)
    }

    /// Ends the job without its effect, or leaves it where it was started by another call.
    fn give_up(&self, merge: &mut dyn Driver, job: &JobState, after: Option<Duration>) -> Box<Stopped> {
        let outline = merge.outline();
        if self.owns
            && let Err(error) = merge.cancel()
        {
            return other(error);
        }
        let done = (job.done, job.total);
        Box::new(Stopped::GivenUp { merge: outline, done, after, cancelled: self.owns })
    }
}

fn other(error: Error) -> Box<Stopped> {
    Box::new(Stopped::Other(error))
}

impl From<Error> for Box<Stopped> {
    fn from(error: Error) -> Self {
        other(error)
    }
}

/// A merge that did not end as it should.
fn failed(merge: &mut dyn Driver, error: Error) -> Box<Stopped> {
    let outline = merge.outline();
    let after = match (&error, outline.phase) {
        // The job is gone and nothing is switched: there is nothing left to know.
        (Error::Job { .. }, Phase::Copying) => {
            // If the file stays, the next merge finds that nothing was switched.
            let _ = merge.done();
            AfterFailure::AsItWas
        }
        (_, Phase::Switching) => AfterFailure::InDoubt,
        (
            Error::Refused { .. }
            | Error::NotFlushed { .. }
            | Error::Command { .. }
            | Error::State { .. }
            | Error::File { .. },
            _,
        ) => AfterFailure::Waiting,
        _ => AfterFailure::Unknown,
    };
    Box::new(Stopped::Failed { merge: outline, error, after })
}
