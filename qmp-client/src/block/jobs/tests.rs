//! Jobs as QEMU 10.0.2 told them.

use super::*;
use crate::qmp::replay::Replay;

fn quiet(_: &Progress<'_>) -> Watch {
    Watch::GoOn
}

#[test]
fn an_intermediate_commit_goes_through_pending() {
    let replay = Replay::of(include_str!("../../../testdata/transcripts/commit-manual.jsonl"));
    let job = Job::new(&replay, "m2");
    let mut seen = Vec::new();
    let mut watch = |p: &Progress<'_>| {
        seen.push((p.job.status, p.job.done));
        Watch::GoOn
    };
    let Waited::Reached(state) = job.wait(Goal::Pending, None, &mut watch).unwrap() else { panic!() };
    assert_eq!((state.kind.as_str(), state.done, state.total), ("commit", 64 << 20, 64 << 20));
    let block = state.block.unwrap();
    assert!(!block.auto_finalize && !block.auto_dismiss);
    assert_eq!(seen.first().unwrap().0, JobStatus::running);
    assert!(seen.is_sorted_by_key(|(_, done)| *done));
    job.finalize().unwrap();
    assert!(matches!(job.wait(Goal::Concluded, None, &mut quiet).unwrap(), Waited::Reached(_)));
}

#[test]
fn an_active_commit_is_ready_then_pending_then_concluded() {
    let replay = Replay::of(include_str!("../../../testdata/transcripts/commit-active.jsonl"));
    let job = Job::new(&replay, "act");
    let Waited::Reached(state) = job.wait(Goal::Ready, None, &mut quiet).unwrap() else { panic!() };
    assert_eq!(state.status, JobStatus::ready);
    job.pause().unwrap();
    job.complete().unwrap();
    job.resume().unwrap();
    job.finalize().unwrap();
    assert!(matches!(job.complete(), Err(Error::Command { .. })), "too late to complete");
}

#[test]
fn a_full_disk_stalls_the_job_and_resuming_it_goes_on() {
    let replay = Replay::of(include_str!("../../../testdata/transcripts/enospc-stop.jsonl"));
    let job = Job::new(&replay, "e");
    let Waited::Stalled(state) = job.wait(Goal::Concluded, None, &mut quiet).unwrap() else { panic!() };
    assert_eq!(state.block.unwrap().io_status, "nospace");
    job.resume().unwrap();
}

#[test]
fn a_failed_job_tells_its_error_before_it_is_forgotten() {
    let replay = Replay::of(include_str!("../../../testdata/transcripts/enospc-report.jsonl"));
    let job = Job::new(&replay, "e");
    let error = job.take_result().unwrap_err().to_string();
    assert!(error.contains("No space left on device"), "{error}");
    assert_eq!(replay.asked.borrow().last().unwrap().0, "job-dismiss");
}

#[test]
fn a_job_that_vanished_is_no_success() {
    let replay = Replay::of(concat!(
        "{\"execute\":\"query-jobs\",\"id\":1}\n{\"return\":[],\"id\":1}\n",
        "{\"execute\":\"query-jobs\",\"id\":2}\n{\"return\":[],\"id\":2}\n",
    ));
    let job = Job::new(&replay, "m1");
    assert!(matches!(job.wait(Goal::Concluded, None, &mut quiet).unwrap(), Waited::Vanished));
    assert!(job.take_result().unwrap_err().to_string().contains("vanished"));
}

#[test]
fn waiting_ends_when_the_time_is_up_or_the_watcher_has_enough() {
    let transcript = include_str!("../../../testdata/transcripts/commit-manual.jsonl");
    let replay = Replay::of(transcript);
    let timeout = Some(Duration::ZERO);
    let waited = Job::new(&replay, "m2").wait(Goal::Pending, timeout, &mut quiet).unwrap();
    assert!(matches!(waited, Waited::TimeUp(job) if job.status == JobStatus::running));
    let replay = Replay::of(transcript);
    let waited = Job::new(&replay, "m2").wait(Goal::Pending, None, &mut |_| Watch::Stop).unwrap();
    assert!(matches!(waited, Waited::Stopped(_)));
}

#[test]
fn rate_and_remaining_time_come_from_what_was_done() {
    let replay = Replay::of(include_str!("../../../testdata/transcripts/commit-manual.jsonl"));
    let mut job = jobs(&replay).unwrap().remove(0);
    (job.done, job.total) = (30, 90);
    let progress = progress(&job, 10, Duration::from_secs(2));
    assert_eq!((progress.rate, progress.remaining), (10.0, Some(Duration::from_secs(6))));
    assert_eq!(super::progress(&job, 30, Duration::from_secs(1)).remaining, None);
}
