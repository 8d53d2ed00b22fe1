//! A guest that is paused for a flush, and a client that is gone before it lets it go on.

use std::time::Duration;

use qmp_client::{
    Address, Connection, Error, Event, Execute, Graph, Merge, MergeOptions, Monitor, Procedure, StateFile,
    Watch, Wishes,
};
use serde_json::{Value, json};

use crate::machine::{Machine, Style};
use crate::support::{qmerge, text, tools_are_here};

/// A monitor whose client is gone before `cont`.
struct Gone(Connection);

impl Monitor for Gone {
    fn execute_raw(&self, command: &str, arguments: Value, timeout: Duration) -> qmp_client::Result<Value> {
        match command {
            "cont" => Err(Error::Disconnected { why: "made up".into() }),
            _ => self.0.execute_raw(command, arguments, timeout),
        }
    }

    fn next_event(&self, timeout: Duration) -> qmp_client::Result<Option<Event>> {
        self.0.next_event(timeout)
    }
}

fn status(machine: &Machine) -> String {
    let status = machine.connect().query("query-status", json!({})).unwrap();
    status["status"].as_str().unwrap().to_owned()
}

/// QEMU's own NBD server listens elsewhere, so that only a pause flushes base.
#[test]
fn a_guest_that_a_killed_client_has_paused_goes_on() {
    if !tools_are_here() {
        return;
    }
    for again in [&["live", "jobs"][..], &["live", "recover"], &["live", "commit", "vda", "--top", "[3]"]] {
        let machine = Machine::new(Style::Drive);
        let monitor = Gone(machine.connect());
        monitor.0.query("cont", json!({})).unwrap();
        let inet = json!({"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}});
        monitor.query("nbd-server-start", json!({"addr": inet})).unwrap();
        let graph = Graph::ask(&monitor).unwrap();
        let disk = graph.disk("vda").unwrap();
        let range = disk.range(disk.layer("[1]").unwrap(), disk.layer("[3]").unwrap()).unwrap();
        let mut commit = Procedure::commit(disk, &range, MergeOptions::default()).unwrap();
        commit.preflight(&monitor).unwrap();
        let file = StateFile::beside(&machine.dir().join("c.img")).unwrap();
        let address = Address::Unix(machine.dir().join("qmp.sock"));
        let mut merge = Merge::begin(&monitor, commit, file, &address, &Wishes::default()).unwrap();
        merge.wait(Some(Duration::from_secs(300)), &mut |_| Watch::GoOn).unwrap();
        merge.finish().unwrap_err();
        drop(merge);
        drop(monitor);
        assert_eq!(status(&machine), "paused");
        let output = qmerge(machine.dir(), &[again, &["--qmp", "qmp.sock"]].concat());
        let said = text(&output.stdout) + &text(&output.stderr);
        assert!(output.status.success(), "{again:?}: {said}");
        assert_eq!(said.contains("goes on now"), again[1] != "commit", "{again:?}: {said}");
        assert_eq!(status(&machine), "running", "{again:?}");
        // Who has paused it since means it.
        machine.connect().query("stop", json!({})).unwrap();
        let jobs = qmerge(machine.dir(), &["live", "jobs", "--qmp", "qmp.sock"]);
        assert!(jobs.status.success() && status(&machine) == "paused", "{again:?}");
    }
}
