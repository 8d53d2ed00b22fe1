//! The examples do what they show, on a real qemu-storage-daemon.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;
#[path = "../examples/live-merge.rs"]
#[allow(dead_code, unreachable_pub, reason = "the example has a main function, and is public to be read")]
mod live_merge;
#[path = "../examples/live-recover.rs"]
#[allow(dead_code, unreachable_pub, reason = "the example has a main function, and is public to be read")]
mod live_recover;

use common::cut::{Cut, Lost};
use common::{Chain, Daemon, Make, disk, listed, tools_are_here};
use qmp_client::{Graph, Merge, MergeOptions, Monitor, Procedure, Watch, Wishes};

#[test]
fn a_live_merge_plans_runs_follows_and_tidies() {
    if !tools_are_here() {
        return;
    }
    let chain = Chain::new(Make::default());
    let before = chain.bytes(4);
    let mut daemon = Daemon::serve(&chain, None);
    drop(daemon.connect());
    live_merge::merge(&daemon.address(), "disk0").unwrap();
    assert_eq!(listed(&disk(&daemon.connect())), ["1.img"]);
    daemon.kill();
    assert!(chain.bytes(1) == before);
    for n in 2..=4 {
        // Each of them shows the disk, and holds nothing of it.
        assert!(chain.bytes(n) == before, "{n}.img");
        assert!(chain.info(n, "backing file").unwrap().contains("1.img"), "{n}.img");
        chain.check(n);
    }
    assert!(chain.state_file().load().unwrap().is_none());
}

/// Everything up to the pivot, over a monitor that is cut off at one command.
fn pivot<M: Monitor>(monitor: &M, daemon: &Daemon, chain: &Chain) -> qmp_client::Result<()> {
    let graph = Graph::ask(monitor)?;
    let disk = graph.disk("disk0")?;
    let range = disk.range(disk.layer("[1]")?, disk.active())?;
    let mut commit = Procedure::commit(disk, &range, MergeOptions::default())?;
    commit.preflight(monitor)?;
    let (file, address) = (chain.state_file(), daemon.address());
    let mut merge = Merge::begin(monitor, commit, file, &address, &Wishes::default())?;
    merge.wait(None, &mut |_| Watch::GoOn)?;
    merge.pivot().map(drop)
}

#[test]
fn what_a_kill_left_is_put_right() {
    if !tools_are_here() {
        return;
    }
    let model = Chain::new(Make::default());
    let before = model.bytes(4);
    let mut tops = Vec::new();
    for lost in [Lost::Command, Lost::Answer] {
        for cuts in 0.. {
            let chain = model.copy();
            let mut daemon = Daemon::serve(&chain, None);
            let connection = daemon.connect();
            let cut = Cut::after(cuts, lost, &connection, &|| {});
            let is_through = pivot(&cut, &daemon, &chain).is_ok();
            drop(cut);
            drop(connection);
            daemon.kill();
            live_recover::recover(&chain.path(4)).unwrap_or_else(|e| panic!("{lost:?} {cuts}: {e}"));
            assert!(chain.state_file().load().unwrap().is_none(), "{lost:?} {cuts}");
            for n in [1, 4] {
                // Before the pivot base may hold less.
                assert!(n == 1 || chain.bytes(n) == before, "{lost:?} {cuts}: {n}.img");
            }
            let is_empty = chain.info(4, "backing file").unwrap().contains("1.img");
            assert!(!is_empty || chain.bytes(1) == before, "{lost:?} {cuts}: 1.img");
            tops.push(is_empty);
            if is_through {
                break;
            }
        }
    }
    // Both sides of the pivot have come up.
    assert!(tops.contains(&true) && tops.contains(&false), "{tops:?}");
}
