//! Snapshots and merges on a real qemu-storage-daemon, judged by qemu-img.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::Command;
use std::time::Duration;

use common::writer::Writer;
use common::{Chain, Daemon, Make, disk, run, tools_are_here};
use qmp_client::qapi::qmp::JobStatus;
use qmp_client::{
    Address, Connection, Disk, Error, Execute, Goal, Job, MergeOptions, Monitor, Options, Procedure, Waited,
    Watch, jobs, snapshot,
};
use serde_json::{Value, json};

fn plan(disk: &Disk, base: &str, top: &str, options: MergeOptions) -> Procedure {
    let range = disk.range(disk.layer(base).unwrap(), disk.layer(top).unwrap()).unwrap();
    Procedure::commit(disk, &range, options).unwrap()
}

fn wait(job: &Job<'_, Connection>, goal: Goal) {
    let waited = job.wait(goal, Some(Duration::from_secs(300)), &mut |_| Watch::GoOn).unwrap();
    assert!(matches!(waited, Waited::Reached(_)), "{waited:?}");
}

fn indexes(disk: &Disk) -> Vec<(usize, String)> {
    let name = |file: &str| file.rsplit('/').next().unwrap_or_default().to_owned();
    disk.layers().iter().map(|l| (l.index, name(&l.file))).collect()
}

fn listed(expected: &[(usize, &str)]) -> Vec<(usize, String)> {
    expected.iter().map(|(n, f)| (*n, (*f).to_owned())).collect()
}

#[test]
fn an_intermediate_merge_keeps_the_bytes_and_the_style_of_the_name() {
    if !tools_are_here() {
        return;
    }
    for (relative, raw_base) in [(true, false), (false, true)] {
        let chain = Chain::new(Make { relative, raw_base, ..Make::default() });
        let before = chain.bytes(4);
        let daemon = Daemon::serve(&chain, None);
        let monitor = daemon.connect();
        let disk = disk(&monitor);
        assert_eq!(indexes(&disk), listed(&[(4, "4.img"), (3, "3.img"), (2, "2.img"), (1, "1.img")]));

        let mut commit = plan(&disk, "[1]", "[3]", MergeOptions::default());
        commit.preflight(&monitor).unwrap();
        assert_eq!(
            chain.info(4, "backing file format").as_deref(),
            Some("qcow2"),
            "the guard changes nothing"
        );
        let job = commit.start(&monitor).unwrap();
        wait(&job, Goal::Pending);
        assert!(chain.info(4, "backing file").unwrap().starts_with(&if relative {
            "3.img".into()
        } else {
            chain.name(3)
        }));
        let merged = commit.finish(&job, &monitor, &mut || Ok(())).unwrap();
        assert_eq!(indexes(&merged.disk), listed(&[(2, "4.img"), (1, "1.img")]));
        assert!(merged.still_open.is_empty(), "{:?}", merged.still_open);
        assert!(jobs(&monitor).unwrap().is_empty(), "the job is dismissed");

        let backing = chain.info(4, "backing file").unwrap();
        let expected = if relative { "1.img".to_owned() } else { chain.name(1) };
        assert_eq!(backing.split(" (").next().unwrap(), expected);
        let format = chain.info(4, "backing file format").unwrap();
        assert_eq!(format, if raw_base { "raw" } else { "qcow2" });
        drop(daemon);
        assert!(chain.bytes(4) == before, "the guest sees other bytes");
        chain.check(4);
        if !raw_base {
            chain.check(1);
        }
    }
}

#[test]
fn an_active_merge_pivots_after_the_hook() {
    if !tools_are_here() {
        return;
    }
    let chain = Chain::new(Make { relative: false, ..Make::default() });
    let before = chain.bytes(4);
    let daemon = Daemon::serve(&chain, None);
    let monitor = daemon.connect();
    let mut commit = plan(&disk(&monitor), "[1]", "[4]", MergeOptions::default());
    assert!(commit.is_active());
    commit.preflight(&monitor).unwrap();
    let job = commit.start(&monitor).unwrap();
    wait(&job, Goal::Ready);
    let mut held = None;
    let merged = commit
        .finish(&job, &monitor, &mut || {
            held = job.state()?.map(|j| j.status);
            Ok(())
        })
        .unwrap();
    assert_eq!(held, Some(JobStatus::pending));
    assert_eq!(indexes(&merged.disk), listed(&[(1, "1.img")]));
    assert!(!merged.disk.active().read_only);
    assert!(merged.still_open.is_empty(), "{:?}", merged.still_open);
    drop(daemon);
    assert!(chain.bytes(1) == before, "the guest sees other bytes");
    chain.check(1);
}

#[test]
fn a_pivot_whose_hook_fails_leaves_the_guest_where_it_was() {
    if !tools_are_here() {
        return;
    }
    let chain = Chain::new(Make::default());
    let before = chain.bytes(4);
    let daemon = Daemon::serve(&chain, None);
    let monitor = daemon.connect();
    let mut commit = plan(&disk(&monitor), "[1]", "[4]", MergeOptions::default());
    commit.preflight(&monitor).unwrap();
    let job = commit.start(&monitor).unwrap();
    wait(&job, Goal::Ready);
    let full = || Error::File { file: "/full".into(), source: std::io::Error::other("the disk is full") };
    let hook = &mut || Err(full());
    let error = commit.finish(&job, &monitor, hook).unwrap_err().to_string();
    assert!(error.contains("disk is full"), "{error}");
    assert!(jobs(&monitor).unwrap().is_empty());
    assert_eq!(disk(&monitor).layers().len(), 4);
    assert!(disk(&monitor).layers()[3].read_only, "base is open for reading only again");
    drop(daemon);
    assert!(chain.bytes(4) == before, "the guest sees other bytes");
}

#[test]
fn a_cancelled_merge_leaves_the_chain_and_the_bytes() {
    if !tools_are_here() {
        return;
    }
    for (top, goal) in [("[3]", Some(Goal::Pending)), ("[4]", Some(Goal::Ready)), ("[3]", None)] {
        let chain = Chain::new(Make::default());
        let before = chain.bytes(4);
        let daemon = Daemon::serve(&chain, None);
        let monitor = daemon.connect();
        let options = MergeOptions::default().with_speed(if goal.is_none() { 64 << 10 } else { 0 });
        let mut commit = plan(&disk(&monitor), "[1]", top, options);
        commit.preflight(&monitor).unwrap();
        let job = commit.start(&monitor).unwrap();
        if let Some(goal) = goal {
            wait(&job, goal);
        } else {
            assert_eq!(job.state().unwrap().unwrap().status, JobStatus::running);
            assert!(
                matches!(commit.finish(&job, &monitor, &mut || Ok(())), Err(Error::Refused { .. })),
                "too early"
            );
            job.pause().unwrap();
            job.resume().unwrap();
            job.set_speed(128 << 10).unwrap();
            assert_eq!(job.state().unwrap().unwrap().block.unwrap().speed, 128 << 10);
        }
        commit.cancel(&job).unwrap();
        assert!(jobs(&monitor).unwrap().is_empty());
        assert_eq!(disk(&monitor).layers().len(), 4);
        drop(daemon);
        assert!(chain.bytes(4) == before, "the guest sees other bytes");
        assert!(chain.info(4, "backing file").unwrap().starts_with("3.img"));
    }
}

#[test]
fn base_is_durable_before_the_switch() {
    if !tools_are_here() {
        return;
    }
    // Killed while it waits, QEMU leaves base without its tables, unless base was flushed.
    for (own_server, flush) in [(true, true), (false, true), (true, false)] {
        let chain = Chain::new(Make::default());
        let expected = chain.bytes(3);
        let nbd = chain.folder.path().join("nbd.sock");
        let mut daemon = Daemon::serve(&chain, (!own_server).then_some(nbd.as_path()));
        let monitor = daemon.connect();
        let nbd_socket = (!own_server).then_some(nbd);
        let options = MergeOptions::default().with_nbd_socket(nbd_socket);
        let mut commit = plan(&disk(&monitor), "[1]", "[3]", options);
        commit.preflight(&monitor).unwrap();
        let job = commit.start(&monitor).unwrap();
        wait(&job, Goal::Pending);
        if flush {
            commit.flush(&monitor).unwrap();
        }
        daemon.kill();
        assert_eq!(chain.bytes(1) == expected, flush, "flushed: {flush}");
    }
}

#[test]
fn without_a_way_to_flush_base_nothing_begins() {
    if !tools_are_here() {
        return;
    }
    let chain = Chain::new(Make::default());
    let daemon = Daemon::serve(&chain, Some(&chain.folder.path().join("nbd.sock")));
    let monitor = daemon.connect();
    let mut commit = plan(&disk(&monitor), "[1]", "[3]", MergeOptions::default());
    let error = commit.preflight(&monitor).unwrap_err().to_string();
    assert!(error.contains("cannot be flushed") && error.contains("already running"), "{error}");
    assert!(matches!(commit.start(&monitor), Err(Error::Refused { .. })));
}

#[test]
fn a_lost_client_is_replaced_and_the_job_is_finished() {
    if !tools_are_here() {
        return;
    }
    let chain = Chain::new(Make::default());
    let before = chain.bytes(4);
    let daemon = Daemon::serve(&chain, None);
    let monitor = daemon.connect();
    let mut commit = plan(&disk(&monitor), "[2]", "[3]", MergeOptions::default());
    commit.preflight(&monitor).unwrap();
    commit.start(&monitor).unwrap();
    drop(monitor);

    let monitor = daemon.connect();
    let found = jobs(&monitor).unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].id.as_str(), found[0].kind.as_str()), (commit.job_id(), "commit"));
    let mut second = plan(&disk(&monitor), "[1]", "[2]", MergeOptions::default());
    let error = second.preflight(&monitor).unwrap_err().to_string();
    assert!(error.contains(commit.job_id()), "{error}");
    assert!(second.resume(&monitor).unwrap().is_none(), "it is another merge");
    let mut again = plan(&disk(&monitor), "[2]", "[3]", MergeOptions::default());
    let job = again.resume(&monitor).unwrap().unwrap();
    wait(&job, Goal::Pending);
    again.flush(&monitor).unwrap();
    // The client is lost once more, after it told the job to switch.
    job.finalize().unwrap();
    wait(&job, Goal::Concluded);
    let merged = again.finish(&job, &monitor, &mut || Ok(())).unwrap();
    assert_eq!(indexes(&merged.disk), listed(&[(3, "4.img"), (2, "2.img"), (1, "1.img")]));
    drop(daemon);
    assert!(chain.bytes(4) == before, "the guest sees other bytes");
}

#[test]
fn a_second_client_is_told_who_holds_the_monitor_and_quit_is_seen() {
    if !tools_are_here() {
        return;
    }
    let chain = Chain::new(Make { layers: 2, ..Make::default() });
    let mut daemon = Daemon::serve(&chain, None);
    let monitor = daemon.connect();
    let address = Address::Unix(daemon.socket.clone());
    let mut options = Options::default();
    options.greeting_timeout = Duration::from_millis(200);
    let error = Connection::connect(&address, &options).unwrap_err().to_string();
    assert!(error.contains("another client holds this monitor"), "{error}");

    assert_eq!(monitor.peer(), Some(daemon.child.id()));
    assert_eq!(qmp_client::Owner::of(&address, monitor.peer()), None);

    let error = monitor.query("no-such-command", json!({})).unwrap_err();
    assert!(matches!(error, Error::Command { failure, .. } if failure.class == "CommandNotFound"));
    monitor.query("quit", json!({})).unwrap();
    daemon.wait_for_its_end();
    let end = std::iter::repeat_with(|| monitor.next_event(Duration::from_secs(20))).find(Result::is_err);
    assert!(matches!(end, Some(Err(Error::Disconnected { .. }))));
    let error = Connection::connect(&address, &options).unwrap_err();
    assert!(matches!(error, Error::Connect { .. }), "{error}");
}

/// A daemon that may not write the third of four layers.
fn with_an_overlay_that_cannot_be_written(chain: &Chain) -> Daemon {
    let folder = chain.folder.path();
    std::fs::set_permissions(folder, PermissionsExt::from_mode(0o777)).unwrap();
    // A crash shall leave no memory dump.
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -c 0; exec qemu-storage-daemon \"$@\"", "sh"]);
    if std::fs::metadata(folder).unwrap().uid() == 0 {
        // Root may write everything, so QEMU must be somebody else.
        use std::os::unix::process::CommandExt;
        command.uid(65534).gid(65534);
        for n in [1, 2, 4] {
            std::os::unix::fs::chown(chain.path(n), Some(65534), Some(65534)).unwrap();
        }
    }
    std::fs::set_permissions(chain.path(3), PermissionsExt::from_mode(0o444)).unwrap();
    Daemon::spawn(command, chain, Some(&folder.join("nbd.sock")))
}

#[test]
fn an_overlay_that_qemu_cannot_write_is_found_before_qemu_would_crash() {
    if !tools_are_here() {
        return;
    }
    let chain = Chain::new(Make::default());
    let daemon = with_an_overlay_that_cannot_be_written(&chain);
    let monitor = daemon.connect();
    let nbd_socket = Some(chain.folder.path().join("nbd.sock"));
    let mut commit = plan(&disk(&monitor), "[1]", "[2]", MergeOptions::default().with_nbd_socket(nbd_socket));
    let error = commit.preflight(&monitor).unwrap_err().to_string();
    assert!(error.contains("Permission denied"), "{error}");
    assert_eq!(disk(&monitor).layers().len(), 4, "QEMU lives");
}

#[test]
fn without_the_guard_qemu_fails_at_the_end_or_dies() {
    if !tools_are_here() {
        return;
    }
    let chain = Chain::new(Make::default());
    let before = chain.bytes(4);
    let daemon = with_an_overlay_that_cannot_be_written(&chain);
    let monitor = daemon.connect();
    let disk = disk(&monitor);
    let node = |n: &str| disk.layer(n).unwrap().node.clone();
    let arguments = json!({
        "job-id": "unguarded", "device": "top", "base-node": node("[1]"), "top-node": node("[2]"),
        "backing-file": "1.img", "auto-finalize": false, "auto-dismiss": false,
    });
    monitor.query("block-commit", arguments).unwrap();
    let job = Job::new(&monitor, "unguarded");
    wait(&job, Goal::Pending);
    let ended = job.finalize().and_then(|()| job.wait(Goal::Concluded, None, &mut |_| Watch::GoOn));
    match ended.and_then(|_| job.take_result()) {
        // QEMU 10.0.2 dies, and every guest's disks with it; one that is mended tells an error.
        Err(Error::Disconnected { .. } | Error::Job { .. } | Error::Command { .. }) => {}
        other => panic!("{other:?}"),
    }
    drop(daemon);
    assert!(chain.bytes(4) == before, "the guest sees other bytes");
}

#[test]
fn snapshots_are_taken_together_or_not_at_all() {
    if !tools_are_here() {
        return;
    }
    let chain = Chain::new(Make { layers: 2, ..Make::default() });
    let before = chain.bytes(2);
    let daemon = Daemon::serve(&chain, None);
    let monitor = daemon.connect();
    let second = chain.folder.path().join("second.img");
    run("qemu-img", &["create", "-q", "-f", "qcow2", second.to_str().unwrap(), "8M"]);
    let file = json!({"driver": "file", "filename": second});
    monitor.query("blockdev-add", json!({"driver": "qcow2", "node-name": "two", "file": file})).unwrap();
    let socket = json!({"type": "unix", "path": chain.folder.path().join("vhost2.sock")});
    let export = json!({"type": "vhost-user-blk", "id": "disk1", "node-name": "two", "addr": socket, "writable": true});
    monitor.query("block-export-add", export).unwrap();

    let graph = qmp_client::Graph::ask(&monitor).unwrap();
    let (one, two) = (graph.disk("disk0").unwrap(), graph.disk("disk1").unwrap());
    let (new_one, new_two) = (chain.folder.path().join("new1.img"), chain.folder.path().join("new2.img"));
    let existing = chain.path(1);
    let bytes = std::fs::read(&existing).unwrap();
    let error = snapshot(&monitor, &[(one, &new_one), (two, &existing)]).unwrap_err().to_string();
    assert!(error.contains("would overwrite"), "{error}");
    assert!(std::fs::read(&existing).unwrap() == bytes && !new_one.exists());

    // The second disk is busy: nothing is left of the first one's overlay either.
    let target = json!({"driver": "null-co", "node-name": "nowhere", "size": 8 << 20, "read-zeroes": false});
    monitor.query("blockdev-add", target).unwrap();
    let mirror = json!({"job-id": "busy", "device": "two", "target": "nowhere", "sync": "full"});
    monitor.query("blockdev-mirror", mirror).unwrap();
    wait(&Job::new(&monitor, "busy"), Goal::Ready);
    assert!(snapshot(&monitor, &[(one, &new_one), (two, &new_two)]).is_err());
    assert!(!new_one.exists() && !new_two.exists());
    assert_eq!(disk(&monitor).layers().len(), 2);
    Job::new(&monitor, "busy").cancel().unwrap();
    while !jobs(&monitor).unwrap().is_empty() {
        monitor.next_event(Duration::from_millis(100)).unwrap();
    }

    let now = snapshot(&monitor, &[(one, &new_one), (two, &new_two)]).unwrap();
    assert_eq!(indexes(&now[0]), listed(&[(3, "new1.img"), (2, "2.img"), (1, "1.img")]));
    assert_eq!(indexes(&now[1]), listed(&[(2, "new2.img"), (1, "second.img")]));
    assert_eq!(now[1].active().virtual_size, 8 << 20);

    // And away again: the new overlay is merged and closed, its nodes too.
    let mut commit = plan(&now[0], "[2]", "[3]", MergeOptions::default());
    commit.preflight(&monitor).unwrap();
    let job = commit.start(&monitor).unwrap();
    wait(&job, Goal::Ready);
    let merged = commit.finish(&job, &monitor, &mut || Ok(())).unwrap();
    assert!(merged.still_open.is_empty(), "{:?}", merged.still_open);
    assert_eq!(indexes(&merged.disk), listed(&[(2, "2.img"), (1, "1.img")]));
    drop(daemon);
    assert!(chain.bytes(2) == before, "the guest sees other bytes");
    run("qemu-img", &["check", "-q", new_one.to_str().unwrap()]);
}

#[test]
fn a_chain_of_a_hundred_layers_is_read_and_merged() {
    if !tools_are_here() {
        return;
    }
    let chain = Chain::new(Make { layers: 100, ..Make::default() });
    let before = chain.bytes(100);
    let daemon = Daemon::serve(&chain, None);
    let monitor = daemon.connect();
    let disk = disk(&monitor);
    assert_eq!(disk.layers().len(), 100);
    assert_eq!(disk.layer("disk0[42]").unwrap().file, chain.name(42));
    assert_eq!(disk.layer(&chain.name(7)).unwrap().index, 7);
    let mut commit = plan(&disk, "[1]", "[99]", MergeOptions::default());
    commit.preflight(&monitor).unwrap();
    let job = commit.start(&monitor).unwrap();
    wait(&job, Goal::Pending);
    let merged = commit.finish(&job, &monitor, &mut || Ok(())).unwrap();
    assert_eq!(indexes(&merged.disk), listed(&[(2, "100.img"), (1, "1.img")]));
    drop(daemon);
    assert!(chain.bytes(100) == before, "the guest sees other bytes");
}

/// The nodes of a chain, each named: `top`, `fmt3` and so on, with `file4` and so on below.
fn named_nodes(chain: &Chain, base_file: Value) -> Vec<Value> {
    let mut nodes = Vec::new();
    for n in 1..=chain.layers {
        let mut file = json!({"driver": "file", "filename": chain.name(n), "node-name": format!("file{n}")});
        if n == 1 && !base_file.is_null() {
            file = base_file.clone();
        }
        nodes.push(file);
        let name = |n| if n == chain.layers { "top".to_owned() } else { format!("fmt{n}") };
        let mut node = json!({"driver": "qcow2", "node-name": name(n), "file": format!("file{n}")});
        node["backing"] = if n > 1 { json!(name(n - 1)) } else { Value::Null };
        if n < chain.layers {
            node["read-only"] = json!(true);
        }
        nodes.push(node);
    }
    nodes
}

#[test]
fn nodes_that_the_user_named_are_closed_after_the_merge() {
    if !tools_are_here() {
        return;
    }
    for top in ["[3]", "[4]"] {
        let chain = Chain::new(Make::default());
        let before = chain.bytes(4);
        let nodes = named_nodes(&chain, Value::Null);
        let daemon = Daemon::spawn_nodes(Command::new("qemu-storage-daemon"), &nodes, &chain, None);
        let monitor = daemon.connect();
        let mut commit = plan(&disk(&monitor), "[1]", top, MergeOptions::default());
        commit.preflight(&monitor).unwrap();
        let job = commit.start(&monitor).unwrap();
        let merged = if commit.is_active() {
            wait(&job, Goal::Ready);
            commit.finish(&job, &monitor, &mut || Ok(())).unwrap()
        } else {
            wait(&job, Goal::Pending);
            commit.finish(&job, &monitor, &mut || Ok(())).unwrap()
        };
        assert!(merged.still_open.is_empty(), "{:?}", merged.still_open);
        let left = monitor.query("query-named-block-nodes", json!({"flat": true})).unwrap();
        let left: Vec<_> =
            left.as_array().unwrap().iter().map(|n| n["node-name"].as_str().unwrap()).collect();
        for gone in ["fmt2", "file2", "fmt3", "file3"] {
            assert!(!left.contains(&gone), "{left:?}");
        }
        assert_eq!(left.contains(&"top"), !commit.is_active());
        drop(daemon);
        let remaining = if commit.is_active() { 1 } else { 4 };
        // With named nodes QEMU would by itself write a `json:` name.
        if remaining == 4 {
            assert!(chain.info(4, "backing file").unwrap().starts_with("1.img"));
        }
        assert!(chain.bytes(remaining) == before, "the guest sees other bytes");
    }
}

#[test]
fn a_full_disk_halts_the_merge_and_room_lets_it_go_on() {
    if !tools_are_here() {
        return;
    }
    for (top, goal) in [("[3]", Goal::Pending), ("[4]", Goal::Ready)] {
        let chain = Chain::new(Make::default());
        let before = chain.bytes(4);
        // The first write to base after it was opened finds no space.
        let full = json!({
            "driver": "blkdebug", "node-name": "file1",
            "inject-error": [{"event": "write_aio", "errno": 28, "once": true}],
            "image": {"driver": "file", "filename": chain.name(1)},
        });
        let nodes = named_nodes(&chain, full);
        let daemon = Daemon::spawn_nodes(Command::new("qemu-storage-daemon"), &nodes, &chain, None);
        let monitor = daemon.connect();
        let options = MergeOptions::default().with_backing_file((top == "[3]").then(|| "1.img".into()));
        let mut commit = plan(&disk(&monitor), "[1]", top, options);
        commit.preflight(&monitor).unwrap();
        let job = commit.start(&monitor).unwrap();
        let waited = job.wait(goal, Some(Duration::from_secs(300)), &mut |_| Watch::GoOn).unwrap();
        assert!(
            matches!(&waited, Waited::Stalled(job) if job.block.as_ref().unwrap().io_status == "nospace"),
            "{waited:?}"
        );
        job.resume().unwrap();
        wait(&job, goal);
        let merged = if commit.is_active() {
            commit.finish(&job, &monitor, &mut || Ok(()))
        } else {
            commit.finish(&job, &monitor, &mut || Ok(()))
        };
        merged.unwrap();
        drop(daemon);
        assert!(chain.bytes(if top == "[3]" { 4 } else { 1 }) == before, "the guest sees other bytes");
        chain.check(1);
    }
}

#[test]
fn a_killed_daemon_loses_nothing_at_any_stage() {
    if !tools_are_here() {
        return;
    }
    // The last stage is the one in which the valid top is base.
    for stage in ["running", "pending", "merged", "ready", "held", "pivoted"] {
        let chain = Chain::new(Make::default());
        let before = chain.bytes(4);
        let mut daemon = Daemon::serve(&chain, None);
        let monitor = daemon.connect();
        let active = ["ready", "held", "pivoted"].contains(&stage);
        let options = MergeOptions::default().with_speed(if stage == "running" { 64 << 10 } else { 0 });
        let mut commit = plan(&disk(&monitor), "[1]", if active { "[4]" } else { "[3]" }, options);
        commit.preflight(&monitor).unwrap();
        let job = commit.start(&monitor).unwrap();
        match stage {
            "running" => {}
            "pending" => wait(&job, Goal::Pending),
            "merged" => {
                wait(&job, Goal::Pending);
                commit.finish(&job, &monitor, &mut || Ok(())).unwrap();
            }
            "ready" => wait(&job, Goal::Ready),
            "held" => {
                wait(&job, Goal::Ready);
                job.complete().unwrap();
                wait(&job, Goal::Pending);
            }
            _ => {
                wait(&job, Goal::Ready);
                commit.finish(&job, &monitor, &mut || Ok(())).unwrap();
            }
        }
        daemon.kill();
        assert!(matches!(job.state(), Err(Error::Disconnected { .. })), "{stage}");
        let top = if stage == "pivoted" { 1 } else { 4 };
        assert!(chain.bytes(top) == before, "{stage}: the guest sees other bytes");
        if stage == "held" {
            assert!(chain.bytes(1) == before, "base equals the active layer while writes are held");
        }
        // QEMU's kill may leak clusters, which is no loss; the overlay is untouched.
        chain.check(4);
    }
}

#[test]
fn a_guest_that_writes_without_pause_loses_no_write() {
    if !tools_are_here() {
        return;
    }
    let chain = Chain::new(Make::default());
    let mut expected = chain.bytes(4);
    let nbd = chain.folder.path().join("nbd.sock");
    let mut daemon = Daemon::serve(&chain, Some(&nbd));
    let monitor = daemon.connect();
    let writer = Writer::start(&nbd, expected.len());
    writer.wait_for(100);

    // A snapshot, an intermediate merge, and the whole chain into its base, while the guest writes.
    let new = chain.folder.path().join("5.img");
    let taken = snapshot(&monitor, &[(&disk(&monitor), &new)]).unwrap();
    assert_eq!(taken[0].active().index, 5);
    writer.wait_for(100);
    let options = MergeOptions::default().with_nbd_socket(Some(nbd.clone()));
    let mut commit = plan(&disk(&monitor), "[1]", "[4]", options.clone());
    commit.preflight(&monitor).unwrap();
    let job = commit.start(&monitor).unwrap();
    wait(&job, Goal::Pending);
    writer.wait_for(100);
    commit.finish(&job, &monitor, &mut || Ok(())).unwrap();
    writer.wait_for(100);
    let mut commit = plan(&disk(&monitor), "[1]", "[2]", options);
    commit.preflight(&monitor).unwrap();
    let job = commit.start(&monitor).unwrap();
    wait(&job, Goal::Ready);
    writer.wait_for(100);
    let merged = commit.finish(&job, &monitor, &mut || Ok(())).unwrap();
    assert_eq!(indexes(&merged.disk), listed(&[(1, "1.img")]));
    writer.wait_for(100);

    let writes = writer.stop(&mut expected);
    assert!(writes >= 600, "{writes} writes were acknowledged");
    monitor.query("quit", json!({})).unwrap();
    daemon.wait_for_its_end();
    let now = chain.bytes(1);
    let lost = expected.chunks(4096).zip(now.chunks(4096)).filter(|(a, b)| a != b).count();
    assert_eq!((lost, now.len()), (0, expected.len()), "blocks lost of {writes} writes");
    chain.check(1);
}

#[test]
fn filters_on_top_are_passed_over_and_kept() {
    if !tools_are_here() {
        return;
    }
    for top in ["[3]", "[4]"] {
        let chain = Chain::new(Make::default());
        let before = chain.bytes(4);
        let mut nodes = named_nodes(&chain, Value::Null);
        let active = nodes.last_mut().unwrap();
        active["node-name"] = json!("active");
        nodes.push(json!({"driver": "copy-on-read", "node-name": "cor", "file": "active"}));
        nodes.push(
            json!({"driver": "throttle", "node-name": "top", "throttle-group": "group0", "file": "cor"}),
        );
        let daemon = Daemon::spawn_nodes(Command::new("qemu-storage-daemon"), &nodes, &chain, None);
        let monitor = daemon.connect();
        let disk = disk(&monitor);
        assert_eq!((disk.root(), disk.active().node.as_str()), ("top", "active"));
        assert_eq!(disk.filters(), ["top", "cor"]);
        assert_eq!(disk.layers().len(), 4);
        let mut commit = plan(&disk, "[2]", top, MergeOptions::default());
        commit.preflight(&monitor).unwrap();
        let job = commit.start(&monitor).unwrap();
        let merged = if commit.is_active() {
            wait(&job, Goal::Ready);
            commit.finish(&job, &monitor, &mut || Ok(())).unwrap()
        } else {
            wait(&job, Goal::Pending);
            commit.finish(&job, &monitor, &mut || Ok(())).unwrap()
        };
        // Left to itself, QEMU drops the filters, and the limits of a throttled disk, at the pivot.
        assert_eq!(merged.disk.filters(), ["top", "cor"]);
        assert_eq!(merged.disk.layers().len(), if commit.is_active() { 2 } else { 3 });
        assert!(merged.still_open.is_empty(), "{:?}", merged.still_open);
        drop(daemon);
        assert!(chain.bytes(if commit.is_active() { 2 } else { 4 }) == before, "the guest sees other bytes");
    }
}

/// A chain whose base is on the other side of NBD, and the server of it.
fn over_nbd() -> (Chain, Daemon) {
    let remote = Chain::new(Make { layers: 1, ..Make::default() });
    let socket = remote.folder.path().join("base.sock");
    let mut command = Command::new("qemu-nbd");
    command.args(["-t", "-e", "4", "-f", "qcow2", "-k"]).arg(&socket).arg(remote.path(1));
    let server = Daemon { child: command.spawn().unwrap(), socket: socket.clone() };
    for _ in 0..30_000 {
        if std::os::unix::net::UnixStream::connect(&socket).is_ok() {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let address = format!("nbd+unix:///?socket={}", socket.display());
    for (n, below, format) in [(2, address.as_str(), "raw"), (3, "2.img", "qcow2")] {
        let file = remote.name(n);
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", below, "-F", format, &file, "16M"]);
        run("qemu-io", &["-f", "qcow2", "-c", &format!("write -q -P {n} {n}M 1M"), &file]);
    }
    (Chain { layers: 3, ..remote }, server)
}

#[test]
fn a_base_behind_nbd_receives_a_merge_and_keeps_its_name() {
    if !tools_are_here() {
        return;
    }
    let (chain, _server) = over_nbd();
    let before = chain.bytes(3);
    let name = chain.info(2, "backing file");
    let daemon = Daemon::serve(&chain, None);
    let monitor = daemon.connect();
    let disk = disk(&monitor);
    assert_eq!(disk.layer("[1]").unwrap().protocol.as_deref(), Some("nbd"));
    let mut commit = plan(&disk, "[1]", "[2]", MergeOptions::default());
    commit.preflight(&monitor).unwrap();
    let job = commit.start(&monitor).unwrap();
    wait(&job, Goal::Pending);
    commit.finish(&job, &monitor, &mut || Ok(())).unwrap();
    drop(daemon);
    assert_eq!(chain.info(3, "backing file"), name);
    assert_eq!(chain.info(3, "backing file format").as_deref(), Some("raw"));
    assert!(chain.bytes(3) == before, "the guest sees other bytes");
}

#[test]
fn a_base_whose_server_goes_halts_the_merge_and_it_can_be_cancelled() {
    if !tools_are_here() {
        return;
    }
    let (chain, mut server) = over_nbd();
    let daemon = Daemon::serve(&chain, None);
    let monitor = daemon.connect();
    let options = MergeOptions::default().with_speed(16 << 10);
    let mut commit = plan(&disk(&monitor), "[1]", "[2]", options);
    commit.preflight(&monitor).unwrap();
    let job = commit.start(&monitor).unwrap();
    server.kill();
    job.set_speed(0).unwrap();
    let waited = job.wait(Goal::Pending, Some(Duration::from_secs(300)), &mut |_| Watch::GoOn).unwrap();
    assert!(
        matches!(&waited, Waited::Stalled(job) if job.block.as_ref().unwrap().io_status == "failed"),
        "{waited:?}"
    );
    commit.cancel(&job).unwrap();
    assert_eq!(disk(&monitor).layers().len(), 3);
    assert!(chain.info(3, "backing file").unwrap().starts_with("2.img"));
}

#[test]
fn a_pull_takes_the_layers_below_into_the_active_one() {
    if !tools_are_here() {
        return;
    }
    for base in [Some("[1]"), None] {
        let chain = Chain::new(Make::default());
        let before = chain.bytes(4);
        let untouched: Vec<_> = (1..4).map(|n| std::fs::read(chain.path(n)).unwrap()).collect();
        let nodes = named_nodes(&chain, Value::Null);
        let mut daemon = Daemon::spawn_nodes(Command::new("qemu-storage-daemon"), &nodes, &chain, None);
        let monitor = daemon.connect();
        let disk = disk(&monitor);
        let base = base.map(|name| disk.layer(name).unwrap());
        let mut pull = Procedure::pull(&disk, base, MergeOptions::default()).unwrap();
        pull.preflight(&monitor).unwrap();
        let job = pull.start(&monitor).unwrap();
        wait(&job, Goal::Pending);
        pull.cancel(&job).unwrap();
        assert_eq!(common::disk(&monitor).layers().len(), 4);
        let job = pull.start(&monitor).unwrap();
        wait(&job, Goal::Pending);
        let merged = pull.finish(&job, &monitor, &mut || Ok(())).unwrap();
        assert_eq!(merged.disk.layers().len(), if base.is_some() { 2 } else { 1 });
        assert_eq!(merged.disk.active().node, "top");
        // Without a base all below is given up, base too.
        assert!(merged.still_open.is_empty(), "{:?}", merged.still_open);
        daemon.kill();
        let backing = chain.info(4, "backing file");
        assert_eq!(
            backing.map(|b| b.split(" (").next().unwrap().to_owned()),
            base.map(|_| "1.img".to_owned())
        );
        assert!(chain.bytes(4) == before, "the guest sees other bytes");
        chain.check(4);
        for (n, bytes) in (1..4).zip(untouched) {
            assert!(std::fs::read(chain.path(n)).unwrap() == bytes, "layer {n} was written");
        }
    }
}
