//! A storage daemon that is killed at every command of a merge, while somebody writes: the state file, the header and the
//! files tell which image is the valid top.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use std::cell::Cell;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::cut::{Cut, Lost};
use common::{Chain, Daemon, Make, tools_are_here};
use qmp_client::{
    Error, Graph, Header, Merge, MergeOptions, Monitor, Phase, Procedure, Qemu, Result, Seen, Verdict, Watch,
    Wishes,
};
use rustix::process::{Pid, Signal, kill_process};

const PLACE: usize = 9 << 20;
const LENGTH: usize = 64 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Commit,
    Active,
    Pull,
}

fn whole<M: Monitor>(monitor: &M, daemon: &Daemon, chain: &Chain, kind: Kind) -> Result<()> {
    let graph = Graph::ask(monitor)?;
    let disk = graph.disk("disk0")?;
    let options = MergeOptions { nbd_socket: Some(chain.nbd()), ..Default::default() };
    let procedure: Procedure = if kind == Kind::Pull {
        let mut pull = Procedure::pull(disk, Some(disk.layer("[1]")?), options)?;
        pull.preflight(monitor)?;
        pull
    } else {
        let top = disk.layer(if kind == Kind::Commit { "[3]" } else { "[4]" })?;
        let mut commit = Procedure::commit(disk, &disk.range(disk.layer("[1]")?, top)?, options)?;
        commit.preflight(monitor)?;
        commit
    };
    let mut merge =
        Merge::begin(monitor, procedure, chain.state_file(), &daemon.address(), &Wishes::default())?;
    merge.wait(Some(Duration::from_secs(300)), &mut |_| Watch::GoOn)?;
    if kind == Kind::Active { merge.pivot() } else { merge.finish() }?;
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
    for kind in [Kind::Commit, Kind::Active, Kind::Pull] {
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

                let state = chain.state_file().load().unwrap();
                let (verdict, top) = match &state {
                    None => (Verdict::NotSwitched, chain.name(4)),
                    Some(state) => {
                        let header = chain.info(4, "backing file").unwrap();
                        let header = Header::Names(header.split(" (").next().unwrap().to_owned());
                        let verdict = state.judge(&Seen::of(state, Qemu::Gone, header).unwrap());
                        let top = match verdict {
                            Verdict::NotSwitched => chain.name(4),
                            Verdict::Switched => state.left().next().unwrap().file.clone(),
                            ref other => panic!("{case}: {other:?}"),
                        };
                        (verdict, top)
                    }
                };
                let bytes = chain.bytes(if top == chain.name(1) { 1 } else { 4 });
                let acknowledged = acknowledged.get();
                assert!(
                    bytes == written || (!acknowledged && bytes == before),
                    "{case}: {verdict:?}, a write was acknowledged: {acknowledged}, and {top} has other bytes"
                );
                seen.push((kind, state.map(|state| state.phase), verdict, acknowledged));
            }
        }
    }
    // What the loop is for has come up.
    let came_up = |kind, phase, verdict: Verdict, acknowledged: Option<bool>| {
        seen.iter().any(|(k, p, v, a)| {
            (*k, *p, v) == (kind, Some(phase), &verdict) && acknowledged.is_none_or(|wanted| wanted == *a)
        })
    };
    for kind in [Kind::Commit, Kind::Active, Kind::Pull] {
        assert!(came_up(kind, Phase::Copying, Verdict::NotSwitched, Some(true)), "{kind:?} {seen:?}");
        assert!(came_up(kind, Phase::Switching, Verdict::Switched, Some(true)), "{kind:?} {seen:?}");
    }
    assert!(came_up(Kind::Commit, Phase::Switching, Verdict::NotSwitched, None), "{seen:?}");
    // A guest is held at that moment, but a client that connects to an NBD export only then is not (QEMU 10.0.2): what it
    // writes goes to the active layer, and the files tell that too.
    let held = seen.iter().any(|(kind, phase, _, acknowledged)| {
        (*kind, *phase) == (Kind::Active, Some(Phase::Switching)) && !acknowledged
    });
    let not_held = came_up(Kind::Active, Phase::Switching, Verdict::NotSwitched, Some(true));
    assert!(held || not_held, "{seen:?}");
}
