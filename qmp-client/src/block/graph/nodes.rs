//! The few fields of QEMU's answers that the graph needs; all others are ignored.

use std::collections::{HashMap, HashSet};

use serde::Deserialize;

/// Nodes that pass requests on and hold no data of their own.
const FILTERS: [&str; 12] = [
    "blkdebug",
    "blklogwrites",
    "blkreplay",
    "commit_top",
    "compress",
    "copy-before-write",
    "copy-on-read",
    "cor",
    "mirror_top",
    "preallocate",
    "snapshot-access",
    "throttle",
];

/// An entry of `query-named-block-nodes`.
#[derive(Deserialize)]
pub(super) struct NamedNode {
    #[serde(rename = "node-name", default)]
    pub(super) node_name: String,
    pub(super) drv: String,
    #[serde(default)]
    pub(super) file: String,
    #[serde(default)]
    pub(super) ro: bool,
    #[serde(default)]
    pub(super) encrypted: bool,
    pub(super) image: Image,
    #[serde(rename = "dirty-bitmaps", default)]
    pub(super) dirty_bitmaps: Vec<Bitmap>,
}

impl NamedNode {
    /// Whether it is a filter that exists only for a job.
    pub(super) fn is_of_a_job(&self) -> bool {
        ["commit_top", "mirror_top"].contains(&self.drv.as_str())
    }

    pub(super) fn is_filter(&self) -> bool {
        FILTERS.contains(&self.drv.as_str())
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Image {
    pub(super) virtual_size: u64,
    pub(super) actual_size: Option<u64>,
    pub(super) backing_filename: Option<String>,
    pub(super) backing_filename_format: Option<String>,
    pub(super) full_backing_filename: Option<String>,
    #[serde(default)]
    pub(super) snapshots: Vec<serde::de::IgnoredAny>,
}

#[derive(Deserialize)]
pub(super) struct Bitmap {
    pub(super) name: Option<String>,
    #[serde(default)]
    pub(super) persistent: bool,
}

/// The answer of `x-debug-query-block-graph`.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Edges {
    nodes: Vec<GraphNode>,
    edges: Vec<Edge>,
}

#[derive(Clone, Debug, Deserialize)]
struct GraphNode {
    id: u64,
    name: String,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Clone, Debug, Deserialize)]
struct Edge {
    parent: u64,
    child: u64,
    name: String,
}

/// The nodes below an image that are no images of the chain.
#[derive(Clone, Debug, Default)]
pub(super) struct Below {
    /// The node that holds the image's file.
    pub(super) file: Option<String>,
    /// The node that holds its external data file.
    pub(super) data_file: Option<String>,
}

impl Edges {
    /// What lies below each node beside its backing file.
    pub(super) fn below(&self) -> HashMap<&str, Below> {
        let names: HashMap<u64, &str> = self.drivers().map(|n| (n.id, n.name.as_str())).collect();
        let mut below: HashMap<&str, Below> = names.values().map(|name| (*name, Below::default())).collect();
        for edge in &self.edges {
            let child = names.get(&edge.child).map(|name| (*name).to_owned());
            let Some(nodes) = names.get(&edge.parent).and_then(|parent| below.get_mut(parent)) else {
                continue;
            };
            match edge.name.as_str() {
                "file" => nodes.file = child,
                "data-file" => nodes.data_file = child,
                _ => {}
            }
        }
        below
    }

    /// A node and the nodes through which it reads. The target of a copying filter is not among them.
    pub(super) fn reach(&self, top: &str) -> HashSet<&str> {
        let names: HashMap<u64, &str> = self.drivers().map(|n| (n.id, n.name.as_str())).collect();
        let mut next: Vec<u64> = self.drivers().filter(|n| n.name == top).map(|n| n.id).collect();
        let mut reached = HashSet::new();
        while let Some(id) = next.pop() {
            if names.get(&id).is_some_and(|name| reached.insert(*name)) {
                let below = self.edges.iter().filter(|edge| edge.parent == id && edge.name != "target");
                next.extend(below.map(|edge| edge.child));
            }
        }
        reached
    }

    /// The nodes directly above a node.
    pub(super) fn above(&self, node: &str) -> Vec<&str> {
        let Some(id) = self.drivers().find(|n| n.name == node).map(|n| n.id) else { return Vec::new() };
        let parents = self.edges.iter().filter(|edge| edge.child == id).map(|edge| edge.parent);
        parents.filter_map(|id| Some(self.drivers().find(|n| n.id == id)?.name.as_str())).collect()
    }

    fn drivers(&self) -> impl Iterator<Item = &GraphNode> {
        self.nodes.iter().filter(|n| n.kind == "block-driver")
    }

    /// The nodes from `top` down.
    pub(super) fn chain(&self, top: &str) -> Vec<String> {
        let names: HashMap<u64, &str> = self.drivers().map(|n| (n.id, n.name.as_str())).collect();
        let children: HashMap<(u64, &str), u64> =
            self.edges.iter().map(|e| ((e.parent, e.name.as_str()), e.child)).collect();
        let child = |id, role| children.get(&(id, role)).copied().filter(|c| names.contains_key(c));
        // The chain ends at a protocol node, which has no file below. A filter over `file` differs: the node
        // below it has a file again.
        let below =
            |id| child(id, "backing").or_else(|| child(id, "file").filter(|c| child(*c, "file").is_some()));
        let mut chain = Vec::new();
        let mut seen = HashSet::new();
        let mut next = self.drivers().find(|n| n.name == top).map(|n| n.id);
        while let Some(id) = next.filter(|id| seen.insert(*id)) {
            chain.extend(names.get(&id).map(|name| (*name).to_owned()));
            next = below(id);
        }
        chain
    }

    /// Whether no node uses this one, except perhaps `own`, and it has no backing node: it belongs to no disk,
    /// and never did.
    pub(super) fn is_alone(&self, node: &str, own: Option<&str>) -> bool {
        let is_other = |id: u64| !self.nodes.iter().any(|n| n.id == id && Some(n.name.as_str()) == own);
        let Some(id) = self.drivers().find(|n| n.name == node).map(|n| n.id) else { return true };
        let uses = |edge: &Edge| edge.child == id && is_other(edge.parent);
        !self.edges.iter().any(|edge| uses(edge) || (edge.parent == id && edge.name == "backing"))
    }

    /// Whether the job of this id copies into a target of its own, as a mirror does. An active commit is one too.
    pub(super) fn has_target(&self, job: &str) -> bool {
        let job = self.nodes.iter().find(|n| n.kind == "block-job" && n.name == job).map(|n| n.id);
        self.edges.iter().any(|e| Some(e.parent) == job && e.name == "target")
    }

    /// The node that the job with this id works on, and those below it. An active commit works on a filter of
    /// its own above the active layer.
    pub(super) fn works_on(&self, job: &str) -> Vec<String> {
        let job = self.nodes.iter().find(|n| n.kind == "block-job" && n.name == job).map(|n| n.id);
        let main =
            self.edges.iter().find(|e| Some(e.parent) == job && e.name == "main node").map(|e| e.child);
        let main = self.nodes.iter().find(|n| Some(n.id) == main);
        main.map(|node| self.chain(&node.name)).unwrap_or_default()
    }
}
