//! The bodies of the fuzz targets.

use super::chain::chain;
use super::commit::commit;
use super::image::image;
use super::seeds::{chains, images};
use super::{crash, fields, inflate, journal, names, repair, restore};
use crate::format::extensions::Extension;
use crate::format::{Cluster0, Header};

/// A fuzz target: its name, and what it does with an input.
#[derive(Clone, Copy, Debug)]
pub struct Body {
    /// The name, as in `fuzz/fuzz_targets/NAME.rs`.
    pub name: &'static str,
    /// Runs one input.
    pub run: fn(&[u8]),
    /// Named inputs to start from.
    pub seeds: fn() -> Vec<(&'static str, Vec<u8>)>,
    /// How many mutations of them `cargo test` runs: a few seconds' worth.
    pub mutations: u64,
}

/// Every fuzz target.
pub const BODIES: [Body; 11] = [
    Body { name: "header", run: header, seeds: images, mutations: 100_000 },
    Body { name: "image", run: image, seeds: images, mutations: 60_000 },
    Body { name: "chain", run: chain, seeds: chains, mutations: 2_000 },
    Body { name: "commit", run: commit, seeds: chains, mutations: 5_000 },
    Body { name: "crash", run: crash::crash, seeds: chains, mutations: 400 },
    Body { name: "journal", run: journal::journal, seeds: chains, mutations: 1_000 },
    Body { name: "repair", run: repair::repair, seeds: repair_seeds, mutations: 3_000 },
    Body { name: "restore", run: restore::restore, seeds: chains, mutations: 3_000 },
    Body { name: "fields", run: fields::fields, seeds: chains, mutations: 2_000 },
    Body { name: "inflate", run: inflate::inflate, seeds: inflate::seeds, mutations: 2_000 },
    Body { name: "name", run: names::name, seeds: names::seeds, mutations: 20_000 },
];

/// Sound images, and damaged ones.
fn repair_seeds() -> Vec<(&'static str, Vec<u8>)> {
    [images(), repair::seeds()].concat()
}

/// Cluster 0 decoded, and if it is valid, encoded and decoded again: both must say the same.
pub fn header(bytes: &[u8]) {
    let Ok(cluster) = Cluster0::decode(bytes) else { return };
    // Tools that look at damaged images ask these of any cluster 0 that decodes.
    let _ = (cluster.backing_format(), cluster.data_file_name(), cluster.bitmaps());
    let _ = (cluster.crypto(), cluster.merged_into());
    // What a short file lacks reads as zeros, which are names too: empty ones.
    let len = bytes.len().max(cluster.header.geometry().cluster_size() as usize);
    assert!(cluster.feature_names().len() * 48 <= len, "more names than bytes");
    if cluster.validate().is_err() {
        return;
    }
    let Ok(encoded) = cluster.encode() else { return };
    let room = cluster.header.geometry().cluster_size();
    assert!(encoded.len() as u64 <= room, "cluster 0 has {} bytes of {room}", encoded.len());
    let again = match Cluster0::parse(&encoded) {
        Ok(again) => again,
        Err(error) => unreachable!("our own header is refused: {error}"),
    };
    assert_eq!(without_places(&again), without_places(&cluster));
}

/// What cluster 0 says, without where in it the parts lie.
fn without_places(cluster: &Cluster0) -> (Header, Vec<Extension>, Option<Vec<u8>>) {
    let mut header = cluster.header.clone();
    (header.backing_offset, header.backing_len) = (0, 0);
    let extensions = cluster.extensions.iter().map(|e| Extension { offset: 0, ..e.clone() }).collect();
    (header, extensions, cluster.backing_name.clone())
}
