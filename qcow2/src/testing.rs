//! Chains in memory with a model of what the guest sees, for the tests of this module.

use std::path::Path;

use kit::Random;

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

/// Makes `/0` to `/layers - 1`, each on the one before, with random writes; returns the bytes that the
/// guest sees through the last one.
pub(crate) fn random_chain(host: &MemHost, dice: &mut Random, layers: u64) -> Vec<u8> {
    random_chain_at(host, "/", dice, layers)
}

/// The same, with names that begin with `start`.
pub(crate) fn random_chain_at(host: &MemHost, start: &str, dice: &mut Random, layers: u64) -> Vec<u8> {
    let mut model: Vec<u8> = Vec::new();
    for n in 0..layers {
        let path = format!("{start}{n}");
        let path = Path::new(&path);
        let size = (256 + dice.below(2048)) * 512;
        let raw = n == 0 && dice.below(2) == 0;
        if raw {
            create_raw(host, path, size).unwrap();
        } else {
            let cluster_bits = 9 + dice.below(9) as u32;
            let extended_l2 = cluster_bits >= 14 && dice.below(2) == 0;
            let version = if extended_l2 || dice.below(3) > 0 { 3 } else { 2 };
            let refcount_order = if version == 3 { dice.below(7) as u32 } else { 4 };
            let below = format!("{start}{}", n.wrapping_sub(1));
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
            while dice.below(6) > 0 {
                at += dice.below(size / 4);
                let len = (1 + dice.below(40_000)).min(size.saturating_sub(at));
                let bytes: Vec<u8> = (0..len).map(|_| dice.below(256) as u8).collect();
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
