//! The body of the target for whole images.

use std::path::Path;

use crate::Error;
use crate::check::{CheckOptions, CheckReport, check};
use crate::image::{ClusterCache, Extent, Image, ImageFormat, Mapping};
use crate::storage::{Access, Host, MemHost};
use crate::units::{GuestOffset, GuestRange};

const READ: usize = 1 << 20;

/// The windows of guest range that are mapped, and the bytes that are read, at most: what lies behind
/// them is more of the same, and an input must not take long.
const WINDOWS: usize = 16;

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
