//! Damage that a repair must not make worse.

use std::path::Path;

use qcow2::check::{CheckOptions, What};
use qcow2::fuzzing::sample::{Content, Image, Sample, field};
use qcow2::repair::{RepairMode, repair};
use qcow2::storage::{Access, Host, MemHost};

use super::kit::IMAGE;

/// Repairs an image; what its file holds afterwards.
fn repaired(image: &Image) -> Vec<u8> {
    let host = MemHost::new();
    host.add(IMAGE, &image.bytes).unwrap();
    let file = host.open(Path::new(IMAGE), Access::ReadWrite).unwrap();
    let done = repair(Path::new(IMAGE), &*file, None, RepairMode::All, &CheckOptions::default()).unwrap();
    assert!(done.after.findings.iter().any(|f| matches!(f.what, What::PastEnd { .. })), "{done}");
    host.content(IMAGE).unwrap()
}

/// Only what lies wholly inside the file is counted, as QEMU does; so it seemed that nothing else lay in the
/// clusters of an L1 table whose header claims too many entries, and refcounts were written over its head.
#[test]
fn a_refcount_block_in_an_l1_table_cut_off_by_the_end_of_the_file_is_not_written() {
    let mut image = Sample::new(100).with(0, Content::Data(1)).build();
    image.put_u64(image.at.refcount_table, image.at.l1);
    image.put_u32(field::L1_SIZE, 0xb802);
    assert!(repaired(&image) == image.bytes, "something was written");
}

/// The same with the head of a compressed cluster, which is guest data.
#[test]
fn a_refcount_block_in_a_compressed_cluster_cut_off_by_the_end_of_the_file_is_not_written() {
    let mut image = Sample::new(100).with(0, Content::Data(1)).build();
    let block = image.at.refcount_blocks[0];
    image.set_refcount(image.at.l1, 0);
    let entry = image.l2_entry(3);
    // Two sectors, of which the file holds one: the refcount block.
    assert_eq!(block + 512, image.bytes.len() as u64);
    image.put_u64(entry, 1 << 62 | 1 << 61 | block);
    assert!(repaired(&image) == image.bytes, "the stream was written over");
}
