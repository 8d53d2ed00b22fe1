//! Compressed clusters: any bytes as a stream, into a cluster of any size.

use std::path::Path;

use super::sample::{Content, Sample};
use crate::format::Compression;
use crate::image::{ClusterCache, Image, ImageFormat, Inflater};
use crate::storage::{Access, Host, MemHost};
use crate::units::{GuestOffset, GuestRange};

/// The guest cluster of the sample that the stream is put into.
const INDEX: u64 = 1;

/// The first byte says how the stream is compressed and how large the cluster is, the rest is the stream. It
/// is inflated by itself, by an inflater that met something else before, and as a cluster of an
/// image: all three say the same; what a cluster inflates to has the size of a cluster.
pub fn inflate(bytes: &[u8]) {
    let Some((how, stream)) = bytes.split_first() else { return };
    let kind = if how & 1 == 0 { Compression::Zlib } else { Compression::Zstd };
    // 512 bytes to 2 MiB.
    let cluster_bits = 9 + u32::from(how >> 1) % 13;
    // Longer ones are not written; in an image a stream lies in whole sectors.
    let mut stream = stream.get(..stream.len().min(1 << cluster_bits)).unwrap_or_default().to_vec();
    stream.resize(stream.len().next_multiple_of(512), 0);
    let stream = &stream[..];
    let fresh = inflated(&mut Inflater::new(), kind, stream, cluster_bits);
    let mut used = Inflater::new();
    let other = if how & 1 == 0 { Compression::Zstd } else { Compression::Zlib };
    let half = stream.get(..stream.len() / 2).unwrap_or_default();
    let _ = inflated(&mut used, kind, half, cluster_bits);
    let _ = inflated(&mut used, other, stream, 9);
    let again = inflated(&mut used, kind, stream, cluster_bits);
    assert_eq!(again.is_ok(), fresh.is_ok(), "what came before changes the outcome");
    assert!(again.ok() == fresh.as_ref().ok().cloned(), "what came before changes the bytes");
    if let Err(why) = &fresh {
        assert!(why.len() < 500, "an error of {} bytes", why.len());
    }
    if let Some(in_image) = read_in_image(kind, stream, cluster_bits) {
        assert_eq!(in_image.ok(), fresh.ok(), "inflated otherwise in an image");
    }
}

fn inflated(inflater: &mut Inflater, kind: Compression, stream: &[u8], bits: u32) -> Result<Vec<u8>, String> {
    let mut cluster = vec![0xee; 1 << bits];
    inflater.inflate(kind, stream, &mut cluster).map(|()| cluster)
}

/// The cluster as an image reads it whose L2 entry names the stream; `None` if no entry can.
fn read_in_image(kind: Compression, stream: &[u8], bits: u32) -> Option<crate::Result<Vec<u8>>> {
    let sample = Sample { zstd: kind == Compression::Zstd, ..Sample::new(0) };
    let sample = sample.with_clusters(bits, 2).with(INDEX, Content::Data(0));
    let mut image = sample.build();
    let host = image.bytes.len() as u64;
    image.put(host, stream);
    // The number of sectors behind the first, in the bits above the offset (specification: "Compressed
    // Clusters Descriptor").
    let sectors = (stream.len() as u64).div_ceil(512).checked_sub(1)?;
    let shift = 62 - (bits - 8);
    let entry = image.l2_entry(INDEX);
    image.put_u64(entry, 1 << 62 | sectors << shift | host);
    let path = Path::new("/image.qcow2");
    let memory = MemHost::new();
    let file = memory.add(path, &image.bytes).and_then(|()| memory.open(path, Access::Read)).ok()?;
    let image = Image::open(path, file, ImageFormat::Qcow2, None).ok()?;
    let range = GuestRange { start: GuestOffset::new(INDEX << bits), len: 1 << bits };
    let mut extents = Vec::new();
    Some(image.map(range, &mut extents).and_then(|()| {
        let mut cluster = vec![0xee; 1 << bits];
        let mut cache = ClusterCache::new();
        let mut at = 0;
        for extent in &extents {
            let end = at + extent.range.len as usize;
            let part = cluster.get_mut(at..end).unwrap_or_default();
            image.read_extent(extent, part, &mut cache, 0)?;
            at = end;
        }
        Ok(cluster)
    }))
}

/// Sound streams of both kinds, in one piece and in frames, and streams that ask for much.
pub(super) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    use std::io::Write;
    let zlib = |plain: &[u8]| {
        let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
        // Writing to a vector cannot fail.
        encoder.write_all(plain).and_then(|()| encoder.finish()).unwrap_or_default()
    };
    let zstd =
        |plain: &[u8]| ruzstd::encoding::compress_to_vec(plain, ruzstd::encoding::CompressionLevel::Fastest);
    let text: Vec<u8> = (0..65536u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 27) as u8).collect();
    let how = |zstd: u8, bits: u8| zstd | (bits - 9) << 1;
    let with = |how: u8, stream: &[u8]| [&[how], stream].concat();
    vec![
        ("zlib-512", with(how(0, 9), &zlib(&[7; 512]))),
        ("zlib-64k", with(how(0, 16), &zlib(&text))),
        ("zlib-too-short", with(how(0, 12), &zlib(&[7; 100]))),
        ("zlib-too-long", with(how(0, 9), &zlib(&text))),
        ("zstd-512", with(how(1, 9), &zstd(&[7; 512]))),
        ("zstd-64k", with(how(1, 16), &zstd(&text))),
        ("zstd-frames", with(how(1, 12), &[zstd(&[1; 2048]), zstd(&[2; 2048])].concat())),
        ("zstd-too-short", with(how(1, 12), &zstd(&[7; 100]))),
        // A frame whose window is 2 TiB, and one whose content is said to be 16 EiB.
        ("zstd-window", with(how(1, 21), &[0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xf8, 0x03, 0x00, 0x10, 0x41])),
        (
            "zstd-content-size",
            with(
                how(1, 21),
                &[&[0x28, 0xb5, 0x2f, 0xfd, 0xe0][..], &[0xff; 8], &[0x03, 0, 0x10, 0x41]].concat(),
            ),
        ),
        // A block of one byte 2^21 times over: 4 bytes that become a whole cluster.
        ("zstd-run", with(how(1, 21), &[0x28, 0xb5, 0x2f, 0xfd, 0x20, 0xff, 0x03, 0x00, 0x10, 0x41])),
    ]
}
