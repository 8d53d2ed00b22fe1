//! Compressed clusters whose streams or sizes are damaged: errors, never other data, never a crash.

use qcow2::fuzzing::sample::{Content, Image, Sample};
use qcow2::{Error, ErrorKind};

use super::kit::{Damage, read_all};

fn image(zstd: bool) -> Image {
    Sample { zstd, ..Sample::new(0) }
        .with_clusters(12, 40)
        .with(0, Content::Data(1))
        .with(3, Content::Compressed(2))
        .build()
}

/// Where the compressed data of guest cluster 3 begins.
fn stream(zstd: bool) -> u64 {
    image(zstd).at.hosts[&3]
}

#[test]
fn sound_streams_are_read() {
    for zstd in [false, true] {
        let guest = read_all(&image(zstd)).unwrap();
        assert!(guest[3 * 4096..4 * 4096].iter().all(|b| *b == 2), "zstd {zstd}");
    }
}

#[test]
fn damaged_streams_are_errors_that_name_the_cluster() {
    for zstd in [false, true] {
        let at = stream(zstd);
        let cases: Vec<(&str, Damage)> = vec![
            ("garbage", Box::new(move |image| image.put(at, &[0xff; 64]))),
            ("zeros", Box::new(move |image| image.put(at, &[0; 64]))),
            ("the file ends inside the stream", Box::new(move |image| image.bytes.truncate(at as usize + 3))),
            (
                "an offset past the end of the file",
                Box::new(|image| {
                    let entry = image.l2_entry(3);
                    image.put_u64(entry, 1 << 62 | 0x1000_0000);
                }),
            ),
            (
                "an offset of all bits",
                Box::new(|image| {
                    let entry = image.l2_entry(3);
                    image.put_u64(entry, 0x7fff_ffff_ffff_ffff);
                }),
            ),
        ];
        for (case, damage) in cases {
            let mut image = image(zstd);
            damage(&mut image);
            let error = read_all(&image).expect_err(case);
            assert_eq!(error.kind(), ErrorKind::Damaged, "{case}, zstd {zstd}: {error}");
            let Error::Mapping { guest, .. } = &error else { panic!("{case}, zstd {zstd}: {error}") };
            assert_eq!(guest.get(), 3 * 4096, "{case}, zstd {zstd}: {error}");
        }
    }
}

#[test]
fn a_stream_for_a_smaller_cluster_is_an_error() {
    // The stream of a cluster of 512 bytes, in an image with clusters of 4 KiB.
    let small = Sample::new(8).with(0, Content::Compressed(7)).build();
    let from = small.at.hosts[&0] as usize;
    let mut image = image(false);
    image.put(stream(false), &small.bytes[from..from + 64]);
    let error = read_all(&image).unwrap_err();
    assert!(error.to_string().contains("512 bytes"), "{error}");
}

#[test]
fn a_stream_that_would_fill_more_than_a_cluster_fills_a_cluster() {
    // The output is one cluster by construction: a bomb has no room to go off.
    let bomb = Sample::new(0).with_clusters(16, 1).with(0, Content::Compressed(5)).build();
    let from = bomb.at.hosts[&0] as usize;
    let mut image = image(false);
    image.put(stream(false), &bomb.bytes[from..from + 256]);
    let guest = read_all(&image).unwrap();
    assert!(guest[3 * 4096..4 * 4096].iter().all(|b| *b == 5));
}

#[test]
fn garbage_behind_a_stream_is_legal() {
    let mut image = Sample::new(0).with_clusters(12, 8).with(3, Content::Compressed(2)).build();
    let end = image.bytes.len();
    let entry = image.l2_entry(3);
    let host = image.get_u64(entry) & 0xffff_ffff;
    // Claim two more sectors than the stream needs, full of garbage.
    let extra = image.at.hosts[&3] + 64;
    image.put(extra, &vec![0xa5; (host + 1536 - extra).min(end as u64 - extra) as usize]);
    image.put_u64(entry, 1 << 62 | 2 << 58 | host);
    let guest = read_all(&image).unwrap();
    assert!(guest[3 * 4096..4 * 4096].iter().all(|b| *b == 2));
}

#[test]
fn bit_0_of_a_compressed_entry_belongs_to_its_offset() {
    // Readers that test the zero flag first give zeros here.
    let mut sample = Sample::new(0).with_clusters(12, 40);
    for cluster in 0..8 {
        sample = sample.with(cluster, Content::Compressed(cluster as u8 + 1));
    }
    let image = sample.build();
    let odd: Vec<_> = image.at.hosts.iter().filter(|(_, host)| *host % 2 == 1).collect();
    assert!(!odd.is_empty(), "the sample must have a stream at an odd offset");
    let guest = read_all(&image).unwrap();
    for cluster in 0..8 {
        let bytes = &guest[cluster * 4096..][..4096];
        assert!(bytes.iter().all(|b| *b == cluster as u8 + 1), "cluster {cluster}");
    }
}
