//! The bodies of the fuzz targets.

use std::path::Path;

use super::chain::chain;
use super::commit::commit;
use super::seeds::{chains, images};
use super::{crash, fields, inflate, journal, names, repair, restore};
use crate::Error;
use crate::check::{CheckOptions, CheckReport, check};
use crate::format::{Cluster0, Extension, Header};
use crate::image::{ClusterCache, Extent, Image, ImageFormat, Mapping};
use crate::storage::{Access, Host, MemHost};
use crate::units::{GuestOffset, GuestRange};

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

/// The windows of guest range that are mapped, and the bytes that are read, at most: what lies behind
/// them is more of the same, and an input must not take long.
const WINDOWS: usize = 16;
const READ: usize = 1 << 20;

/// A whole image: opened, mapped, read, checked. The extents must tile the disk, lie inside the file, and
/// say the same when a part is asked for; what cannot be mapped, the check must have found; nothing may
/// be written.
pub fn image(bytes: &[u8]) {
    let (path, data) = (Path::new("/image.qcow2"), Path::new("/data.raw"));
    let host = MemHost::new();
    let files = host
        .add(path, bytes)
        .and_then(|()| host.add(data, &[0xda; 8192]))
        .and_then(|()| Ok((host.open(path, Access::Read)?, host.open(data, Access::Read)?)));
    let Ok((file, data)) = files else { return };
    let report = check(path, &*file, Some(&*data), &CheckOptions::default());
    if let Ok(image) = Image::open(path, file, ImageFormat::Qcow2, Some(data)) {
        let mapped = map_and_read(&image);
        let consistent = report.as_ref().is_ok_and(CheckReport::is_consistent);
        if let (true, Err(Error::Mapping { source, .. })) = (consistent, &mapped) {
            // The check does not inflate.
            assert_eq!(source.field(), "compressed cluster", "the check has missed: {source}");
        }
    }
    assert!(host.content(path).is_ok_and(|now| now == bytes), "reading has written");
}

fn map_and_read(image: &Image) -> crate::Result<()> {
    let size = image.virtual_size();
    let cluster = image.as_qcow2().map_or(512, |q| q.geometry().cluster_size());
    let mut cache = ClusterCache::new();
    let mut budget = READ;
    let mut from = GuestOffset::ZERO;
    for _ in 0..WINDOWS {
        if from.get() >= size {
            break;
        }
        let Some(start) = image.next_allocated(from)? else { break };
        assert!(start >= from && start.get() < size, "{start} is not ahead of {from} in {size} bytes");
        let end = GuestOffset::new(start.get().saturating_add(cluster << 15).min(size));
        let range = GuestRange::between(start, end);
        let mut extents = Vec::new();
        image.map(range, &mut extents)?;
        assert_tiles(range, &extents);
        assert_parts_agree(image, range, &extents)?;
        for extent in &extents {
            let len = extent.range.len.min(budget as u64) as usize;
            let mut buf = vec![0xee; len];
            image.read_extent(extent, &mut buf, &mut cache, 0)?;
            if matches!(extent.mapping, Mapping::Zero { .. }) {
                assert!(buf.iter().all(|b| *b == 0), "a zero extent does not read as zeros");
            }
            budget -= len;
        }
        from = end;
    }
    Ok(())
}

fn assert_tiles(range: GuestRange, extents: &[Extent]) {
    let mut at = range.start;
    for extent in extents {
        assert_eq!(extent.range.start, at, "a gap or an overlap");
        assert!(!extent.range.is_empty(), "an empty extent");
        at = extent.range.end();
    }
    assert_eq!(at, range.end(), "the extents do not reach the end");
}

/// The map of the odd middle of a range is the middle of its map.
fn assert_parts_agree(image: &Image, range: GuestRange, extents: &[Extent]) -> crate::Result<()> {
    let third = range.len / 3 + 1;
    let middle = GuestRange::between(range.start + third, range.start + third * 2);
    let Some(middle) = middle.intersect(&range) else { return Ok(()) };
    let mut part = Vec::new();
    image.map(middle, &mut part)?;
    let expected: Vec<_> = extents.iter().filter_map(|e| e.clip(&middle)).collect();
    assert_eq!(part, expected, "a part of {range} is mapped in another way");
    Ok(())
}
