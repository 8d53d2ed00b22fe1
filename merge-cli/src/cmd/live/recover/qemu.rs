//! Whether the QEMU that ran the merge still runs, and has it in hand.

use std::time::Duration;

use qmp_client::{
    Address, Connection, Disk, Error, Graph, Kind, Options, Owner, Phase, Qemu, State, StateLayer, jobs,
};

use super::Case;
use super::tell::Finding;
use crate::cmd::live::files::Files;
use crate::cmd::live::option;
use crate::exit::Exit;
use crate::failure::Report;
use crate::output::human::{printable, shell_word};

/// What answers at the address of a merge.
enum Answer {
    /// Nothing.
    Nobody,
    /// QEMU, but another client holds its monitor.
    Silence,
    /// QEMU says this of the merge; and whether the disk has the nodes that the merge leaves, so that `live finish`
    /// and `live pivot` know it; and the files of
    /// that disk, from the active one down.
    Says(Qemu, bool, Vec<String>),
}

impl Case<'_> {
    /// What a QEMU says of the merge; or what to say, where it has the merge in hand and nothing is to be changed. And the
    /// files of its disk, from the active one down, if it shows that.
    pub(super) fn ask(&self, qmp: Option<&Address>) -> (Result<Qemu, Box<Finding>>, Vec<String>) {
        let recorded = self.state.address.parse::<Address>().ok();
        let mut addresses: Vec<&Address> = recorded.iter().chain(qmp).collect();
        addresses.dedup_by_key(|address| address.to_string());
        let mut said = (Qemu::Gone, Vec::new());
        for address in addresses {
            match ask(address, self.state) {
                Answer::Nobody => {}
                Answer::Silence => return (Err(Box::new(self.silent(address))), Vec::new()),
                Answer::Says(qemu, same_nodes, top) => match self.in_hand(address, qemu, same_nodes) {
                    Some(finding) => return (Err(Box::new(finding)), top),
                    None => said = (qemu, top),
                },
            }
        }
        (Ok(said.0), said.1)
    }

    fn silent(&self, address: &Address) -> Finding {
        let mut finding = Finding::new(self, "running");
        finding.trouble = Some(Report {
            kind: "monitor-in-use",
            message: format!("{address}: QEMU runs, and another client holds its monitor"),
            hint: format!("end that client, then again: {}", self.call.again()).into(),
            exit: Exit::IN_USE,
        });
        finding
    }

    fn in_hand(&self, address: &Address, qemu: Qemu, same_nodes: bool) -> Option<Finding> {
        let state = self.state;
        let live =
            |words: &str| format!("qmerge live {words} {} {}", shell_word(&state.disk), option(address));
        let end = if state.kind == Kind::ActiveCommit { "pivot" } else { "finish" };
        let mut finding = Finding::new(self, "running");
        match (qemu, state.phase) {
            (Qemu::HasJob(status), _) => {
                let status = printable(&format!("{status:?}"));
                finding
                    .facts
                    .push(format!("QEMU runs, and the job is {status}: there is nothing to put right"));
                finding.facts.push(format!("to give it up instead: {}", live("cancel")));
                finding.next = Some(live(end));
            }
            (Qemu::ShowsBefore, Phase::Copying) => {
                finding.facts.push("QEMU runs, the job is gone, and nothing was switched".to_owned());
                finding.next = Some(format!("{}{}", live(verb(state)), range(state)));
            }
            (Qemu::ShowsAfter, Phase::Switching) if same_nodes => {
                finding.facts.push("QEMU runs, and has switched; only the end is not noted".to_owned());
                finding.next = Some(live(end));
            }
            // Only files are left to put right, and their locks tell who has them.
            _ => return None,
        }
        Some(finding)
    }
}

/// The verb that begins such a merge.
fn verb(state: &State) -> &'static str {
    if state.kind == Kind::Pull { "pull" } else { "commit" }
}

/// Its range, as options.
fn range(state: &State) -> String {
    let file = |index| state.layer(index).map(|layer: &StateLayer| shell_word(&layer.file));
    let mut out = String::new();
    if let Some(base) = file(state.base) {
        out += &format!(" --base {base}");
    }
    match state.kind {
        Kind::Commit => out += &file(state.top).map_or(String::new(), |top| format!(" --top {top}")),
        Kind::ActiveCommit => out += " --active",
        Kind::Pull => {}
    }
    out
}

fn ask(address: &Address, state: &State) -> Answer {
    // A manager's monitor is not for us; such a merge was not begun through it.
    if Owner::of(address, None).is_some() {
        return Answer::Nobody;
    }
    let options = Options { allow_tcp: true, greeting_timeout: Duration::from_secs(2), ..Options::default() };
    let monitor = match Connection::connect(address, &options) {
        Ok(monitor) => monitor,
        Err(Error::NoGreeting { .. }) => return Answer::Silence,
        Err(_) => return Answer::Nobody,
    };
    // Not every job leaves QEMU fit to be asked for its disks.
    let Ok(all) = jobs(&monitor) else { return Answer::Silence };
    if let Some(job) = all.into_iter().find(|job| job.id == state.job) {
        return Answer::Says(Qemu::HasJob(job.status), true, Vec::new());
    }
    let files = Files::of(&monitor);
    let Ok(graph) = Graph::ask(&monitor) else { return Answer::Silence };
    let graph = graph.with_files(&|name| files.absolute(name));
    let Ok(qemu) = Qemu::ask(&monitor, &graph, state) else { return Answer::Silence };
    let nodes = |disk: &Disk| {
        let now = disk.layers().iter().map(|layer| layer.node.as_str());
        now.eq(state.left().map(|layer| layer.node.as_str()))
    };
    let shown = state.disk_after(&graph).or_else(|| state.disk_before(&graph));
    let layers = shown.map_or(&[][..], Disk::layers);
    let files = layers.iter().map(|layer| layer.file.clone()).collect();
    Answer::Says(qemu, graph.disks().iter().any(nodes), files)
}
