//! The simulated disk itself: what it lets a power cut do, and what not.

use std::collections::BTreeSet;
use std::path::Path;

use super::*;
use crate::storage::{Access, Host, MemHost, Storage};

const ALL: Cuts = Cuts {
    seed: 1,
    tear: Tear::Sector,
    exhaustive: 12,
    listed: 8,
    random: 16,
    garbage: Garbage::None,
    damaged: 0,
};

fn disk(files: &[(&str, &[u8])]) -> SimHost {
    let host = MemHost::new();
    files.iter().for_each(|(path, bytes)| host.add(path, bytes).unwrap());
    SimHost::over(&host)
}

fn open(disk: &SimHost, path: &str) -> std::sync::Arc<dyn Storage> {
    disk.open(Path::new(path), Access::ReadWrite).unwrap()
}

/// All contents that a file may have, `None` where it has no name.
fn contents(disk: &SimHost, path: &str, cuts: &Cuts) -> BTreeSet<Option<Vec<u8>>> {
    let mut found = BTreeSet::new();
    power_cuts(disk.start(), &disk.log(), cuts, |cut| {
        found.insert(cut.state.content(Path::new(path)));
    });
    found
}

#[test]
fn sectors_of_one_write_are_there_in_any_combination() {
    let disk = disk(&[("/a", &[0; 1536])]);
    open(&disk, "/a").write_all_at(&[1; 1024], 256).unwrap();
    let found = contents(&disk, "/a", &ALL);
    assert_eq!(found.len(), 8);
    for bytes in found.into_iter().flatten() {
        for sector in [256..512, 512..1024, 1024..1280] {
            assert!(bytes[sector.clone()].iter().all(|b| *b == bytes[sector.start]), "a sector is torn");
        }
    }
    let whole = contents(&disk, "/a", &Cuts { tear: Tear::Block, ..ALL });
    assert_eq!(whole.len(), 2);
}

#[test]
fn what_was_synced_stays() {
    let disk = disk(&[("/a", &[0; 512]), ("/b", &[0; 512])]);
    let (a, b) = (open(&disk, "/a"), open(&disk, "/b"));
    a.write_all_at(&[1; 512], 0).unwrap();
    b.write_all_at(&[1; 512], 0).unwrap();
    a.sync().unwrap();
    disk.note("synced");
    let mut both = BTreeSet::new();
    power_cuts(disk.start(), &disk.log(), &ALL, |cut| {
        let of = |path| cut.state.content(Path::new(path)).unwrap()[0];
        both.insert((cut.reached > 2, of("/a"), of("/b")));
    });
    let before = [(false, 0, 0), (false, 0, 1), (false, 1, 0), (false, 1, 1)];
    assert_eq!(both.into_iter().collect::<Vec<_>>(), [&before[..], &[(true, 1, 0), (true, 1, 1)]].concat());
}

#[test]
fn writes_to_one_sector_keep_their_order() {
    let disk = disk(&[("/a", &[0; 512])]);
    let a = open(&disk, "/a");
    a.write_all_at(&[1; 8], 0).unwrap();
    a.write_all_at(&[2; 8], 8).unwrap();
    let found: Vec<_> = contents(&disk, "/a", &ALL).into_iter().flatten().map(|b| (b[0], b[8])).collect();
    assert_eq!(found, [(0, 0), (1, 0), (1, 2)]);
}

#[test]
fn a_longer_file_may_have_its_old_length() {
    let disk = disk(&[("/a", &[7; 512])]);
    open(&disk, "/a").write_all_at(&[1; 512], 1024).unwrap();
    let lengths: BTreeSet<_> = contents(&disk, "/a", &ALL).into_iter().flatten().map(|b| b.len()).collect();
    assert_eq!(lengths.into_iter().collect::<Vec<_>>(), [512, 1536]);
    let zeros = contents(&disk, "/a", &ALL).into_iter().flatten().any(|b| b.len() == 1536 && b[1024] == 0);
    assert!(zeros, "the length is durable and the data is not");
}

#[test]
fn names_are_durable_with_their_directory() {
    let disk = disk(&[("/dir/a", b"old")]);
    let new = disk.create_new(Path::new("/dir/b")).unwrap();
    new.write_all_at(b"new", 0).unwrap();
    new.sync().unwrap();
    let found = contents(&disk, "/dir/b", &ALL);
    assert!(
        found.contains(&None) && found.contains(&Some(b"new".to_vec())) && found.contains(&Some(Vec::new()))
    );
    disk.rename(Path::new("/dir/b"), Path::new("/dir/a")).unwrap();
    let found = contents(&disk, "/dir/a", &ALL);
    assert!(found.contains(&Some(b"old".to_vec())) && found.contains(&Some(b"new".to_vec())));
    disk.sync_dir(Path::new("/dir")).unwrap();
    disk.note("after");
    let mut last = BTreeSet::new();
    let log = disk.log();
    power_cuts(disk.start(), &log, &ALL, |cut| {
        if cut.reached == log.len() {
            last.insert(cut.state.content(Path::new("/dir/a")));
        }
    });
    assert_eq!(last.into_iter().collect::<Vec<_>>(), [Some(b"new".to_vec())]);
}

#[test]
fn what_a_failed_barrier_left_is_never_safe_again() {
    let disk = disk(&[("/a", &[0; 1024])]);
    let a = open(&disk, "/a");
    a.write_all_at(&[1; 512], 0).unwrap();
    disk.fail(Some(Fault { kind: FaultKind::Sync, nth: 1, for_ever: false }));
    assert_eq!(a.sync().unwrap_err().raw_os_error(), Some(5));
    assert_eq!(disk.failed(), 1);
    // The second barrier succeeds, and says nothing about what the first one was for.
    a.write_all_at(&[2; 512], 512).unwrap();
    a.sync().unwrap();
    disk.note("after");
    let log = disk.log();
    let mut last = BTreeSet::new();
    power_cuts(disk.start(), &log, &ALL, |cut| {
        let bytes = cut.state.content(Path::new("/a")).unwrap();
        if cut.reached == log.len() {
            last.insert((bytes[0], bytes[512]));
        }
    });
    assert_eq!(last.into_iter().collect::<Vec<_>>(), [(0, 2), (1, 2)]);
}

#[test]
fn the_nth_operation_fails_once_or_for_ever() {
    for (for_ever, expected) in [(false, [true, false, true, true]), (true, [true, false, false, false])] {
        let disk = disk(&[("/a", &[0; 512])]);
        let a = open(&disk, "/a");
        disk.fail(Some(Fault { kind: FaultKind::NoSpace, nth: 2, for_ever }));
        let done: Vec<bool> = (0..4).map(|_| a.write_all_at(&[1; 8], 0).is_ok()).collect();
        assert_eq!(done, expected);
        assert!(a.sync().is_ok(), "a barrier needs no room");
    }
    let disk = disk(&[("/a", &[0; 2048])]);
    let a = open(&disk, "/a");
    disk.fail(Some(Fault { kind: FaultKind::Short, nth: 1, for_ever: true }));
    let full = |result: std::io::Result<()>| result.unwrap_err().kind() == std::io::ErrorKind::StorageFull;
    assert!(full(a.write_all_at(&[1; 1600], 100)) && full(a.write_all_at(&[1; 100], 1800)));
    let bytes = disk.now().content(Path::new("/a")).unwrap();
    assert_eq!([99, 100, 511, 512, 1800].map(|at| bytes[at]), [0, 1, 1, 0, 0]);
}

#[test]
fn garbage_lies_only_where_something_was_written() {
    let disk = disk(&[("/a", &[7; 8192])]);
    open(&disk, "/a").write_all_at(&[1; 512], 512).unwrap();
    for (garbage, place) in [(Garbage::Sectors, 512..1024), (Garbage::Blocks, 0..4096)] {
        let cuts = Cuts { garbage, damaged: 20, ..ALL };
        let mut spoiled = 0;
        for bytes in contents(&disk, "/a", &cuts).into_iter().flatten() {
            let outside = bytes.iter().enumerate().all(|(at, byte)| place.contains(&at) || *byte == 7);
            assert!(outside, "garbage where nothing was written");
            spoiled += usize::from(bytes[place.clone()].iter().any(|byte| *byte != 7 && *byte != 1));
        }
        assert!(spoiled > 0, "{garbage:?}");
    }
}

/// A request that writes four sectors, one of which changes: each of them may be torn.
#[test]
fn sectors_that_are_written_with_what_they_hold_may_be_torn() {
    let disk = disk(&[("/a", &[7; 4096])]);
    let mut bytes = [7; 2048];
    bytes[512..1024].fill(1);
    open(&disk, "/a").write_all_at(&bytes, 1024).unwrap();
    let cuts = Cuts { garbage: Garbage::Sectors, damaged: 8, ..ALL };
    let found = contents(&disk, "/a", &cuts);
    let is_torn = |sector: usize| {
        let torn = |byte: &u8| *byte != 7 && *byte != 1;
        found.iter().flatten().any(|bytes| bytes[sector * 512..][..512].iter().any(torn))
    };
    assert_eq!((0..8).map(is_torn).collect::<Vec<_>>(), [0, 0, 1, 1, 1, 1, 0, 0].map(|torn| torn == 1));
}

#[test]
fn a_state_keeps_identities_and_the_same_seed_gives_the_same_states() {
    let disk = disk(&[("/a", &[0; 8192]), ("/b", b"b")]);
    let a = open(&disk, "/a");
    (0..16).for_each(|n| a.write_all_at(&[n as u8 + 1; 512], n * 512).unwrap());
    let states = |seed| {
        let mut all = Vec::new();
        power_cuts(disk.start(), &disk.log(), &Cuts { seed, ..ALL }, |cut| {
            let host = cut.state.host();
            for path in [Path::new("/a"), Path::new("/b")] {
                assert_eq!(host.stat(path).unwrap().id, disk.stat(path).unwrap().id);
            }
            all.push(cut.state.content(Path::new("/a")).unwrap().to_vec());
        });
        all
    };
    assert_eq!(states(1), states(1));
    assert!(states(1) != states(2) && states(1).len() > 20);
}
