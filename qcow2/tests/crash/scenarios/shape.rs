//! What all scenarios are made of.

use qcow2::fuzzing::sample::{Content, Sample};

use crate::chain::{After, BuiltLayer, Room, Scenario};

/// An image format, in short.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) name: &'static str,
    pub(crate) version: u32,
    pub(crate) cluster_bits: u32,
    pub(crate) refcount_order: u32,
    pub(crate) extended_l2: bool,
    pub(crate) zstd: bool,
}

pub(crate) const SHAPE: Shape =
    Shape { name: "512", version: 3, cluster_bits: 9, refcount_order: 4, extended_l2: false, zstd: false };

impl Shape {
    pub(crate) fn sample(self, clusters: u64) -> Sample {
        let mut sample = Sample::new(0).with_clusters(self.cluster_bits, clusters);
        sample.version = self.version;
        sample.refcount_order = self.refcount_order;
        sample.extended_l2 = self.extended_l2;
        sample.zstd = self.zstd;
        sample
    }

    /// Whether an image of this shape can have this content.
    pub(crate) fn can(self, content: &Content) -> bool {
        match content {
            Content::Zero | Content::ZeroAllocated(_) => self.version >= 3,
            Content::Compressed(_) => self.refcount_order >= 3,
            Content::Subclusters { .. } => self.extended_l2,
            Content::Data(_) => true,
        }
    }
}

pub(super) fn name(n: usize) -> String {
    format!("/vm/{n}.qcow2")
}

/// An overlay on layer `n - 1`.
pub(crate) fn overlay(sample: Sample, below: &BuiltLayer, n: usize) -> BuiltLayer {
    let backing = below.path.file_name().unwrap().to_str().unwrap().to_owned();
    let sample = sample.over(&backing, below.format());
    BuiltLayer::qcow2(&name(n), &sample, Room::Dirty(0))
}

/// The four ways in which a merge ends, in turn; one of them has a layer more.
pub(super) fn ends(label: String, mut layers: Vec<BuiltLayer>, turn: usize) -> Scenario {
    let top = layers.len() - 1;
    if turn % 4 == 1 {
        let size = layers[top].says.len() as u64;
        let sample = Sample::new(size.div_ceil(512)).with(0, Content::Data(0x99));
        let above = overlay(sample, &layers[top], top + 1);
        layers.push(above);
    }
    let mut scenario = Scenario::new(label, layers, 0, top);
    match turn % 4 {
        2 => scenario.after = After::Delete,
        3 => scenario.after = After::Keep,
        _ => {}
    }
    scenario.name += [", emptied", ", below another", ", deleted", ", kept"][turn % 4];
    scenario
}
