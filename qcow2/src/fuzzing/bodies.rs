//! The bodies of the fuzz targets.

use super::seeds::images;
use crate::format::{Cluster0, Extension, Header};

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
pub const BODIES: [Body; 1] = [Body { name: "header", run: header, seeds: images, mutations: 50_000 }];

/// Cluster 0 decoded, and if it is valid, encoded and decoded again: both must say the same.
pub fn header(bytes: &[u8]) {
    let Ok(cluster) = Cluster0::decode(bytes) else { return };
    // Tools that look at damaged images ask these of any cluster 0 that decodes.
    let _ = (cluster.backing_format(), cluster.data_file_name(), cluster.bitmaps());
    let _ = (cluster.crypto(), cluster.merged_into());
    assert!(cluster.feature_names().len() * 48 <= bytes.len() + 48, "more names than bytes");
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
