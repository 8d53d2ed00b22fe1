//! Asks whether the QEMU that ran the merge is still running, and whether the merge is its business.

use std::time::Duration;

use super::finding::{Fact, Finding, Found, Next, Trouble};
use crate::block::graph::{Disk, Graph};
use crate::block::jobs::jobs;
use crate::error::Error;
use crate::live::discover::{Files, Unfinished};
use crate::live::paused::let_go_on;
use crate::qmp::address::Address;
use crate::qmp::connection::{Connection, Options};
use crate::qmp::owner::Owner;
use crate::state::{Phase, Qemu};

/// How long to wait for a monitor's greeting. A monitor that another client holds never sends one.
const GREETING: Duration = Duration::from_secs(2);

/// What answers at the address of a merge.
enum Answer {
    /// Nothing.
    Nobody,
    /// QEMU, but another client holds its monitor.
    Silence,
    /// QEMU.
    Says(Said),
}

/// What QEMU says of a merge.
struct Said {
    qemu: Qemu,
    /// Whether a disk consists of the nodes that the merge leaves. Then the merge can be found again and ended.
    has_nodes: bool,
    /// Whether a killed client had left the guest paused, and it runs again now.
    goes_on: bool,
    /// The files of the disk, from the active one down.
    files: Vec<String>,
}

/// Asks the QEMUs that may have the merge: the one at the recorded address, and the one at `address`. The error
/// is the finding if the merge is the business of one of them, so that nothing may be changed. The second value
/// is the files of the disk, from the active one down, if a QEMU shows it.
pub(super) fn ask(
    merge: &Unfinished,
    address: Option<&Address>,
    dry_run: bool,
) -> (Result<Qemu, Box<Finding>>, Vec<String>) {
    let recorded = merge.state.address.parse::<Address>().ok();
    let mut addresses: Vec<&Address> = recorded.iter().chain(address).collect();
    addresses.dedup_by_key(|address| address.to_string());
    let mut said = (Qemu::Gone, Vec::new());
    for address in addresses {
        match ask_one(address, merge, dry_run) {
            Answer::Nobody => {}
            Answer::Silence => {
                let mut finding = Finding::new(merge.outline(), Found::Running);
                finding.trouble = Some(Trouble::MonitorInUse(address.clone()));
                return (Err(Box::new(finding)), Vec::new());
            }
            Answer::Says(now) => match in_hand(merge, address, &now) {
                Some(finding) => return (Err(Box::new(finding)), now.files),
                None => said = (now.qemu, now.files),
            },
        }
    }
    (Ok(said.0), said.1)
}

fn in_hand(merge: &Unfinished, address: &Address, said: &Said) -> Option<Finding> {
    let mut finding = Finding::new(merge.outline(), Found::Running);
    if said.goes_on {
        finding.facts.push(Fact::GuestGoesOn);
    }
    match (said.qemu, merge.state.phase) {
        (Qemu::HasJob(status), _) => {
            finding.facts.push(Fact::JobIs(status));
            finding.facts.push(Fact::CanBeCancelled(address.clone()));
            finding.next = Some(Next::End(address.clone()));
        }
        (Qemu::ShowsBefore, Phase::Copying) => {
            finding.facts.push(Fact::JobIsGone);
            finding.next = Some(Next::Begin(address.clone()));
        }
        (Qemu::ShowsAfter, Phase::Switching) if said.has_nodes => {
            finding.facts.push(Fact::HasSwitched);
            finding.next = Some(Next::End(address.clone()));
        }
        // Only files remain to be recovered, and their locks show who uses them.
        _ => return None,
    }
    Some(finding)
}

fn ask_one(address: &Address, merge: &Unfinished, dry_run: bool) -> Answer {
    let state = &merge.state;
    // The monitor belongs to a manager like libvirt, so this merge was not begun through it.
    if Owner::of(address, None).is_some() {
        return Answer::Nobody;
    }
    let options = Options { allow_tcp: true, greeting_timeout: GREETING, ..Options::default() };
    let monitor = match Connection::connect(address, &options) {
        Ok(monitor) => monitor,
        Err(Error::NoGreeting { .. }) => return Answer::Silence,
        Err(_) => return Answer::Nobody,
    };
    // Ask for jobs before disks: with some jobs, QEMU cannot answer for its disks.
    let Ok(all) = jobs(&monitor) else { return Answer::Silence };
    // If that fails, the state still notes the pause, and the next call tries again.
    let go_on = || !dry_run && let_go_on(&monitor, &merge.file, &mut state.clone()).unwrap_or(false);
    if let Some(job) = all.into_iter().find(|job| job.id == state.job) {
        return Answer::Says(Said {
            qemu: Qemu::HasJob(job.status),
            has_nodes: true,
            goes_on: go_on(),
            files: Vec::new(),
        });
    }
    let files = Files::of(&monitor);
    let Ok(graph) = Graph::ask(&monitor) else { return Answer::Silence };
    let graph = graph.with_files(&|name| files.absolute(name));
    let Ok(qemu) = Qemu::ask(&monitor, &graph, state) else { return Answer::Silence };
    let has_nodes = |disk: &Disk| {
        let now = disk.layers().iter().map(|layer| layer.node.as_str());
        now.eq(state.layers_after().map(|layer| layer.node.as_str()))
    };
    let shown = state.disk_after(&graph).or_else(|| state.disk_before(&graph));
    let layers = shown.map_or(&[][..], Disk::layers);
    let files = layers.iter().map(|layer| layer.file.clone()).collect();
    let has_nodes = graph.disks().iter().any(has_nodes);
    Answer::Says(Said { qemu, has_nodes, goes_on: shown.is_some() && go_on(), files })
}
