//! Every answer of the one function that judges files, and what it follows from.

use super::*;

const SECOND: i128 = 1_000_000_000;

fn stamp() -> Stamp {
    Stamp {
        path: "/vm/base".into(),
        id: FileId { device: 7, inode: 12 },
        is_device: false,
        file_system: Some(3),
        born_ns: Some(5),
        times: Times { len: 4096, modified_ns: 100 * SECOND, changed_ns: 100 * SECOND },
        head_crc: 77,
    }
}

fn at(modified: i128, changed: i128) -> Times {
    Times { modified_ns: modified * SECOND, changed_ns: changed * SECOND, ..stamp().times }
}

/// A work that was killed at 110 s, had noted the file at 100 s, in the run of the system that is on.
fn killed() -> WorkTimes {
    let now = Some(Boot { id: 1, started_ns: 10 * SECOND });
    WorkTimes { known: at(100, 100), alive_ns: Some(110 * SECOND), boot: now, now }
}

/// The same, and the power failed then; the system started again at 125 s.
fn cut() -> WorkTimes {
    WorkTimes { now: Some(Boot { id: 2, started_ns: 125 * SECOND }), ..killed() }
}

/// A work that was stopped in good order.
fn stopped() -> WorkTimes {
    WorkTimes { alive_ns: None, ..killed() }
}

#[test]
fn times_tell_who_has_written() {
    for (what, work, now, seen) in [
        ("nothing happened", killed(), at(100, 100), FileFate::Untouched),
        ("killed in the middle of a batch", killed(), at(109, 109), FileFate::Untouched),
        (
            "the last write of a batch",
            killed(),
            Times { modified_ns: 110 * SECOND + 9, changed_ns: 110 * SECOND + 9, ..stamp().times },
            FileFate::Untouched,
        ),
        ("written 3 s after the kill", killed(), at(113, 113), FileFate::Newer),
        ("cp -p of an older file", killed(), at(50, 113), FileFate::Older),
        ("cp -p at once", killed(), at(50, 110), FileFate::Older),
        ("a volume was rolled back", killed(), at(50, 50), FileFate::Older),
        ("its rights were changed", killed(), at(100, 300), FileFate::Unsure),
        ("cp -p of a file with the time of the last batch", killed(), at(109, 300), FileFate::Unsure),
        ("stopped in order", stopped(), at(100, 100), FileFate::Untouched),
        ("written right behind a stop in order", stopped(), at(101, 101), FileFate::Newer),
        ("put back behind a stop in order", stopped(), at(99, 101), FileFate::Older),
        ("a power cut took its times", cut(), at(90, 90), FileFate::Unsure),
        ("a power cut in the middle of a batch", cut(), at(120, 120), FileFate::Untouched),
        ("written when the system was there again", cut(), at(126, 126), FileFate::Newer),
        ("put back when the system was there again", cut(), at(50, 126), FileFate::Older),
        ("written much later before the power cut", cut(), at(145, 145), FileFate::Newer),
    ] {
        assert_eq!(stamp().judge(&work, &Stamp { times: now, ..stamp() }), seen, "{what}");
    }
}

/// Somebody sets the clock back, and writes: that may look older than the work's last sign of life.
#[test]
fn what_is_written_when_the_clock_was_set_back_is_not_untouched() {
    // The system has run for 100 s when it seems to have begun 8 s earlier: its clock goes 8 s behind.
    let set_back = |work: WorkTimes| WorkTimes { now: Some(Boot { id: 1, started_ns: 2 * SECOND }), ..work };
    let restarted = WorkTimes { now: Some(Boot { id: 2, started_ns: 104 * SECOND }), ..killed() };
    for (what, work, now, seen) in [
        ("between the last record and the kill", set_back(killed()), at(105, 105), FileFate::Unsure),
        ("before the last record", set_back(killed()), at(98, 98), FileFate::Unsure),
        ("stopped in order", set_back(stopped()), at(98, 98), FileFate::Unsure),
        ("nothing was written", set_back(killed()), at(100, 100), FileFate::Untouched),
        ("a run that began before the last one ended", restarted, at(106, 106), FileFate::Unsure),
        ("within what two looks may differ", jitter(killed()), at(105, 105), FileFate::Untouched),
    ] {
        assert_eq!(stamp().judge(&work, &Stamp { times: now, ..stamp() }), seen, "{what}");
    }
    assert!(set_back(killed()).clock_was_set_back() && !killed().clock_was_set_back());
}

fn jitter(work: WorkTimes) -> WorkTimes {
    WorkTimes { now: Some(Boot { id: 1, started_ns: 10 * SECOND - SECOND / 100 }), ..work }
}

#[test]
fn another_file_is_told_from_the_same_one() {
    let yes = |now: Stamp| assert_eq!(stamp().same_file(&now), SameFile::Yes, "{now:?}");
    let no = |now: Stamp| assert_eq!(stamp().same_file(&now), SameFile::No, "{now:?}");
    yes(Stamp { path: "/other".into(), head_crc: 1, ..stamp() });
    // The system has started again, and numbers devices otherwise.
    yes(Stamp { id: FileId { device: 8, inode: 12 }, ..stamp() });
    yes(Stamp { id: FileId { device: 8, inode: 12 }, file_system: None, ..stamp() });
    yes(Stamp { file_system: None, born_ns: None, ..stamp() });
    no(Stamp { id: FileId { device: 7, inode: 13 }, ..stamp() });
    // The same inode number: on another file system, or of a file that was made later.
    no(Stamp { file_system: Some(4), ..stamp() });
    no(Stamp { born_ns: Some(6), ..stamp() });
    let unknown = Stamp { id: FileId { device: 8, inode: 12 }, file_system: None, born_ns: None, ..stamp() };
    assert_eq!(stamp().same_file(&unknown), SameFile::Unsure);
    assert!(!stamp().is_same_file(&unknown));
    let device = Stamp { is_device: true, ..stamp() };
    assert!(device.is_same_file(&Stamp { id: FileId { device: 0, inode: 3 }, ..device.clone() }));
    assert!(device.is_same_file(&Stamp { path: "/dev/other".into(), ..device.clone() }));
    assert!(!device.is_same_file(&Stamp {
        path: "/dev/x".into(),
        id: FileId { device: 0, inode: 3 },
        ..device.clone()
    }));
    assert!(!device.is_same_file(&stamp()));
}

#[test]
fn copies_moves_and_strangers_are_told_apart() {
    let elsewhere =
        |path: &str, inode| Stamp { path: path.into(), id: FileId { device: 7, inode }, ..stamp() };
    let judge = |now: &Stamp| stamp().judge(&killed(), now);
    assert_eq!(judge(&elsewhere("/moved/base", 12)), FileFate::Moved);
    assert_eq!(judge(&elsewhere("/copy/base", 13)), FileFate::Copied);
    assert_eq!(judge(&elsewhere("/vm/base", 13)), FileFate::Copied, "put back under its name");
    assert_eq!(judge(&elsewhere("/vm/other", 13)), FileFate::Other);
    let newer = Stamp { times: at(200, 200), ..elsewhere("/copy/base", 13) };
    assert_eq!(judge(&newer), FileFate::Newer);
    let unknown = Stamp { id: FileId { device: 8, inode: 12 }, file_system: None, born_ns: None, ..stamp() };
    assert_eq!(judge(&unknown), FileFate::Unsure);
}

#[test]
fn the_times_of_a_device_prove_nothing() {
    let device = Stamp { is_device: true, ..stamp() };
    let judge = |work: &WorkTimes, times| device.judge(work, &Stamp { times, ..device.clone() });
    assert_eq!(judge(&killed(), at(100, 100)), FileFate::Unsure);
    assert_eq!(judge(&killed(), at(113, 113)), FileFate::Newer);
    assert_eq!(
        judge(&cut(), at(130, 130)),
        FileFate::Unsure,
        "its name in /dev was made when the system started"
    );
}

#[test]
fn a_file_that_was_written_is_known_for_it() {
    let was = stamp();
    assert!(was.is_unwritten(&was) && was.is_unchanged(&was));
    assert!(was.is_unwritten(&Stamp { times: at(99, 99), ..was.clone() }), "a power cut took its times");
    for other in [
        Stamp { times: at(101, 101), ..was.clone() },
        Stamp { times: at(99, 101), ..was.clone() },
        Stamp { times: at(100, 101), ..was.clone() },
        Stamp { path: "/b".into(), ..was.clone() },
        Stamp { times: Times { len: 1, ..was.times }, ..was.clone() },
        Stamp { head_crc: 0, ..was.clone() },
        Stamp { id: FileId { device: 7, inode: 8 }, ..was.clone() },
    ] {
        assert!(!was.is_unwritten(&other), "{other:?}");
    }
}

#[test]
fn the_first_difference_is_told() {
    let was = stamp();
    let device = |stamp: Stamp| Stamp { is_device: true, ..stamp };
    for (now, difference, is_written) in [
        (was.clone(), None, Some(false)),
        (
            Stamp { id: FileId { device: 7, inode: 8 }, ..was.clone() },
            Some(Difference::OtherFile),
            Some(false),
        ),
        (
            Stamp { times: Times { len: 1, ..was.times }, ..was.clone() },
            Some(Difference::Length { then: 4096, now: 1 }),
            Some(true),
        ),
        (Stamp { times: at(99, 101), ..was.clone() }, Some(Difference::Written), Some(true)),
        (Stamp { times: at(100, 101), ..was.clone() }, Some(Difference::Changed), Some(true)),
        (Stamp { head_crc: 5, ..was.clone() }, Some(Difference::Written), Some(true)),
        (Stamp { head_crc: 0, ..was.clone() }, None, Some(false)),
        (Stamp { path: "/moved".into(), ..was.clone() }, None, Some(false)),
    ] {
        assert_eq!(was.difference(&now), difference, "{now:?}");
        assert_eq!(was.is_written(&now), is_written, "{now:?}");
        let other = difference.filter(|difference| *difference == Difference::OtherFile);
        let is_here = device(was.clone()).path == now.path;
        assert_eq!(
            device(was.clone()).difference(&device(now.clone())),
            other.filter(|_| !is_here),
            "{now:?}"
        );
        assert_eq!(device(was.clone()).is_written(&device(now)), None);
    }
}

#[test]
fn an_inode_number_counts_only_after_a_start_of_the_system_if_nothing_else_tells() {
    let unknown = Stamp { id: FileId { device: 8, inode: 12 }, file_system: None, born_ns: None, ..stamp() };
    assert!(stamp().is_same_file_after(&unknown, false));
    assert!(!stamp().is_same_file_after(&unknown, true));
    let other = Stamp { born_ns: Some(6), ..stamp() };
    assert!(!stamp().is_same_file_after(&other, false));
}

#[test]
fn a_name_has_a_stamp_only_if_it_leads_to_a_file() {
    let host = crate::storage::MemHost::new();
    host.add("/vm/base", b"bytes").unwrap();
    let stamp = Stamp::now(&host, Path::new("/vm/base")).unwrap().unwrap();
    assert_eq!((stamp.times.len, stamp.head_crc != 0), (5, true));
    assert_eq!(Stamp::now(&host, Path::new("/vm/none")).unwrap(), None);
}
