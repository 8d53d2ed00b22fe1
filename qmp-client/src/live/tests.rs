//! Switches that fail, on a QEMU that is made up: what the state file says then.

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::*;
use crate::block::merge::MergeOptions;
use crate::qmp::message::{Event, Failure};
use crate::qmp::replay::Replay;

/// A QEMU whose jobs are copied at once, and whose switches fail with these words. Its disks stay what they are.
struct Failing {
    status: Cell<Option<&'static str>>,
    id: RefCell<String>,
    why: &'static str,
    is_gone_at_the_switch: bool,
    graph: Vec<(String, Value)>,
}

impl Failing {
    fn new(is_gone_at_the_switch: bool) -> Self {
        let replay = Replay::of(include_str!("../../testdata/transcripts/discovery-blockdev.jsonl"));
        Graph::ask(&replay).unwrap();
        let asked: Vec<_> = replay.asked.take();
        let replay = Replay::of(include_str!("../../testdata/transcripts/discovery-blockdev.jsonl"));
        let answer = |(command, arguments): (String, Value)| {
            let value = replay.execute_raw(&command, arguments, Duration::ZERO).ok()?;
            Some((command, value))
        };
        Self {
            status: Cell::new(None),
            id: RefCell::default(),
            why: "Input/output error",
            is_gone_at_the_switch,
            graph: asked.into_iter().filter_map(answer).collect(),
        }
    }
}

impl Monitor for Failing {
    fn execute_raw(&self, command: &str, arguments: Value, _: Duration) -> Result<Value> {
        let gone = || Err(Error::Disconnected { why: "gone".into() });
        if self.status.get() == Some("gone") {
            return gone();
        }
        let fail = |class: &str| {
            let failure = Failure { class: class.into(), description: "made up".into() };
            Err(Error::Command { command: command.into(), failure })
        };
        match command {
            "block-commit" | "block-stream" => {
                self.id.replace(arguments["job-id"].as_str().unwrap().to_owned());
                let is_active = command == "block-commit" && arguments.get("backing-file").is_none();
                self.status.set(Some(if is_active { "ready" } else { "pending" }));
            }
            "job-complete" => self.status.set(Some("pending")),
            "job-finalize" if self.is_gone_at_the_switch => {
                self.status.set(Some("gone"));
                return gone();
            }
            "job-finalize" => self.status.set(Some("concluded")),
            "job-cancel" => self.status.set(Some("concluded")),
            "job-dismiss" => self.status.set(None),
            "query-jobs" => {
                let job = self.status.get().map(|status| {
                    let mut job = json!({
                        "id": *self.id.borrow(), "type": "commit", "status": status, "current-progress": 1, "total-progress": 1,
                    });
                    if status == "concluded" {
                        job["error"] = json!(self.why);
                    }
                    job
                });
                return Ok(job.into_iter().collect());
            }
            "query-block-jobs" => return Ok(json!([])),
            // A running guest that can be paused, and no NBD: that is how base is flushed.
            "query-status" => return Ok(json!({"running": true, "status": "running"})),
            "stop" | "cont" | "change-backing-file" => {}
            _ => {
                let known = self.graph.iter().find(|(name, _)| name == command);
                return known.map_or_else(|| fail("CommandNotFound"), |(_, value)| Ok(value.clone()));
            }
        }
        Ok(json!({}))
    }

    fn next_event(&self, _: Duration) -> Result<Option<Event>> {
        Ok(None)
    }
}

fn begin<'m>(qemu: &'m Failing, folder: &Path, top: Option<&str>) -> Merge<'m, Failing> {
    let graph = Graph::ask(qemu).unwrap();
    let disk = &graph.disks()[0];
    let base = disk.layer("[1]").unwrap();
    let procedure: Procedure = match top {
        Some(top) => {
            let range = disk.range(base, disk.layer(top).unwrap()).unwrap();
            let mut commit = Procedure::commit(disk, &range, MergeOptions::default()).unwrap();
            commit.preflight(qemu).unwrap();
            commit
        }
        None => {
            let mut pull = Procedure::pull(disk, Some(base), MergeOptions::default()).unwrap();
            pull.preflight(qemu).unwrap();
            pull
        }
    };
    let file = StateFile::in_folder(folder, Path::new("/vm/a/active.qcow2"));
    let address = Address::Unix(folder.join("qmp.sock"));
    Merge::begin(qemu, procedure, file, &address, &Wishes::default()).unwrap()
}

#[test]
fn a_switch_that_fails_is_written_back() {
    for top in [Some("[3]"), Some("[5]"), None] {
        let folder = tempfile::tempdir().unwrap();
        let qemu = Failing::new(false);
        let mut merge = begin(&qemu, folder.path(), top);
        let error = if top == Some("[5]") { merge.pivot() } else { merge.finish() }.unwrap_err().to_string();
        assert!(error.contains("Input/output error"), "{error}");
        assert_eq!(qemu.status.get(), None, "the job is dismissed, or it would block the disk");
        let said = merge.file().load().unwrap().unwrap();
        assert_eq!((said.phase, &*said.valid_top), (Phase::Copying, "/vm/a/active.qcow2"), "{top:?}");
    }
}

#[test]
fn a_switch_whose_end_nobody_saw_stays_a_switch() {
    for (top, valid) in [(Some("[3]"), "active"), (Some("[5]"), "base"), (None, "active")] {
        let folder = tempfile::tempdir().unwrap();
        let qemu = Failing::new(true);
        let mut merge = begin(&qemu, folder.path(), top);
        let error = if top == Some("[5]") { merge.pivot() } else { merge.finish() }.unwrap_err();
        assert!(matches!(error, Error::Disconnected { .. }), "{error}");
        let said = merge.file().load().unwrap().unwrap();
        assert_eq!(
            (said.phase, said.valid_top),
            (Phase::Switching, format!("/vm/a/{valid}.qcow2")),
            "{top:?}"
        );
    }
}

#[test]
fn a_state_file_that_cannot_be_written_stops_the_switch_before_it_begins() {
    for top in [Some("[3]"), Some("[5]"), None] {
        let folder = tempfile::tempdir().unwrap();
        let qemu = Failing::new(false);
        let mut merge = begin(&qemu, folder.path(), top);
        // The folder of the file is gone.
        std::fs::remove_dir_all(folder.path()).unwrap();
        let error = if top == Some("[5]") { merge.pivot() } else { merge.finish() }.unwrap_err();
        assert!(matches!(error, Error::File { .. }), "{error}");
        // A guest that is held is let go; otherwise the job waits, and can be finished later.
        let expected = if top == Some("[5]") { None } else { Some("pending") };
        assert_eq!(qemu.status.get(), expected, "{top:?}");
        assert_eq!(merge.state().phase, Phase::Copying);
    }
}
