use super::*;
use crate::error::ErrorKind;

const MIB: u64 = 1 << 20;

#[test]
fn tables_grow_with_the_disk() {
    if !qemu() {
        return;
    }
    // With clusters of 512 bytes an entry of "fine" stands for 2 MiB, and 64 of them fill a cluster.
    for (options, old, new) in [
        ("cluster_size=512", 4 * MIB, 5 * MIB),
        ("cluster_size=512", 5 * MIB + 512, 300 * MIB),
        ("cluster_size=4096,lazy_refcounts=on", 15 * MIB + 1024, 40 * MIB),
        ("cluster_size=65536", 200 * MIB, 700 * MIB),
    ] {
        let fixture = Fixture::new(options, &old.to_string());
        fixture.bitmap("fine", "512").bitmap("coarse", "65536");
        fixture.write(old - 10_240, 10_240).write(MIB, MIB);
        fixture.bitmap("other", "1024").disable("fine").bitmap("idle", "512").disable("idle");
        let ranges = [
            range(MIB / 2, MIB / 2 + 1),
            range(old - 1024, old - 512),
            range(old - 512, old + 512),
            range(old + 1024, old + 2048),
            range(old + MIB / 2, new - 4096),
            range(new - 512, new),
        ];
        let mut image = fixture.open();
        let before: Vec<_> = bitmaps(&image).iter().map(|b| dirty(&image, &b.display_name())).collect();
        merge(&mut image, &ranges, new).unwrap();
        assert_eq!(image.virtual_size(), new);
        let image = fixture.checked();
        assert_eq!(image.virtual_size(), new);
        for (bitmap, before) in bitmaps(&image).iter().zip(before) {
            let name = bitmap.display_name();
            assert_eq!(u64::from(bitmap.table_entries), bitmap.table_entries_for(image.geometry(), new));
            let granularity = 1 << bitmap.granularity_bits;
            // What was dirty up to the old end is so up to the end of its bit.
            let whole: Vec<_> = before.iter().map(|r| range(r.start, r.end)).collect();
            let mut expected = rounded(&whole, granularity, new);
            if bitmap.is_auto() {
                expected.extend(rounded(&ranges, granularity, new));
            }
            let expected = union(expected);
            assert_eq!(dirty(&image, &name), expected, "{options}, {name}");
            assert_eq!(fixture.dirty_by_qemu(&name), expected, "{options}, {name}");
        }
        // QEMU goes on from there.
        fixture.write(new - 20_000, 512);
        ok("qemu-img", &["resize", "-q", fixture.name(), &(new + 8 * MIB).to_string()]);
        fixture.checked();
    }
}

#[test]
fn what_has_room_does_not_move() {
    if !qemu() {
        return;
    }
    let fixture = Fixture::new("cluster_size=64k", "8M");
    fixture.bitmap("b", "64k").write(0, MIB);
    let mut image = fixture.open();
    let (before, extension) = (bitmaps(&image), image.cluster0().bitmaps().unwrap());
    merge(&mut image, &[range(2 * MIB, 3 * MIB)], 100 * MIB).unwrap();
    let mut image = fixture.checked();
    assert_eq!((bitmaps(&image), image.cluster0().bitmaps().unwrap()), (before, extension));
    assert_eq!(image.virtual_size(), 100 * MIB);
    assert_eq!(dirty(&image, "b"), [0..MIB, 2 * MIB..3 * MIB]);
    // Bits behind the old end have no place in the present cluster of bits.
    merge(&mut image, &[range(110 * MIB, 111 * MIB)], 120 * MIB).unwrap();
    let image = fixture.checked();
    assert_ne!(image.cluster0().bitmaps().unwrap(), extension);
    let expected = [0..MIB, 2 * MIB..3 * MIB, 110 * MIB..111 * MIB];
    assert_eq!(dirty(&image, "b"), expected);
    assert_eq!(fixture.dirty_by_qemu("b"), expected);
}

#[test]
fn disks_without_bitmaps_only_change_their_size() {
    if !qemu() {
        return;
    }
    for options in ["compat=0.10", "compat=1.1"] {
        let fixture = Fixture::new(options, "8M");
        let mut before = std::fs::read(&fixture.path).unwrap();
        merge(&mut fixture.open(), &[range(MIB, 9 * MIB)], 9 * MIB).unwrap();
        before[24..32].copy_from_slice(&(9 * MIB).to_be_bytes());
        assert!(std::fs::read(&fixture.path).unwrap() == before, "{options}");
        // A disk never shrinks.
        merge(&mut fixture.open(), &[], MIB).unwrap();
        assert_eq!(fixture.checked().virtual_size(), 9 * MIB);
    }
}

#[test]
fn a_bitmap_in_use_survives_growth_as_it_is() {
    if !qemu() {
        return;
    }
    let fixture = Fixture::new("cluster_size=512", "4M");
    fixture.bitmap("unsaved", "512").write(0, 1024).bitmap("good", "512");
    let unsaved = bitmap(&fixture.open(), "unsaved");
    fixture.patch(unsaved.offset + 12, &[0, 0, 0, 3]);
    let mut image = fixture.open();
    merge(&mut image, &[range(5 * MIB, 6 * MIB)], 9 * MIB).unwrap();
    let image = fixture.checked();
    let after = bitmap(&image, "unsaved");
    assert_eq!((after.table_offset, after.table_entries), (unsaved.table_offset, unsaved.table_entries));
    assert!(after.is_in_use());
    assert_eq!(fixture.dirty_by_qemu("good"), only(5 * MIB..6 * MIB));
    let info: serde_json::Value =
        serde_json::from_str(&ok("qemu-img", &["info", "--output=json", fixture.name()])).unwrap();
    let listed = info["format-specific"]["data"]["bitmaps"].as_array().unwrap();
    assert_eq!(listed[0]["flags"], serde_json::json!(["in-use", "auto"]));
    assert_eq!(listed[1]["flags"], serde_json::json!(["auto"]));
}

#[test]
fn a_bitmap_that_cannot_grow_is_refused_first() {
    if !qemu() {
        return;
    }
    let fixture = Fixture::new("cluster_size=64k", "1T");
    fixture.bitmap("fine", "512");
    let before = std::fs::read(&fixture.path).unwrap();
    let image = fixture.open();
    assert!(BitmapPlan::new(&image, 2 << 40).is_ok());
    let error = BitmapPlan::new(&image, (2 << 40) + 512).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(error.to_string().contains("'fine'"), "{error}");
    assert!(std::fs::read(&fixture.path).unwrap() == before);
}

#[test]
fn growth_that_is_given_up_leaves_no_leak() {
    if !qemu() {
        return;
    }
    let fixture = Fixture::new("cluster_size=512", "4M");
    fixture.bitmap("b", "512").write(4 * MIB - 512, 512).bitmap("c", "512");
    let mut image = fixture.open();
    let ranges = [range(MIB, MIB + 1), range(4 * MIB, 6 * MIB)];
    let plan = plan(&image, &ranges, 9 * MIB);
    let refcounts = make_room(&mut image, &plan, 9 * MIB);
    let growth = mark(&image, &refcounts, plan, &ranges).unwrap();
    growth.abandon(&image, &refcounts).unwrap();
    let image = fixture.checked();
    assert_eq!(image.virtual_size(), 4 * MIB);
    assert_eq!(dirty(&image, "b"), [MIB..MIB + 512, 4 * MIB - 512..4 * MIB]);
    assert_eq!(fixture.dirty_by_qemu("c"), only(MIB..MIB + 512));
}

#[test]
fn tables_of_many_clusters_lie_side_by_side() {
    if !qemu() {
        return;
    }
    // 6 GiB need 3072 entries of 2 MiB each: 48 clusters of table.
    let fixture = Fixture::new("cluster_size=512", "4M");
    let names: Vec<_> =
        (0..20).map(|n| format!("a bitmap with a name that fills the directory {n}")).collect();
    for name in &names {
        fixture.bitmap(name, "512");
    }
    // Free clusters between used ones: runs that are too short, and one that is long enough for a table.
    fixture.write(0, MIB);
    ok("qemu-io", &["-c", "discard 0 32k", "-c", "discard 512k 1k", "-c", "discard 600k 2k", fixture.name()]);
    let size = 6 << 30;
    let ranges = [range(MIB, MIB + 1), range(5 << 30, (5 << 30) + 1)];
    merge(&mut fixture.open(), &ranges, size).unwrap();
    let image = fixture.checked();
    assert_eq!(bitmaps(&image).len(), 20);
    let expected = union(vec![0..MIB + 512, 5 << 30..(5 << 30) + 512]);
    for name in names.iter().take(2) {
        assert_eq!(fixture.dirty_by_qemu(name), expected);
    }
}
