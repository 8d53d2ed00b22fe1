//! The block graph: the disks of a virtual machine, and the chain of each.

mod attached;
mod disk;
mod nodes;
mod readers;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};

use serde_json::{Value, json};

use crate::error::{Error, Refusal, Result};
use crate::qmp::monitor::{Execute, Monitor, read};
pub(crate) use attached::{are_alone, holds_requests};
use disk::file_of;
pub use disk::{Backing, Disk, Layer, Range};
use nodes::{Below, Edges, NamedNode};

/// The disks of a QEMU or a qemu-storage-daemon at the time of the query.
#[derive(Clone, Debug)]
pub struct Graph {
    disks: Vec<Disk>,
    /// All nodes, each with its file's name as QEMU has it.
    files: Vec<(String, String)>,
    /// Which node is above which; `None` before QEMU 4.0.
    edges: Option<Edges>,
}

/// The top of a chain: a device, or an export.
struct Root {
    name: String,
    device: Option<String>,
    qdev: Option<String>,
    export: Option<String>,
    /// Node names from the top, each with the nodes of its files.
    nodes: Vec<(String, Below)>,
}

impl Graph {
    /// Asks for the devices of a QEMU, the exports of both, and the chains below them.
    ///
    /// The nodes are queried as a flat list. QEMU's other answer is quadratic in the depth of a chain, and
    /// takes seconds during which the guest stands still.
    ///
    /// # Errors
    /// Those of the queries; [`Error::Refused`] while QEMU keeps a pull that has concluded, because this query
    /// crashes QEMU 10.0.2 then.
    pub fn ask(monitor: &(impl Monitor + ?Sized)) -> Result<Self> {
        no_kept_stream(monitor)?;
        let command = "query-blockstats";
        let Value::Array(devices) = monitor.query(command, json!({}))? else {
            return Err(Error::Unreadable { command: command.to_owned(), why: "it is no list".to_owned() });
        };
        let command = "query-named-block-nodes";
        let named: Vec<NamedNode> = read(command, monitor.query(command, json!({"flat": true}))?)?;
        let edges = edges(monitor)?;
        let below = edges.as_ref().map(Edges::below);
        let mut roots: Vec<Root> =
            devices.iter().filter_map(|device| Root::of_device(device, below.as_ref())).collect();
        let reached: HashSet<String> =
            roots.iter().flat_map(|r| &r.nodes).map(|(node, _)| node.clone()).collect();
        roots.extend(
            exports(monitor, edges.as_ref(), below.as_ref())?
                .into_iter()
                .filter(|root| !reached.contains(root.top())),
        );
        let named: HashMap<String, NamedNode> = named.into_iter().map(|n| (n.node_name.clone(), n)).collect();
        let below = below.unwrap_or_default();
        let file = |node: &NamedNode| {
            let below = below.get(node.node_name.as_str()).and_then(|below| named.get(below.file.as_ref()?));
            (node.node_name.clone(), file_of(node, below))
        };
        let files = named.values().map(file).collect();
        let disks = roots.into_iter().filter_map(|root| Disk::new(root, &named)).collect();
        Ok(Self { disks, files, edges })
    }

    /// The disks that have a medium, in the order in which they were made, devices before exports.
    pub fn disks(&self) -> &[Disk] {
        &self.disks
    }

    /// The same disks with the names of their layers' files as `rename` gives them, where it gives one.
    ///
    /// This is for names that are relative to QEMU's own folder: a caller that knows QEMU's open files can tell
    /// which files are meant.
    #[must_use]
    pub(crate) fn with_files(mut self, rename: &dyn Fn(&str) -> Option<String>) -> Self {
        self.disks.iter_mut().for_each(|disk| disk.rename_files(rename));
        for (_, file) in &mut self.files {
            if let Some(name) = rename(file) {
                *file = name;
            }
        }
        self
    }

    /// The disk of this name: as [`Disk::name`], or the id of its drive, of its device or of its export, the
    /// device's path, a node name at the top, or the file of the active layer.
    ///
    /// # Errors
    /// [`Error::NoSuchDisk`], which lists the disks, if no disk or more than one is meant.
    pub fn disk(&self, name: &str) -> Result<&Disk> {
        let exact = self.disks.iter().find(|d| d.name() == name);
        let mut meant = self.disks.iter().filter(|d| d.answers_to(name));
        let found = exact.or_else(|| meant.next().filter(|_| meant.next().is_none()));
        found.ok_or_else(|| Error::NoSuchDisk {
            disk: name.to_owned(),
            disks: self.disks.iter().map(|d| d.name().to_owned()).collect::<Vec<_>>().join(", "),
        })
    }
}

impl Root {
    /// The chain in an entry of `query-blockstats`, where each level is nested in the one above. The code
    /// descends step by step, because a long chain is nested too deep for recursive types.
    ///
    /// The edges of the graph tell which node holds an image's file. The entry names the node with the data,
    /// which is another one for an image with an external data file.
    fn of_device(stats: &Value, below: Option<&HashMap<&str, Below>>) -> Option<Self> {
        let text = |level: &Value, key: &str| level[key].as_str().map(str::to_owned);
        let device = text(stats, "device").filter(|d| !d.is_empty());
        let qdev = text(stats, "qdev");
        let mut nodes = Vec::new();
        let mut level = stats;
        while level.is_object() {
            // An empty drive has no node. Below a node lies its backing node, or the node under a filter.
            let node = text(level, "node-name")?;
            let files = match below {
                Some(below) => below.get(node.as_str()).cloned().unwrap_or_default(),
                None => Below { file: text(&level["parent"], "node-name"), data_file: None },
            };
            nodes.push((node, files));
            level = &level["backing"];
        }
        let id = qdev.as_deref().and_then(device_id).map(str::to_owned);
        let name = id.or_else(|| device.clone()).or_else(|| nodes.first().map(|n| n.0.clone()))?;
        Some(Self { name, device, qdev, export: None, nodes })
    }

    fn top(&self) -> &str {
        self.nodes.first().map_or("", |(node, _)| node)
    }
}

/// Refuses while QEMU keeps a `stream` job that has concluded. The job's filter has nothing below it then, and
/// QEMU 10.0.2 crashes, with the guest, when it lists its nodes.
fn no_kept_stream(monitor: &(impl Monitor + ?Sized)) -> Result<()> {
    let jobs = match monitor.query("query-jobs", json!({})) {
        Ok(jobs) => jobs,
        // Before QEMU 3.0, where no job is kept.
        Err(Error::Command { failure, .. }) if failure.class == "CommandNotFound" => return Ok(()),
        Err(error) => return Err(error),
    };
    let kept = |job: &&Value| job["type"] == "stream" && job["status"] == "concluded";
    let Some(job) = jobs.as_array().into_iter().flatten().find(kept) else { return Ok(()) };
    let text = |key: &str| job[key].as_str().map(str::to_owned);
    Err(Refusal::KeptPull { job: text("id").unwrap_or_default(), error: text("error") }.into())
}

/// The id that a user gave to a device, from its path in QEMU's tree of objects.
fn device_id(qdev: &str) -> Option<&str> {
    qdev.strip_prefix("/machine/peripheral/")
        .and_then(|rest| rest.split('/').next())
        .filter(|id| !id.is_empty())
}

/// The edges between nodes. QEMU calls this command unstable, but it is exact, unlike file names. `None` before
/// QEMU 4.0.
fn edges(monitor: &(impl Monitor + ?Sized)) -> Result<Option<Edges>> {
    let command = "x-debug-query-block-graph";
    match monitor.query(command, json!({})) {
        Ok(edges) => read(command, edges).map(Some),
        Err(Error::Command { failure, .. }) if failure.class == "CommandNotFound" => Ok(None),
        Err(error) => Err(error),
    }
}

/// The chains below exports. A qemu-storage-daemon has no devices, and QEMU gives statistics only for devices.
fn exports(
    monitor: &(impl Monitor + ?Sized),
    edges: Option<&Edges>,
    below: Option<&HashMap<&str, Below>>,
) -> Result<Vec<Root>> {
    #[derive(serde::Deserialize)]
    struct Export {
        id: String,
        #[serde(rename = "node-name")]
        node_name: String,
    }
    let command = "query-block-exports";
    let exports: Vec<Export> = match monitor.query(command, json!({})) {
        Ok(exports) => read(command, exports)?,
        // Before QEMU 5.2.
        Err(Error::Command { failure, .. }) if failure.class == "CommandNotFound" => Vec::new(),
        Err(error) => return Err(error),
    };
    let (Some(edges), Some(below)) = (edges, below) else { return Ok(Vec::new()) };
    let with_files = |node: String| {
        let files = below.get(node.as_str()).cloned().unwrap_or_default();
        (node, files)
    };
    Ok(exports
        .into_iter()
        // QEMU tells the newest first.
        .rev()
        .map(|export| Root {
            nodes: edges.chain(&export.node_name).into_iter().map(with_files).collect(),
            name: export.id.clone(),
            device: None,
            qdev: None,
            export: Some(export.id),
        })
        .collect())
}
