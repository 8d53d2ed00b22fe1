//! Commits of damaged or foreign chains: refused before anything is written. Where QEMU 10.0.2 aborts,
//! corrupts the disk or hides the damage, the test says so.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use qcow2::chain::{OpenOptions, Policy};
use qcow2::check::{CheckOptions, Verdict, check};
use qcow2::fuzzing::sample::{Content, Image, Sample, field, incompatible};
use qcow2::merge::{Commit, CommitOptions, Prepared, Report, Silent};
use qcow2::storage::{Access, Host, MemHost};
use qcow2::{Error, ErrorKind, Refusal, Result};

const BASE: &str = "/vm/base.qcow2";
const TOP: &str = "/vm/top.qcow2";
const COPIED: u64 = 1 << 63;

fn base() -> Sample {
    (0..8).fold(Sample::new(200), |sample, n| sample.with(n * 9, Content::Data(0xb0 + n as u8)))
}

fn top() -> Sample {
    Sample::new(200)
        .with(0, Content::Data(1))
        .with(9, Content::Zero)
        .with(100, Content::Data(2))
        .over("base.qcow2", "qcow2")
}

fn chain(base: &Image, top: &Image) -> MemHost {
    let host = MemHost::new();
    host.add(BASE, &base.bytes).unwrap();
    host.add(TOP, &top.bytes).unwrap();
    host
}

fn options() -> CommitOptions {
    CommitOptions::new(OpenOptions::new(Policy::local_files()))
}

fn prepare(host: &MemHost, options: &CommitOptions) -> Result<Prepared> {
    Commit::prepare(Arc::new(host.clone()), Path::new(TOP), options, &AtomicBool::new(false))
}

fn commit(host: &MemHost) -> Result<Report> {
    prepare(host, &options())?.execute(&Silent, &AtomicBool::new(false))
}

/// The commit must be refused with this kind, the error must name this file, and no byte may change.
fn assert_refused(host: &MemHost, kind: ErrorKind, file: &str, case: &str) -> Error {
    let files = || (host.content(BASE).unwrap(), host.content(TOP).unwrap());
    let before = files();
    let error = commit(host).expect_err(case);
    assert_eq!(error.kind(), kind, "{case}: {error}");
    assert!(error.to_string().contains(file), "{case}: {error} does not name {file}");
    assert!(files() == before, "{case}: refused, but something was written");
    error
}

fn verdict(host: &MemHost, path: &str) -> Verdict {
    let file = host.open(Path::new(path), Access::Read).unwrap();
    check(Path::new(path), &*file, None, &CheckOptions::default()).unwrap().verdict()
}

#[test]
fn the_sound_chain_is_merged() {
    let host = chain(&base().build(), &top().build());
    commit(&host).unwrap();
    assert_eq!(verdict(&host, BASE), Verdict::Clean);
    assert_eq!(verdict(&host, TOP), Verdict::Clean);
}

#[test]
fn damaged_bases_are_refused_before_anything_is_written() {
    type Damage = fn(&mut Image);
    let cases: Vec<(&str, Damage)> = vec![
        ("a refcount of zero on data: QEMU gives the cluster away and corrupts the disk", |image| {
            let host = image.at.hosts[&0];
            image.set_refcount(host, 0);
        }),
        ("a refcount of zero on the L1 table", |image| image.set_refcount(image.at.l1, 0)),
        ("a refcount of zero on cluster 0", |image| image.set_refcount(0, 0)),
        ("an empty refcount table", |image| image.put_u64(image.at.refcount_table, 0)),
        ("a refcount block past the end", |image| {
            image.put_u64(image.at.refcount_table, 0x1000_0000);
        }),
        ("a refcount block at 2^63 - 512", |image| {
            image.put_u64(image.at.refcount_table, 0x7fff_ffff_ffff_fe00);
        }),
        ("reserved bits in the refcount table", |image| {
            let old = image.get_u64(image.at.refcount_table);
            image.put_u64(image.at.refcount_table, old | 1);
        }),
        ("a refcount of two with COPIED", |image| {
            let host = image.at.hosts[&0];
            image.set_refcount(host, 2);
        }),
        ("a missing COPIED flag", |image| {
            let at = image.l2_entry(0);
            image.put_u64(at, image.get_u64(at) & !COPIED);
        }),
        ("a missing COPIED flag on an L2 table", |image| {
            image.put_u64(image.at.l1, image.get_u64(image.at.l1) & !COPIED);
        }),
        ("data in its own L2 table: QEMU crashes", |image| {
            let table = image.at.l2[&0];
            let at = image.l2_entry(0);
            image.put_u64(at, COPIED | table);
        }),
        ("data in the L1 table", |image| {
            let at = image.l2_entry(0);
            image.put_u64(at, COPIED | image.at.l1);
        }),
        ("data in a refcount block", |image| {
            let at = image.l2_entry(0);
            image.put_u64(at, COPIED | image.at.refcount_blocks[0]);
        }),
        ("data in the refcount table", |image| {
            let at = image.l2_entry(0);
            image.put_u64(at, COPIED | image.at.refcount_table);
        }),
        ("data of two guest clusters in one host cluster", |image| {
            let (from, to) = (image.l2_entry(9), image.l2_entry(0));
            image.put_u64(to, image.get_u64(from));
        }),
        ("an L2 table in the L1 table", |image| image.put_u64(image.at.l1, COPIED | image.at.l1)),
        ("an L2 table past the end", |image| image.put_u64(image.at.l1 + 8, COPIED | 0x1000_0000)),
        ("data past the end", |image| {
            let at = image.l2_entry(0);
            image.put_u64(at, COPIED | 0x1000_0000);
        }),
        ("reserved bits in an L2 entry that the merge does not touch", |image| {
            let at = image.l2_entry(27);
            image.put_u64(at, image.get_u64(at) | 1 << 60);
        }),
        ("a truncated file: QEMU makes it longer again, and check calls it clean", |image| {
            let len = image.at.hosts[&27] as usize;
            image.bytes.truncate(len);
        }),
    ];
    for (case, damage) in cases {
        let mut base = base().build();
        damage(&mut base);
        assert_refused(&chain(&base, &top().build()), ErrorKind::Damaged, BASE, case);
    }
}

#[test]
fn snapshots_of_base_that_are_damaged_are_refused() {
    let sample = Sample { snapshots: vec!["before".into()], ..base() };
    type Damage = fn(&mut Image);
    let cases: Vec<(&str, Damage)> = vec![
        ("L1 table past the end", |image| image.put_u64(image.at.snapshots, 0x1000_0000)),
        ("L1 table unaligned", |image| image.put_u64(image.at.snapshots, image.at.snapshot_l1[0] + 8)),
        ("L1 table over 32 MiB", |image| image.put_u32(image.at.snapshots + 8, (4 << 20) + 1)),
        ("extra data over 1 KiB", |image| image.put_u32(image.at.snapshots + 36, 1025)),
        ("the table past the end", |image| image.put_u64(field::SNAPSHOTS_OFFSET, 0x1000_0000)),
        ("more snapshots than the table holds", |image| image.put_u32(field::SNAPSHOTS, 65_536)),
        ("an L2 table shared, but counted once", |image| image.set_refcount(image.at.l2[&0], 1)),
    ];
    commit(&chain(&sample.build(), &top().build())).expect("the snapshot itself is no hindrance");
    for (case, damage) in cases {
        let mut base = sample.build();
        damage(&mut base);
        assert_refused(&chain(&base, &top().build()), ErrorKind::Damaged, BASE, case);
    }
}

#[test]
fn damaged_layers_above_base_are_refused_before_anything_is_written() {
    type Damage = fn(&mut Image);
    let cases: Vec<(&str, Damage)> = vec![
        ("an L2 entry past the end", |image| {
            let at = image.l2_entry(100);
            image.put_u64(at, COPIED | 0x1000_0000);
        }),
        ("a reserved bit in an L2 entry", |image| {
            let at = image.l2_entry(100);
            image.put_u64(at, image.get_u64(at) | 1 << 60);
        }),
        ("an L2 table past the end", |image| image.put_u64(image.at.l1 + 8, COPIED | 0x1000_0000)),
        ("a reserved bit in the L1 table", |image| {
            image.put_u64(image.at.l1, image.get_u64(image.at.l1) | 1);
        }),
        ("a refcount of zero on data, in the image that will be emptied", |image| {
            let host = image.at.hosts[&0];
            image.set_refcount(host, 0);
        }),
        ("data in cluster 1, the refcount table, of the image that will be emptied", |image| {
            let at = image.l2_entry(0);
            image.put_u64(at, COPIED | 0x200);
        }),
    ];
    for (case, damage) in cases {
        let mut top = top().build();
        damage(&mut top);
        assert_refused(&chain(&base().build(), &top), ErrorKind::Damaged, TOP, case);
    }
    // QEMU aborts on this one (`assert !child->frozen`).
    let large =
        |sample: Sample| Sample { clusters: sample.clusters.clone(), ..sample.with_clusters(12, 128) };
    let mut unaligned = large(top()).build();
    let at = unaligned.l2_entry(100);
    let entry = unaligned.get_u64(at);
    unaligned.put_u64(at, entry + 0x200);
    let host = chain(&large(base()).build(), &unaligned);
    assert_refused(&host, ErrorKind::Damaged, TOP, "an L2 entry that is not aligned");
}

#[test]
fn a_damaged_compressed_cluster_stops_the_merge_and_loses_nothing() {
    // The plan does not inflate; what was merged before the damage was met stays in base, as consistent
    // as it was, and the top still holds everything.
    let mut top = top().with(101, Content::Compressed(7)).build();
    let at = top.at.hosts[&101];
    top.put(at, &[0xff; 16]);
    let host = chain(&base().build(), &top);
    let before = host.content(TOP).unwrap();
    let error = commit(&host).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged, "{error}");
    assert!(error.to_string().contains(TOP), "{error}");
    assert!(host.content(TOP).unwrap() == before, "the top was changed");
    assert!(matches!(verdict(&host, BASE), Verdict::Clean | Verdict::Leaks));
}

// QEMU merges into a dirty base with stale refcounts, destroys data of it, and exits with 0.
#[test]
fn a_dirty_base_is_refused() {
    let mut base = base().build();
    base.put_u64(field::INCOMPATIBLE, incompatible::DIRTY);
    let error = assert_refused(&chain(&base, &top().build()), ErrorKind::Damaged, BASE, "dirty base");
    assert!(matches!(error, Error::Refused { reason: Refusal::Dirty, .. }), "{error}");
}

#[test]
fn a_dirty_image_that_would_be_emptied_is_refused() {
    let mut top = top().build();
    top.put_u64(field::INCOMPATIBLE, incompatible::DIRTY);
    let error = assert_refused(&chain(&base().build(), &top), ErrorKind::Damaged, TOP, "dirty top");
    assert!(matches!(error, Error::Refused { reason: Refusal::Dirty, .. }), "{error}");
}

// QEMU writes to a base whose corrupt bit is set.
#[test]
fn a_base_marked_corrupt_is_refused() {
    let mut base = base().build();
    base.put_u64(field::INCOMPATIBLE, incompatible::CORRUPT);
    let error = assert_refused(&chain(&base, &top().build()), ErrorKind::Damaged, BASE, "corrupt base");
    assert!(matches!(error, Error::Refused { reason: Refusal::CorruptBit, .. }), "{error}");
}

// QEMU writes to such a base and leaves the bits set, against the specification.
#[test]
fn unknown_autoclear_bits_of_base_are_cleared() {
    let mut base = base().build();
    base.put_u64(field::AUTOCLEAR, 1 << 40);
    let host = chain(&base, &top().build());
    commit(&host).unwrap();
    assert_eq!(host.content(BASE).unwrap()[88..96], [0; 8]);
}

#[test]
fn features_that_are_not_supported_are_refused_in_every_layer() {
    type Damage = fn(&mut Image);
    let cases: [(&str, Damage); 3] = [
        ("incompatible bit 63", |image| image.put_u64(field::INCOMPATIBLE, 1 << 63)),
        ("AES", |image| image.put_u32(field::CRYPT_METHOD, 1)),
        ("LUKS", |image| image.put_u32(field::CRYPT_METHOD, 2)),
    ];
    for (case, damage) in cases {
        let (mut bad_base, mut bad_top) = (base().build(), top().build());
        damage(&mut bad_base);
        damage(&mut bad_top);
        let host = chain(&bad_base, &top().build());
        assert_refused(&host, ErrorKind::Unsupported, BASE, &format!("{case} in base"));
        let host = chain(&base().build(), &bad_top);
        assert_refused(&host, ErrorKind::Unsupported, TOP, &format!("{case} in top"));
    }
}

#[test]
fn leaked_clusters_in_base_are_no_hindrance() {
    let mut base = base().build();
    let end = base.bytes.len() as u64;
    base.set_refcount(end, 1);
    base.bytes.resize(end as usize + 512, 0xee);
    let host = chain(&base, &top().build());
    assert_eq!(verdict(&host, BASE), Verdict::Leaks);
    commit(&host).unwrap();
    assert_eq!(verdict(&host, BASE), Verdict::Leaks, "the leak is still the only finding");
    assert!(host.content(BASE).unwrap()[end as usize..][..512].iter().all(|b| *b == 0xee));
}

#[test]
fn what_would_be_lost_is_refused_until_it_is_allowed() {
    let snapshot = Sample { snapshots: vec!["before".into()], ..top() }.build();
    let host = chain(&base().build(), &snapshot);
    let error = assert_refused(&host, ErrorKind::Refused, TOP, "a snapshot in the top");
    assert!(matches!(error, Error::Refused { reason: Refusal::Snapshots { count: 1 }, .. }), "{error}");
    let mut allowed = options();
    allowed.allow_snapshot_change = true;
    prepare(&host, &allowed).unwrap();

    let bitmap = Sample { bitmaps: vec!["nightly".into()], ..top() }.build();
    let host = chain(&base().build(), &bitmap);
    // What the guest sees through the active image does not change, so its bitmaps stay true: they are kept.
    commit(&host).unwrap();
    assert_eq!(verdict(&host, TOP), Verdict::Clean);
    let content = host.content(TOP).unwrap();
    assert!(content.windows(7).any(|bytes| bytes == b"nightly"), "the bitmap is lost");
}

// QEMU changes what such a sibling shows, without a word.
#[test]
fn a_base_that_another_image_uses_is_refused() {
    let host = chain(&base().build(), &top().build());
    host.add("/vm/sibling.qcow2", &top().build().bytes).unwrap();
    let error = assert_refused(&host, ErrorKind::Refused, BASE, "a sibling");
    assert!(error.to_string().contains("/vm/sibling.qcow2"), "{error}");
    let mut allowed = options();
    allowed.allow_shared_base = true;
    prepare(&host, &allowed).unwrap();
}

#[test]
fn the_library_opens_nothing_that_an_image_names_unless_it_is_told_to() {
    let host = chain(&base().build(), &top().build());
    let error = prepare(&host, &CommitOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
}
