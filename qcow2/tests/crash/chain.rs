//! Small chains, laid out by hand, and what their guest sees according to a byte array.

use std::path::{Path, PathBuf};

use qcow2::chain::{OpenOptions, Policy};
use qcow2::fuzzing::sample::{Content, Sample};
use qcow2::merge::{BaseChoice, CommitOptions};
use qcow2::storage::MemHost;
use qcow2::storage::sim::State;

/// One layer: its files, and what it says about every byte of the guest's disk.
#[derive(Clone, Debug)]
pub(crate) struct BuiltLayer {
    pub(crate) path: PathBuf,
    pub(crate) file: Vec<u8>,
    pub(crate) data_file: Option<(PathBuf, Vec<u8>)>,
    pub(crate) is_qcow2: bool,
    pub(crate) cluster_size: u64,
    /// Host clusters that an internal snapshot uses.
    pub(crate) held: Vec<u64>,
    /// By guest offset: a byte of this layer, or `None` where what lies below shows.
    pub(crate) says: Vec<Option<u8>>,
}

/// How much room there is in an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Room {
    /// Free clusters inside the file that hold old bytes.
    Dirty(u64),
    /// Every cluster that has a refcount is taken: the first new one needs a refcount block.
    NoBlock,
    /// As before, and the refcount table is full, too.
    NoTable,
}

impl BuiltLayer {
    /// A qcow2 image.
    pub(crate) fn qcow2(path: &str, sample: &Sample, room: Room) -> Self {
        let mut image = sample.build();
        let cluster = 1u64 << sample.cluster_bits;
        let used = image.bytes.len() as u64 / cluster;
        let per_block = (cluster * 8) >> sample.refcount_order;
        match room {
            Room::Dirty(clusters) => image.bytes.resize(((used + clusters) * cluster) as usize, 0xee),
            Room::NoBlock | Room::NoTable => {
                let covered = image.at.refcount_blocks.len() as u64 * per_block;
                let own = if room == Room::NoTable { 1 } else { 0 };
                // What is leaked is taken, and nobody minds.
                (used + own..covered).for_each(|n| image.set_refcount(n * cluster, 1));
                if room == Room::NoTable {
                    // The last entry of the table has a block: all that it counts is taken, too.
                    let block = used * cluster;
                    let last = cluster / 8 - 1;
                    image.set_refcount(block, 1);
                    image.put_u64(image.at.refcount_table + last * 8, block);
                    image.put(block, &vec![0; cluster as usize]);
                    let ones: Vec<u8> = (0..per_block).flat_map(|_| 1u64.to_be_bytes()).collect();
                    assert_eq!(sample.refcount_order, 6, "counters of 64 bits make small tables");
                    image.put(block, &ones);
                }
            }
        }
        let tables = image.at.l2.values().chain(&image.at.snapshot_l1).chain(image.at.hosts.values());
        let held = if sample.snapshots.is_empty() {
            Vec::new()
        } else {
            tables.map(|host| host & !(cluster - 1)).collect()
        };
        let data_file = sample.data_file.as_ref().map(|(name, _)| (PathBuf::from(name), image.data.clone()));
        Self {
            path: path.into(),
            file: image.bytes,
            data_file,
            is_qcow2: true,
            cluster_size: cluster,
            held,
            says: says(sample),
        }
    }

    /// A raw disk of so many sectors; the fill of each sector follows from its number.
    pub(crate) fn raw(path: &str, sectors: u64, fill: u8) -> Self {
        let file: Vec<u8> = (0..sectors * 512)
            .map(|at| if fill == 0 { 0 } else { fill.wrapping_add((at / 512) as u8) | 1 })
            .collect();
        Self {
            path: path.into(),
            says: file.iter().map(|byte| Some(*byte)).collect(),
            file,
            data_file: None,
            is_qcow2: false,
            cluster_size: 512,
            held: Vec::new(),
        }
    }

    pub(crate) fn format(&self) -> &'static str {
        if self.is_qcow2 { "qcow2" } else { "raw" }
    }
}

/// What an image says about each byte of its disk.
fn says(sample: &Sample) -> Vec<Option<u8>> {
    let cluster = 1usize << sample.cluster_bits;
    let mut says = vec![None; sample.size as usize];
    for (index, content) in &sample.clusters {
        let start = *index as usize * cluster;
        for (n, byte) in says.iter_mut().skip(start).take(cluster).enumerate() {
            *byte = match *content {
                Content::Data(fill) | Content::Compressed(fill) => Some(fill),
                Content::Zero | Content::ZeroAllocated(_) => Some(0),
                Content::Subclusters { allocated, zero, fill } => {
                    let bit = 1u32 << (n / (cluster / 32));
                    if allocated & bit != 0 { Some(fill) } else { (zero & bit != 0).then_some(0) }
                }
            };
        }
    }
    says
}

/// The guest's bytes as `layers[..=top]` show them. A short layer hides what lies below past its end.
pub(crate) fn guest(layers: &[BuiltLayer], top: usize) -> Vec<u8> {
    let byte = |at: usize| {
        for layer in layers[..=top].iter().rev() {
            match layer.says.get(at) {
                None => return 0,
                Some(Some(byte)) => return *byte,
                Some(None) => {}
            }
        }
        0
    };
    (0..layers[top].says.len()).map(byte).collect()
}

/// What becomes of the merged layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum After {
    /// They are marked, and the active image is emptied.
    Default,
    /// They are removed.
    Delete,
    /// The active image stays as it was.
    Keep,
}

/// Where the journals of block devices are kept.
pub(crate) const JOURNALS: &str = "/journals";

/// A chain and a merge.
#[derive(Clone, Debug)]
pub(crate) struct Scenario {
    pub(crate) name: String,
    pub(crate) layers: Vec<BuiltLayer>,
    pub(crate) base: usize,
    pub(crate) top: usize,
    pub(crate) after: After,
    /// Top is named by its index in the chain.
    pub(crate) by_index: bool,
    /// The disk of base is a block device.
    pub(crate) device: bool,
    /// Headers have no room for the name of base.
    pub(crate) cramped: bool,
}

impl Scenario {
    pub(crate) fn new(name: String, layers: Vec<BuiltLayer>, base: usize, top: usize) -> Self {
        Self {
            name,
            layers,
            base,
            top,
            after: After::Default,
            by_index: false,
            device: false,
            cramped: false,
        }
    }

    pub(crate) fn active(&self) -> usize {
        self.layers.len() - 1
    }

    pub(crate) fn options(&self) -> CommitOptions {
        let named = |at: usize| self.layers[at].path.clone().into_os_string();
        let top = if self.by_index { format!("[{}]", self.top + 1).into() } else { named(self.top) };
        let mut options = CommitOptions::new(options());
        options.base = BaseChoice::Named(named(self.base));
        options.top = (self.by_index || self.top != self.active()).then_some(top);
        options.delete = self.after == After::Delete;
        options.keep_active = self.after == After::Keep;
        options.drop_bitmaps = true;
        options.allow_snapshot_change = true;
        options.journal_dir = self.device.then(|| PathBuf::from(JOURNALS));
        options
    }

    /// The disk before the merge, all of it durable.
    pub(crate) fn start(&self) -> State {
        let host = MemHost::new();
        // A folder is there when something lies in it.
        host.add("/vm/readme", b"").unwrap();
        if self.device {
            host.add(Path::new(JOURNALS).join("readme"), b"").unwrap();
        }
        for layer in &self.layers {
            let data = layer.data_file.iter().map(|(path, bytes)| (path, bytes));
            for (path, bytes) in data.chain([(&layer.path, &layer.file)]) {
                host.add(path, bytes).unwrap();
            }
        }
        State::of(&host)
    }

    /// What each layer shows before the merge.
    pub(crate) fn seen(&self) -> Vec<Vec<u8>> {
        (0..self.layers.len()).map(|at| guest(&self.layers, at)).collect()
    }

    /// What base shows when all is done.
    pub(crate) fn merged(&self) -> Vec<u8> {
        let mut merged = guest(&self.layers, self.top);
        let old = guest(&self.layers, self.base);
        let seen = merged.len();
        merged.extend(old.iter().skip(seen));
        if self.top < self.active() && seen < merged.len() {
            // What the layer above a short top saw as zeros is zeros now.
            let zeros = self.layers[self.top + 1].says.len().clamp(seen, merged.len());
            merged[seen..zeros].fill(0);
        }
        merged
    }

    /// The files that are to be gone when all is done.
    pub(crate) fn removed(&self) -> impl Iterator<Item = &Path> {
        let removed = if self.after == After::Delete { self.base + 1..self.top + 1 } else { 0..0 };
        let layers = &self.layers[removed];
        let files = layers.iter().map(|layer| (&layer.path, layer.data_file.as_ref()));
        files
            .flat_map(|(path, data)| [Some(path), data.map(|(path, _)| path)])
            .flatten()
            .map(PathBuf::as_path)
    }

    /// The files of the layers.
    pub(crate) fn path(&self, at: usize) -> &Path {
        &self.layers[at].path
    }
}

/// Everything that an image names may be opened.
pub(crate) fn options() -> OpenOptions {
    OpenOptions::new(Policy::local_files())
}
