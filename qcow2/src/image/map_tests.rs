//! Maps of images that are cut short, that grow meanwhile, and whose tables are more than their files can hold.

use std::path::Path;
use std::sync::Arc;

use super::{Extent, Mapping, Qcow2};
use crate::error::Result;
use crate::fuzzing::sample::{Content, Sample};
use crate::storage::{MemFile, Storage};
use crate::units::{GuestOffset, GuestRange};

/// A sound image of eight clusters of data.
fn sample() -> Vec<u8> {
    let filled = (0..8).fold(Sample::new(8), |sample, n| sample.with(n, Content::Data(n as u8 + 1)));
    filled.build().bytes
}

fn open(bytes: &[u8]) -> (Qcow2, Arc<MemFile>) {
    let file = Arc::new(MemFile::new());
    file.write_all_at(bytes, 0).unwrap();
    let image = Qcow2::open(Path::new("x"), Arc::clone(&file) as Arc<dyn Storage>, None).unwrap();
    (image, file)
}

fn map(image: &Qcow2) -> Result<Vec<Extent>> {
    let mut out = Vec::new();
    let all = GuestRange { start: GuestOffset::new(0), len: image.virtual_size() };
    image.map(all, &mut out).map(|()| out)
}

/// What a program writes behind the end of a file that we know is inside the file when a table refers to it.
#[test]
fn a_file_that_grows_is_no_damaged_one() {
    let bytes = sample();
    for known in (512..bytes.len()).step_by(512) {
        let file = Arc::new(MemFile::new());
        file.write_all_at(&bytes[..known], 0).unwrap();
        let Ok(image) = Qcow2::open(Path::new("x"), Arc::clone(&file) as Arc<dyn Storage>, None) else {
            continue;
        };
        file.write_all_at(&bytes, 0).unwrap();
        assert_eq!(map(&image).unwrap(), map(&open(&bytes).0).unwrap(), "{known} bytes");
    }
}

#[test]
fn a_file_that_is_cut_short_is_an_error_unless_it_is_read_as_qemu_does() {
    let bytes = sample();
    let whole = map(&open(&bytes).0).unwrap();
    for cut in (1024..bytes.len()).step_by(512) {
        let (mut image, _) = open(&bytes[..cut]);
        let strict = map(&image);
        assert!(strict.as_ref().map_or(true, |extents| !extents.is_empty()) && !image.has_read_behind_end());
        image.read_as_qemu();
        let extents = map(&image).unwrap();
        assert_eq!(extents.iter().map(|extent| extent.range.len).sum::<u64>(), image.virtual_size());
        for extent in &extents {
            if let Mapping::Data { host } = extent.mapping {
                assert!(host.get() + extent.range.len <= cut as u64, "{cut}: {extent:?}");
                assert!(whole.iter().any(|w| w.clip(&extent.range) == Some(*extent)), "{cut}: {extent:?}");
            }
        }
        assert!(strict.is_ok() || image.has_read_behind_end(), "{cut}: strict {strict:?}");
    }
}

#[test]
fn an_entry_with_the_copied_flag_alone_is_an_error_or_none() {
    let filled = Sample::new(2).with(0, Content::Data(1)).with(1, Content::Data(2));
    let mut built = filled.build();
    let at = *built.at.l2.values().next().unwrap();
    built.put_u64(at + 8, 1 << 63);
    let (mut image, _) = open(&built.bytes);
    assert!(map(&image).is_err());
    image.read_as_qemu();
    assert_eq!(map(&image).unwrap().last().unwrap().mapping, Mapping::Unallocated);
}

/// 67 million lines of a map came from 512 KiB.
#[test]
fn more_tables_than_the_file_can_hold_are_refused() {
    let bytes = sample();
    assert!(open(&bytes).0.check_number_of_tables().is_ok());
    let mut built = Sample::new(64 * 2000).with(0, Content::Data(1)).build();
    let (l1, table) = (built.at.l1, built.get_u64(built.at.l1));
    for entry in 1..2000 {
        built.put_u64(l1 + entry * 8, table);
    }
    let refused = |bytes: &[u8], as_qemu| {
        let (mut image, _) = open(bytes);
        if as_qemu {
            image.read_as_qemu();
        }
        image.check_number_of_tables().is_err_and(|e| e.to_string().contains("2000 L2 tables"))
    };
    assert!(refused(&built.bytes, false) && refused(&built.bytes, true));
    // QEMU reads tables behind the end of a file that was cut short as zeros: there are none to be followed.
    for entry in 1..2000 {
        built.put_u64(l1 + entry * 8, table + (entry << 32));
    }
    assert!(refused(&built.bytes, false) && !refused(&built.bytes, true));
}
