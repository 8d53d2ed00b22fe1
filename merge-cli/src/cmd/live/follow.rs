//! Follows a merge: tells its user what happens while it runs, and how it ended.

use std::sync::atomic::Ordering;
use std::time::Duration;

use qmp_client::ways;
use qmp_client::{Driver, Ended, How, Outline, Run, RunEvent, Step, Stopped, Watch};
use serde_json::json;

use super::outcome::Outcome;
use super::stall;
use super::trouble::Session;
use super::ways::hints;
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::hint::{Hint, HintKind};
use crate::output::Console;
use crate::output::human::{list, printable};
use crate::output::progress::Meter;
use crate::output::size;
use crate::signals::Stop;

/// What is needed to follow a merge to its end.
pub(super) struct Follow<'a> {
    /// The call.
    pub(super) session: &'a Session<'a>,
    /// Where output goes.
    pub(super) console: &'a Console,
    /// The progress.
    pub(super) meter: Meter<'a>,
    /// The request to stop.
    pub(super) stop: Stop,
    /// The merge, as it is driven.
    pub(super) run: Run<'a>,
    /// Whether the guest can be slowed down.
    pub(super) can_converge: bool,
}

impl Follow<'_> {
    /// Follows the merge until it is over or stands still.
    pub(super) fn step(&mut self, merge: &mut dyn Driver) -> Result<Step, Failure> {
        let teller = Teller::of(self.session, self.console, &self.meter, &self.stop);
        let step = self.run.follow(merge, &mut |event| teller.tell(&event));
        self.meter.clear();
        step.map_err(|stopped| self.failure(&stopped))
    }

    /// As long as the merge stands still, lets other clients use the monitor in turn; then tells the end.
    pub(super) fn until_over(mut self, step: Step) -> Result<Exit, Failure> {
        let teller = Teller::of(self.session, self.console, &self.meter, &self.stop);
        let ended = self.run.take_turns(step, &mut |event| teller.tell(&event));
        self.meter.clear();
        let ended = ended.map_err(|stopped| self.failure(&stopped))?;
        self.outcome(&ended).tell(self.console)?;
        Ok(Exit::DONE)
    }

    fn outcome(&self, ended: &Ended) -> Outcome {
        let (merge, copied, seconds) = (&ended.merge, ended.copied, ended.took.as_secs_f64());
        match &ended.how {
            How::Switched(tidied) => {
                Outcome::switched(self.session, ended.process, merge, tidied, Some(copied), seconds)
            }
            How::KeptOverlay => Outcome::kept_overlay(merge, copied, seconds),
            _ => Outcome::ready(self.session, merge, copied, seconds),
        }
    }

    /// The failure of a merge that did not end.
    fn failure(&self, stopped: &Stopped) -> Failure {
        let session = self.session;
        let ways = ways::stopped(stopped, &session.wanted());
        match stopped {
            Stopped::Other(error) | Stopped::Lost(error) | Stopped::Failed { error, .. } => {
                session.failure_with(error, &ways)
            }
            Stopped::GivenUp { merge, done, after, cancelled } => {
                self.given_up(merge, *done, *after, *cancelled)
            }
            // The job is gone, and nobody saw how it ended; the graph tells.
            _ => {
                let (message, hint) = (stopped.to_string(), hints(&ways, session));
                Report { kind: "job-vanished", message, hint, exit: Exit::FAILED }.into()
            }
        }
    }

    fn given_up(
        &self,
        merge: &Outline,
        (done, total): (u64, u64),
        after: Option<Duration>,
        cancelled: bool,
    ) -> Failure {
        let (session, signal) = (self.session, self.stop.exit());
        let (kind, when, exit) = match (signal, after) {
            (None, Some(time)) => ("timed-out", format!(" after {} s", time.as_secs_f64()), Exit::HALFWAY),
            (signal, _) => ("interrupted", String::new(), signal.unwrap_or(Exit::HALFWAY)),
        };
        let share = if total == 0 { 0.0 } else { done as f64 / total as f64 * 100.0 };
        let disk = printable(&merge.disk);
        let again = |words: &str| Hint::command(HintKind::Again, words, session.again());
        if !cancelled {
            let message = format!("stopped waiting{when}; the job goes on, at {share:.0} %");
            return Report { kind, message, hint: again("to wait again").into(), exit }.into();
        }
        let lost = list(merge.restore_points_lost().map(|layer| &layer.file));
        let changed = match lost.is_empty() {
            true => String::new(),
            false => format!("; no restore points any more: {lost}"),
        };
        let message = format!(
            "stopped{when} at {share:.0} %, and the job is cancelled: the chain of {disk} is as it was, with the same \
             bytes{changed}"
        );
        let hint = match (signal, after) {
            (None, Some(_))
                if merge.merges_active() && self.can_converge && !session.words_have("--converge") =>
            {
                Hint::command(
                    HintKind::Converge,
                    "nothing is lost; if the guest writes faster than QEMU copies",
                    session.again_with(&["--converge"]),
                )
            }
            (None, Some(_)) => again("nothing is lost; again, with more time or without --timeout"),
            _ => again("nothing is lost; to begin anew"),
        };
        Report { kind, message, hint: hint.into(), exit }.into()
    }
}

/// Tells what happens while a merge runs. A reader that went away must not stop a merge; the result will tell.
struct Teller<'a> {
    session: &'a Session<'a>,
    console: &'a Console,
    meter: &'a Meter<'a>,
    stop: &'a Stop,
}

impl<'a> Teller<'a> {
    fn of(session: &'a Session<'a>, console: &'a Console, meter: &'a Meter<'a>, stop: &'a Stop) -> Self {
        Self { session, console, meter, stop }
    }

    fn tell(&self, event: &RunEvent<'_>) -> Watch {
        match event {
            RunEvent::Copied { done, total } => self.meter.update(*done, *total),
            RunEvent::Limited(limit) => self.say_limit(*limit),
            RunEvent::Stalled { merge, job } => {
                self.meter.clear();
                stall::explain(self.session, self.console, merge, job);
            }
            RunEvent::Resumed => stall::over(self.console),
            _ => {}
        }
        if self.stop.flag().load(Ordering::SeqCst) { Watch::Stop } else { Watch::GoOn }
    }

    /// Tells that the guest is slowed down.
    fn say_limit(&self, limit: u64) {
        self.meter.clear();
        let _ = self.console.event("throttled", json!({ "bytes-per-second": limit }));
        if !self.console.is_json() {
            self.console.note(&format!(
                "the guest writes faster than base takes it; its writes to this disk are limited to {}/s until the merge ends",
                size::short(limit)
            ));
        }
    }
}
