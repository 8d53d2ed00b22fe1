//! Notes a switch, and checks the disk while QEMU holds the guest's writes.

use std::path::Path;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::block::graph::{Disk, Graph};
use crate::error::Result;
use crate::qmp::monitor::{Execute, Monitor};
use crate::state::{Kind, Phase, State, StateFile, now_ns, stamp_of};

/// Two writes that are further apart than this have different times in that order: the kernel's clock for files goes in
/// steps of some milliseconds.
const CLOCK_STEP: Duration = Duration::from_millis(20);

/// Notes that QEMU is about to switch.
pub(super) fn note_switching(state: &mut State, file: &StateFile) -> Result<()> {
    let valid_top = state.top_after();
    if state.kind == Kind::ActiveCommit {
        settle(state);
    }
    state.enter(Phase::Switching, valid_top);
    let saved = file.save(state);
    if saved.is_err() {
        // The new content may have reached the file all the same. Write the old one again: the guest stays
        // where it was.
        let valid_top = state.top_before();
        state.enter(Phase::Copying, valid_top);
        let _ = file.save(state);
    }
    saved
}

/// Whether anything was written after QEMU began to hold the disk's writes, and so is not in base. QEMU 10.0.2
/// does not hold back a client that connects to an NBD export only then: it acknowledges that client's writes,
/// and loses them at the pivot.
pub(super) fn is_written_while_held(monitor: &(impl Monitor + ?Sized), state: &State) -> Result<bool> {
    let active = state.active().map(|layer| layer.node.as_str());
    let graph = Graph::ask(monitor)?;
    let disk = graph.disks().iter().find(|disk| Some(disk.active().node.as_str()) == active);
    let filters = disk.map(Disk::filters).unwrap_or_default();
    let nodes = monitor.query("query-named-block-nodes", json!({"flat": true}))?;
    let is_filter = |node: &&Value| filters.iter().any(|filter| node["node-name"] == filter.as_str());
    let filters = nodes.as_array().into_iter().flatten().filter(is_filter);
    // The job's own list of data to copy has no name; a user's bitmap has one.
    let mut lists = filters.filter_map(|node| node["dirty-bitmaps"].as_array()).flatten();
    Ok(lists.any(|list| list.get("name").is_none() && list["count"].as_u64() != Some(0)))
}

/// Waits until a write to base or to the active layer would change its time. The kernel's clock for files goes in
/// steps of some milliseconds; guest writes are held meanwhile.
fn settle(state: &State) {
    let layers = [state.active(), state.target()].into_iter().flatten();
    let here = layers.filter(|layer| layer.stamp.is_some());
    let last = here.filter_map(|layer| stamp_of(Path::new(&layer.file)).ok().flatten());
    let last = last.filter(|stamp| !stamp.is_device).map(|stamp| stamp.times.modified_ns).max();
    let last = last.and_then(|last| u64::try_from(last).ok()).unwrap_or(0);
    let age = Duration::from_nanos(now_ns().saturating_sub(last));
    if let Some(rest) = CLOCK_STEP.checked_sub(age) {
        thread::sleep(rest);
    }
}
