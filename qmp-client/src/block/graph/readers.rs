//! Finds nodes of the same QEMU that read through a disk's layers without belonging to the disk. A search of
//! folders does not show them.

use std::collections::{BTreeMap, HashSet};

use super::{Disk, Graph, Layer};
use crate::block::ids::{FLUSH_ALONE, FLUSH_BESIDE};

/// A node outside a disk that reads through one of its layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reader {
    /// The topmost such node.
    pub(crate) node: String,
    /// Its file, as QEMU calls it.
    pub(crate) file: String,
    /// The index of the layer.
    pub(crate) uses: usize,
}

impl Graph {
    /// The nodes outside this disk that read through one of the `touched` layers: by an edge, because they have
    /// its file open a second time, or as another device or export with this image. `layer_of` returns the
    /// index of the touched layer to which a file name leads. Another device or export of the same active image
    /// does not count: it shows the same disk.
    pub(crate) fn readers(
        &self,
        disk: &Disk,
        touched: &[&Layer],
        layer_of: &dyn Fn(&str) -> Option<usize>,
    ) -> Vec<Reader> {
        let Some(edges) = &self.edges else { return Vec::new() };
        let own: HashSet<&str> = edges.reach(disk.root());
        let mut used: BTreeMap<&str, usize> = BTreeMap::new();
        for layer in touched {
            let nodes = [Some(&layer.node), layer.protocol_node.as_ref(), layer.data_file_node.as_ref()];
            for node in nodes.into_iter().flatten() {
                let above = edges.above(node).into_iter().filter(|node| !own.contains(node));
                used.extend(above.map(|node| (node, layer.index)));
            }
        }
        for (node, file) in self.files.iter().filter(|(node, _)| !own.contains(node.as_str())) {
            if let Some(index) = layer_of(file) {
                used.entry(node).or_insert(index);
            }
        }
        let mut readers: Vec<Reader> = Vec::new();
        let mut add = |node: &str, uses: usize| match readers.iter_mut().find(|r| r.node == node) {
            Some(reader) => reader.uses = reader.uses.max(uses),
            None => {
                let file = self.files.iter().find(|(name, _)| name == node).map(|(_, file)| file.clone());
                readers.push(Reader { node: node.to_owned(), file: file.unwrap_or_default(), uses });
            }
        };
        for (node, index) in used {
            for top in tops(node, &|node| edges.above(node)) {
                add(top, index);
            }
        }
        // An export that a killed client left behind after a flush reads nothing.
        let is_flush = |id: &str| id.starts_with(FLUSH_ALONE) || id.starts_with(FLUSH_BESIDE);
        let others = self.disks.iter().filter(|other| other.active().node != disk.active().node);
        for other in others.filter(|other| !other.export().is_some_and(is_flush)) {
            if let Some(layer) = touched.iter().find(|layer| layer.node == other.active().node) {
                add(&layer.node, layer.index);
            }
        }
        readers
    }
}

/// The nodes above this one that have none above them.
fn tops<'e>(node: &'e str, above: &dyn Fn(&str) -> Vec<&'e str>) -> Vec<&'e str> {
    let (mut next, mut seen, mut tops) = (vec![node], HashSet::new(), Vec::new());
    while let Some(node) = next.pop().filter(|node| seen.insert(*node)) {
        let parents = above(node);
        if parents.is_empty() {
            tops.push(node);
        }
        next.extend(parents);
    }
    tops
}
