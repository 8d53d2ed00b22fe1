//! Chains in which everything follows from a seed.

use kit::Random;
use qcow2::fuzzing::sample::Content;

use super::shape::{SHAPE, name};
use crate::chain::{After, BuiltLayer, Room, Scenario};

/// A chain of two to four layers in which everything follows from a seed.
pub(super) fn chain(seed: u64) -> Scenario {
    let mut dice = Random::new(seed);
    let depth = 2 + dice.below(3) as usize;
    let mut layers: Vec<BuiltLayer> = Vec::new();
    if dice.one_in(4) {
        layers.push(BuiltLayer::raw("/vm/0.raw", 1 + dice.below(60), dice.next() as u8));
    }
    while layers.len() < depth {
        let n = layers.len();
        let mut shape = SHAPE;
        match dice.below(8) {
            0 => shape.version = 2,
            1 => shape.cluster_bits = 10,
            2 => shape.cluster_bits = 12,
            3 => (shape.cluster_bits, shape.extended_l2) = (14, true),
            4 => shape.refcount_order = [0, 1, 2, 3, 5, 6][dice.below(6) as usize],
            _ => {}
        }
        let most = match shape.cluster_bits {
            9 if dice.one_in(4) => 80,
            9 => 24,
            _ => 8,
        };
        let clusters = 3 + dice.below(most);
        let mut sample = shape.sample(clusters);
        for _ in 0..dice.below(9) {
            let fill = dice.next() as u8 | 1;
            let content = match dice.below(6) {
                0 => Content::Zero,
                1 => Content::ZeroAllocated(fill),
                2 => Content::Compressed(fill),
                3 => {
                    let allocated = dice.next() as u32;
                    Content::Subclusters { allocated, zero: dice.next() as u32 & !allocated, fill }
                }
                _ => Content::Data(fill),
            };
            if shape.can(&content) {
                sample = sample.with(dice.below(clusters), content);
            }
        }
        // Version 2 need not say how large the disk of a snapshot was: such a base does not grow.
        if shape.refcount_order >= 3 && shape.version == 3 && dice.one_in(5) {
            sample.snapshots.push("before".into());
        }
        if shape.version == 3 && dice.one_in(6) {
            sample.bitmaps.push("nightly".into());
        }
        if let Some(below) = layers.last() {
            sample = sample.over(below.path.file_name().unwrap().to_str().unwrap(), below.format());
        }
        // What is new lies behind all that the blocks count: that must not be far.
        let near = shape.cluster_bits == 9 && shape.refcount_order >= 4;
        let room = if near && dice.one_in(2) { Room::NoBlock } else { Room::Dirty(dice.below(20)) };
        layers.push(BuiltLayer::qcow2(&name(n), &sample, room));
    }
    let top = 1 + dice.below(depth as u64 - 1) as usize;
    let base = dice.below(top as u64) as usize;
    let mut scenario = Scenario::new(format!("random {seed}"), layers, base, top);
    scenario.after = match dice.below(5) {
        0 => After::Delete,
        1 if top == depth - 1 => After::Keep,
        _ => After::Default,
    };
    scenario
}
