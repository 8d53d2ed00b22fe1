//! Every kind of entry over every other.

use qcow2::fuzzing::sample::Content;

use super::shape::{SHAPE, Shape, ends, name, overlay};
use crate::chain::{BuiltLayer, Room, Scenario};

const MIXED: Content = Content::Subclusters { allocated: 0x00ff_00ff, zero: 0x0f00_0f00, fill: 0x77 };

/// What base has where the overlay says something.
#[derive(Clone, Debug)]
enum OldEntry {
    /// Not even an L2 table.
    NoTable,
    Unallocated,
    Is(Content),
    /// The same, and an internal snapshot shares it.
    Shared(Content),
}

/// Every kind of entry over every other.
pub(super) fn entries() -> Vec<Scenario> {
    let shapes = [
        SHAPE,
        Shape { name: "512 v2", version: 2, ..SHAPE },
        Shape { name: "512 refcounts of 64 bits", refcount_order: 6, ..SHAPE },
        Shape { name: "512 refcounts of 1 bit", refcount_order: 0, ..SHAPE },
        Shape { name: "1K refcounts of 8 bits", cluster_bits: 10, refcount_order: 3, ..SHAPE },
        Shape { name: "4K zstd", cluster_bits: 12, zstd: true, ..SHAPE },
        Shape { name: "16K extended", cluster_bits: 14, extended_l2: true, ..SHAPE },
    ];
    let data = |fill| Content::Data(fill);
    let old = [
        OldEntry::NoTable,
        OldEntry::Unallocated,
        OldEntry::Is(data(0x22)),
        OldEntry::Is(Content::Compressed(0x22)),
        OldEntry::Is(Content::Zero),
        OldEntry::Is(Content::ZeroAllocated(0x22)),
        OldEntry::Is(MIXED),
        OldEntry::Shared(data(0x22)),
        OldEntry::Shared(Content::Compressed(0x22)),
        OldEntry::Shared(Content::ZeroAllocated(0x22)),
        OldEntry::Shared(MIXED),
    ];
    let new = [
        data(0x44),
        Content::Compressed(0x44),
        Content::Zero,
        Content::ZeroAllocated(0x44),
        Content::Subclusters { allocated: 0x0ff0_0000, zero: 0x0000_000f, fill: 0x44 },
    ];
    let mut list = Vec::new();
    for shape in shapes {
        for old in &old {
            for new in &new {
                let Some(base) = old.base(shape) else { continue };
                if !shape.can(new) {
                    continue;
                }
                let top = overlay(shape.sample(8).with(2, new.clone()).with(5, new.clone()), &base, 1);
                let label = format!("entry {}: {old:?} <- {new:?}", shape.name);
                let turn = list.len();
                list.push(ends(label, vec![base, top], turn));
            }
        }
    }
    list
}

impl OldEntry {
    fn base(&self, shape: Shape) -> Option<BuiltLayer> {
        let mut sample = shape.sample(8);
        if !matches!(self, Self::NoTable) {
            sample = sample.with(1, Content::Data(0x11));
        }
        if let Self::Is(content) | Self::Shared(content) = self {
            if !shape.can(content) {
                return None;
            }
            sample = sample.with(2, content.clone()).with(3, content.clone());
        }
        if matches!(self, Self::Shared(_)) {
            if shape.refcount_order < 3 {
                return None;
            }
            sample.snapshots.push("before".into());
        }
        Some(BuiltLayer::qcow2(&name(0), &sample, Room::Dirty(12)))
    }
}
