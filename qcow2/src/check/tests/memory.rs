//! Images built by hand in memory: no QEMU needed. Hostile ones cost no more than their size.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use kit::Random;

use super::super::{CheckOptions, CheckReport, Structure, Verdict, What, check};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Cluster0, Geometry, Header};
use crate::repair::tests::repair::{assert_same_guest, guest};
use crate::repair::{RepairMode, repair};
use crate::storage::{Access, CopyError, FileStat, Host, LockError, LockMode, MemHost, Storage};
use crate::units::HostOffset;

const COPIED: u64 = 1 << 63;

/// An image in memory.
struct MemoryImage {
    file: Arc<dyn Storage>,
    cluster: u64,
}

impl MemoryImage {
    /// An image with its header in cluster 0, the refcount table in 1, a refcount block in 2 and the L1
    /// table from 3 on.
    fn new(cluster_bits: u32, size: u64, l1_entries: u32, snapshots: (u32, u64)) -> Self {
        let geometry = Geometry::new(cluster_bits, 4, false).unwrap();
        let cluster = geometry.cluster_size();
        let mut header = Header::new(3, geometry, size);
        header.refcount_table_offset = HostOffset::new(cluster);
        header.refcount_table_clusters = 1;
        header.l1_offset = HostOffset::new(3 * cluster);
        header.l1_entries = l1_entries;
        (header.snapshots, header.snapshots_offset) = (snapshots.0, HostOffset::new(snapshots.1));
        let host = MemHost::new();
        host.add("/image", &Cluster0::new(header).encode().unwrap()).unwrap();
        let this = Self { file: host.open(Path::new("/image"), Access::ReadWrite).unwrap(), cluster };
        this.word(cluster, 2 * cluster);
        this.refcounts(0, 3, 1);
        this
    }

    /// A small sound image: two data clusters of 512 bytes, and one of zeros.
    fn small() -> Self {
        let this = Self::new(9, 64 << 10, 2, (0, 0));
        this.word(3 * 512, COPIED | (4 * 512));
        this.word(4 * 512, COPIED | (5 * 512));
        this.word(4 * 512 + 8, 1);
        this.word(4 * 512 + 16, COPIED | (6 * 512));
        this.refcounts(3, 7, 1);
        this.file.set_len(7 * 512).unwrap();
        this
    }

    fn word(&self, at: u64, value: u64) {
        self.file.write_all_at(&value.to_be_bytes(), at).unwrap();
    }

    fn refcounts(&self, from: u64, to: u64, count: u16) {
        for cluster in from..to {
            self.file.write_all_at(&count.to_be_bytes(), 2 * self.cluster + cluster * 2).unwrap();
        }
    }

    fn check(&self) -> Result<CheckReport> {
        check(Path::new("/image"), &*self.file, None, &CheckOptions::default())
    }
}

#[test]
fn a_sound_image_is_clean() {
    let report = MemoryImage::small().check().unwrap();
    assert_eq!(report.verdict(), Verdict::Clean, "{report:#?}");
    assert!(report.findings.is_empty() && report.references_complete);
    assert_eq!(report.image_end_offset, 7 * 512);
    assert_eq!((report.total_clusters, report.allocated_clusters), (128, 2));
    assert_eq!((report.fragmented_clusters, report.compressed_clusters), (0, 0));
}

#[test]
fn damage_names_its_guest_offset() {
    let image = MemoryImage::small();
    image.refcounts(6, 7, 0);
    let report = image.check().unwrap();
    assert_eq!((report.verdict(), report.corruptions), (Verdict::Corrupt, 2));
    let text: Vec<_> = report.findings.iter().map(ToString::to_string).collect();
    assert_eq!(text[0], "host offset 0xc00 (guest offset 0x400): used once, but the refcount is 0");
    assert_eq!(
        text[1],
        "host offset 0xc00 (guest offset 0x400): the entry has the COPIED flag, but the refcount is 0"
    );
    assert_eq!(report.first_corruption().unwrap().to_string(), text[0]);

    let image = MemoryImage::small();
    image.file.set_len(20 * 512).unwrap();
    image.refcounts(10, 15, 1);
    let report = image.check().unwrap();
    assert_eq!((report.verdict(), report.leaks, report.findings.len()), (Verdict::Leaks, 5, 1));
    assert!(report.is_consistent() && report.first_corruption().is_none());
}

#[test]
fn a_check_can_be_cancelled() {
    let cancel = AtomicBool::new(true);
    let options = CheckOptions { cancel: Some(&cancel) };
    let error = check(Path::new("/image"), &*MemoryImage::small().file, None, &options).unwrap_err();
    assert!(matches!(error, Error::Cancelled));
}

#[test]
fn what_cannot_be_read_is_an_error_and_not_clean() {
    let image = MemoryImage::small();
    let checked = |cluster: u64| {
        let faulty = Faulty { file: &*image.file, bad: cluster * 512..cluster * 512 + 512 };
        check(Path::new("/image"), &faulty, None, &CheckOptions::default())
    };
    assert_eq!(checked(1).unwrap_err().kind(), ErrorKind::Io, "without the refcount table there is no check");
    for (cluster, structure) in
        [(2, Structure::RefcountBlock), (3, Structure::ActiveL1), (4, Structure::L2Table)]
    {
        let report = checked(cluster).unwrap();
        assert_eq!((report.verdict(), report.check_errors), (Verdict::Failed, 1), "{structure}: {report:#?}");
        assert!(!report.is_consistent() && !report.references_complete, "{structure}");
        let named =
            |what: &What| matches!(what, What::Unreadable { structure: found, .. } if *found == structure);
        assert!(report.findings.iter().any(|f| named(&f.what)), "{structure}: {report:#?}");
    }
}

/// However many entries name one table, it is read once.
#[test]
fn millions_of_entries_for_one_table_cost_one_table() {
    let cluster = 2 << 20;
    let image = MemoryImage::new(21, 1 << 60, 4 << 20, (0, 0));
    let table = 3 * cluster + (32 << 20);
    let entries: Vec<u8> = (0..4 << 20).flat_map(|_| (COPIED | table).to_be_bytes()).collect();
    image.file.write_all_at(&entries, 3 * cluster).unwrap();
    image.word(table, COPIED | (table + cluster));
    image.file.set_len(table + 2 * cluster).unwrap();
    let start = Instant::now();
    let report = image.check().unwrap();
    assert_eq!(report.verdict(), Verdict::Corrupt);
    assert_eq!(report.allocated_clusters, 4 << 20);
    let shared = What::RefcountTooLow { stored: 0, references: 4 << 20 };
    assert!(report.findings.iter().any(|f| f.what == shared), "{:#?}", report.findings);

    // 2^40 references to a cluster are more than anybody counts.
    let same: Vec<u8> = (0..1 << 18).flat_map(|_| (table + cluster).to_be_bytes()).collect();
    image.file.write_all_at(&same, table).unwrap();
    assert_eq!(image.check().unwrap_err().kind(), ErrorKind::Damaged);
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

/// However many snapshots claim the same L1 table, it is read once.
#[test]
fn thousands_of_snapshots_with_one_huge_table_cost_one_table() {
    let cluster = 64 << 10;
    let (table, l1) = (16 * cluster, 256 * cluster);
    let image = MemoryImage::new(16, 1 << 30, 2, (65_536, table));
    let mut entry = [0; 64];
    entry[..8].copy_from_slice(&u64::to_be_bytes(l1));
    entry[8..12].copy_from_slice(&u32::to_be_bytes(4 << 20));
    entry[39] = 24;
    let entries: Vec<u8> = std::iter::repeat_n(entry, 65_536).flatten().collect();
    image.file.write_all_at(&entries, table).unwrap();
    image.file.set_len(l1 + (32 << 20)).unwrap();
    image.word(l1 + 80, l1 + 512 * cluster - cluster);
    let start = Instant::now();
    let report = image.check().unwrap();
    assert_eq!(report.verdict(), Verdict::Corrupt);
    let shared = What::Overlap { references: 65_536 };
    assert!(report.findings.iter().any(|f| f.what == shared), "{:#?}", report.findings);
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

/// A file of 16 TiB that is nearly all hole, with references far apart.
#[test]
fn huge_sparse_files_cost_what_they_hold() {
    let image = MemoryImage::small();
    image.file.set_len(16 << 40).unwrap();
    for n in 0..40 {
        image.word(4 * 512 + 64 + n * 8, COPIED | ((n * 400) << 30));
    }
    let start = Instant::now();
    let report = image.check().unwrap();
    let low = |what: &What| matches!(what, What::RefcountTooLow { stored: 0, references: 1 });
    assert_eq!(report.findings.iter().filter(|f| low(&f.what)).count(), 39, "{:#?}", report.findings);
    assert_eq!(report.image_end_offset, ((39 * 400) << 30) + 512);
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

/// Any damage to any byte is survived.
#[test]
fn mutated_images_never_panic() {
    let pristine = {
        let image = MemoryImage::small();
        let mut bytes = vec![0; 7 * 512];
        image.file.read_at(&mut bytes, 0).unwrap();
        bytes
    };
    let mut random = Random::new(1);
    let (mut opened, mut refused) = (0, 0);
    for _ in 0..3000 {
        let mut bytes = pristine.clone();
        for _ in 0..random.between(1, 4) {
            let within = if random.one_in(3) { 112 } else { bytes.len() as u64 };
            let (at, any) = (random.below(within) as usize, random.next() as u8);
            bytes[at] = random.pick(&[0, 1, 0x7f, 0x80, 0xff, any]);
        }
        if random.one_in(8) {
            bytes.truncate(random.below(7 * 512) as usize);
        }
        let host = MemHost::new();
        host.add("/image", &bytes).unwrap();
        let path = Path::new("/image");
        let file = host.open(path, Access::ReadWrite).unwrap();
        let options = CheckOptions::default();
        let report = match check(path, &*file, None, &options) {
            Ok(report) => report,
            Err(_) => {
                refused += 1;
                repair(path, &*file, None, RepairMode::All, &options).unwrap_err();
                assert!(host.content(path).unwrap() == bytes);
                continue;
            }
        };
        opened += 1;
        // A repair makes nothing worse, and is done after one go.
        let seen = guest(&bytes);
        let done = repair(path, &*file, None, RepairMode::All, &options).unwrap();
        assert!(done.before == report && done.after.corruptions <= report.corruptions, "{done}");
        assert_same_guest(&seen, &guest(&host.content(path).unwrap()), &done.to_string());
        assert_eq!(check(path, &*file, None, &options).unwrap(), done.after);
        let again = repair(path, &*file, None, RepairMode::All, &options).unwrap();
        assert!(again.is_empty(), "{done}\n{again}");
    }
    assert!(opened > 1000 && refused > 100, "{opened} {refused}");
}

/// A file of which a range cannot be read.
#[derive(Debug)]
struct Faulty<'a> {
    file: &'a dyn Storage,
    bad: Range<u64>,
}

impl Storage for Faulty<'_> {
    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        // Cluster 0 is read with what follows it: that read is let through.
        if offset != 0 && offset < self.bad.end && offset + buf.len() as u64 > self.bad.start {
            return Err(io::Error::other("bad sector"));
        }
        self.file.read_at(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(buf, offset)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.write_zeroes(offset, len)
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.punch_hole(offset, len)
    }

    fn copy_from(
        &self,
        src: &dyn Storage,
        src_offset: u64,
        dst_offset: u64,
        len: u64,
    ) -> std::result::Result<(), CopyError> {
        self.file.copy_from(src, src_offset, dst_offset, len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.file.next_data(offset)
    }

    fn stat(&self) -> io::Result<FileStat> {
        self.file.stat()
    }

    fn lock(&self, mode: LockMode) -> std::result::Result<(), LockError> {
        self.file.lock(mode)
    }

    fn used_by_others(&self) -> io::Result<Option<LockMode>> {
        self.file.used_by_others()
    }

    fn drop_cache(&self) -> io::Result<()> {
        self.file.drop_cache()
    }

    fn as_file(&self) -> Option<&File> {
        self.file.as_file()
    }
}
