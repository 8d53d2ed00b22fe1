//! Follows a merge: tells its user what happens while it runs, and how it ended.

use std::sync::atomic::Ordering;

use qmp_client::{AfterFailure, Driver, Ended, How, Run, RunEvent, Step, Stopped, Watch};
use serde_json::json;

use super::outcome::Outcome;
use super::stall;
use super::trouble::Session;
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::hint::{Hint, HintKind, Hints};
use crate::output::Console;
use crate::output::human::printable;
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
        let again = |words: &str| Hint::command(HintKind::Again, words, session.again());
        match stopped {
            Stopped::Other(error) => session.failure(error),
            Stopped::Lost(error) => {
                let goes_on =
                    again("if QEMU still runs, the job goes on, and the same command picks it up again");
                let ended = "if it has ended, this says which image holds the disk";
                let recover = Hint::command(HintKind::Recover, ended, session.other(&["recover"]));
                session.failure_with(error, Hints::from(goes_on).or(recover))
            }
            Stopped::Failed { merge, error, after } => {
                let disk = merge.disk.as_str();
                let hints =
                    match after {
                        AfterFailure::AsItWas => again(
                            "the chain is as it was; look for the reason (dmesg, QEMU's log), then again",
                        )
                        .into(),
                        AfterFailure::InDoubt => Hint::command(
                            HintKind::Recover,
                            "which image is valid, and what to do",
                            session.other(&["recover", disk]),
                        )
                        .into(),
                        AfterFailure::Waiting => {
                            let cancel = session.other(&["cancel", disk]);
                            Hints::from(again("nothing is switched, and the job waits; again"))
                                .or(Hint::command(HintKind::LiveCancel, "or give it up", cancel))
                        }
                        _ => return session.failure(error),
                    };
                session.failure_with(error, hints)
            }
            Stopped::Vanished { merge } => self.vanished(stopped, &merge.disk),
            Stopped::EndedByAnother { disk } => self.vanished(stopped, disk),
            Stopped::GivenUp { .. } => self.given_up(stopped),
            _ => Report {
                kind: "qmp",
                message: stopped.to_string(),
                hint: again("again").into(),
                exit: Exit::FAILED,
            }
            .into(),
        }
    }

    /// The job is gone, and nobody saw its end. The graph shows how it ended.
    fn vanished(&self, stopped: &Stopped, disk: &str) -> Failure {
        let chain = self.session.other(&["chain", disk]);
        let hint = Hint::command(HintKind::LiveLook, "see the chain as it is", chain).into();
        Report { kind: "job-vanished", message: stopped.to_string(), hint, exit: Exit::FAILED }.into()
    }

    fn given_up(&self, stopped: &Stopped) -> Failure {
        let Stopped::GivenUp { merge, done: (done, total), after, cancelled } = stopped else {
            return self.vanished(stopped, "");
        };
        let (session, signal) = (self.session, self.stop.exit());
        let (kind, when, exit) = match (signal, after) {
            (None, Some(time)) => ("timed-out", format!(" after {} s", time.as_secs_f64()), Exit::HALFWAY),
            (signal, _) => ("interrupted", String::new(), signal.unwrap_or(Exit::HALFWAY)),
        };
        let share = if *total == 0 { 0.0 } else { *done as f64 / *total as f64 * 100.0 };
        let disk = printable(&merge.disk);
        let again = |words: &str| Hint::command(HintKind::Again, words, session.again());
        if !cancelled {
            let message = format!("stopped waiting{when}; the job goes on, at {share:.0} %");
            return Report { kind, message, hint: again("to wait again").into(), exit }.into();
        }
        let lost: Vec<_> = merge.restore_points_lost().map(|layer| printable(&layer.file)).collect();
        let changed = match lost.is_empty() {
            true => String::new(),
            false => format!("; no restore points any more: {}", lost.join(", ")),
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
