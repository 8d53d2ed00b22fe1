//! A merge under the eyes of its user: waiting, progress, standing still, stopping, ending.

use std::cell::Cell;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use qmp_client::{Connection, Disk, Error, JobState, Kind, Merge, Phase, Progress, Throttle, Waited, Watch};
use serde_json::json;

use super::after;
use super::files::Files;
use super::outcome::Outcome;
use super::plan::End;
use super::tidy::Wishes;
use super::trouble::Session;
use super::{ask, connection_options, find, stall, states};
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::output::Console;
use crate::output::human::{printable, shell_word};
use crate::output::progress::Meter;
use crate::output::size;
use crate::signals::Stop;

/// How long other clients have their turn while a job stands still, and how long they may take it.
const TURN: Duration = Duration::from_secs(1);
const LONGEST_TURN: Duration = Duration::from_secs(60);

/// What a merge's client does until it is over.
pub(super) struct Drive<'a> {
    /// The call.
    pub(super) session: &'a Session<'a>,
    /// Where output goes.
    pub(super) console: &'a Console,
    /// The progress.
    pub(super) meter: Meter<'a>,
    /// The request to stop.
    pub(super) stop: Stop,
    /// When this client began.
    pub(super) began: Instant,
    /// How long the user wants to wait.
    pub(super) timeout: Option<Duration>,
    /// The disk, as the user named it.
    pub(super) disk: &'a str,
    /// Where else the state file may lie.
    pub(super) state_dir: Option<&'a std::path::Path>,
    /// What happens when all is copied.
    pub(super) end: End,
    /// Whether the job is cancelled when the user stops waiting: the call is the one that started it.
    pub(super) owns: bool,
    /// What to do with the files that are no longer needed.
    pub(super) wishes: Wishes,
    /// What slows the guest down if an active merge does not catch up with it.
    pub(super) throttle: Option<Throttle>,
    /// Whether it was said that the job stands still.
    pub(super) said_stalled: Cell<bool>,
}

/// How a stretch of waiting ended.
pub(super) enum Step {
    /// It is over.
    Over,
    /// The job met an error, and waits to be resumed.
    Stalled,
}

/// Why a user stops waiting.
enum GivesUp {
    Signal(Exit),
    Time(Duration),
}

impl Drive<'_> {
    /// Takes turns with other clients as long as the job stands still: a monitor serves one client at a time, and
    /// whoever makes room must be able to resume the job. `step` is how [`Drive::follow`] ended, and its
    /// connection must be closed.
    pub(super) fn take_turns(&self, mut step: Step) -> Result<Exit, Failure> {
        while let Step::Stalled = step {
            self.give_turn();
            let monitor = self.reconnect()?;
            let graph = ask(self.session, &monitor, &Files::of(&monitor))?;
            let disk = find(&graph, self.disk, self.session)?;
            let known = states::of(self.session, std::slice::from_ref(disk), self.state_dir)?;
            let merge =
                Merge::attach(&monitor, &graph, disk, &known).map_err(|e| self.session.failure(&e))?;
            let mut merge = merge.ok_or_else(|| self.ended_by_another(disk))?;
            step = self.follow(&monitor, &mut merge)?;
        }
        Ok(Exit::DONE)
    }

    /// Stays with the merge until it is over, stands still, or the user does not want to wait any longer.
    pub(super) fn follow(
        &self,
        monitor: &Connection,
        merge: &mut Merge<'_, Connection>,
    ) -> Result<Step, Failure> {
        let left = self.timeout.map(|timeout| timeout.saturating_sub(self.began.elapsed()));
        let mut watch = |progress: &Progress<'_>| {
            let job = progress.job;
            if !job.is_stalled() && self.said_stalled.replace(false) {
                stall::over(self);
            }
            if job.total > 0 && !job.is_stalled() {
                self.meter.update(job.done, job.total);
            }
            if self.stop.flag().load(Ordering::SeqCst) { Watch::Stop } else { Watch::GoOn }
        };
        let waited = match self.throttle.as_ref().filter(|_| merge.state().kind == Kind::ActiveCommit) {
            Some(throttle) => {
                merge.wait_converging(throttle, left, &mut watch, &mut |limit| self.say_limit(limit))
            }
            None => merge.wait(left, &mut watch),
        };
        match waited.map_err(|e| self.lost(&e))? {
            Waited::Reached(job) => self.end(monitor, merge, job.done),
            // Somebody else ended it, or it failed: what the merge says of it is the truth.
            Waited::Concluded(job) => self.end(monitor, merge, job.done),
            // An earlier client was lost when QEMU had switched; only the end is to be noted.
            Waited::Vanished if merge.state().phase == Phase::Switching && self.ends_with_a_switch(merge) => {
                self.end(monitor, merge, 0)
            }
            Waited::Vanished => self.vanished(merge),
            Waited::Stalled(job) => match self.gives_up() {
                Some(why) => Err(self.give_up(merge, &job, &why)),
                None => {
                    self.meter.clear();
                    if !self.said_stalled.replace(true) {
                        stall::explain(self, merge.state(), &job)?;
                    }
                    Ok(Step::Stalled)
                }
            },
            Waited::TimeUp(job) | Waited::Stopped(job) => {
                let why = self.gives_up().unwrap_or(GivesUp::Time(self.began.elapsed()));
                Err(self.give_up(merge, &job, &why))
            }
        }
    }

    fn ends_with_a_switch(&self, merge: &Merge<'_, Connection>) -> bool {
        merge.state().kind != Kind::ActiveCommit || self.end == End::Pivot
    }

    /// Everything is copied: does what the user wants then.
    fn end(
        &self,
        monitor: &Connection,
        merge: &mut Merge<'_, Connection>,
        done: u64,
    ) -> Result<Step, Failure> {
        self.meter.clear();
        let ended = match (merge.state().kind, self.end) {
            (Kind::ActiveCommit, End::Pivot) => merge.pivot(),
            (Kind::ActiveCommit, End::KeepOverlay) => {
                merge.keep_overlay().map_err(|e| self.failed(merge, &e))?;
                Outcome::kept_overlay(merge.state(), done, self.seconds()).tell(self.console)?;
                return Ok(Step::Over);
            }
            (Kind::ActiveCommit, _) => {
                Outcome::ready(self.session, merge.state(), done, self.seconds()).tell(self.console)?;
                return Ok(Step::Over);
            }
            _ => merge.finish(),
        };
        ended.map_err(|e| self.failed(merge, &e))?;
        let tidied = after::tidy(merge.state(), &Files::of(monitor), &self.wishes);
        let outcome =
            Outcome::switched(self.session, monitor, merge.state(), &tidied, Some(done), self.seconds());
        if outcome.is_complete() {
            merge.done().map_err(|e| self.session.failure(&e))?;
        }
        outcome.tell(self.console)?;
        Ok(Step::Over)
    }

    /// Tells that the guest is slowed down.
    fn say_limit(&self, limit: u64) {
        self.meter.clear();
        // A reader that went away must not stop a merge; the result will tell.
        let _ = self.console.event("throttled", json!({ "bytes-per-second": limit }));
        if !self.console.is_json() {
            self.console.note(&format!(
                "the guest writes faster than base takes it; its writes to this disk are limited to {}/s until the merge ends",
                size::short(limit)
            ));
        }
    }

    fn seconds(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    /// A merge that did not end as it should.
    fn failed(&self, merge: &mut Merge<'_, Connection>, error: &Error) -> Failure {
        // The job is gone and nothing is switched: there is nothing left to know.
        if matches!(error, Error::Job { .. }) && merge.state().phase == Phase::Copying {
            let _ = merge.done();
            let again = self.session.again();
            let hint = format!(
                "the chain is as it was; look for the reason (dmesg, QEMU's log), then again: {again}"
            );
            return self.session.failure_with(error, hint);
        }
        if merge.state().phase == Phase::Switching {
            let hint = format!(
                "which image is valid, and what to do: {}",
                self.session.other(&format!("recover {}", shell_word(&merge.state().disk)))
            );
            return self.session.failure_with(error, hint);
        }
        let left_waiting = matches!(
            error,
            Error::Refused { .. }
                | Error::NotFlushed { .. }
                | Error::Command { .. }
                | Error::State { .. }
                | Error::File { .. }
        );
        if left_waiting {
            let disk = shell_word(&merge.state().disk);
            let hint = format!(
                "nothing is switched, and the job waits; again: {}; or give it up: {}",
                self.session.again(),
                self.session.other(&format!("cancel {disk}"))
            );
            return self.session.failure_with(error, hint);
        }
        self.session.failure(error)
    }

    /// The connection broke off while the job ran.
    fn lost(&self, error: &Error) -> Failure {
        self.meter.clear();
        let hint = format!(
            "if QEMU still runs, the job goes on, and the same command picks it up again: {}; if it has ended, this says which \
             image holds the disk: {}",
            self.session.again(),
            self.session.other("recover")
        );
        match error {
            Error::Disconnected { .. } => self.session.failure_with(error, hint),
            _ => self.session.failure(error),
        }
    }

    /// The job is gone, and nobody saw how it ended; the graph tells.
    fn vanished(&self, merge: &mut Merge<'_, Connection>) -> Result<Step, Failure> {
        self.meter.clear();
        let state = merge.state();
        let message = format!(
            "the job {} of {} has vanished: another client has ended it; how it ended is not known",
            printable(&state.job),
            printable(&state.disk)
        );
        let hint = format!(
            "see the chain as it is: {}",
            self.session.other(&format!("chain {}", shell_word(&state.disk)))
        );
        Err(Report { kind: "job-vanished", message, hint: hint.into(), exit: Exit::FAILED }.into())
    }

    fn ended_by_another(&self, disk: &Disk) -> Failure {
        Report {
            kind: "job-vanished",
            message: format!("another client has ended the merge of {} meanwhile", printable(disk.name())),
            hint: format!(
                "see the chain as it is: {}",
                self.session.other(&format!("chain {}", shell_word(disk.name())))
            )
            .into(),
            exit: Exit::FAILED,
        }
        .into()
    }

    fn gives_up(&self) -> Option<GivesUp> {
        let over = self.timeout.filter(|timeout| self.began.elapsed() >= *timeout);
        self.stop.exit().map(GivesUp::Signal).or(over.map(GivesUp::Time))
    }

    /// Ends the job without its effect, or leaves it where it was started by another call.
    fn give_up(&self, merge: &mut Merge<'_, Connection>, job: &JobState, why: &GivesUp) -> Failure {
        self.meter.clear();
        let (kind, when, exit) = match why {
            GivesUp::Signal(exit) => ("interrupted", String::new(), *exit),
            GivesUp::Time(time) => ("timed-out", format!(" after {} s", time.as_secs_f64()), Exit::HALFWAY),
        };
        let share = if job.total == 0 { 0.0 } else { job.done as f64 / job.total as f64 * 100.0 };
        let disk = printable(&merge.state().disk);
        if !self.owns {
            let message = format!("stopped waiting{when}; the job goes on, at {share:.0} %");
            let hint = format!("to wait again: {}", self.session.again());
            return Report { kind, message, hint: hint.into(), exit }.into();
        }
        let lost = after::restore_points_lost(merge.state());
        if let Err(error) = merge.cancel() {
            return self.session.failure(&error);
        }
        let changed =
            if lost.is_empty() { String::new() } else { format!("; no restore points any more: {lost}") };
        let message = format!(
            "stopped{when} at {share:.0} %, and the job is cancelled: the chain of {disk} is as it was, with the same \
             bytes{changed}"
        );
        let hint = match why {
            GivesUp::Signal(_) => format!("nothing is lost; to begin anew: {}", self.session.again()),
            GivesUp::Time(_)
                if merge.state().kind == Kind::ActiveCommit && !self.session.words_have("--converge") =>
            {
                format!(
                    "nothing is lost; if the guest writes faster than QEMU copies: {}",
                    self.session.again_with("--converge")
                )
            }
            GivesUp::Time(_) => format!(
                "nothing is lost; again, with more time or without --timeout: {}",
                self.session.again()
            ),
        };
        Report { kind, message, hint: hint.into(), exit }.into()
    }

    /// Leaves the monitor to others for a moment.
    fn give_turn(&self) {
        let begin = Instant::now();
        while begin.elapsed() < TURN && self.gives_up().is_none() {
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn reconnect(&self) -> Result<Connection, Failure> {
        let begin = Instant::now();
        loop {
            match Connection::connect(self.session.address, &connection_options()) {
                Ok(monitor) => return Ok(monitor),
                Err(Error::NoGreeting { .. }) if begin.elapsed() < LONGEST_TURN => {}
                Err(error) => return Err(self.session.failure(&error)),
            }
        }
    }
}
