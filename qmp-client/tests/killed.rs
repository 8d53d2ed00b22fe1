//! A storage daemon that is killed at every command of a merge, while somebody writes: the state file, the header and the
//! files tell which image is the valid top.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use std::cell::Cell;
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use common::cut::{Cut, Lost};
use common::{Chain, Daemon, Make, tools_are_here};
use qmp_client::{
    Error, Finding, Found, Graph, Merge, MergeOptions, Monitor, Phase, Procedure, Recovery, Result,
    Unfinished, Watch, Wishes,
};
use rustix::process::{Pid, Signal, kill_process};

const PLACE: usize = 9 << 20;
const LENGTH: usize = 64 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum KilledMerge {
    Commit,
    Active,
    Pull,
}

fn whole<M: Monitor>(monitor: &M, daemon: &Daemon, chain: &Chain, kind: KilledMerge) -> Result<()> {
    let graph = Graph::ask(monitor)?;
    let disk = graph.disk("disk0")?;
    let options = MergeOptions::default().with_nbd_socket(Some(chain.nbd()));
    let procedure: Procedure = if kind == KilledMerge::Pull {
        let mut pull = Procedure::pull(disk, Some(disk.layer("[1]")?), options)?;
        pull.preflight(monitor)?;
        pull
    } else {
        let top = disk.layer(if kind == KilledMerge::Commit { "[3]" } else { "[4]" })?;
        let mut commit = Procedure::commit(disk, &disk.range(disk.layer("[1]")?, top)?, options)?;
        commit.preflight(monitor)?;
        commit
    };
    let mut merge =
        Merge::begin(monitor, procedure, chain.state_file(), &daemon.address(), &Wishes::default())?;
    merge.wait(Some(Duration::from_secs(300)), &mut |_| Watch::GoOn)?;
    if kind == KilledMerge::Active { merge.pivot() } else { merge.finish() }?;
    merge.done()
}

/// Writes through the export, if that is not held; whether it was acknowledged shows when the daemon is killed.
fn write_then_kill(daemon: &Daemon, chain: &Chain) -> bool {
    let write = format!("write -q -P 238 {PLACE} {LENGTH}");
    let mut writer = Command::new("qemu-io")
        .args(["-f", "raw", "-c", &write, "-c", "flush"])
        .arg(format!("nbd+unix:///x?socket={}", chain.nbd().display()))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(3) && writer.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(5));
    }
    kill_process(Pid::from_child(&daemon.child), Signal::KILL).unwrap();
    writer.wait().unwrap().success()
}

struct NoProgress;

impl qmp_client::qcow2::merge::Progress for NoProgress {
    fn written(&self, _: u64, _: u64) {}
}

/// What is found out about a merge, and done about it unless `dry_run`.
fn recovered(merge: &Unfinished, dry_run: bool) -> Finding {
    let cancel = AtomicBool::new(false);
    let mut how = Recovery::new(&NoProgress, &cancel);
    how.dry_run = dry_run;
    merge.recover(how)
}

#[test]
fn whatever_command_the_daemon_is_killed_at_the_valid_top_is_known_and_whole() {
    if !tools_are_here() {
        return;
    }
    let model = Chain::new(Make::default());
    let before = model.bytes(4);
    let mut written = before.clone();
    written[PLACE..PLACE + LENGTH].fill(238);
    let mut seen = Vec::new();
    for kind in [KilledMerge::Commit, KilledMerge::Active, KilledMerge::Pull] {
        for lost in [Lost::Command, Lost::Answer] {
            for cuts in 0.. {
                let chain = model.copy();
                let mut daemon = Daemon::serve(&chain, Some(&chain.nbd()));
                let connection = daemon.connect();
                let acknowledged = Cell::new(false);
                let kill = || acknowledged.set(write_then_kill(&daemon, &chain));
                let cut = Cut::after(cuts, lost, &connection, &kill);
                let result = whole(&cut, &daemon, &chain, kind);
                let Some(at) = cut.cut_off() else {
                    result.unwrap();
                    break;
                };
                let case = format!("{kind:?}, killed at {at}, {lost:?} lost");
                assert!(matches!(result, Err(Error::Disconnected { .. })), "{case}: {result:?}");
                drop(cut);
                drop(connection);
                daemon.kill();

                let mut found = Unfinished::of_image(&chain.path(4)).unwrap();
                assert!(found.len() <= 1, "{case}: {found:?}");
                let merge = found.pop();
                // Without a state file nothing was begun.
                let dry = merge.as_ref().map(|merge| recovered(merge, true));
                let outcome = dry.as_ref().map_or(Found::NotSwitched, |finding| finding.outcome);
                let top = dry.map_or_else(
                    || chain.name(4),
                    |finding| finding.valid_top.clone().unwrap_or_else(|| panic!("{case}: {finding:?}")),
                );
                let n = if top == chain.name(1) { 1 } else { 4 };
                let bytes = chain.bytes(n);
                let acknowledged = acknowledged.get();
                assert!(
                    bytes == written || (!acknowledged && bytes == before),
                    "{case}: {outcome:?}, a write was acknowledged: {acknowledged}, and {top} has other bytes"
                );
                if let Some(merge) = &merge {
                    // What is put right shows the same, and nothing is left to be done.
                    assert_eq!(recovered(merge, false).outcome, outcome, "{case}");
                    assert!(
                        chain.bytes(n) == bytes,
                        "{case}: {outcome:?}, and the recovery has changed {top}"
                    );
                    assert!(Unfinished::of_image(&chain.path(4)).unwrap().is_empty(), "{case}");
                }
                seen.push((kind, merge.map(|merge| merge.outline().phase), outcome, acknowledged));
            }
        }
    }
    // What the loop is for has come up.
    let came_up = |kind, phase, outcome: Found, acknowledged: Option<bool>| {
        seen.iter().any(|(k, p, v, a)| {
            (*k, *p, *v) == (kind, Some(phase), outcome) && acknowledged.is_none_or(|wanted| wanted == *a)
        })
    };
    for kind in [KilledMerge::Commit, KilledMerge::Active, KilledMerge::Pull] {
        assert!(came_up(kind, Phase::Copying, Found::NotSwitched, Some(true)), "{kind:?} {seen:?}");
        assert!(came_up(kind, Phase::Switching, Found::Completed, Some(true)), "{kind:?} {seen:?}");
    }
    assert!(came_up(KilledMerge::Commit, Phase::Switching, Found::NotSwitched, None), "{seen:?}");
    // A guest is held at that moment, but a client that connects to an NBD export only then is not (QEMU 10.0.2): what it
    // writes goes to the active layer, and the files tell that too.
    let held = seen.iter().any(|(kind, phase, _, acknowledged)| {
        (*kind, *phase) == (KilledMerge::Active, Some(Phase::Switching)) && !acknowledged
    });
    let not_held = came_up(KilledMerge::Active, Phase::Switching, Found::NotSwitched, Some(true));
    assert!(held || not_held, "{seen:?}");
}
