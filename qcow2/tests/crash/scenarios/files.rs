//! Other files than one qcow2 image: raw bases, devices, data files; clusters of other sizes; names.

use qcow2::fuzzing::sample::Content;

use super::shape::{SHAPE, Shape, ends, name, overlay};
use crate::chain::{After, BuiltLayer, Room, Scenario};

/// Raw bases: sectors beside others that no overlay holds, holes, growth, devices.
pub(super) fn raw() -> Vec<Scenario> {
    let mut list = Vec::new();
    for (sectors, fill) in [(24, 7), (24, 0), (3, 7), (40, 9)] {
        for (cluster_bits, size) in [(9, 24), (9, 60), (10, 20), (12, 8)] {
            let shape = Shape { cluster_bits, ..SHAPE };
            let base = BuiltLayer::raw("/vm/0.raw", sectors, fill);
            let sample = shape.sample(size).with(1, Content::Data(0x44)).with(3, Content::Zero);
            let top = overlay(sample.with(size - 1, Content::Compressed(0x45)), &base, 1);
            let label = format!("raw: {sectors} sectors of {fill}, {size} clusters of 2^{cluster_bits}");
            let turn = list.len();
            list.push(ends(label, vec![base, top], turn));
        }
    }
    for turn in 0..4 {
        let base = BuiltLayer::raw("/vm/0.raw", 48, 5);
        let sample = SHAPE
            .sample(48)
            .with(3, Content::Data(0x44))
            .with(4, Content::Zero)
            .with(40, Content::Data(0x45));
        let top = overlay(sample, &base, 1);
        let mut scenario = ends("raw on a device".into(), vec![base, top], turn);
        scenario.device = true;
        list.push(scenario);
    }
    for turn in 0..4 {
        let base =
            BuiltLayer::qcow2(&name(0), &SHAPE.sample(24).with(1, Content::Data(0x11)), Room::Dirty(40));
        let sample = SHAPE
            .sample(24)
            .with(1, Content::Data(0x44))
            .with(4, Content::Zero)
            .with(20, Content::Data(0x45));
        let top = overlay(sample, &base, 1);
        let mut scenario = ends("qcow2 on a device".into(), vec![base, top], turn);
        scenario.device = true;
        list.push(scenario);
    }
    list
}

/// Base or overlay with an external data file, raw or not.
pub(super) fn data_files() -> Vec<Scenario> {
    let mut list = Vec::new();
    for cluster_bits in [9, 12] {
        for (base_raw, top_raw) in
            [(Some(false), None), (Some(true), None), (None, Some(false)), (Some(false), Some(false))]
        {
            for (base_size, top_size) in [(12, 12), (12, 80)] {
                let shape = Shape { cluster_bits, ..SHAPE };
                let mut base = shape
                    .sample(base_size)
                    .with(1, Content::Data(0x11))
                    .with(2, Content::ZeroAllocated(0x22));
                base.data_file = base_raw.map(|raw| ("/vm/0.data".to_owned(), raw));
                if base_raw == Some(true) {
                    // A raw data file shows every cluster of the disk.
                    base = (0..base_size).fold(base, |s, n| s.with(n, Content::Data(0x30 + n as u8)));
                }
                let base = BuiltLayer::qcow2(&name(0), &base, Room::Dirty(4));
                let mut top = shape
                    .sample(top_size)
                    .with(2, Content::Data(0x44))
                    .with(3, Content::Zero)
                    .with(top_size - 1, Content::Data(0x45));
                top.data_file = top_raw.map(|raw| ("/vm/1.data".to_owned(), raw));
                let top = overlay(top, &base, 1);
                let label = format!(
                    "data files 2^{cluster_bits}: base {base_raw:?}, top {top_raw:?}, {base_size} to {top_size}"
                );
                let turn = list.len();
                list.push(ends(label, vec![base, top], turn));
            }
        }
    }
    list
}

/// Overlays that get another backing file: names that are shorter, longer, and in other folders.
pub(super) fn switches() -> Vec<Scenario> {
    let mut list = Vec::new();
    let long = "x".repeat(60);
    for (cluster_bits, version) in [(9, 3), (9, 2), (10, 3), (12, 3), (16, 3)] {
        for (folder, base_name) in
            [("/vm", "b"), ("/vm", "base-of-all.qcow2"), ("/elsewhere", "base.qcow2"), ("/vm", &long)]
        {
            for merged in 1..4 {
                if cluster_bits == 16 && (merged != 2 || folder == "/elsewhere") {
                    continue;
                }
                let shape = Shape { cluster_bits, version, ..SHAPE };
                let mut layers = vec![BuiltLayer::qcow2(
                    &format!("{folder}/{base_name}"),
                    &shape.sample(6).with(1, Content::Data(0x11)),
                    Room::Dirty(9),
                )];
                for n in 1..=merged + 1 {
                    let below = &layers[n - 1].path;
                    let inside = below.parent().unwrap().to_str() == Some("/vm");
                    let backing = if inside {
                        below.file_name().unwrap().to_str().unwrap().to_owned()
                    } else {
                        below.to_str().unwrap().to_owned()
                    };
                    let sample =
                        shape.sample(6).with(n as u64, Content::Data(0x40 + n as u8)).over(&backing, "qcow2");
                    layers.push(BuiltLayer::qcow2(&name(n), &sample, Room::Dirty(0)));
                }
                let label =
                    format!("switch v{version} 2^{cluster_bits}: {folder}/{base_name}, {merged} layers");
                // Below another one, and all of them into an empty overlay.
                list.push(Scenario::new(label.clone(), layers.clone(), 0, merged));
                list.push(Scenario::new(label + ", emptied", layers, 0, merged + 1));
            }
        }
    }
    list
}

/// Clusters of base and overlay that differ: parts of clusters are written, others are filled from below.
pub(super) fn cluster_sizes() -> Vec<Scenario> {
    let mut list = Vec::new();
    for (base_bits, top_bits) in [(12, 9), (9, 12), (14, 9), (10, 9), (9, 14), (13, 12), (16, 9), (16, 16)] {
        for extended_l2 in [false, true] {
            if extended_l2 && base_bits < 14 {
                continue;
            }
            let size = 3u64 << base_bits.max(top_bits);
            let shape = Shape { cluster_bits: base_bits, extended_l2, ..SHAPE };
            let below = BuiltLayer::qcow2(
                &name(0),
                &SHAPE
                    .sample(size >> 9)
                    .with(0, Content::Data(0x61))
                    .with((size >> 9) - 1, Content::Data(0x62)),
                Room::Dirty(0),
            );
            let base =
                shape.sample(size >> base_bits).with(1, Content::Compressed(0x11)).over("0.qcow2", "qcow2");
            let base = BuiltLayer::qcow2(&name(1), &base, Room::Dirty(4));
            let top = Shape { cluster_bits: top_bits, ..SHAPE };
            let last = (size >> top_bits) - 1;
            let sample = top.sample(size >> top_bits).with(0, Content::Data(0x44)).with(last, Content::Zero);
            let middle = (size / 2) >> top_bits;
            let top = overlay(sample.with(middle, Content::Data(0x45)), &base, 2);
            let label = format!("clusters of 2^{base_bits} (extended: {extended_l2}) below 2^{top_bits}");
            let mut scenario = Scenario::new(label, vec![below, base, top], 1, 2);
            if list.len() % 2 == 1 {
                scenario.after = After::Keep;
            }
            list.push(scenario);
        }
    }
    list
}
