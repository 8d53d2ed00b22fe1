//! Damage in the header and its extensions: the image does not open.

use qcow2::ErrorKind;
use qcow2::fuzzing::sample::{Content, Image, Sample, extension, field, incompatible};

use super::kit::{Damage, all, assert_refused, assert_says, damaged, read_all, u32_at, u64_at, unsupported};

/// An overlay with something in it.
fn overlay() -> Image {
    Sample::new(100).with(0, Content::Data(1)).with(70, Content::Data(2)).over("base.raw", "raw").build()
}

/// The same with clusters of 64 KiB, for limits that small clusters do not reach.
fn large_clusters() -> Image {
    Sample::new(0).with_clusters(16, 4).with(0, Content::Data(1)).over("base.raw", "raw").build()
}

#[test]
fn what_is_no_qcow2_image_is_refused() {
    for (case, bytes) in [
        ("empty", Vec::new()),
        ("one byte", vec![b'Q']),
        ("zeros", vec![0; 4096]),
        ("magic alone", b"QFI\xfb".to_vec()),
        ("magic of VMDK", b"KDMV".repeat(1024)),
    ] {
        let mut image = overlay();
        image.bytes = bytes;
        assert_eq!(read_all(&image).unwrap_err().kind(), ErrorKind::Damaged, "{case}");
    }
}

#[test]
fn headers_cut_off_are_refused() {
    for len in 4..104 {
        let mut image = overlay();
        image.bytes.truncate(len);
        assert!(read_all(&image).is_err(), "{len} bytes");
    }
}

// Limits of QEMU's test 080, and the histories of CVE-2014-0142 to 0147: sizes that overflow shifts,
// tables that overflow buffers, counts that make a small file ask for much memory.
#[test]
fn impossible_sizes_and_places_are_refused() {
    use field::*;
    let not_a_cluster = 0x200 + 1;
    assert_refused(
        overlay,
        vec![
            ("version 1", unsupported("version", VERSION), u32_at(VERSION, 1)),
            ("version 4", unsupported("version", VERSION), u32_at(VERSION, 4)),
            ("cluster bits 0", damaged("cluster bits", CLUSTER_BITS), u32_at(CLUSTER_BITS, 0)),
            ("cluster bits 8", damaged("cluster bits", CLUSTER_BITS), u32_at(CLUSTER_BITS, 8)),
            ("cluster bits 22", damaged("cluster bits", CLUSTER_BITS), u32_at(CLUSTER_BITS, 22)),
            ("cluster bits 64", damaged("cluster bits", CLUSTER_BITS), u32_at(CLUSTER_BITS, 64)),
            ("cluster bits -1", damaged("cluster bits", CLUSTER_BITS), u32_at(CLUSTER_BITS, u32::MAX)),
            ("refcount order 7", damaged("refcount order", REFCOUNT_ORDER), u32_at(REFCOUNT_ORDER, 7)),
            ("refcount order 64", damaged("refcount order", REFCOUNT_ORDER), u32_at(REFCOUNT_ORDER, 64)),
            ("header length 72", damaged("header length", HEADER_LENGTH), u32_at(HEADER_LENGTH, 72)),
            ("header length 105", damaged("header length", HEADER_LENGTH), u32_at(HEADER_LENGTH, 105)),
            ("header length 520", damaged("header length", HEADER_LENGTH), u32_at(HEADER_LENGTH, 520)),
            ("header length -8", damaged("header length", HEADER_LENGTH), u32_at(HEADER_LENGTH, 0xffff_fff8)),
            ("disk of 2^64 - 1", damaged("L1 table entries", L1_SIZE), u64_at(SIZE, u64::MAX)),
            ("disk of 2^63", damaged("L1 table entries", L1_SIZE), u64_at(SIZE, 1 << 63)),
            ("disk past L1", damaged("L1 table entries", L1_SIZE), u64_at(SIZE, 0x2_0001)),
            ("no L1 entries", damaged("L1 table entries", L1_SIZE), u32_at(L1_SIZE, 0)),
            ("L1 over 32 MiB", damaged("L1 table entries", L1_SIZE), u32_at(L1_SIZE, (4 << 20) + 1)),
            ("L1 entries -1", damaged("L1 table entries", L1_SIZE), u32_at(L1_SIZE, u32::MAX)),
            ("L1 unaligned", damaged("L1 table offset", L1_OFFSET), u64_at(L1_OFFSET, not_a_cluster)),
            ("L1 at 2^63", damaged("L1 table offset", L1_OFFSET), u64_at(L1_OFFSET, 1 << 63)),
            ("L1 wraps", damaged("L1 table offset", L1_OFFSET), u64_at(L1_OFFSET, u64::MAX - 511)),
            ("L1 in the header", damaged("L1 table offset", L1_OFFSET), u64_at(L1_OFFSET, 0)),
            (
                "refcount table unaligned",
                damaged("refcount table offset", REFCOUNT_TABLE_OFFSET),
                u64_at(REFCOUNT_TABLE_OFFSET, not_a_cluster),
            ),
            (
                "refcount table at 2^63",
                damaged("refcount table offset", REFCOUNT_TABLE_OFFSET),
                u64_at(REFCOUNT_TABLE_OFFSET, 1 << 63),
            ),
            (
                "refcount table over 8 MiB",
                damaged("refcount table clusters", REFCOUNT_TABLE_CLUSTERS),
                u32_at(REFCOUNT_TABLE_CLUSTERS, (8 << 20) / 512 + 1),
            ),
            (
                "no refcount table",
                damaged("refcount table clusters", REFCOUNT_TABLE_CLUSTERS),
                u32_at(REFCOUNT_TABLE_CLUSTERS, 0),
            ),
            ("65537 snapshots", damaged("number of snapshots", SNAPSHOTS), u32_at(SNAPSHOTS, 65_537)),
            (
                "snapshot table unaligned, though there are none",
                damaged("snapshot table offset", SNAPSHOTS_OFFSET),
                u64_at(SNAPSHOTS_OFFSET, not_a_cluster),
            ),
            (
                "snapshot table at 2^63",
                damaged("snapshot table offset", SNAPSHOTS_OFFSET),
                u64_at(SNAPSHOTS_OFFSET, 1 << 63),
            ),
            (
                "snapshots in the header (CVE-2014-0146)",
                damaged("snapshot table offset", SNAPSHOTS_OFFSET),
                u32_at(SNAPSHOTS, 1),
            ),
        ],
    );
}

#[test]
fn backing_names_outside_cluster_0_are_refused() {
    use field::*;
    let at = large_clusters().at.backing_name;
    assert_refused(
        large_clusters,
        vec![
            ("behind cluster 0", damaged("backing file", BACKING_OFFSET), u64_at(BACKING_OFFSET, 0x10001)),
            ("far away", damaged("backing file", BACKING_OFFSET), u64_at(BACKING_OFFSET, u64::MAX)),
            ("in the header", damaged("backing file", BACKING_OFFSET), u64_at(BACKING_OFFSET, 8)),
            ("crossing the end", damaged("backing file", BACKING_SIZE), u64_at(BACKING_OFFSET, 0xfffc)),
            ("1024 bytes", damaged("backing file", BACKING_SIZE), u32_at(BACKING_SIZE, 1024)),
            ("4 GiB", damaged("backing file", BACKING_SIZE), u32_at(BACKING_SIZE, u32::MAX)),
        ],
    );
    let mut most = large_clusters();
    most.put(at, &[b'n'; 1023]);
    most.put_u32(BACKING_SIZE, 1023);
    read_all(&most).expect("1023 bytes are allowed");
}

#[test]
fn features_that_are_not_known_are_refused_by_name() {
    use field::*;
    assert_refused(
        overlay,
        vec![
            (
                "incompatible bit 63",
                unsupported("incompatible features", INCOMPATIBLE),
                u64_at(INCOMPATIBLE, 1 << 63),
            ),
            (
                "incompatible bit 5",
                unsupported("incompatible features", INCOMPATIBLE),
                u64_at(INCOMPATIBLE, 1 << 5),
            ),
            ("AES", unsupported("encryption", CRYPT_METHOD), u32_at(CRYPT_METHOD, 1)),
            ("LUKS without its header", unsupported("encryption", CRYPT_METHOD), u32_at(CRYPT_METHOD, 2)),
            ("encryption method 3", damaged("encryption", CRYPT_METHOD), u32_at(CRYPT_METHOD, 3)),
        ],
    );
    let names = Sample {
        extensions: vec![(extension::FEATURE_NAMES, {
            let mut table = vec![0, 40];
            table.extend(b"time travel");
            table.resize(48, 0);
            table
        })],
        ..Sample::new(8)
    };
    let mut image = names.build();
    image.put_u64(INCOMPATIBLE, 1 << 40);
    let error = read_all(&image).unwrap_err().to_string();
    assert!(error.contains("time travel"), "the image's own name for the feature is missing: {error}");
}

#[test]
fn a_feature_name_table_of_one_byte_is_harmless() {
    let mut sample = Sample::new(8);
    sample.extensions = vec![(extension::FEATURE_NAMES, vec![0])];
    let mut image = sample.build();
    read_all(&image).unwrap();
    image.put_u64(field::INCOMPATIBLE, 1 << 40);
    assert_eq!(read_all(&image).unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn feature_bits_that_contradict_the_header_are_refused() {
    use field::*;
    let byte = |value: u8| -> Damage { Box::new(move |image| image.put(COMPRESSION_TYPE, &[value])) };
    let bit = |value| u64_at(INCOMPATIBLE, value);
    assert_refused(
        || Sample::new(100).with(0, Content::Data(1)).build(),
        vec![
            ("zstd without its bit", damaged("compression type", COMPRESSION_TYPE), byte(1)),
            (
                "zlib with the bit",
                damaged("compression type", COMPRESSION_TYPE),
                bit(incompatible::COMPRESSION),
            ),
            (
                "compression type 2",
                unsupported("compression type", COMPRESSION_TYPE),
                all(vec![bit(incompatible::COMPRESSION), byte(2)]),
            ),
            (
                "extended L2 entries with clusters of 512 bytes",
                damaged("cluster bits", CLUSTER_BITS),
                bit(incompatible::EXTENDED_L2),
            ),
            ("raw data without a data file", damaged("autoclear", AUTOCLEAR), u64_at(AUTOCLEAR, 2)),
        ],
    );
    let raw = || Sample { data_file: Some(("data.raw".into(), true)), ..Sample::new(8) }.build();
    assert_refused(
        raw,
        vec![(
            "raw data with a backing file",
            damaged("autoclear", AUTOCLEAR),
            Box::new(|image| {
                let at = image.at.header_end;
                image.put_u64(BACKING_OFFSET, at);
                image.put_u32(BACKING_SIZE, 8);
                image.put(at, b"base.raw");
            }),
        )],
    );
}

#[test]
fn extensions_that_do_not_fit_are_refused() {
    let at = overlay().at.extensions[&extension::BACKING_FORMAT];
    assert_refused(
        overlay,
        vec![
            ("up to the name and beyond", damaged("header extension", at + 4), u32_at(at + 4, 25)),
            ("4 GiB", damaged("header extension", at + 4), u32_at(at + 4, u32::MAX)),
            (
                "unknown and too long",
                damaged("header extension", at + 4),
                all(vec![u32_at(at, 0x1234_5678), u32_at(at + 4, 0x8000_0000)]),
            ),
        ],
    );
}

#[test]
fn bitmap_extensions_out_of_bounds_are_refused() {
    let bitmaps = || Sample { bitmaps: vec!["nightly".into()], ..Sample::new(100) }.build();
    let at = bitmaps().at.extensions[&extension::BITMAPS];
    let cases: Vec<(&str, Damage)> = vec![
        ("no bitmaps", u32_at(at + 8, 0)),
        ("65536 bitmaps", u32_at(at + 8, 65_536)),
        ("reserved field", u32_at(at + 12, 1)),
        ("empty directory", u64_at(at + 16, 0)),
        ("directory over 64 MiB", u64_at(at + 16, 64 << 20)),
        ("directory unaligned", u64_at(at + 24, 0x201)),
        ("directory at 2^63", u64_at(at + 24, 1 << 63)),
        ("short extension", u32_at(at + 4, 16)),
    ];
    for (case, damage) in cases {
        let mut image = bitmaps();
        damage(&mut image);
        let error = read_all(&image).expect_err(case);
        assert_eq!(error.kind(), ErrorKind::Damaged, "{case}: {error}");
        // What is left of a short extension is read as the next one.
        let named = if case == "short extension" { "header extension" } else { "bitmap" };
        assert!(error.to_string().contains(named), "{case}: {error}");
        // Without the autoclear bit the extension means nothing: it cannot do harm.
        image.put_u64(field::AUTOCLEAR, 0);
        if case != "short extension" {
            read_all(&image).unwrap_or_else(|error| panic!("{case}, not consistent: {error}"));
        }
    }
}

#[test]
fn an_encryption_header_without_encryption_is_refused() {
    let sample = Sample { extensions: vec![(extension::LUKS, vec![0; 16])], ..Sample::new(8) };
    let image = sample.build();
    let at = image.at.extensions[&extension::LUKS];
    assert_says(&read_all(&image).unwrap_err(), damaged("encryption", at), "LUKS extension");
}

#[test]
fn unknown_compatible_bits_and_autoclear_bits_do_not_hinder_reading() {
    let mut image = overlay();
    image.put_u64(field::COMPATIBLE, u64::MAX);
    image.put_u64(field::AUTOCLEAR, 1 << 63);
    assert_eq!(read_all(&image).unwrap()[0], 1);
}

#[test]
fn a_tiny_file_that_claims_a_huge_disk_opens_at_no_cost() {
    let mut image = overlay();
    // The largest disk that an L1 table of 32 MiB describes: 128 GiB with clusters of 512 bytes.
    image.put_u64(field::SIZE, 128 << 30);
    image.put_u32(field::L1_SIZE, 4 << 20);
    let image = image;
    let host = qcow2::storage::MemHost::new();
    host.add("/huge", &image.bytes).unwrap();
    let file = qcow2::storage::Host::open(&host, "/huge".as_ref(), qcow2::storage::Access::Read).unwrap();
    let opened =
        qcow2::image::Image::open("/huge".as_ref(), file, qcow2::image::ImageFormat::Qcow2, None).unwrap();
    assert_eq!(opened.virtual_size(), 128 << 30);
}
