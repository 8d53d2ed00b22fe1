//! Chains in memory with a model of what the guest sees, for the tests of this module.

use std::path::Path;

use crate::chain::{OpenOptions, Policy};
use crate::image::{CreateOptions, create, create_raw};
use crate::storage::MemHost;
pub(crate) use crate::transfer::Silent;
use crate::transfer::put;
use crate::units::GuestOffset;

/// Everything that an image names may be opened.
pub(crate) fn local() -> OpenOptions {
    OpenOptions { policy: Policy::local_files(), ..OpenOptions::default() }
}

/// Small numbers that look random and are the same each time.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn roll(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }
}

/// Makes `/0` to `/layers - 1`, each on the one before, with random writes; returns the bytes that the
/// guest sees through the last one.
pub(crate) fn random_chain(host: &MemHost, dice: &mut Dice, layers: u64) -> Vec<u8> {
    let mut model: Vec<u8> = Vec::new();
    for n in 0..layers {
        let path = format!("/{n}");
        let path = Path::new(&path);
        let size = (256 + dice.roll(2048)) * 512;
        let raw = n == 0 && dice.roll(2) == 0;
        if raw {
            create_raw(host, path, size).unwrap();
        } else {
            let cluster_bits = 9 + dice.roll(9) as u32;
            let extended_l2 = cluster_bits >= 14 && dice.roll(2) == 0;
            let version = if extended_l2 || dice.roll(3) > 0 { 3 } else { 2 };
            let refcount_order = if version == 3 { dice.roll(7) as u32 } else { 4 };
            let below = format!("/{}", n.wrapping_sub(1));
            let of_below =
                if host.content(&below).is_ok_and(|b| b.starts_with(b"QFI\xfb")) { "qcow2" } else { "raw" };
            let backing = (n > 0).then(|| (below.into_bytes(), of_below.to_owned()));
            let kind = CreateOptions {
                cluster_bits,
                extended_l2,
                version,
                refcount_order,
                backing,
                ..CreateOptions::new(size)
            };
            create(host, path, &kind).unwrap();
        }
        model.resize(size as usize, 0);
        for _ in 0..3 {
            let mut writes: Vec<(GuestOffset, Vec<u8>)> = Vec::new();
            let mut at = 0;
            while dice.roll(6) > 0 {
                at += dice.roll(size / 4);
                let len = (1 + dice.roll(40_000)).min(size.saturating_sub(at));
                let bytes: Vec<u8> = (0..len).map(|_| dice.roll(256) as u8).collect();
                if let Some(there) = model.get_mut(at as usize..(at + len) as usize) {
                    there.copy_from_slice(&bytes);
                    writes.push((GuestOffset::new(at), bytes));
                }
                at += len;
            }
            writes.reverse();
            put(host, path, &local(), &writes).unwrap();
        }
    }
    model
}
