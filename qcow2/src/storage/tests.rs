//! What every storage must do alike, on the usual file system, on tmpfs and in memory; and what only
//! real files can do.

use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier};

use kit::Random;

use super::{Access, FileKind, Host, LockError, LockMode, MemFile, MemHost, OsHost, Storage};

/// A host to test on, and a directory that is removed at the end.
struct TestHost {
    host: Box<dyn Host>,
    dir: PathBuf,
    _kept: Option<tempfile::TempDir>,
}

impl TestHost {
    fn on_disk(parent: &Path) -> Self {
        let kept = tempfile::Builder::new().prefix("qcow2-storage-").tempdir_in(parent).unwrap();
        Self { host: Box::new(OsHost), dir: kept.path().to_owned(), _kept: Some(kept) }
    }

    fn in_memory() -> Self {
        let host = MemHost::new();
        host.add("/dir/first", b"").unwrap();
        Self { host: Box::new(host), dir: "/dir".into(), _kept: None }
    }

    fn name(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn create(&self, name: &str) -> Arc<dyn Storage> {
        self.host.create_new(&self.name(name)).unwrap()
    }
}

fn places() -> Vec<TestHost> {
    vec![
        TestHost::on_disk(&std::env::temp_dir()),
        TestHost::on_disk(Path::new("/dev/shm")),
        TestHost::in_memory(),
    ]
}

fn all(file: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0xee; usize::try_from(file.size().unwrap()).unwrap() + 7];
    let n = file.read_at(&mut bytes, 0).unwrap();
    assert_eq!(n, bytes.len() - 7, "a read is short at the end of the file only");
    bytes.truncate(n);
    bytes
}

#[test]
fn reads_are_short_only_at_the_end() {
    for place in places() {
        let file = place.create("a");
        file.write_all_at(b"abc", 5000).unwrap();
        assert_eq!(file.size().unwrap(), 5003);
        let mut buf = [1; 8];
        assert_eq!(file.read_at(&mut buf, 4998).unwrap(), 5);
        assert_eq!(&buf[..5], b"\0\0abc");
        assert_eq!(file.read_at(&mut buf, 5003).unwrap(), 0);
        assert_eq!(file.read_at(&mut buf, 1 << 40).unwrap(), 0);
        let mut buf = [1; 8];
        file.read_exact_or_zero(&mut buf, 5001).unwrap();
        assert_eq!(&buf, b"bc\0\0\0\0\0\0");
        file.read_exact_or_zero(&mut buf, 1 << 40).unwrap();
        assert_eq!(buf, [0; 8]);
    }
}

#[test]
fn zeros_replace_data_and_grow_the_file() {
    for place in places() {
        let file = place.create("a");
        file.write_all_at(&[7; 20_000], 0).unwrap();
        for (offset, len) in [(100, 50), (4000, 200), (8192, 4096), (19_000, 30_000), (60_000, 1)] {
            let mut expected = all(&*file);
            let end = offset + len;
            expected.resize(expected.len().max(end), 0);
            expected[offset..end].fill(0);
            file.write_zeroes(offset as u64, len as u64).unwrap();
            assert!(all(&*file) == expected, "{place:?}: {offset}+{len}", place = place.dir);
        }
        file.write_zeroes(1 << 30, 0).unwrap();
        assert_eq!(file.size().unwrap(), 60_001, "an empty range changes nothing");
    }
}

#[test]
fn holes_keep_the_length_and_are_skipped() {
    for place in places() {
        let file = place.create("a");
        file.write_all_at(&[7; 1 << 20], 0).unwrap();
        file.sync().unwrap();
        let before = file.stat().unwrap().allocated;
        file.punch_hole(256 << 10, 512 << 10).unwrap();
        assert_eq!(file.size().unwrap(), 1 << 20);
        assert!(file.stat().unwrap().allocated <= before - (512 << 10), "the blocks are given back");
        assert_eq!(file.next_data(0).unwrap(), Some(0..256 << 10));
        assert_eq!(file.next_data(1000).unwrap(), Some(1000..256 << 10));
        assert_eq!(file.next_data(300 << 10).unwrap(), Some(768 << 10..1 << 20));
        assert_eq!(file.next_data(1 << 20).unwrap(), None);
        assert_eq!(file.next_data(1 << 50).unwrap(), None);
        file.set_len(1 << 40).unwrap();
        assert_eq!(file.next_data(1 << 20).unwrap(), None, "the rest is a hole");
        assert_eq!(file.next_data(1 << 39).unwrap(), None);
    }
}

#[test]
fn what_was_cut_off_does_not_come_back() {
    for place in places() {
        let file = place.create("a");
        file.write_all_at(&[7; 10_000], 0).unwrap();
        file.set_len(5000).unwrap();
        file.set_len(10_000).unwrap();
        let mut expected = vec![7; 5000];
        expected.resize(10_000, 0);
        assert!(all(&*file) == expected);
    }
}

#[test]
fn copies_end_in_zeros_where_the_source_ends() {
    for place in places() {
        let (src, dst) = (place.create("src"), place.create("dst"));
        let bytes: Vec<u8> = (0..3_000_000_u32).map(|i| (i / 7) as u8 | 1).collect();
        src.write_all_at(&bytes, 0).unwrap();
        dst.write_all_at(&[9; 4_000_000], 0).unwrap();

        dst.copy_from(&*src, 1234, 99, 2_500_000).unwrap();
        assert!(all(&*dst)[99..2_500_099] == bytes[1234..2_501_234]);
        assert_eq!(all(&*dst)[98], 9);
        assert_eq!(all(&*dst)[2_500_099], 9);

        dst.copy_from(&*src, 2_999_000, 3_000_000, 500_000).unwrap();
        assert!(all(&*dst)[3_000_000..3_001_000] == bytes[2_999_000..]);
        assert!(all(&*dst)[3_001_000..3_500_000].iter().all(|&b| b == 0));
        assert_eq!(all(&*dst)[3_500_000], 9);

        dst.copy_from(&*src, 5_000_000, 4_000_000, 1000).unwrap();
        assert_eq!(dst.size().unwrap(), 4_001_000, "zeros behind the end make the file grow");

        src.copy_from(&*src, 0, 3_000_000, 3_000_000).unwrap();
        assert!(all(&*src) == [&bytes[..], &bytes[..]].concat(), "a copy inside one file");
    }
}

#[test]
fn copies_cross_file_systems_and_kinds_of_storage() {
    let places = places();
    let bytes: Vec<u8> = (0..2_500_000_u32).map(|i| (i % 251) as u8).collect();
    for from in &places {
        let src = from.create("cross-src");
        src.write_all_at(&bytes, 0).unwrap();
        for (n, to) in places.iter().enumerate() {
            let dst = to.create(&format!("cross-dst-{}-{n}", from.dir.file_name().unwrap().display()));
            dst.copy_from(&*src, 500, 300, 2_499_600).unwrap();
            let got = all(&*dst);
            assert!(got[300..2_499_800] == bytes[500..]);
            assert!(got[2_499_800..].iter().all(|&b| b == 0));
            assert_eq!(got.len(), 2_499_900);
        }
    }
}

#[test]
fn ranges_past_the_largest_offset_are_errors() {
    for place in places() {
        let file = place.create("a");
        for offset in [i64::MAX as u64, u64::MAX - 1, u64::MAX] {
            assert!(file.write_all_at(b"abc", offset).is_err());
            assert!(file.write_zeroes(offset, 3).is_err());
            assert!(file.copy_from(&MemFile::new(), 0, offset, 3).is_err());
            assert!(file.copy_from(&MemFile::new(), offset, 0, 3).is_err());
        }
        assert!(file.set_len(u64::MAX).is_err());
        assert_eq!(file.size().unwrap(), 0);
    }
}

#[test]
fn names_are_created_once_renamed_listed_and_removed() {
    for place in places() {
        let host = &*place.host;
        let before = host.list(&place.dir).unwrap().len();
        place.create("a").write_all_at(b"a", 0).unwrap();
        assert_eq!(host.create_new(&place.name("a")).unwrap_err().kind(), ErrorKind::AlreadyExists);
        place.create("b").write_all_at(b"bb", 0).unwrap();
        host.rename(&place.name("a"), &place.name("b")).unwrap();
        host.sync_dir(&place.dir).unwrap();
        assert_eq!(host.list(&place.dir).unwrap().len(), before + 1);
        assert!(host.list(&place.dir).unwrap().contains(&place.name("b")));
        assert_eq!(host.stat(&place.name("b")).unwrap().len, 1);
        assert_eq!(host.open(&place.name("a"), Access::Read).unwrap_err().kind(), ErrorKind::NotFound);
        host.unlink(&place.name("b")).unwrap();
        assert_eq!(host.unlink(&place.name("b")).unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(host.stat(&place.name("b")).unwrap_err().kind(), ErrorKind::NotFound);
    }
}

#[test]
fn a_file_opened_for_reading_is_not_written() {
    for place in places() {
        place.create("a").write_all_at(b"abc", 0).unwrap();
        let file = place.host.open(&place.name("a"), Access::Read).unwrap();
        assert!(file.write_all_at(b"x", 0).is_err());
        assert!(file.write_zeroes(0, 1).is_err());
        assert!(file.set_len(0).is_err());
        assert!(file.copy_from(&MemFile::new(), 0, 0, 1).is_err());
        assert_eq!(all(&*file), b"abc");
    }
}

#[test]
fn a_new_name_never_replaces_another() {
    for place in places() {
        let host = &*place.host;
        place.create("a").write_all_at(b"a", 0).unwrap();
        place.create("b").write_all_at(b"bb", 0).unwrap();
        let refused = host.rename_new(&place.name("a"), &place.name("b")).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::AlreadyExists);
        assert_eq!(
            host.rename_new(&place.name("a"), &place.dir).unwrap_err().kind(),
            ErrorKind::AlreadyExists
        );
        assert_eq!(host.stat(&place.name("b")).unwrap().len, 2);
        host.rename_new(&place.name("a"), &place.name("c")).unwrap();
        assert_eq!(host.stat(&place.name("c")).unwrap().len, 1);
        let gone = host.rename_new(&place.name("a"), &place.name("d")).unwrap_err();
        assert_eq!(gone.kind(), ErrorKind::NotFound);
    }
}

#[test]
fn identity_follows_the_file_not_the_name() {
    for place in places() {
        let file = place.create("a");
        let other = place.create("b");
        let id = file.stat().unwrap().id;
        assert_eq!(place.host.stat(&place.name("a")).unwrap().id, id);
        assert_ne!(other.stat().unwrap().id, id);
        place.host.rename(&place.name("a"), &place.name("c")).unwrap();
        assert_eq!(place.host.stat(&place.name("c")).unwrap().id, id);
        assert_eq!(place.host.stat(&place.dir).unwrap().kind, FileKind::Other("a directory"));
    }
}

#[test]
fn modes_of_two_opens_conflict_alike() {
    for place in places() {
        place.create("a");
        let open = || place.host.open(&place.name("a"), Access::Read).unwrap();
        let (first, second) = (open(), open());
        first.lock(LockMode::Read).unwrap();
        second.lock(LockMode::Read).unwrap();
        assert!(matches!(second.lock(LockMode::Write), Err(LockError::Held { .. })));
        drop(first);
        second.lock(LockMode::Write).unwrap();
        second.lock(LockMode::Read).unwrap();
        let third = open();
        assert!(matches!(third.lock(LockMode::Read), Err(LockError::Held { .. })));
        assert!(matches!(third.lock(LockMode::Write), Err(LockError::Held { .. })));
        drop(second);
        third.lock(LockMode::Write).unwrap();
    }
}

#[test]
fn the_use_by_others_is_seen_without_a_lock() {
    for place in places() {
        place.create("a");
        let open = || place.host.open(&place.name("a"), Access::Read).unwrap();
        let (user, observer) = (open(), open());
        assert_eq!(observer.used_by_others().unwrap(), None);
        user.lock(LockMode::Read).unwrap();
        assert_eq!(observer.used_by_others().unwrap(), Some(LockMode::Read));
        assert_eq!(user.used_by_others().unwrap(), None);
        user.lock(LockMode::Write).unwrap();
        assert_eq!(observer.used_by_others().unwrap(), Some(LockMode::Write));
        drop(user);
        assert_eq!(observer.used_by_others().unwrap(), None);
    }
}

/// Random operations, judged by a byte array.
#[test]
fn storages_behave_like_a_byte_array() {
    const MOST: u64 = 40_000;
    for place in places() {
        let (file, src) = (place.create("model"), place.create("model-src"));
        let source: Vec<u8> = (0..9000_u32).map(|i| (i % 255) as u8 + 1).collect();
        src.write_all_at(&source, 0).unwrap();
        let mut model: Vec<u8> = Vec::new();
        let mut random = Random::new(1);
        let mut next = |below: u64| random.below(below);
        for step in 0..400 {
            let offset = next(MOST);
            let len = [next(10), next(5000), next(20_000)][next(3) as usize];
            let (start, end) = (offset as usize, (offset + len) as usize);
            let grow = |model: &mut Vec<u8>| model.resize(model.len().max(end), 0);
            match next(5) {
                _ if len == 0 => continue,
                0 => {
                    grow(&mut model);
                    model[start..end].fill(step as u8 | 1);
                    file.write_all_at(&vec![step as u8 | 1; len as usize], offset).unwrap();
                }
                1 => {
                    grow(&mut model);
                    model[start..end].fill(0);
                    file.write_zeroes(offset, len).unwrap();
                }
                2 => {
                    grow(&mut model);
                    let from = next(10_000) as usize;
                    for i in 0..len as usize {
                        model[start + i] = source.get(from + i).copied().unwrap_or(0);
                    }
                    file.copy_from(&*src, from as u64, offset, len).unwrap();
                }
                3 if end <= model.len() => {
                    model[start..end].fill(0);
                    file.punch_hole(offset, len).unwrap();
                }
                3 => {}
                _ => {
                    model.resize(start, 0);
                    file.set_len(offset).unwrap();
                }
            }
            assert!(all(&*file) == model, "step {step} in {}", place.dir.display());
            let mut at = 0;
            while let Some(data) = file.next_data(at).unwrap() {
                assert!(data.start >= at && data.end > data.start && data.end <= model.len() as u64);
                assert!(model[at as usize..data.start as usize].iter().all(|&b| b == 0), "a hole with data");
                at = data.end;
            }
            assert!(model[at.min(model.len() as u64) as usize..].iter().all(|&b| b == 0));
        }
    }
}

#[test]
fn writers_of_disjoint_ranges_do_not_disturb_each_other() {
    const PIECES: u64 = 15_000;
    for place in places() {
        let file = place.create("threads");
        let start = Barrier::new(2);
        // All pieces lie behind the end of the file when they are written, or nearly so: whoever makes it
        // grow must not cut off what the other one has just added.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                start.wait();
                (0..PIECES).for_each(|i| file.write_all_at(&[7; 100], i * 200).unwrap());
            });
            scope.spawn(|| {
                start.wait();
                (0..PIECES).for_each(|i| file.write_zeroes(i * 200 + 100, 100).unwrap());
            });
        });
        let bytes = all(&*file);
        assert_eq!(bytes.len() as u64, PIECES * 200);
        for piece in bytes.chunks(200) {
            assert!(piece[..100].iter().all(|&b| b == 7) && piece[100..].iter().all(|&b| b == 0));
        }
    }
}

#[test]
fn a_tebibyte_in_memory_costs_nothing() {
    let (file, copy) = (MemFile::new(), MemFile::new());
    file.set_len(1 << 40).unwrap();
    file.write_all_at(b"end", (1 << 40) - 3).unwrap();
    copy.copy_from(&file, 0, 0, 1 << 40).unwrap();
    assert_eq!(copy.stat().unwrap().allocated, 4096);
    let data = copy.next_data(0).unwrap().unwrap();
    assert_eq!(data, (1 << 40) - 4096..1 << 40);
    copy.write_zeroes(0, 1 << 40).unwrap();
    assert_eq!(copy.next_data(0).unwrap(), None);
}

#[test]
fn what_is_not_a_file_is_refused_without_waiting() {
    let place = TestHost::on_disk(&std::env::temp_dir());
    let refused = |path: &Path| {
        for access in [Access::Read, Access::ReadWrite] {
            let e = place.host.open(path, access).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::InvalidInput, "{}: {e}", path.display());
        }
    };
    let fifo = place.name("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RUSR).unwrap();
    refused(&fifo);
    assert_eq!(place.host.stat(&fifo).unwrap().kind, FileKind::Other("a fifo"));
    symlink(&fifo, place.name("to-fifo")).unwrap();
    refused(&place.name("to-fifo"));
    refused(&place.dir);
    refused(Path::new("/dev/null"));
    let _listener = std::os::unix::net::UnixListener::bind(place.name("socket")).unwrap();
    refused(&place.name("socket"));
}

#[test]
fn symbolic_links_are_followed() {
    let place = TestHost::on_disk(&std::env::temp_dir());
    let file = place.create("real");
    symlink("real", place.name("link")).unwrap();
    let opened = place.host.open(&place.name("link"), Access::Read).unwrap();
    assert_eq!(opened.stat().unwrap().id, file.stat().unwrap().id);
    let real = place.host.canonicalize(&place.dir).unwrap().join("real");
    assert_eq!(place.host.canonicalize(&place.name("link")).unwrap(), real);
    symlink("gone", place.name("dangling")).unwrap();
    let missing = place.host.open(&place.name("dangling"), Access::Read).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    assert!(place.host.create_new(&place.name("dangling")).is_err(), "a new file never goes through a link");
}

#[test]
fn stat_tells_sizes_and_times() {
    let place = TestHost::on_disk(&std::env::temp_dir());
    let file = place.create("a");
    file.write_all_at(&[1; 8192], 1 << 20).unwrap();
    file.sync().unwrap();
    let stat = file.stat().unwrap();
    assert_eq!((stat.kind, stat.len), (FileKind::Regular, (1 << 20) + 8192));
    assert!((8192..1 << 20).contains(&stat.allocated));
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as i128;
    assert!((now - stat.modified_ns).abs() < 60_000_000_000);
    assert_eq!(place.host.stat(&place.name("a")).unwrap(), stat);
    assert!(place.host.free_space(&place.name("a")).unwrap().unwrap() > 0);
    file.drop_cache().unwrap();
}

#[test]
fn views_need_a_lock() {
    let place = TestHost::on_disk(&std::env::temp_dir());
    let file = place.create("a");
    file.write_all_at(b"0123456789", 0).unwrap();
    assert!(file.view().is_none(), "nobody holds the file's length");
    file.lock(LockMode::Read).unwrap();
    let view = file.view().unwrap();
    assert_eq!(view.bytes(3, 4), Some(&b"3456"[..]));
    assert_eq!(view.bytes(10, 0), Some(&[][..]));
    assert_eq!(view.bytes(7, 4), None);
    assert_eq!(view.bytes(u64::MAX, 2), None);
    assert_eq!(view.bytes(1, usize::MAX), None);
    let empty = place.create("empty");
    empty.lock(LockMode::Write).unwrap();
    assert!(empty.view().unwrap().bytes(0, 1).is_none());
}

#[test]
fn names_in_memory_are_resolved_like_real_ones() {
    let host = MemHost::new();
    host.add("a/b/../c", b"12").unwrap();
    assert_eq!(host.canonicalize(Path::new("/a/./c")).unwrap(), Path::new("/a/c"));
    assert_eq!(host.content("/a/c").unwrap(), b"12");
    assert_eq!(host.list(Path::new("/")).unwrap(), [Path::new("/a")]);
    assert_eq!(host.list(Path::new("/a/c")).unwrap_err().kind(), ErrorKind::NotADirectory);
    assert_eq!(host.list(Path::new("/b")).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(host.open(Path::new("/a"), Access::Read).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert!(host.create_new(Path::new("/a")).is_err());
    let kept = host.open(Path::new("/a/c"), Access::ReadWrite).unwrap();
    host.unlink(Path::new("/a/c")).unwrap();
    kept.write_all_at(b"3", 2).unwrap();
    assert_eq!(all(&*kept), b"123", "an open file outlives its name");
    assert!(matches!(host.list(Path::new("/a")), Err(e) if e.kind() == ErrorKind::NotFound));
}

#[test]
fn a_name_that_leads_nowhere_has_an_absolute_form() {
    for place in places() {
        let gone = place.name("gone");
        let real = place.host.canonicalize(&place.dir).unwrap().join("gone");
        assert_eq!(place.host.resolve(&gone).unwrap(), real);
        assert!(place.host.resolve(&place.name("no-folder/gone")).is_err());
    }
    let place = TestHost::on_disk(&std::env::temp_dir());
    symlink("two", place.name("one")).unwrap();
    symlink(place.name("gone"), place.name("two")).unwrap();
    symlink("loop", place.name("loop")).unwrap();
    let real = place.host.canonicalize(&place.dir).unwrap().join("gone");
    assert_eq!(place.host.resolve(&place.name("one")).unwrap(), real);
    assert!(place.host.resolve(&place.name("loop")).is_err());
}
