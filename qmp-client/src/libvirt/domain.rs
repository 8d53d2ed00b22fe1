//! One domain, from its XML.

use std::path::{Path, PathBuf};

use roxmltree::{Document, Node, ParsingOptions};

/// More elements than any definition has.
const MOST_NODES: u32 = 200_000;
/// The longest chain that libvirt follows (`VIR_STORAGE_SOURCE_MAX_DEPTH` is 200), with room.
const DEEPEST: usize = 1000;

/// A virtual machine as a file of libvirt's defines it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Domain {
    /// The domain's name, which virsh takes.
    pub name: String,
    /// The file that defines it.
    pub definition: PathBuf,
    /// Whether it belongs to a user's own libvirt (`qemu:///session`) and not to the system's.
    pub is_of_a_session: bool,
    /// Whether the file tells how a domain runs now, and not how it will start.
    pub is_live: bool,
    /// Its disks.
    pub disks: Vec<DomainDisk>,
}

/// A disk of a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DomainDisk {
    /// The name by which virsh knows it, such as `vda`.
    pub target: String,
    /// The name that libvirt gives its device in QEMU, such as `virtio-disk0`; only where it runs.
    pub alias: Option<String>,
    /// The images, from the active one down as far as they are recorded; `None` for what is no file.
    pub images: Vec<Option<PathBuf>>,
    /// How much of the chain is recorded.
    pub recorded: Recorded,
}

/// How much of a disk's chain a definition records. libvirt gives QEMU what is recorded, whatever the headers say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recorded {
    /// Only the active image: libvirt reads the headers at each start.
    ActiveOnly,
    /// Some layers; libvirt reads the headers of the last one.
    Part,
    /// The whole chain.
    Whole,
}

impl Domain {
    /// Reads a definition, or the state of a domain that runs; `None` for a file about something else. `pool` tells the
    /// folder of a storage pool.
    ///
    /// # Errors
    /// What is wrong with the file, in words.
    pub(super) fn parse(
        text: &str,
        definition: &Path,
        is_of_a_session: bool,
        pool: &dyn Fn(&str) -> Option<PathBuf>,
    ) -> Result<Option<Self>, String> {
        let document = parse(text)?;
        let root = document.root_element();
        let is_live = root.has_tag_name("domstatus");
        let domain =
            if is_live { child(root, "domain") } else { Some(root).filter(|r| r.has_tag_name("domain")) };
        let Some(domain) = domain else { return Ok(None) };
        let Some(name) = child(domain, "name").and_then(|n| n.text()) else {
            return Err("it names no domain".to_owned());
        };
        let disks = child(domain, "devices").into_iter().flat_map(|devices| children(devices, "disk"));
        Ok(Some(Self {
            name: name.to_owned(),
            definition: definition.to_owned(),
            is_of_a_session,
            is_live,
            disks: disks.filter_map(|node| disk(node, pool)).collect(),
        }))
    }
}

/// The folder of a storage pool, from its definition.
pub(super) fn pool_folder(text: &str) -> Option<PathBuf> {
    let document = parse(text).ok()?;
    let path = child(child(document.root_element(), "target")?, "path")?.text()?;
    Some(PathBuf::from(path)).filter(|path| path.is_absolute())
}

fn parse(text: &str) -> Result<Document<'_>, String> {
    // Without a DTD there are no entities that grow.
    let options = ParsingOptions { allow_dtd: false, nodes_limit: MOST_NODES, ..ParsingOptions::default() };
    Document::parse_with_options(text, options).map_err(|error| error.to_string())
}

fn disk(node: Node<'_, '_>, pool: &dyn Fn(&str) -> Option<PathBuf>) -> Option<DomainDisk> {
    let target = child(node, "target")?.attribute("dev")?.to_owned();
    let alias = child(node, "alias").and_then(|a| a.attribute("name")).map(str::to_owned);
    let mut images = vec![image(node, pool)];
    let mut recorded = Recorded::ActiveOnly;
    let mut level = node;
    while let Some(below) = child(level, "backingStore") {
        // An empty element ends the chain.
        if below.attribute("type").is_none() && child(below, "source").is_none() {
            recorded = Recorded::Whole;
            break;
        }
        if images.len() >= DEEPEST {
            break;
        }
        recorded = Recorded::Part;
        images.push(image(below, pool));
        level = below;
    }
    Some(DomainDisk { target, alias, images, recorded })
}

/// The file or device of a disk or of a layer.
fn image(node: Node<'_, '_>, pool: &dyn Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    let source = child(node, "source")?;
    let path = match node.attribute("type") {
        Some("volume") => pool(source.attribute("pool")?)?.join(source.attribute("volume")?),
        Some("block") => source.attribute("dev")?.into(),
        _ => source.attribute("file")?.into(),
    };
    path.is_absolute().then_some(path)
}

fn child<'a, 'i>(node: Node<'a, 'i>, name: &'static str) -> Option<Node<'a, 'i>> {
    children(node, name).next()
}

fn children<'a, 'i>(node: Node<'a, 'i>, name: &'static str) -> impl Iterator<Item = Node<'a, 'i>> {
    node.children().filter(move |child| child.has_tag_name(name))
}
