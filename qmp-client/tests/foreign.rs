//! Jobs that another client has started, ended without a state file.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::time::Duration;

use common::{Chain, Daemon, Make, disk, listed, tools_are_here};
use qmp_client::{Connection, Error, Execute, Goal, Job, Watch, conclude, jobs};
use serde_json::json;

fn start(monitor: &Connection, active: bool, finalizes: bool, dismisses: bool) -> Job<'_, Connection> {
    let disk = disk(monitor);
    let node = |n: &str| disk.layer(n).unwrap().node.clone();
    let mut arguments = json!({
        "job-id": "theirs", "device": "top", "base-node": node("[1]"), "auto-finalize": finalizes,
        "auto-dismiss": dismisses,
    });
    if !active {
        arguments["top-node"] = json!(node("[3]"));
        arguments["backing-file"] = json!("1.img");
    }
    monitor.query("block-commit", arguments).unwrap();
    Job::new(monitor, "theirs")
}

#[test]
fn an_active_commit_of_any_client_is_pivoted_and_the_graph_says_so() {
    if !tools_are_here() {
        return;
    }
    for (finalizes, dismisses) in [(true, true), (true, false), (false, true), (false, false)] {
        let chain = Chain::new(Make::default());
        let before = chain.bytes(4);
        let daemon = Daemon::serve(&chain, None);
        let monitor = daemon.connect();
        let was = disk(&monitor);
        let job = start(&monitor, true, finalizes, dismisses);
        job.wait(Goal::Ready, Some(Duration::from_secs(300)), &mut |_| Watch::GoOn).unwrap();
        let now = conclude(&monitor, &was, &job).unwrap();
        assert_eq!(listed(&now), ["1.img"], "{finalizes} {dismisses}");
        assert!(jobs(&monitor).unwrap().is_empty());
        drop(daemon);
        assert!(chain.bytes(1) == before, "the guest sees other bytes");
    }
}

#[test]
fn a_pending_commit_of_any_client_is_finished_and_durable() {
    if !tools_are_here() {
        return;
    }
    for dismisses in [true, false] {
        let chain = Chain::new(Make::default());
        let before = chain.bytes(4);
        let mut daemon = Daemon::serve(&chain, None);
        let monitor = daemon.connect();
        let was = disk(&monitor);
        let job = start(&monitor, false, false, dismisses);
        job.wait(Goal::Pending, Some(Duration::from_secs(300)), &mut |_| Watch::GoOn).unwrap();
        let now = conclude(&monitor, &was, &job).unwrap();
        assert_eq!(listed(&now), ["4.img", "1.img"]);
        daemon.kill();
        assert!(chain.bytes(4) == before, "the guest sees other bytes");
    }
}

#[test]
fn a_job_that_is_not_ready_or_was_ended_is_not_called_a_success() {
    if !tools_are_here() {
        return;
    }
    let chain = Chain::new(Make::default());
    let daemon = Daemon::serve(&chain, None);
    let monitor = daemon.connect();
    let was = disk(&monitor);
    let error = conclude(&monitor, &was, &Job::new(&monitor, "nobody's")).unwrap_err();
    assert!(matches!(error, Error::Refused { .. }), "{error}");
    let job = start(&monitor, true, true, false);
    job.wait(Goal::Ready, Some(Duration::from_secs(300)), &mut |_| Watch::GoOn).unwrap();
    job.cancel().unwrap();
    job.wait(Goal::Concluded, Some(Duration::from_secs(300)), &mut |_| Watch::GoOn).unwrap();
    // It was kept with its error, which is told when it is taken.
    let error = conclude(&monitor, &was, &job).unwrap_err();
    assert!(matches!(error, Error::Job { .. }), "{error}");
    assert!(jobs(&monitor).unwrap().is_empty());
    assert_eq!(listed(&disk(&monitor)).len(), 4);
}
