use super::*;
use crate::error::ErrorKind;
use crate::format::EXT_BITMAPS;
use crate::image::bitmap_names;
use crate::image::bitmaps::drop_all;

const MIB: u64 = 1 << 20;

fn drop_from(fixture: &Fixture) -> Result<()> {
    let mut image = fixture.open();
    let refcounts = Refcounts::load(&image)?;
    drop_all(&mut image, &refcounts)
}

#[test]
fn bitmaps_go_and_leave_no_leak() {
    if !qemu() {
        return;
    }
    for options in ["cluster_size=512", "cluster_size=64k"] {
        let fixture = Fixture::new(options, "64M");
        fixture.bitmap("a", "512").bitmap("b", "64k").write(MIB, 4 * MIB).disable("b").write(60 * MIB, MIB);
        drop_from(&fixture).unwrap();
        let image = fixture.checked();
        assert!(image.cluster0().extension(EXT_BITMAPS).is_none(), "{options}");
        assert_eq!(image.header().autoclear, 0, "{options}");
        let info: serde_json::Value =
            serde_json::from_str(&ok("qemu-img", &["info", "--output=json", fixture.name()])).unwrap();
        assert!(info["format-specific"]["data"].get("bitmaps").is_none(), "{options}");
        // Nothing is left to do.
        let before = std::fs::read(&fixture.path).unwrap();
        drop_from(&fixture).unwrap();
        assert!(std::fs::read(&fixture.path).unwrap() == before);
    }
}

#[test]
fn a_header_without_room_to_shuffle_loses_the_bit_alone() {
    if !qemu() {
        return;
    }
    // Another program's extension behind that of the bitmaps would have to move, across sectors.
    let fixture = Fixture::new("cluster_size=4096", "8M");
    fixture.bitmap("a", "512").write(0, MIB);
    let at = fixture.open().cluster0().extension(EXT_BITMAPS).unwrap().offset + 32;
    let mut foreign = vec![0x5a; 8 + 600];
    foreign[4..8].copy_from_slice(&600u32.to_be_bytes());
    fixture.patch(at, &foreign);
    drop_from(&fixture).unwrap();
    let image = fixture.checked();
    assert!(bitmaps(&image).is_empty());
    assert!(image.cluster0().extension(EXT_BITMAPS).is_some(), "it cannot be taken out atomically");
    assert_eq!(image.cluster0().extension(0x5a5a_5a5a).unwrap().data.len(), 600);
    assert!(!ok("qemu-img", &["info", fixture.name()]).contains("granularity"));
    // QEMU takes it out when it writes the header.
    fixture.bitmap("b", "512");
    assert_eq!(bitmap_names(&fixture.checked()).unwrap().len(), 1);
}

#[test]
fn broken_tables_are_refused_before_anything_is_written() {
    if !qemu() {
        return;
    }
    let fixture = Fixture::new("cluster_size=4096", "8M");
    fixture.bitmap("a", "512");
    let table = bitmap(&fixture.open(), "a").table_offset.get();
    fixture.patch(table, &[0xff; 8]);
    let before = std::fs::read(&fixture.path).unwrap();
    assert_eq!(drop_from(&fixture).unwrap_err().kind(), ErrorKind::Damaged);
    assert!(std::fs::read(&fixture.path).unwrap() == before);
}
