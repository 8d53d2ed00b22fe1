//! The block graph: the disks of a virtual machine, and the chain of each.

mod attached;
mod disk;
mod nodes;
#[cfg(test)]
mod tests;

use std::collections::HashSet;

use serde_json::json;

use crate::error::{Error, Result};
use crate::monitor::{Execute, Monitor, read};
pub use disk::{Backing, Disk, Layer, Range};
use nodes::{Edges, NamedNode, Stats};

/// The disks of a QEMU or of a qemu-storage-daemon, as they were when it was asked.
#[derive(Clone, Debug)]
pub struct Graph {
    disks: Vec<Disk>,
}

/// A place where a chain hangs: a device, or an export.
struct Root {
    name: String,
    device: Option<String>,
    qdev: Option<String>,
    export: Option<String>,
    /// Node names from the top, each with the node that holds its file.
    nodes: Vec<(String, Option<String>)>,
}

impl Graph {
    /// Asks for the devices of a QEMU, the exports of both, and the chains below them.
    ///
    /// Node names are asked for in a flat list: QEMU's answer is otherwise quadratic in the depth of a
    /// chain, and takes seconds during which the guest stands still.
    ///
    /// # Errors
    /// Those of the queries.
    pub fn ask(monitor: &(impl Monitor + ?Sized)) -> Result<Self> {
        let command = "query-blockstats";
        let devices: Vec<Stats> = read(command, monitor.query(command, json!({}))?)?;
        let command = "query-named-block-nodes";
        let named: Vec<NamedNode> = read(command, monitor.query(command, json!({"flat": true}))?)?;
        let mut roots: Vec<Root> = devices.into_iter().filter_map(Root::of_device).collect();
        let reached: HashSet<String> =
            roots.iter().flat_map(|r| &r.nodes).map(|(node, _)| node.clone()).collect();
        roots.extend(exports(monitor)?.into_iter().filter(|root| !reached.contains(root.top())));
        let named = named.into_iter().map(|n| (n.node_name.clone(), n)).collect();
        Ok(Self { disks: roots.into_iter().filter_map(|root| Disk::new(root, &named)).collect() })
    }

    /// The disks that have a medium, in the order in which they were made, devices before exports.
    pub fn disks(&self) -> &[Disk] {
        &self.disks
    }

    /// The same disks with the names of their layers' files as `rename` gives them, where it gives one.
    ///
    /// For names that only QEMU understands, because it runs in another folder: whoever knows which files it
    /// has open can say which are meant.
    #[must_use]
    pub fn with_files(mut self, rename: &dyn Fn(&str) -> Option<String>) -> Self {
        self.disks.iter_mut().for_each(|disk| disk.rename_files(rename));
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
    fn of_device(stats: Stats) -> Option<Self> {
        let device = stats.device.clone().filter(|d| !d.is_empty());
        let qdev = stats.qdev.clone();
        let mut nodes = Vec::new();
        let mut next = Some(&stats);
        while let Some(level) = next {
            // An empty drive has no node.
            let node = level.node_name.clone()?;
            nodes.push((node, level.parent.as_ref().and_then(|p| p.node_name.clone())));
            next = level.backing.as_deref();
        }
        let id = qdev.as_deref().and_then(device_id).map(str::to_owned);
        let name = id.or_else(|| device.clone()).or_else(|| nodes.first().map(|n| n.0.clone()))?;
        Some(Self { name, device, qdev, export: None, nodes })
    }

    fn top(&self) -> &str {
        self.nodes.first().map_or("", |(node, _)| node)
    }
}

/// The id that a user gave to a device, from its path in QEMU's tree of objects.
fn device_id(qdev: &str) -> Option<&str> {
    qdev.strip_prefix("/machine/peripheral/")
        .and_then(|rest| rest.split('/').next())
        .filter(|id| !id.is_empty())
}

/// The chains below exports. A qemu-storage-daemon has no devices, and statistics only for devices; its
/// graph is told by a command that QEMU calls unstable, but which is exact, unlike names of files.
fn exports(monitor: &(impl Monitor + ?Sized)) -> Result<Vec<Root>> {
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
    if exports.is_empty() {
        return Ok(Vec::new());
    }
    let command = "x-debug-query-block-graph";
    let edges: Edges = read(command, monitor.query(command, json!({}))?)?;
    Ok(exports
        .into_iter()
        // QEMU tells the newest first.
        .rev()
        .map(|export| Root {
            nodes: edges.chain(&export.node_name),
            name: export.id.clone(),
            device: None,
            qdev: None,
            export: Some(export.id),
        })
        .collect())
}
