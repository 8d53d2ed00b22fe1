//! Sound images with one to three named fields changed: what random bytes seldom reach.

use std::path::Path;

use super::image::image;
use super::model::{Input, sample};
use super::mutate::VALUES;
use super::repair::repair;
use super::sample::{Image, field};

/// An image made from the input, with damage to fields that the input chooses, goes through the bodies
/// [`image`] and [`repair`].
pub fn fields(bytes: &[u8]) {
    let bytes = damaged(bytes);
    image(&bytes);
    repair(&bytes);
}

/// The image that an input stands for.
pub fn damaged(bytes: &[u8]) -> Vec<u8> {
    let mut input = Input::new(bytes);
    let backing = input.one_in(3).then(|| ("base.raw".into(), Some("raw".into())));
    let mut image = sample(&mut input, Path::new("/image.qcow2"), backing).build();
    for _ in 0..=input.below(3) {
        let fields = places(&image);
        let chosen = usize::from(input.byte()) << 8 | usize::from(input.byte());
        let Some(&(at, len)) = fields.get(chosen.checked_rem(fields.len()).unwrap_or(0)) else { continue };
        let value = value(&image, at, len, &mut input);
        put(&mut image, at, len, value);
    }
    image.bytes
}

/// Host offset and length in bytes of everything that has a meaning, the header's fields first.
fn places(image: &Image) -> Vec<(u64, u64)> {
    let at = &image.at;
    let mut places = vec![
        (field::MAGIC, 4),
        (field::VERSION, 4),
        (field::BACKING_OFFSET, 8),
        (field::BACKING_SIZE, 4),
        (field::CLUSTER_BITS, 4),
        (field::SIZE, 8),
        (field::CRYPT_METHOD, 4),
        (field::L1_SIZE, 4),
        (field::L1_OFFSET, 8),
        (field::REFCOUNT_TABLE_OFFSET, 8),
        (field::REFCOUNT_TABLE_CLUSTERS, 4),
        (field::SNAPSHOTS, 4),
        (field::SNAPSHOTS_OFFSET, 8),
        (field::INCOMPATIBLE, 8),
        (field::COMPATIBLE, 8),
        (field::AUTOCLEAR, 8),
        (field::REFCOUNT_ORDER, 4),
        (field::HEADER_LENGTH, 4),
        (field::COMPRESSION_TYPE, 1),
    ];
    places.extend(
        at.extensions.values().flat_map(|ext| [(*ext, 4), (ext + 4, 4), (ext + 8, 8), (ext + 24, 8)]),
    );
    places.extend((0..4).map(|n| (at.refcount_table + n * 8, 8)));
    places.extend(at.l2.keys().map(|index| (at.l1 + index * 8, 8)));
    places.extend(at.hosts.keys().map(|index| (image.l2_entry(*index), 8)));
    // Entries that are not in use, and, with extended entries, the bitmaps of subclusters.
    places.extend(at.l2.values().flat_map(|table| (0..32).map(move |n| (table + n * 8, 8))));
    for block in &at.refcount_blocks {
        places.extend((0..64).map(|n| (block + n * 2, 2)));
    }
    if at.snapshots != 0 {
        // Offset and size of its L1 table, lengths of id and name, size of the VM's state, length of what follows.
        places.extend(
            [(0, 8), (8, 4), (12, 2), (14, 2), (32, 4), (36, 4)].map(|(n, len)| (at.snapshots + n, len)),
        );
    }
    places.extend(at.snapshot_l1.iter().flat_map(|table| [(*table, 8), (table + 8, 8)]));
    if at.bitmap_directory != 0 {
        // Offset and size of its table, flags, type and granularity, length of the name, extra data.
        let entry = [(0, 8), (8, 4), (12, 4), (16, 1), (17, 1), (18, 2), (20, 4)];
        places.extend(entry.map(|(n, len)| (at.bitmap_directory + n, len)));
    }
    places.extend(at.bitmap_tables.iter().map(|table| (*table, 8)));
    places
}

/// A new value for a field: a limit, a neighbour of the old one, a place where something lies, one bit changed.
fn value(image: &Image, at: u64, len: u64, input: &mut Input<'_>) -> u64 {
    let old = get(image, at, len);
    let end = image.bytes.len() as u64;
    match input.below(6) {
        0 => VALUES[input.below(VALUES.len() as u64) as usize],
        1 => old.wrapping_add(1),
        2 => old.wrapping_sub(1),
        3 => old ^ 1 << (u64::from(input.byte()) % (len * 8)),
        4 => u64::from(input.byte()) << 9 | old & 0xc000_0000_0000_0001,
        _ => {
            let places = [0, image.at.refcount_table, image.at.l1, image.at.snapshots, end, end - 512];
            places[input.below(places.len() as u64) as usize] | old & (1 << 63)
        }
    }
}

fn get(image: &Image, at: u64, len: u64) -> u64 {
    let bytes = image.bytes.iter().skip(at as usize).take(len as usize);
    bytes.fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn put(image: &mut Image, at: u64, len: u64, value: u64) {
    let bytes = value.to_be_bytes();
    image.put(at, &bytes[8 - len as usize..]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use kit::Random;

    /// Damage that is noticed nowhere, or everywhere, would find nothing.
    #[test]
    fn some_images_stay_readable_and_some_do_not() {
        use crate::format::Cluster0;
        let mut random = Random::new(3);
        let opens = (0..200).filter(|_| {
            let bytes: Vec<u8> = (0..128).map(|_| random.next() as u8).collect();
            Cluster0::parse(&damaged(&bytes)).is_ok()
        });
        assert!((40..190).contains(&opens.count()));
    }
}
