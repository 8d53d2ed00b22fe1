//! Tables that grow, shrink, and are freed.

use qcow2::fuzzing::sample::Content;

use super::shape::{SHAPE, Shape, ends, name, overlay};
use crate::chain::{After, BuiltLayer, Room, Scenario};

/// Tables that grow: refcount blocks, the refcount table, the L1 table, and all of them at once.
pub(super) fn growth() -> Vec<Scenario> {
    let mut list = Vec::new();
    let shapes = [
        SHAPE,
        Shape { name: "512 v2", version: 2, ..SHAPE },
        Shape { name: "512 refcounts of 64 bits", refcount_order: 6, ..SHAPE },
        Shape { name: "512 refcounts of 8 bits", refcount_order: 3, ..SHAPE },
    ];
    for shape in shapes {
        for room in [Room::Dirty(6), Room::NoBlock, Room::NoTable] {
            if room == Room::NoTable && shape.refcount_order != 6 {
                continue;
            }
            // Clusters of base and top: the L1 table has one entry for each 64.
            for (base_size, top_size) in [(8, 8), (8, 40), (64, 65), (60, 200)] {
                for snapshot in [false, true] {
                    if snapshot && shape.version == 2 {
                        continue;
                    }
                    let mut sample =
                        shape.sample(base_size).with(1, Content::Data(0x11)).with(2, Content::Data(0x22));
                    if snapshot {
                        sample.snapshots.push("before".into());
                    }
                    let base = BuiltLayer::qcow2(&name(0), &sample, room);
                    let last = top_size - 1;
                    let top =
                        shape.sample(top_size).with(2, Content::Data(0x44)).with(last, Content::Data(0x55));
                    let top = overlay(top, &base, 1);
                    let label = format!(
                        "growth {}: {room:?}, {base_size} to {top_size} clusters, snapshot: {snapshot}",
                        shape.name
                    );
                    let turn = list.len();
                    list.push(ends(label, vec![base, top], turn));
                }
            }
        }
    }
    // More than one new refcount block: they count each other.
    let shape = Shape { refcount_order: 6, ..SHAPE };
    for clusters in [70, 150] {
        let base =
            BuiltLayer::qcow2(&name(0), &shape.sample(clusters).with(1, Content::Data(0x11)), Room::NoBlock);
        let top = (0..clusters).fold(shape.sample(clusters), |s, n| s.with(n, Content::Data(n as u8 | 1)));
        let top = overlay(top, &base, 1);
        list.push(ends(
            format!("growth: {clusters} clusters into a full image"),
            vec![base, top],
            list.len(),
        ));
    }
    list
}

/// Disks of different sizes, with and without an image below base.
pub(super) fn sizes() -> Vec<Scenario> {
    let mut list = Vec::new();
    for version in [2, 3] {
        let shape = Shape { version, ..SHAPE };
        for (below, base, top, active) in [
            (0, 8, 12, 12),
            (16, 8, 12, 12),
            (16, 8, 80, 80),
            (0, 12, 8, 8),
            (0, 12, 8, 12),
            (0, 80, 8, 80),
            (16, 12, 8, 10),
            (16, 12, 8, 20),
        ] {
            let mut layers = Vec::new();
            if below > 0 {
                let sample = (0..below).fold(shape.sample(below), |s, n| s.with(n, Content::Data(0x61)));
                layers.push(BuiltLayer::qcow2(&name(0), &sample, Room::Dirty(0)));
            }
            let at = layers.len();
            let mut sample =
                shape.sample(base).with(1, Content::Data(0x11)).with(base - 1, Content::Data(0x12));
            if let Some(lowest) = layers.first() {
                sample = sample.over(lowest.path.file_name().unwrap().to_str().unwrap(), "qcow2");
            }
            layers.push(BuiltLayer::qcow2(&name(at), &sample, Room::Dirty(10)));
            for (n, size, fill) in [(1, top, 0x44), (2, active, 0x55)] {
                let sample =
                    shape.sample(size).with(2, Content::Data(fill)).with(size - 2, Content::Data(fill));
                let layer = overlay(sample, &layers[at + n - 1], at + n);
                layers.push(layer);
            }
            for top_at in [at + 1, at + 2] {
                for after in [After::Default, After::Delete] {
                    let label = format!(
                        "sizes v{version}: {below} < {base} < {top} < {active}, top [{}], {after:?}",
                        top_at + 1
                    );
                    let mut scenario = Scenario::new(label, layers.clone(), at, top_at);
                    scenario.after = after;
                    list.push(scenario);
                }
            }
        }
    }
    list
}

/// Active images that become empty overlays: many tables, compressed clusters, snapshots.
pub(super) fn emptied() -> Vec<Scenario> {
    let mut list = Vec::new();
    for (shape, room) in [
        (SHAPE, Room::Dirty(3)),
        (Shape { name: "512 v2", version: 2, ..SHAPE }, Room::Dirty(3)),
        (Shape { name: "512 refcounts of 64 bits", refcount_order: 6, ..SHAPE }, Room::Dirty(0)),
        (Shape { name: "512 refcounts of 64 bits", refcount_order: 6, ..SHAPE }, Room::NoBlock),
        (Shape { name: "4K", cluster_bits: 12, ..SHAPE }, Room::Dirty(2)),
        (Shape { name: "16K extended", cluster_bits: 14, extended_l2: true, ..SHAPE }, Room::Dirty(1)),
    ] {
        for (tables, snapshot, bitmap) in
            [(1, false, false), (3, false, false), (2, true, false), (2, false, true)]
        {
            if bitmap && shape.version == 2 {
                continue;
            }
            let entries = (1 << shape.cluster_bits) / if shape.extended_l2 { 16 } else { 8 };
            let size = if shape.cluster_bits == 9 { tables * entries } else { 12 };
            let base = BuiltLayer::qcow2(&name(0), &shape.sample(size), Room::Dirty(30));
            let mut sample = shape.sample(size);
            for n in 0..tables {
                let at = n * size / tables;
                sample = sample
                    .with(at, Content::Data(0x41))
                    .with(at + 1, Content::Compressed(0x42))
                    .with(at + 2, Content::Compressed(0x43));
            }
            if snapshot {
                sample.snapshots.push("mine".into());
            }
            if bitmap {
                sample.bitmaps.push("lost".into());
            }
            let sample = sample.over("0.qcow2", "qcow2");
            let top = BuiltLayer::qcow2(&name(1), &sample, room);
            let label = format!(
                "emptied {}: {room:?}, {tables} tables, snapshot: {snapshot}, bitmap: {bitmap}",
                shape.name
            );
            list.push(Scenario::new(label, vec![base, top], 0, 1));
        }
    }
    list
}

/// Bases with persistent bitmaps: of the same size, and growing.
pub(super) fn bitmaps() -> Vec<Scenario> {
    let mut list = Vec::new();
    for (cluster_bits, base_size, top_size) in
        [(9, 12, 12), (9, 12, 24), (9, 64, 130), (12, 8, 8), (12, 8, 12)]
    {
        for count in [1, 3] {
            let shape = Shape { cluster_bits, ..SHAPE };
            let mut base = shape.sample(base_size).with(1, Content::Data(0x11));
            base.bitmaps = (0..count).map(|n| format!("b{n}")).collect();
            let base = BuiltLayer::qcow2(&name(0), &base, Room::Dirty(8));
            let top =
                shape.sample(top_size).with(1, Content::Data(0x44)).with(top_size - 1, Content::Data(0x45));
            let top = overlay(top, &base, 1);
            let label = format!("bitmaps 2^{cluster_bits}: {count}, {base_size} to {top_size} clusters");
            let turn = list.len();
            list.push(ends(label, vec![base, top], turn));
        }
    }
    list
}

/// More to be kept than one record of a journal has blocks: tables of a qcow2 base, parts of blocks of a raw one.
pub(crate) fn full_records() -> Vec<Scenario> {
    const BLOCKS: u64 = 36;
    let each = |every: u64, first: u64, clusters: u64, fill: u8| {
        let at = (0..BLOCKS).flat_map(move |block| (0..clusters).map(move |n| block * every + first + n));
        at.fold(SHAPE.sample(BLOCKS * every), |sample, at| sample.with(at, Content::Data(fill)))
    };
    // Each table has a block of the file to itself.
    let base = BuiltLayer::qcow2(&name(0), &each(64, 0, 7, 0x11), Room::Dirty(0));
    let top = overlay(each(64, 9, 1, 0x22), &base, 1);
    let raw = BuiltLayer::raw("/vm/0.raw", BLOCKS * 8, 0x11);
    let over_raw = overlay(each(8, 3, 1, 0x22), &raw, 1);
    vec![
        Scenario::new("more tables than a record has blocks".into(), vec![base, top], 0, 1),
        Scenario::new("more parts of blocks than a record has".into(), vec![raw, over_raw], 0, 1),
    ]
}
