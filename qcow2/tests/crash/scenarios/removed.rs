//! Merges that remove layers: several of them, below another one or up to the active image.

use qcow2::fuzzing::sample::Content;

use super::shape::{SHAPE, Shape, name};
use crate::chain::{After, BuiltLayer, Room, Scenario};

/// What is special about a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ChainKind {
    Plain,
    /// Base has no dirty bit.
    Version2,
    Raw,
    /// The disk of base is a block device: the journal lies elsewhere.
    Device,
    /// The layers have external data files.
    DataFiles,
    /// Base lies in another folder.
    Elsewhere,
    /// Headers have no room for the name of base.
    Cramped,
}

/// Chains of two to four layers above base, of which all are merged, or all but one or two; named by path and by index.
pub(super) fn removed() -> Vec<Scenario> {
    let mut list = Vec::new();
    for kind in [
        ChainKind::Plain,
        ChainKind::Version2,
        ChainKind::Raw,
        ChainKind::Device,
        ChainKind::DataFiles,
        ChainKind::Elsewhere,
        ChainKind::Cramped,
    ] {
        for (merged, above) in [(1, 1), (2, 1), (3, 1), (2, 2), (1, 0), (2, 0), (3, 0)] {
            for by_index in [false, true] {
                let label = format!("removed {kind:?}: {merged} layers, {above} above, by index: {by_index}");
                let mut scenario = Scenario::new(label, chain(kind, merged + above), 0, merged);
                (scenario.after, scenario.by_index) = (After::Delete, by_index);
                scenario.device = kind == ChainKind::Device;
                scenario.cramped = kind == ChainKind::Cramped;
                list.push(scenario);
            }
        }
    }
    // Base is not the bottom: indexes count from there.
    for by_index in [false, true] {
        let mut scenario = Scenario::new("removed".into(), chain(ChainKind::Plain, 4), 1, 3);
        scenario.name = format!("removed above a layer, by index: {by_index}");
        (scenario.after, scenario.by_index) = (After::Delete, by_index);
        list.push(scenario);
    }
    list
}

/// Base and so many layers.
fn chain(kind: ChainKind, overlays: usize) -> Vec<BuiltLayer> {
    let shape = if kind == ChainKind::Version2 { Shape { version: 2, ..SHAPE } } else { SHAPE };
    let base = match kind {
        ChainKind::Elsewhere => "/elsewhere/base.qcow2".to_owned(),
        ChainKind::Cramped => format!("/vm/{}/{}.qcow2", "x".repeat(200), "y".repeat(158)),
        _ => name(0),
    };
    let sample = shape.sample(10).with(1, Content::Data(0x11)).with(2, Content::Zero);
    let mut layers = vec![match kind {
        ChainKind::Raw => BuiltLayer::raw("/vm/0.raw", 10, 5),
        ChainKind::Version2 => {
            BuiltLayer::qcow2(&base, &shape.sample(10).with(1, Content::Data(0x11)), Room::Dirty(30))
        }
        _ => BuiltLayer::qcow2(&base, &sample, Room::Dirty(30)),
    }];
    for n in 1..=overlays {
        let below = &layers[n - 1];
        let in_folder = below.path.parent() == Some("/vm".as_ref());
        let named = if in_folder { below.path.file_name().unwrap().as_ref() } else { below.path.as_path() };
        let mut sample = SHAPE.sample(10).with(n as u64, Content::Data(0x40 + n as u8));
        if kind == ChainKind::DataFiles {
            sample.data_file = Some((format!("/vm/{n}.data"), false));
        }
        let sample = sample.over(named.to_str().unwrap(), below.format());
        layers.push(BuiltLayer::qcow2(&name(n), &sample, Room::Dirty(0)));
    }
    layers
}
