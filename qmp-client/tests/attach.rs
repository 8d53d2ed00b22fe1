//! Clients that are lost in the middle of a merge, and those that come after them.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::cut::{Cut, Lost};
use common::{Chain, Daemon, Make, attach, begin, commit, copied, disk, listed, tools_are_here};
use qmp_client::qapi::qmp::JobStatus;
use qmp_client::{
    Connection, Error, Execute, Goal, Graph, Job, Merge, MergeOptions, Monitor, Phase, Procedure, Result,
    Waited, Watch, Wishes, jobs, states_of,
};
use serde_json::json;

/// The merges that are gone through, and the chains that they leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AttachedMerge {
    Commit,
    Active,
    KeepOverlay,
    Pull,
}

impl AttachedMerge {
    const ALL: [Self; 4] = [Self::Commit, Self::Active, Self::KeepOverlay, Self::Pull];

    fn leaves(self) -> &'static [&'static str] {
        match self {
            Self::Commit | Self::Pull => &["4.img", "1.img"],
            Self::Active => &["1.img"],
            Self::KeepOverlay => &["4.img", "3.img", "2.img", "1.img"],
        }
    }
}

fn procedure<M: Monitor>(monitor: &M, kind: AttachedMerge, nbd: &Path) -> Result<Procedure> {
    let graph = Graph::ask(monitor)?;
    let disk = graph.disk("disk0")?;
    let options = MergeOptions::default().with_nbd_socket(Some(nbd.to_owned()));
    Ok(if kind == AttachedMerge::Pull {
        let mut pull = Procedure::pull(disk, Some(disk.layer("[1]")?), options)?;
        pull.preflight(monitor)?;
        pull
    } else {
        let top = disk.layer(if kind == AttachedMerge::Commit { "[3]" } else { "[4]" })?;
        let mut commit = Procedure::commit(disk, &disk.range(disk.layer("[1]")?, top)?, options)?;
        commit.preflight(monitor)?;
        commit
    })
}

fn to_the_end<M: Monitor>(merge: &mut Merge<'_, M>, kind: AttachedMerge) -> Result<()> {
    match merge.wait(Some(Duration::from_secs(300)), &mut |_| Watch::GoOn)? {
        // One that has vanished was carried out, or attach would not have found it.
        Waited::Reached(_) | Waited::Concluded(_) | Waited::Vanished => {}
        other => panic!("{other:?}"),
    }
    match kind {
        AttachedMerge::Commit | AttachedMerge::Pull => merge.finish().map(drop)?,
        AttachedMerge::Active => merge.pivot().map(drop)?,
        AttachedMerge::KeepOverlay => return merge.keep_overlay().map(drop),
    }
    merge.done()
}

fn whole<M: Monitor>(
    monitor: &M,
    daemon: &Daemon,
    chain: &Chain,
    kind: AttachedMerge,
    nbd: &Path,
) -> Result<()> {
    let procedure = procedure(monitor, kind, nbd)?;
    let mut wishes = Wishes::default();
    wishes.keep_overlay = kind == AttachedMerge::KeepOverlay;
    let mut merge = Merge::begin(monitor, procedure, chain.state_file(), &daemon.address(), &wishes)?;
    to_the_end(&mut merge, kind)
}

/// What the same command does after the client was lost.
fn again(daemon: &Daemon, chain: &Chain, kind: AttachedMerge, nbd: &Path) {
    let monitor = daemon.connect();
    let known = states_of(&daemon.address()).unwrap();
    if let Some(mut merge) = attach(&monitor, daemon) {
        match to_the_end(&mut merge, kind) {
            Ok(()) => return,
            // The one before has cancelled, and was lost before it took the result.
            Err(Error::Job { .. }) if kind == AttachedMerge::KeepOverlay => {}
            Err(error) => panic!("{error}"),
        }
    }
    match known.first().map(|(_, state)| state.phase) {
        Some(Phase::Switched) => known[0].0.remove().unwrap(),
        Some(Phase::Switching) => panic!("the job is gone, and attach did not find what it left"),
        Some(Phase::Copying) | None
            if listed(&disk(&monitor)) == kind.leaves() && kind != AttachedMerge::KeepOverlay => {}
        Some(Phase::Copying) | None => whole(&monitor, daemon, chain, kind, nbd).unwrap(),
    }
}

#[test]
fn whatever_command_a_client_is_lost_at_the_next_one_goes_on() {
    if !tools_are_here() {
        return;
    }
    let model = Chain::new(Make::default());
    let before = model.bytes(4);
    for kind in AttachedMerge::ALL {
        for lost in [Lost::Command, Lost::Answer] {
            let mut cuts = Vec::new();
            loop {
                let chain = model.copy();
                let nbd = chain.folder.path().join("nbd.sock");
                let daemon = Daemon::serve(&chain, Some(&nbd));
                let connection = daemon.connect();
                let cut = Cut::after(cuts.len(), lost, &connection, &|| {});
                let result = whole(&cut, &daemon, &chain, kind, &nbd);
                let at = cut.cut_off();
                drop(cut);
                drop(connection);
                let case = format!("{kind:?}, {lost:?} lost at {at:?}");
                if let Some(at) = at.clone() {
                    assert!(matches!(result, Err(Error::Disconnected { .. })), "{case}: {result:?}");
                    cuts.push(at);
                    again(&daemon, &chain, kind, &nbd);
                } else {
                    result.unwrap();
                }
                let monitor = daemon.connect();
                assert_eq!(listed(&disk(&monitor)), kind.leaves(), "{case}");
                assert!(jobs(&monitor).unwrap().is_empty(), "{case}");
                drop(daemon);
                for n in [1, 4] {
                    if kind.leaves().contains(&&*format!("{n}.img"))
                        && (n, kind) != (1, AttachedMerge::Commit)
                        && (n, kind) != (1, AttachedMerge::Pull)
                    {
                        assert!(chain.bytes(n) == before, "{case}: other bytes in {n}");
                    }
                }
                if at.is_none() {
                    break;
                }
            }
            assert!(cuts.iter().any(|at| at == "job-finalize" || at == "job-cancel"), "{cuts:?}");
        }
    }
}

#[test]
fn a_client_that_is_lost_while_the_guest_is_held_is_replaced_in_each_way() {
    if !tools_are_here() {
        return;
    }
    for end in ["pivot", "keep overlay", "cancel"] {
        let chain = Chain::new(Make::default());
        let before = chain.bytes(4);
        let daemon = Daemon::serve(&chain, None);
        let connection = daemon.connect();
        // Preflight changes nothing here; the commands are block-commit, job-complete, job-finalize.
        let cut = Cut::after(2, Lost::Command, &connection, &|| {});
        let planned = commit(&connection, "[1]", "[4]", MergeOptions::default());
        let mut merge =
            Merge::begin(&cut, planned, chain.state_file(), &daemon.address(), &Wishes::default()).unwrap();
        merge.wait(None, &mut |_| Watch::GoOn).unwrap();
        assert!(matches!(merge.pivot(), Err(Error::Disconnected { .. })));
        assert_eq!(cut.cut_off().as_deref(), Some("job-finalize"));
        drop(merge);
        drop(cut);
        drop(connection);
        let said = chain.state_file().load().unwrap().unwrap();
        assert_eq!((said.phase, said.valid_top), (Phase::Switching, chain.name(1)));

        let monitor = daemon.connect();
        assert_eq!(jobs(&monitor).unwrap()[0].status, JobStatus::pending);
        let mut merge = attach(&monitor, &daemon).unwrap();
        copied(&merge);
        let left = match end {
            "pivot" => {
                merge.pivot().unwrap();
                let said = chain.state_file().load().unwrap().unwrap();
                assert_eq!((said.phase, said.valid_top), (Phase::Switched, chain.name(1)));
                merge.done().unwrap();
                vec!["1.img"]
            }
            other => {
                if other == "cancel" {
                    merge.cancel().unwrap();
                } else {
                    merge.keep_overlay().unwrap();
                }
                vec!["4.img", "3.img", "2.img", "1.img"]
            }
        };
        assert!(chain.state_file().load().unwrap().is_none());
        assert_eq!(listed(&disk(&monitor)), left, "{end}");
        drop(merge);
        drop(daemon);
        assert!(chain.bytes(1) == before && (end == "pivot" || chain.bytes(4) == before), "{end}");
    }
}

#[test]
fn a_merge_of_another_disk_or_without_a_job_is_not_found() {
    if !tools_are_here() {
        return;
    }
    let chain = Chain::new(Make::default());
    let daemon = Daemon::serve(&chain, None);
    let monitor = daemon.connect();
    let mut merge = begin(&monitor, &daemon, &chain, commit(&monitor, "[1]", "[3]", MergeOptions::default()));
    let graph = Graph::ask(&monitor).unwrap();
    let disk0 = graph.disk("disk0").unwrap();
    let (file, mut state) = states_of(&daemon.address()).unwrap().remove(0);
    assert!(Merge::attach(&monitor, &graph, disk0, &[(file.clone(), state.clone())]).unwrap().is_some());
    state.job = "merge.disk0.1.3.ffffffff".into();
    assert!(Merge::attach(&monitor, &graph, disk0, &[(file, state)]).unwrap().is_none());
    assert!(Merge::attach(&monitor, &graph, disk0, &[]).unwrap().is_none());
    merge.cancel().unwrap();
}

#[test]
fn a_job_that_somebody_else_has_finished_is_recorded_by_the_graph() {
    if !tools_are_here() {
        return;
    }
    let chain = Chain::new(Make::default());
    let before = chain.bytes(4);
    let daemon = Daemon::serve(&chain, None);
    let monitor = daemon.connect();
    let mut merge = begin(&monitor, &daemon, &chain, commit(&monitor, "[1]", "[3]", MergeOptions::default()));
    copied(&merge);
    let other = Job::new(&monitor, merge.job().id());
    other.finalize().unwrap();
    other.wait(Goal::Concluded, None, &mut |_| Watch::GoOn).unwrap();
    // It cannot be cancelled any more, and the state file does not say that it was.
    assert!(merge.cancel().is_err());
    assert!(chain.state_file().load().unwrap().is_some());
    let merged = merge.finish().unwrap();
    assert_eq!(listed(&merged.disk), ["4.img", "1.img"]);
    assert_eq!(merge.state().phase, Phase::Switched);
    merge.done().unwrap();
    drop(daemon);
    assert!(chain.bytes(4) == before, "the guest sees other bytes");
}

#[test]
fn a_flush_that_a_killed_client_left_is_swept_away() {
    if !tools_are_here() {
        return;
    }
    let chain = Chain::new(Make::default());
    let daemon = Daemon::serve(&chain, None);
    let connection: Connection = daemon.connect();
    // Lost before it can remove its export: the server that it started is in the way of the next.
    let cut = Cut::after(4, Lost::Command, &connection, &|| {});
    let error = procedure(&cut, AttachedMerge::Commit, Path::new("/no/such/socket")).unwrap_err();
    assert!(matches!(error, Error::Disconnected { .. }), "{error}");
    let at = cut.cut_off();
    drop(cut);
    drop(connection);
    let monitor = daemon.connect();
    let planned = commit(&monitor, "[1]", "[3]", MergeOptions::default());
    let mut merge = begin(&monitor, &daemon, &chain, planned);
    copied(&merge);
    merge.finish().unwrap_or_else(|error| panic!("{at:?}: {error}"));
    merge.done().unwrap();
}

#[test]
fn a_pull_that_is_kept_is_not_asked_about_because_qemu_would_die() {
    if !tools_are_here() {
        return;
    }
    let chain = Chain::new(Make::default());
    let daemon = Daemon::serve(&chain, None);
    let monitor = daemon.connect();
    let base = disk(&monitor).layer("[1]").unwrap().node.clone();
    // As libvirt starts it.
    let arguments = json!({
        "job-id": "theirs", "device": "top", "base-node": base, "backing-file": "1.img", "auto-dismiss": false,
    });
    monitor.query("block-stream", arguments).unwrap();
    let job = Job::new(&monitor, "theirs");
    job.wait(Goal::Concluded, None, &mut |_| Watch::GoOn).unwrap();
    let error = Graph::ask(&monitor).unwrap_err().to_string();
    assert!(error.contains("theirs") && error.contains("job-dismiss"), "{error}");
    job.take_result().unwrap();
    assert_eq!(listed(&disk(&monitor)), ["4.img", "1.img"]);
}

#[test]
fn a_write_that_qemu_should_have_held_is_not_lost_at_the_pivot() {
    if !tools_are_here() {
        return;
    }
    let chain = Chain::new(Make::default());
    let mut expected = chain.bytes(4);
    let daemon = Daemon::serve(&chain, Some(&chain.nbd()));
    let connection = daemon.connect();
    // Held, and the client is gone.
    let cut = Cut::after(2, Lost::Command, &connection, &|| {});
    let planned = commit(&connection, "[1]", "[4]", MergeOptions::default());
    let mut merge =
        Merge::begin(&cut, planned, chain.state_file(), &daemon.address(), &Wishes::default()).unwrap();
    merge.wait(None, &mut |_| Watch::GoOn).unwrap();
    assert!(merge.pivot().is_err());
    drop(merge);
    drop(cut);
    drop(connection);
    // A client that connects now should be held too; QEMU 10.0.2 acknowledges its writes.
    let export = format!("nbd+unix:///x?socket={}", chain.nbd().display());
    let mut writer = Command::new("timeout")
        .args(["60", "qemu-io", "-f", "raw", "-c", "write -q -P 238 9M 64k", "-c", "flush", &export])
        .spawn()
        .unwrap();
    let acknowledged = writer.wait().unwrap().success();
    let monitor = daemon.connect();
    let mut merge = attach(&monitor, &daemon).unwrap();
    let pivoted = merge.pivot();
    let top = match (acknowledged, pivoted) {
        (true, Err(Error::Job { why, .. })) => {
            assert!(why.contains("held"), "{why}");
            assert_eq!((merge.state().phase, &merge.state().valid_top), (Phase::Copying, &chain.name(4)));
            assert!(jobs(&monitor).unwrap().is_empty());
            expected[9 << 20..(9 << 20) + (64 << 10)].fill(238);
            4
        }
        (false, Ok(_)) => 1,
        other => panic!("{other:?}"),
    };
    drop(merge);
    drop(daemon);
    assert!(chain.bytes(top) == expected, "an acknowledged write is lost");
}
