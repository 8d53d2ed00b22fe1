//! Runs over a driver that says what it is told to.

use std::collections::VecDeque;
use std::time::Duration;

use qapi::qmp::JobStatus;

use super::*;
use crate::block::jobs::BlockJobState;
use crate::state::StateFile;
use crate::state::tests::state;

/// A driver that waits as it is told, and writes down what it is asked.
struct Told {
    outline: Outline,
    waits: VecDeque<Waited>,
    /// The error of the switch.
    fails: Option<Error>,
    asked: Vec<&'static str>,
}

impl Told {
    fn new(kind: Kind, phase: Phase, waits: impl IntoIterator<Item = Waited>) -> Self {
        let mut state = state("/vm");
        (state.kind, state.phase) = (kind, phase);
        let outline = Outline::of(&StateFile::at("/vm/state"), &state);
        Self { outline, waits: waits.into_iter().collect(), fails: None, asked: Vec::new() }
    }

    fn ask(&mut self, what: &'static str) -> Result<()> {
        self.asked.push(what);
        self.fails.take().map_or(Ok(()), Err)
    }
}

impl Driver for Told {
    fn outline(&self) -> Outline {
        self.outline.clone()
    }

    fn process(&self) -> Option<u32> {
        None
    }

    fn wait(
        &mut self,
        _: Option<&Throttle>,
        _: Option<Duration>,
        watch: &mut dyn FnMut(Copying<'_>) -> Watch,
    ) -> Result<Waited> {
        let waited = self.waits.pop_front().ok_or(Error::Disconnected { why: "it is over".into() })?;
        if let Waited::Reached(job) | Waited::Stalled(job) | Waited::Stopped(job) = &waited {
            watch(Copying::Job(job));
        }
        Ok(waited)
    }

    fn finish(&mut self) -> Result<()> {
        self.ask("finish")
    }

    fn pivot(&mut self) -> Result<()> {
        self.ask("pivot")
    }

    fn keep_overlay(&mut self) -> Result<()> {
        self.ask("keep")
    }

    fn cancel(&mut self) -> Result<()> {
        self.ask("cancel")
    }

    fn tidy(&self, _: &TidyOptions) -> Tidied {
        Tidied::default()
    }

    fn done(&mut self) -> Result<()> {
        self.ask("done")
    }
}

fn job(status: JobStatus, done: u64) -> JobState {
    JobState { id: "j".into(), kind: "commit".into(), status, done, total: 10, error: None, block: None }
}

/// A job that met an error.
fn stalled() -> JobState {
    let block =
        BlockJobState { speed: 0, io_status: "nospace".into(), auto_finalize: false, auto_dismiss: false };
    JobState { block: Some(block), ..job(JobStatus::paused, 5) }
}

fn run(end: End) -> Run<'static> {
    static ADDRESS: std::sync::LazyLock<Address> = std::sync::LazyLock::new(|| Address::Unix("q".into()));
    Run::new(&ADDRESS, "vda", end)
}

#[test]
fn what_is_wanted_at_the_end_is_done() {
    for (kind, end, asked) in [
        (Kind::Commit, End::Finish, &["finish", "done"][..]),
        (Kind::Pull, End::Finish, &["finish", "done"]),
        (Kind::ActiveCommit, End::Pivot, &["pivot", "done"]),
        (Kind::ActiveCommit, End::KeepOverlay, &["keep"]),
        (Kind::ActiveCommit, End::Ready, &[]),
    ] {
        let mut told = Told::new(kind, Phase::Copying, [Waited::Reached(job(JobStatus::pending, 10))]);
        let mut seen = Vec::new();
        let step = run(end).follow(&mut told, &mut |event| {
            seen.push(format!("{event:?}"));
            Watch::GoOn
        });
        assert!(matches!(step, Ok(Step::Over(ended)) if ended.copied == 10), "{kind:?} {end:?}");
        assert_eq!(told.asked, asked, "{kind:?} {end:?}");
        assert_eq!(seen, ["Copied { done: 10, total: 10 }"]);
    }
}

#[test]
fn a_job_that_stands_still_is_told_once_and_again_when_it_goes_on() {
    let waits = [Waited::Stalled(stalled()), Waited::Stalled(stalled())];
    let mut told = Told::new(Kind::Commit, Phase::Copying, waits);
    let mut run = run(End::Finish);
    let mut seen = Vec::new();
    let mut watch = |event: Event<'_>| {
        match event {
            Event::Stalled { .. } => seen.push("stalled"),
            Event::Resumed => seen.push("resumed"),
            _ => {}
        }
        Watch::GoOn
    };
    for _ in 0..2 {
        assert!(matches!(run.follow(&mut told, &mut watch), Ok(Step::Stalled)));
    }
    told.waits.push_back(Waited::Reached(job(JobStatus::pending, 10)));
    assert!(matches!(run.follow(&mut told, &mut watch), Ok(Step::Over(_))));
    assert_eq!(seen, ["stalled", "resumed"]);
}

#[test]
fn who_gives_up_cancels_only_what_is_his() {
    for (owns, asked) in [(true, &["cancel"][..]), (false, &[])] {
        let mut told = Told::new(Kind::Commit, Phase::Copying, [Waited::Stopped(job(JobStatus::running, 4))]);
        let mut run = run(End::Finish);
        run.owns = owns;
        let stopped = run.follow(&mut told, &mut |_| Watch::Stop).unwrap_err();
        let Stopped::GivenUp { done, after, cancelled, .. } = *stopped else { unreachable!("{stopped}") };
        assert_eq!((done, after, cancelled), ((4, 10), None, owns));
        assert_eq!(told.asked, asked);
    }
    let mut told = Told::new(Kind::Commit, Phase::Copying, [Waited::TimeUp(job(JobStatus::running, 4))]);
    let mut run = run(End::Finish);
    run.timeout = Some(Duration::ZERO);
    let stopped = run.follow(&mut told, &mut |_| Watch::GoOn).unwrap_err();
    assert!(matches!(*stopped, Stopped::GivenUp { after: Some(Duration::ZERO), cancelled: false, .. }));
}

#[test]
fn what_a_failure_leaves_is_told_by_its_kind_and_the_phase() {
    let failed = || Error::Job { id: "j".into(), why: "no".into() };
    let refused =
        || Error::Refused { reason: crate::Refusal::FormatsDiffer { overlay: "a".into(), top: "b".into() } };
    let gone = || Error::Disconnected { why: "no".into() };
    for (phase, error, after, asked) in [
        (Phase::Copying, failed(), AfterFailure::AsItWas, &["finish", "done"][..]),
        (Phase::Copying, refused(), AfterFailure::Waiting, &["finish"]),
        (Phase::Copying, gone(), AfterFailure::Unknown, &["finish"]),
        (Phase::Switching, failed(), AfterFailure::InDoubt, &["finish"]),
        (Phase::Switching, refused(), AfterFailure::InDoubt, &["finish"]),
    ] {
        let mut told = Told::new(Kind::Commit, phase, [Waited::Reached(job(JobStatus::pending, 10))]);
        told.fails = Some(error);
        let stopped = run(End::Finish).follow(&mut told, &mut |_| Watch::GoOn).unwrap_err();
        assert!(
            matches!(*stopped, Stopped::Failed { after: now, .. } if now == after),
            "{phase:?}: {stopped}"
        );
        assert_eq!(told.asked, asked);
    }
}

#[test]
fn a_job_that_vanished_is_a_success_only_where_its_end_was_to_come() {
    for (phase, kind, end, is_over) in [
        (Phase::Copying, Kind::Commit, End::Finish, false),
        (Phase::Switching, Kind::Commit, End::Finish, true),
        (Phase::Switching, Kind::ActiveCommit, End::Pivot, true),
        (Phase::Switching, Kind::ActiveCommit, End::Ready, false),
    ] {
        let mut told = Told::new(kind, phase, [Waited::Vanished]);
        let step = run(end).follow(&mut told, &mut |_| Watch::GoOn);
        assert_eq!(step.is_ok(), is_over, "{phase:?} {kind:?} {end:?}");
        assert!(is_over || matches!(*step.unwrap_err(), Stopped::Vanished { .. }));
    }
    // The connection is lost, and the job with it, perhaps.
    let mut told = Told::new(Kind::Commit, Phase::Copying, []);
    let stopped = run(End::Finish).follow(&mut told, &mut |_| Watch::GoOn).unwrap_err();
    assert!(matches!(*stopped, Stopped::Lost(_)));
}
