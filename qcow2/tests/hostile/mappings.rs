//! Damage in L1 and L2 tables: the image opens, and reading through the damage is refused.

use qcow2::fuzzing::sample::{Content, Image, Sample, incompatible};
use qcow2::{Error, ErrorKind};

use super::kit::{Damage, assert_refused, damaged, read_all};

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

fn image() -> Image {
    Sample::new(100)
        .with(0, Content::Data(1))
        .with(1, Content::Data(2))
        .with(5, Content::Zero)
        .with(70, Content::Data(3))
        .build()
}

/// Changes the L2 entry of a guest cluster.
fn entry(cluster: u64, change: impl Fn(u64) -> u64 + 'static) -> Damage {
    Box::new(move |image| {
        let at = image.l2_entry(cluster);
        let old = image.get_u64(at);
        image.put_u64(at, change(old));
    })
}

/// Changes an entry of the L1 table.
fn l1(index: u64, change: impl Fn(u64) -> u64 + 'static) -> Damage {
    Box::new(move |image| {
        let at = image.at.l1 + index * 8;
        let old = image.get_u64(at);
        image.put_u64(at, change(old));
    })
}

#[test]
fn l1_entries_that_break_the_rules_are_refused() {
    let at = image().at.l1 + 8;
    assert_refused(
        image,
        vec![
            ("reserved bit 0", damaged("L1 entry", at), l1(1, |e| e | 1)),
            ("reserved bit 8", damaged("L1 entry", at), l1(1, |e| e | 1 << 8)),
            ("reserved bit 56", damaged("L1 entry", at), l1(1, |e| e | 1 << 56)),
            ("reserved bit 62", damaged("L1 entry", at), l1(1, |e| e | 1 << 62)),
            ("COPIED without a table", damaged("L1 entry", at), l1(1, |_| COPIED)),
            ("past the end", damaged("L2 table offset", at), l1(1, |_| COPIED | 0x10_0000)),
            ("at 2^55", damaged("L2 table offset", at), l1(1, |_| COPIED | 1 << 55)),
        ],
    );
    let large = || Sample::new(0).with_clusters(12, 100).with(0, Content::Data(1)).build();
    let at = large().at.l1;
    assert_refused(large, vec![("unaligned", damaged("L2 table offset", at), l1(0, |e| e + 0x200))]);
}

#[test]
fn l2_entries_that_break_the_rules_are_refused() {
    let at = image().l2_entry(1);
    assert_refused(
        image,
        vec![
            ("reserved bit 1", damaged("L2 entry", at), entry(1, |e| e | 2)),
            ("reserved bit 8", damaged("L2 entry", at), entry(1, |e| e | 1 << 8)),
            ("reserved bit 56", damaged("L2 entry", at), entry(1, |e| e | 1 << 56)),
            ("reserved bit 61", damaged("L2 entry", at), entry(1, |e| e | 1 << 61)),
            ("COPIED without a place", damaged("L2 entry", at), entry(1, |_| COPIED)),
            ("past the end", damaged("L2 entry", at), entry(1, |_| COPIED | 0x10_0000)),
            ("2^32 clusters away", damaged("L2 entry", at), entry(1, |_| COPIED | 0x200_0000_0000)),
            ("the last offset", damaged("L2 entry", at), entry(1, |_| COPIED | 0xff_ffff_ffff_fe00)),
            ("COPIED and compressed", damaged("L2 entry", at), entry(1, |e| COPIED | COMPRESSED | e)),
        ],
    );
    let large = || Sample::new(0).with_clusters(12, 100).with(1, Content::Data(1)).build();
    let at = large().l2_entry(1);
    assert_refused(large, vec![("unaligned", damaged("L2 entry", at), entry(1, |e| e + 0x200))]);
}

#[test]
fn damage_is_met_only_where_it_lies() {
    let mut damaged = image();
    let at = damaged.l2_entry(70);
    damaged.put_u64(at, COPIED | 0x10_0000);
    let error = read_all(&damaged).unwrap_err();
    let Error::Mapping { guest, .. } = &error else { panic!("{error}") };
    assert_eq!(guest.get(), 70 * 512, "the error names the guest offset: {error}");
}

#[test]
fn a_zero_flag_in_version_2_is_refused() {
    let version_2 = || Sample { version: 2, ..Sample::new(100) }.with(1, Content::Data(1)).build();
    let at = version_2().l2_entry(1);
    assert_refused(
        version_2,
        vec![
            ("on data", damaged("L2 entry", at), entry(1, |e| e | 1)),
            ("alone", damaged("L2 entry", at), entry(1, |_| 1)),
        ],
    );
}

#[test]
fn subclusters_that_contradict_themselves_are_refused() {
    let image = || {
        Sample { extended_l2: true, ..Sample::new(0) }
            .with_clusters(14, 6)
            .with(0, Content::Data(1))
            .with(1, Content::Subclusters { allocated: 0xff, zero: 0xff00, fill: 2 })
            .with(2, Content::Subclusters { allocated: 0, zero: 1, fill: 0 })
            .with(4, Content::Compressed(9))
            .build()
    };
    let bitmap = |cluster: u64, value: u64| -> Damage {
        Box::new(move |image: &mut Image| image.put_u64(image.l2_entry(cluster) + 8, value))
    };
    let at = |cluster| image().l2_entry(cluster);
    assert_refused(
        image,
        vec![
            ("both allocated and zero", damaged("L2 entry", at(1)), bitmap(1, 0x1_0000_0001)),
            ("allocated without a place", damaged("L2 entry", at(2)), bitmap(2, 1)),
            ("a bitmap beside a compressed cluster", damaged("L2 entry", at(4)), bitmap(4, 1 << 32)),
            ("the zero flag of short entries", damaged("L2 entry", at(1)), entry(1, |e| e | 1)),
        ],
    );
}

#[test]
fn data_files_hold_data_at_the_guests_offset_and_nothing_compressed() {
    let image = || {
        Sample { data_file: Some(("data.raw".into(), false)), ..Sample::new(100) }
            .with(0, Content::Data(1))
            .with(1, Content::Data(2))
            .build()
    };
    assert_eq!(read_all(&image()).unwrap()[..1024], [[1; 512], [2; 512]].concat());
    let at = image().l2_entry(1);
    assert_refused(
        image,
        vec![
            ("another offset", damaged("host offset in L2 entry", at), entry(1, |e| e + 0x200)),
            ("compressed", damaged("L2 entry", at), entry(1, |_| COMPRESSED | 0x200)),
        ],
    );
}

#[test]
fn an_image_that_needs_a_data_file_does_not_open_without_it() {
    let mut image = Sample::new(8).build();
    image.put_u64(qcow2::fuzzing::sample::field::INCOMPATIBLE, incompatible::DATA_FILE);
    let host = qcow2::storage::MemHost::new();
    host.add("/x", &image.bytes).unwrap();
    let file = qcow2::storage::Host::open(&host, "/x".as_ref(), qcow2::storage::Access::Read).unwrap();
    let error =
        qcow2::image::Image::open("/x".as_ref(), file, qcow2::image::ImageFormat::Qcow2, None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged, "{error}");
    assert!(error.to_string().contains("data file"), "{error}");
}

#[test]
fn a_table_cut_off_by_the_end_of_the_file_reads_as_zeros() {
    // As `qemu-img create` leaves it: the file ends inside the L1 table.
    let mut image = Sample::new(100).build();
    image.bytes.truncate(image.at.l1 as usize + 8);
    assert!(read_all(&image).unwrap().iter().all(|b| *b == 0));
}
