//! One disk, its layers, and the ways to name them.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Serialize, Serializer};

use super::Root;
use super::nodes::{Below, NamedNode};
use crate::error::{Error, Refusal, Result, printable};

/// A disk and its chain.
#[derive(Clone, Debug)]
pub struct Disk {
    name: String,
    aliases: Vec<String>,
    qdev: Option<String>,
    export: Option<String>,
    root: String,
    filters: Vec<String>,
    layers: Vec<Layer>,
}

/// One image of a chain. For programs it has QEMU's own names for what QEMU tells.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Layer {
    /// The place in the chain, counted from the bottom, which is `1`. So a new overlay renumbers nothing.
    pub index: usize,
    /// The node's name. Names that begin with `#` are made by QEMU and change with every start.
    pub node: String,
    /// The node that holds the file, or speaks the protocol, below [`Layer::node`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocol_node: Option<String>,
    /// The node that holds the external data file, if the image has one.
    #[serde(skip)]
    pub data_file_node: Option<String>,
    /// The name of that file as QEMU has it.
    #[serde(skip)]
    pub data_file: Option<String>,
    /// The driver of [`Layer::protocol_node`], such as `file`, `host_device` or `nbd`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocol: Option<String>,
    /// The file's name as QEMU has it, or the address of what is no file.
    #[serde(rename = "filename")]
    pub file: String,
    /// The format, such as `qcow2` or `raw`.
    pub format: String,
    /// The size that a guest sees, in bytes.
    pub virtual_size: u64,
    /// The bytes that it holds on disk, if QEMU knows them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub actual_size: Option<u64>,
    /// Whether QEMU has it open for reading only.
    #[serde(rename = "ro")]
    pub read_only: bool,
    /// Whether QEMU decrypts it: its data on disk is not plain.
    #[serde(skip)]
    pub encrypted: bool,
    /// Whether it is only a part of its file, by an offset or a size that QEMU was given. Then the file's name
    /// alone means another disk.
    #[serde(skip)]
    pub part: bool,
    /// The backing file that the image's header names.
    #[serde(flatten)]
    pub backing: Option<Backing>,
    /// The names of its persistent bitmaps.
    pub bitmaps: Vec<String>,
    /// How many internal snapshots it holds.
    #[serde(skip)]
    pub snapshots: usize,
}

/// The backing file that an image's header names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Backing {
    /// The name as it is written there.
    #[serde(rename = "backing-filename")]
    pub name: String,
    /// The format as it is written there.
    #[serde(rename = "backing-filename-format", skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
    /// The name as QEMU resolves it.
    #[serde(rename = "full-backing-filename", skip_serializing_if = "Option::is_none")]
    pub resolved: Option<String>,
}

/// A part of a chain that is to be merged: the layers above `base`, up to and including `top`.
#[derive(Clone, Copy, Debug)]
pub struct Range<'a> {
    /// The layer that receives the data.
    pub base: &'a Layer,
    /// The uppermost layer that is merged.
    pub top: &'a Layer,
    /// The layer above top; none if top is the active layer.
    pub above: Option<&'a Layer>,
}

/// A disk for programs: its name, and its active image.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct DiskShape<'d> {
    disk: &'d str,
    node: &'d str,
    file: &'d str,
    format: &'d str,
    virtual_size: u64,
}

impl Serialize for Disk {
    fn serialize<S: Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        let Layer { node, file, format, virtual_size, .. } = self.active();
        DiskShape { disk: self.name(), node, file, format, virtual_size: *virtual_size }.serialize(to)
    }
}

impl Disk {
    /// `None` if QEMU describes none of its nodes: the disk is about to be removed.
    pub(super) fn new(root: Root, named: &HashMap<String, NamedNode>) -> Option<Self> {
        let top = root.top().to_owned();
        let known = |name: &String| named.get(name);
        let (filters, images): (Vec<_>, Vec<_>) = root
            .nodes
            .iter()
            .filter_map(|(name, files)| Some((known(name)?, files)))
            .partition(|(node, _)| node.is_filter());
        // A disk without a name of its own must not be named after a job's filter, which will go.
        let lasting = filters.iter().find(|(node, _)| !node.is_of_a_job()).or(images.first());
        let name = match lasting {
            Some((node, _)) if root.name == top && root.export.is_none() => node.node_name.clone(),
            _ => root.name,
        };
        let depth = images.len();
        let layer = |(place, (node, files)): (usize, (&NamedNode, &Below))| Layer {
            index: depth - place,
            node: node.node_name.clone(),
            protocol_node: files.file.clone(),
            data_file_node: files.data_file.clone(),
            data_file: files.data_file.as_ref().and_then(known).map(|n| n.file.clone()),
            protocol: files.file.as_ref().and_then(known).map(|n| n.drv.clone()),
            file: file_of(node, files.file.as_ref().and_then(known)),
            format: node.drv.clone(),
            virtual_size: node.image.virtual_size,
            actual_size: node.image.actual_size,
            read_only: node.ro,
            encrypted: node.encrypted,
            part: is_part(node),
            backing: node.image.backing_filename.clone().map(|name| Backing {
                name,
                format: node.image.backing_filename_format.clone(),
                resolved: node.image.full_backing_filename.clone(),
            }),
            snapshots: node.image.snapshots.len(),
            bitmaps: node
                .dirty_bitmaps
                .iter()
                .filter(|b| b.persistent)
                .filter_map(|b| b.name.clone())
                .collect(),
        };
        let layers: Vec<Layer> = images.into_iter().enumerate().map(layer).collect();
        let active = layers.first()?;
        let aliases = [
            root.device,
            root.qdev.clone(),
            root.export.clone(),
            Some(top.clone()),
            Some(active.node.clone()),
        ];
        Some(Self {
            name,
            aliases: aliases.into_iter().flatten().collect(),
            qdev: root.qdev,
            export: root.export,
            root: top,
            filters: filters.iter().map(|(node, _)| node.node_name.clone()).collect(),
            layers,
        })
    }

    /// What the disk is called: its device's id, else its drive's id, the export's id, or its node's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The device's path in QEMU's tree of objects, which commands about its throttling want.
    pub fn qdev(&self) -> Option<&str> {
        self.qdev.as_deref()
    }

    /// The id of the export, for a disk that is no device but is served to others.
    pub(crate) fn export(&self) -> Option<&str> {
        self.export.as_deref()
    }

    /// The topmost node, perhaps a filter. A job names it as its device.
    pub fn root(&self) -> &str {
        &self.root
    }

    /// The filters of the chain, from the top. They are not counted as layers.
    pub fn filters(&self) -> &[String] {
        &self.filters
    }

    /// The layers from the active one down.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The layer that the guest writes to.
    pub fn active(&self) -> &Layer {
        // `new` makes no disk without a layer.
        &self.layers[0]
    }

    pub(super) fn rename_files(&mut self, rename: &dyn Fn(&str) -> Option<String>) {
        for layer in &mut self.layers {
            if let Some(name) = rename(&layer.file) {
                layer.file = name;
            }
            if let Some(name) = layer.data_file.as_deref().and_then(rename) {
                layer.data_file = Some(name);
            }
        }
    }

    pub(super) fn answers_to(&self, name: &str) -> bool {
        self.name == name || self.aliases.iter().any(|a| a == name) || is_file(self.active(), name)
    }

    /// The layer of this name: an index in brackets as `[1]` or `vda[1]`, a node name, or a path, which may
    /// be another name of the same file.
    ///
    /// # Errors
    /// [`Error::Layer`], which shows the chain, if no layer or more than one is meant.
    pub fn layer(&self, name: &str) -> Result<&Layer> {
        let fail = |why: &str| Err(self.refusal(format!("'{}' {why}", printable(name))));
        let bracket = name.strip_suffix(']').and_then(|n| n.rsplit_once('['));
        let indexed = bracket.and_then(|(disk, index)| Some((disk, index.parse::<usize>().ok()?)));
        if let Some((disk, index)) = indexed {
            if !disk.is_empty() && !self.answers_to(disk) {
                return fail("names another disk");
            }
            let found = self.layers.iter().find(|l| l.index == index);
            return found.map_or_else(|| fail("is outside the chain"), Ok);
        }
        if let Some(layer) = self.layers.iter().find(|l| l.node == name) {
            return Ok(layer);
        }
        let mut meant = self.layers.iter().filter(|l| is_file(l, name));
        match (meant.next(), meant.next()) {
            (Some(layer), None) => Ok(layer),
            (Some(_), Some(_)) => fail("is the file of more than one layer; name it by its index"),
            (None, _) => fail("is no layer of the chain"),
        }
    }

    /// The range of layers above `base` up to `top`.
    ///
    /// # Errors
    /// [`Error::Layer`], which shows the chain, if they are the same layer, or base lies above top.
    pub fn range<'a>(&'a self, base: &'a Layer, top: &'a Layer) -> Result<Range<'a>> {
        if base.index == top.index {
            return Err(self.refusal(format!("[{}] cannot be merged into itself", base.index)));
        }
        if base.index > top.index {
            let (base, top) = (base.index, top.index);
            return Err(
                self.refusal(format!("the base [{base}] lies above the top [{top}]: they are reversed"))
            );
        }
        Ok(Range { base, top, above: self.layers.iter().find(|l| l.index == top.index + 1) })
    }

    /// The layer directly below another one.
    pub(crate) fn below(&self, layer: &Layer) -> Option<&Layer> {
        self.layers.iter().find(|l| l.index + 1 == layer.index)
    }

    /// Refuses names that are not UTF-8. QEMU puts U+FFFD in the place of other bytes in its JSON, so a name
    /// that we write into a header would lead nowhere.
    pub(crate) fn is_told(layer: &Layer) -> Result<()> {
        let file = Path::new(&layer.file);
        if layer.file.contains(char::REPLACEMENT_CHARACTER) && file.symlink_metadata().is_err() {
            return Err(Refusal::NotUtf8 { file: file.to_owned() }.into());
        }
        Ok(())
    }

    pub(crate) fn refusal(&self, why: String) -> Error {
        let line = |l: &Layer| format!("  [{}] {} ({}, node {})", l.index, l.file, l.format, l.node);
        let chain: Vec<String> = self.layers.iter().map(|l| printable(&line(l))).collect();
        Error::Layer { disk: printable(&self.name), why, chain: chain.join("\n") }
    }
}

/// The name of an image's file. QEMU describes an image by a `json:` name if its header disagrees with its
/// place in the chain, as after a merge with a relative name; the node of the file has the plain name. If that
/// node is a filter, its description ends with the file below it.
pub(super) fn file_of(node: &NamedNode, below: Option<&NamedNode>) -> String {
    let described = |node: &NamedNode| node.file.starts_with("json:");
    match below {
        Some(below) if described(node) && !described(below) => below.file.clone(),
        Some(below) if described(node) => leaf(&below.file).unwrap_or_else(|| node.file.clone()),
        _ => node.file.clone(),
    }
}

/// Whether a raw image was given an offset or a size in its file. QEMU describes such a node by a `json:` name.
fn is_part(node: &NamedNode) -> bool {
    let described = node.file.strip_prefix("json:").filter(|_| node.drv == "raw");
    let whole = described.and_then(|text| serde_json::from_str::<serde_json::Value>(text).ok());
    whole.is_some_and(|level| ["offset", "size"].iter().any(|key| !level[key].is_null()))
}

/// The file at the end of a `json:` description, if it ends with a file or a device of the host.
fn leaf(description: &str) -> Option<String> {
    let text = description.strip_prefix("json:")?;
    let whole: serde_json::Value = serde_json::from_str(text).ok()?;
    let mut level = &whole;
    while level["file"].is_object() {
        level = &level["file"];
    }
    let is_local = level["driver"].as_str().is_some_and(|driver| ["file", "host_device"].contains(&driver));
    level["filename"].as_str().filter(|_| is_local).map(str::to_owned)
}

/// Whether `name` means the file of this layer: it is the same text, or leads to the same file here.
fn is_file(layer: &Layer, name: &str) -> bool {
    let file_id = |path: &str| fs::metadata(path).ok().map(|m| (m.dev(), m.ino()));
    layer.file == name || file_id(name).is_some_and(|here| file_id(&layer.file) == Some(here))
}

#[cfg(test)]
mod tests {
    use super::leaf;

    #[test]
    fn a_filter_below_the_format_hides_no_file() {
        let throttle = r#"json:{"throttle-group": "g", "driver": "throttle", "file": {"driver": "file", "filename": "/a"}}"#;
        assert_eq!(leaf(throttle).as_deref(), Some("/a"));
        let nbd = r#"json:{"driver": "throttle", "file": {"driver": "nbd", "server.path": "/s"}}"#;
        for other in [nbd, "json:[]", "json:", "/a"] {
            assert_eq!(leaf(other), None, "{other}");
        }
    }
}
