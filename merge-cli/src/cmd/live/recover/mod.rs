//! `qmerge live recover`: what a merge left whose QEMU, client or host has gone, put right.
//!
//! A state file says how far the merge was; the images say what they are. Where the two agree, what is left to do
//! is done. Where somebody has written to an image that the merge left behind, nobody but the user can know
//! which bytes are wanted: that is only told.

mod above;
mod active;
mod below;
pub(in crate::cmd) mod find;
mod look;
mod qemu;
pub(in crate::cmd) mod tell;

use std::ffi::OsString;
use std::path::Path;

use qcow2::Error;
use qmp_client::{Address, Kind, State, StateFile};

use self::tell::Finding;
use crate::call::{Call, VerbName};
use crate::cli::RecoverArgs;
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::output::Console;
use crate::output::progress::Meter;
use crate::signals::Stop;

/// One state file that is dealt with.
struct Case<'a> {
    file: &'a StateFile,
    state: &'a State,
    dry_run: bool,
    no_lock: bool,
    meter: &'a Meter<'a>,
    stop: &'a Stop,
    call: &'a Call,
}

/// Deals with every state file that is found.
pub(super) fn run(
    args: &RecoverArgs,
    qmp: Option<&Address>,
    words: &[OsString],
    console: &Console,
) -> Result<Exit, Failure> {
    let image = args.what.clone().unwrap_or_else(|| ".".to_owned()).into();
    let call = Call { verb: VerbName::Recover, image, words: words.to_vec() };
    let stop = Stop::on_signals(&call)?;
    let states = find::states(args, qmp)?;
    if !args.dry_run {
        find::sweep(args, qmp);
    }
    let meter = Meter::without_events(console, "comparing");
    let mut findings = Vec::new();
    for (file, state) in &states {
        let case = Case {
            file,
            state,
            dry_run: args.dry_run,
            // Who only looks is kept from nothing.
            no_lock: args.no_lock || args.dry_run,
            meter: &meter,
            stop: &stop,
            call: &call,
        };
        let finding = case.judge(qmp);
        meter.clear();
        findings.push(finding);
    }
    if console.is_json() {
        console.document(&findings.iter().map(Finding::json).collect())?;
    } else if findings.is_empty() {
        console.result(&format!("nothing to recover: {}", find::searched(args, qmp)))?;
    }
    let mut first: Option<Report> = None;
    for finding in findings {
        console.result(&finding.human(args.dry_run))?;
        match (finding.trouble, &first) {
            (None, _) => {}
            (Some(trouble), None) => first = Some(trouble),
            (Some(trouble), Some(_)) => console.note(&trouble.to_string()),
        }
    }
    first.map_or(Ok(Exit::DONE), |report| Err(report.into()))
}

impl Case<'_> {
    /// What is to be said about it, and what was done.
    fn judge(&self, qmp: Option<&Address>) -> Finding {
        let (asked, live) = self.ask(qmp);
        let judged = asked.map(|qemu| match self.state.kind {
            Kind::ActiveCommit => self.active_commit(qemu),
            Kind::Commit => self.commit(),
            Kind::Pull => self.pull(),
        });
        let mut finding = match judged {
            Ok(judged) => judged.unwrap_or_else(|error| self.failed(&error)),
            Err(in_hand) => *in_hand,
        };
        self.look_above(&mut finding, &live);
        if let (Kind::ActiveCommit, "completed", Some(top)) =
            (self.state.kind, finding.outcome, &finding.valid_top)
        {
            finding.facts.push(format!("what starts the virtual machine should name {top}"));
        }
        finding
    }

    /// An error of the engine: nothing was changed, or the same command goes on.
    fn failed(&self, error: &Error) -> Finding {
        let outcome = if matches!(error, Error::InUse { .. }) { "in-use" } else { "failed" };
        let mut finding = Finding::new(self, outcome);
        if let (Error::Cancelled, Some(exit)) = (error, self.stop.exit()) {
            finding.trouble = report(Failure::interrupted("while it compared", exit, self.call));
        } else {
            finding.trouble = report(Failure::engine(error, self.call));
        }
        finding
    }

    /// Takes the state file away, because all that it spoke of is done.
    fn forget(&self, finding: &mut Finding) {
        if !self.dry_run
            && let Err(error) = self.file.forget(self.state)
        {
            finding.trouble = Some(Report {
                kind: "io",
                message: error.to_string(),
                hint: format!("all else is done; remove it: rm {}", crate::hint::word(self.file.path()))
                    .into(),
                exit: Exit::FAILED,
            });
            return;
        }
        finding.did.push(format!("remove the state file {}", self.file.path().display()));
    }

    /// A question that only the user can answer; nothing is changed.
    fn unclear(&self, why: String, hint: String) -> Finding {
        let mut finding = Finding::new(self, "unclear");
        finding.valid_top = None;
        let message = format!("{}: {why}; nothing was changed", self.file.path().display());
        finding.trouble = Some(Report { kind: "unclear", message, hint: hint.into(), exit: Exit::REFUSED });
        finding
    }

    /// A file of the chain is not the one that the state speaks of.
    fn moved(&self, what: &str) -> Finding {
        let state = crate::hint::word(self.file.path());
        let active = self.state.active().map(|layer| Path::new(&layer.file)).unwrap_or(Path::new(""));
        self.unclear(
            format!("{what}, so this state may speak of other images than those that lie here"),
            format!(
                "if the images were moved, put them back where they were; if the chain is right as it stands (qmerge info \
                 --chain {}), remove the state: rm {state}",
                crate::hint::word(active)
            ),
        )
    }
}

fn report(failure: Failure) -> Option<Report> {
    match failure {
        Failure::Reported(report) => Some(report),
        Failure::PipeClosed => None,
    }
}
