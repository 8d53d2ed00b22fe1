use super::*;
use crate::error::ErrorKind;
use crate::image::bitmap_names;
use crate::image::bitmaps::BitmapInfo;

const MIB: u64 = 1 << 20;

#[test]
fn what_a_merge_changes_is_dirty_and_nothing_else_becomes_so() {
    if !qemu() {
        return;
    }
    for (options, granularities) in [
        ("cluster_size=512", ["512", "4096"]),
        ("cluster_size=4096,refcount_bits=1", ["512", "65536"]),
        ("cluster_size=65536,extended_l2=on", ["1024", "65536"]),
        ("cluster_size=2M", ["512", "2M"]),
    ] {
        let fixture = Fixture::new(options, "96M");
        fixture.bitmap("fine", granularities[0]).bitmap("coarse", granularities[1]);
        fixture.write(5 * MIB + 512, 70_000).write(95 * MIB, MIB);
        fixture.bitmap("idle", granularities[0]).disable("idle");
        fixture.bitmap("fresh", granularities[1]);
        let ranges = [
            range(0, 1),
            range(MIB - 1, MIB + 1),
            range(5 * MIB, 5 * MIB + 1024),
            range(5 * MIB + 1024, 5 * MIB + 1536),
            range(8 * MIB + 512, 40 * MIB),
            range(96 * MIB - 512, 96 * MIB),
        ];
        let mut image = fixture.open();
        let before: Vec<_> = bitmaps(&image).iter().map(|b| dirty(&image, &b.display_name())).collect();
        assert!(!before[0].is_empty(), "QEMU has set bits");
        let idle = bitmap(&image, "idle");
        merge(&mut image, &ranges, 96 * MIB).unwrap();
        let image = fixture.checked();
        assert_eq!(bitmap(&image, "idle"), idle, "{options}");
        for (bitmap, before) in bitmaps(&image).iter().zip(before) {
            let name = bitmap.display_name();
            let mut expected = before;
            if name != "idle" {
                expected.extend(rounded(&ranges, 1 << bitmap.granularity_bits, 96 * MIB));
            }
            let expected = union(expected);
            assert_eq!(dirty(&image, &name), expected, "{options}, {name}");
            assert_eq!(fixture.dirty_by_qemu(&name), expected, "{options}, {name}");
        }
    }
}

#[test]
fn many_scattered_ranges_share_their_bits() {
    if !qemu() {
        return;
    }
    let fixture = Fixture::new("cluster_size=512", "64M");
    fixture.bitmap("fine", "512").bitmap("coarse", "65536");
    let ranges: Vec<_> = (0..20_000).map(|n| range(n * 3072 + 100, n * 3072 + 700)).collect();
    let mut image = fixture.open();
    merge(&mut image, &ranges, 64 * MIB).unwrap();
    let image = fixture.checked();
    for (name, granularity) in [("fine", 512), ("coarse", 65536)] {
        let expected = rounded(&ranges, granularity, 64 * MIB);
        assert_eq!(dirty(&image, name), expected);
        assert_eq!(fixture.dirty_by_qemu(name), expected);
    }
    // A second merge of the same ranges takes nothing.
    assert_eq!(plan(&image, &ranges, 64 * MIB).clusters(), 0);
}

#[test]
fn a_table_entry_that_says_all_one_stays() {
    if !qemu() {
        return;
    }
    let fixture = Fixture::new("cluster_size=512", "8M");
    fixture.bitmap("ones", "512");
    let table = bitmap(&fixture.open(), "ones").table_offset.get();
    fixture.patch(table + 8, &[0, 0, 0, 0, 0, 0, 0, 1]);
    let ranges = [range(3 * MIB, 5 * MIB)];
    merge(&mut fixture.open(), &ranges, 8 * MIB).unwrap();
    let image = fixture.checked();
    assert_eq!(dirty(&image, "ones"), only(2 * MIB..5 * MIB));
    assert_eq!(fixture.dirty_by_qemu("ones"), only(2 * MIB..5 * MIB));
    assert_eq!(BitmapTable::of(&bitmap(&image, "ones")).entry(&image, 1).unwrap(), BitmapTableEntry::AllOne);
}

#[test]
fn bitmaps_that_mean_nothing_are_left_alone() {
    if !qemu() {
        return;
    }
    let fixture = Fixture::new("cluster_size=4096", "8M");
    fixture.bitmap("unsaved", "512").write(0, MIB);
    // The flags stand behind the table's offset and size.
    fixture.patch(bitmap(&fixture.open(), "unsaved").offset + 12, &[0, 0, 0, 3]);
    let before = std::fs::read(&fixture.path).unwrap();
    merge(&mut fixture.open(), &[range(MIB, 2 * MIB)], 8 * MIB).unwrap();
    assert!(std::fs::read(&fixture.path).unwrap() == before, "a bitmap that is in use was touched");

    let fixture = Fixture::new("cluster_size=4096", "8M");
    fixture.bitmap("invalid", "512").write(0, MIB);
    fixture.patch(88, &[0; 8]);
    let before = std::fs::read(&fixture.path).unwrap();
    let mut image = fixture.open();
    assert!(bitmap_names(&image).unwrap().is_empty());
    assert!(!plan(&image, &[], 8 * MIB).wants_ranges());
    merge(&mut image, &[range(MIB, 2 * MIB)], 8 * MIB).unwrap();
    assert!(std::fs::read(&fixture.path).unwrap() == before, "a bitmap that is not valid was touched");
    merge(&mut image, &[], 9 * MIB).unwrap();
    assert_eq!((image.header().autoclear, image.virtual_size()), (0, 9 * MIB), "it did not become valid");
}

#[test]
fn ranges_out_of_order_are_refused() {
    if !qemu() {
        return;
    }
    let fixture = Fixture::new("cluster_size=4096", "8M");
    fixture.bitmap("b", "512");
    let mut image = fixture.open();
    let ranges = [range(MIB, 2 * MIB), range(0, 512)];
    assert_eq!(merge(&mut image, &ranges, 8 * MIB).unwrap_err().kind(), ErrorKind::Broken);
}

#[test]
fn a_broken_table_is_found_before_anything_is_written() {
    if !qemu() {
        return;
    }
    let fixture = Fixture::new("cluster_size=4096", "8M");
    fixture.bitmap("b", "512");
    let table = bitmap(&fixture.open(), "b").table_offset.get();
    for (entry, why) in [(2u64, "reserved bits"), (0x1200, "not aligned"), (1 << 40, "behind the file")] {
        fixture.patch(table, &entry.to_be_bytes());
        let image = fixture.open();
        let error = BitmapPlan::new(&image, 8 * MIB).unwrap().add(&image, range(0, 1)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Damaged, "{why}");
        assert!(error.to_string().contains("bitmap table entry"), "{why}: {error}");
    }
}

#[test]
fn bitmaps_are_listed_as_qemu_lists_them() {
    if !qemu() {
        return;
    }
    let fixture = Fixture::new("cluster_size=64k", "8M");
    fixture.bitmap("daily", "32k").bitmap("idle", "1M").disable("idle");
    let info = |name: &str, granularity, enabled| {
        let name = name.to_owned();
        BitmapInfo { name, granularity, enabled, in_use: false }
    };
    let expected = [info("daily", 32 << 10, true), info("idle", MIB, false)];
    assert_eq!(bitmap_names(&fixture.open()).unwrap(), expected);
    assert!(bitmap_names(&Fixture::new("compat=0.10", "1M").open()).unwrap().is_empty());
}
