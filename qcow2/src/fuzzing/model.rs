//! Small chains made from any bytes, and what their guest sees according to a plain byte array.

use std::path::{Path, PathBuf};

use super::sample::{Content, Image, Sample};

/// The clusters that one layer of a chain says something about, at most.
const CONTENTS: u64 = 24;
/// The largest disk, in sectors of 512 bytes.
const SECTORS: u64 = 200;

/// Numbers from any bytes; zeros when they run out.
#[derive(Debug)]
pub(super) struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(super) fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    /// A number below `limit`, or zero.
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        u64::from(self.byte()).checked_rem(limit).unwrap_or(0)
    }

    /// True for one byte of `n`.
    pub(super) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == n - 1
    }
}

/// One layer: its file, and what it says about every byte of the guest's disk.
#[derive(Debug)]
pub(super) struct ModelLayer {
    /// The name of the image.
    pub(super) path: PathBuf,
    /// The image's file, or the raw disk.
    pub(super) file: Vec<u8>,
    /// Name and content of the data file.
    pub(super) data_file: Option<(PathBuf, Vec<u8>)>,
    /// Where host clusters lie that an internal snapshot uses.
    pub(super) held_by_snapshots: Vec<u64>,
    /// The size of a cluster; 512 for a raw disk.
    pub(super) cluster_size: u64,
    /// By guest offset: a byte of this layer, or `None` where what lies below shows.
    pub(super) says: Vec<Option<u8>>,
}

impl ModelLayer {
    pub(super) fn size(&self) -> usize {
        self.says.len()
    }

    pub(super) fn is_qcow2(&self) -> bool {
        self.path.extension().is_some_and(|e| e == "qcow2")
    }
}

/// The guest's bytes as `layers[..=top]` show them. A short layer hides what lies below past its end.
pub(super) fn guest(layers: &[ModelLayer], top: usize) -> Vec<u8> {
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
    (0..layers[top].size()).map(byte).collect()
}

/// Two to four layers, the base first.
pub(super) fn chain(input: &mut Input<'_>) -> Vec<ModelLayer> {
    let depth = 2 + input.below(3) as usize;
    let mut layers = Vec::with_capacity(depth);
    layers.push(if input.one_in(3) { raw(input) } else { qcow2(input, 0, None) });
    for n in 1..depth {
        let below: &ModelLayer = &layers[n - 1];
        let format = if below.is_qcow2() { "qcow2" } else { "raw" };
        let name = below.path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        layers.push(qcow2(input, n, Some((name, Some(format.into())))));
    }
    layers
}

fn raw(input: &mut Input<'_>) -> ModelLayer {
    // A raw file may end anywhere; its disk has whole sectors, as in QEMU.
    let len = input.below(SECTORS) * 512 + if input.one_in(3) { input.below(200) } else { 0 };
    let fill = input.byte();
    let file: Vec<u8> = (0..len).map(|at| fill.wrapping_add((at / 512) as u8) | 1).collect();
    let mut says: Vec<_> = file.iter().map(|b| Some(*b)).collect();
    says.resize(says.len().next_multiple_of(512), Some(0));
    ModelLayer {
        path: "/vm/0.raw".into(),
        says,
        file,
        data_file: None,
        held_by_snapshots: Vec::new(),
        cluster_size: 512,
    }
}

fn qcow2(input: &mut Input<'_>, n: usize, backing: Option<(String, Option<String>)>) -> ModelLayer {
    let path = PathBuf::from(format!("/vm/{n}.qcow2"));
    let sample = sample(input, &path, backing);
    let image = sample.build();
    let says = says(&sample);
    let held = if sample.snapshots.is_empty() { Vec::new() } else { held_by_snapshots(&sample, &image) };
    let data_file = sample.data_file.as_ref().map(|(name, _)| (name.into(), image.data.clone()));
    ModelLayer {
        path,
        file: image.bytes,
        data_file,
        held_by_snapshots: held,
        cluster_size: 1 << sample.cluster_bits,
        says,
    }
}

fn held_by_snapshots(sample: &Sample, image: &Image) -> Vec<u64> {
    let cluster = 1u64 << sample.cluster_bits;
    let tables = image.at.l2.values().chain(&image.at.snapshot_l1);
    tables.chain(image.at.hosts.values()).map(|host| host & !(cluster - 1)).collect()
}

/// How an image is laid out.
pub(super) fn sample(
    input: &mut Input<'_>,
    path: &Path,
    backing: Option<(String, Option<String>)>,
) -> Sample {
    let mut sample = Sample::new(0);
    sample.backing = backing;
    let shape = input.below(10);
    sample.cluster_bits = match shape {
        0..=3 => 9,
        4 => 10,
        5 | 6 => 12,
        7 => 14,
        _ => 9,
    };
    sample.extended_l2 = shape == 7;
    if shape == 8 {
        sample.version = 2;
    } else {
        sample.refcount_order = [4, 4, 4, 5, 6, 3, 1, 0][input.below(8) as usize];
    }
    if shape == 9 {
        sample.data_file = Some((path.with_extension("data").to_string_lossy().into_owned(), false));
    }
    sample.size = input.below(SECTORS) * 512;
    // Narrow refcounts cannot express what compressed clusters and snapshots share.
    let wide = sample.refcount_order >= 3;
    let compressible = wide && sample.data_file.is_none();
    sample.zstd = compressible && sample.version == 3 && input.one_in(4);
    if wide && sample.data_file.is_none() && sample.size != 0 && input.one_in(4) {
        sample.snapshots.push("before".into());
    }
    if sample.version == 3 && sample.size != 0 && input.one_in(4) {
        sample.bitmaps.push("nightly".into());
    }
    let clusters = sample.size.div_ceil(1 << sample.cluster_bits);
    let contents = if clusters == 0 { 0 } else { input.below(CONTENTS) };
    for _ in 0..contents {
        let index = input.below(clusters);
        let fill = input.byte();
        let content = match input.below(8) {
            0..=3 => Content::Data(fill),
            4 if sample.version == 3 => Content::Zero,
            5 if sample.version == 3 => Content::ZeroAllocated(fill),
            6 if compressible => Content::Compressed(fill),
            7 if sample.extended_l2 => {
                let allocated = u32::from_be_bytes([input.byte(), input.byte(), input.byte(), fill]);
                let zero = u32::from_be_bytes([input.byte(), fill, input.byte(), input.byte()]);
                Content::Subclusters { allocated, zero: zero & !allocated, fill }
            }
            _ => Content::Data(fill),
        };
        sample.clusters.insert(index, content);
    }
    sample
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
