//! Chains that a configuration has recorded layer by layer: every merged layer hides what lies below it.

use qcow2::fuzzing::sample::Content;

use super::shape::{SHAPE, Shape, overlay};
use crate::chain::{After, BuiltLayer, Room, Scenario};

/// What is special about the layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LayerKind {
    Plain,
    /// No dirty bit.
    Version2,
    /// The base is raw.
    Raw,
    /// The layers have external data files.
    DataFiles,
    Subclusters,
    /// The disk has grown with each layer: the lower ones must grow, and need larger tables.
    Growing,
    /// A layer in the middle is longer than all others.
    Bulging,
    /// Layers have internal snapshots.
    Snapshots,
}

/// Two to four layers above base, all of which write to the same places; all are merged, or all but one.
pub(super) fn recorded() -> Vec<Scenario> {
    let mut list = Vec::new();
    for kind in [
        LayerKind::Plain,
        LayerKind::Version2,
        LayerKind::Raw,
        LayerKind::DataFiles,
        LayerKind::Subclusters,
        LayerKind::Growing,
        LayerKind::Bulging,
        LayerKind::Snapshots,
    ] {
        let (most, removes) = match kind {
            // Its clusters are large.
            LayerKind::Subclusters => (2, false),
            LayerKind::Plain | LayerKind::DataFiles => (4, true),
            _ => (3, false),
        };
        let mut add = |merged, above, after| {
            let label = format!("recorded {kind:?}: {merged} layers, {above} above, {after:?}");
            let mut scenario = Scenario::new(label, chain(kind, merged + above), 0, merged);
            scenario.after = after;
            list.push(scenario);
        };
        add(most, 0, After::Default);
        add(2, 1, After::Default);
        if removes {
            add(3, 0, After::Delete);
        }
    }
    list
}

fn chain(kind: LayerKind, overlays: usize) -> Vec<BuiltLayer> {
    let shape = match kind {
        LayerKind::Version2 => Shape { version: 2, ..SHAPE },
        LayerKind::Subclusters => Shape { cluster_bits: 14, extended_l2: true, ..SHAPE },
        _ => SHAPE,
    };
    let base_size = if kind == LayerKind::Growing { 6 } else { 12 };
    let mut layers = vec![match kind {
        LayerKind::Raw => BuiltLayer::raw("/vm/0.raw", base_size, 5),
        _ => {
            let sample = shape.sample(base_size).with(1, Content::Data(0x11)).with(3, Content::Data(0x12));
            BuiltLayer::qcow2("/vm/0.qcow2", &sample, Room::Dirty(40))
        }
    }];
    for n in 1..=overlays {
        let size = match kind {
            // From one L1 entry to several.
            LayerKind::Growing => 6 + 60 * n as u64,
            LayerKind::Bulging if n == 1 => 90,
            _ => 12,
        };
        let fill = 0x40 + 0x10 * n as u8;
        let mut sample =
            shape.sample(size).with(n as u64, Content::Data(fill)).with(1, Content::Data(fill + 1));
        sample = match kind {
            LayerKind::Subclusters => {
                sample.with(4, Content::Subclusters { allocated: 0xf0 << n, zero: 0x0f, fill: fill + 2 })
            }
            LayerKind::Version2 => sample.with(7, Content::Compressed(fill + 2)),
            _ if n % 2 == 0 => sample.with(3, Content::Zero).with(7, Content::Compressed(fill + 2)),
            _ => sample.with(3, Content::Data(fill + 3)),
        };
        sample = sample.with(size - 1, Content::Data(fill + 4));
        if kind == LayerKind::DataFiles {
            sample.clusters.retain(|_, content| !matches!(content, Content::Compressed(_)));
            sample.data_file = Some((format!("/vm/{n}.data"), false));
        }
        if kind == LayerKind::Snapshots && n == 1 {
            sample.snapshots.push("before".into());
        }
        layers.push(overlay(sample, &layers[n - 1], n));
    }
    layers
}
