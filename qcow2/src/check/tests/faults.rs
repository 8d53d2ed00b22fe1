//! Every operation of a check and of a repair fails once, and for ever. What cannot be read is never "not there": a check
//! says so, a repair stops, and nothing that was in use is freed.

use std::path::Path;
use std::sync::Arc;

use super::super::subject::Subject;
use super::super::{CheckOptions, CheckReport, Verdict, What, check, check_subject};
use super::damaged_images;
use crate::error::{ErrorKind, Result};
use crate::fuzzing::sample::{Content, Sample};
use crate::repair::tests::repair::{assert_same_guest, guest};
use crate::repair::{RepairMode, RepairPlan, plan, repair};
use crate::storage::sim::{Fault, FaultKind, SimHost};
use crate::storage::{Access, Host, MemHost, Storage};

const NAME: &str = "/image";

/// A disk with this image, and the image opened.
fn disk(image: &[u8]) -> (SimHost, Arc<dyn Storage>) {
    let host = MemHost::new();
    host.add(NAME, image).unwrap();
    let disk = SimHost::over(&host);
    let file = disk.open(Path::new(NAME), Access::ReadWrite).unwrap();
    (disk, file)
}

fn repair_of(file: &dyn Storage, mode: RepairMode) -> Result<RepairPlan> {
    repair(Path::new(NAME), file, None, mode, &CheckOptions::default())
}

/// How many clusters have a refcount that is too low.
fn too_low(report: &CheckReport) -> u64 {
    let low = report.findings.iter().filter(|f| matches!(f.what, What::RefcountTooLow { .. }));
    low.map(|f| f.clusters).sum()
}

/// Lets the N-th operation fail, for every N, and calls `judge` with what came of it; returns how many failed.
fn fail_each<T>(
    image: &[u8],
    work: impl Fn(&dyn Storage) -> T,
    mut judge: impl FnMut(Fault, &SimHost, T),
) -> u64 {
    let kinds = [
        (FaultKind::Io, false),
        (FaultKind::Io, true),
        (FaultKind::NoSpace, false),
        (FaultKind::NoSpace, true),
        (FaultKind::Short, false),
        (FaultKind::Sync, false),
    ];
    let mut failed = 0;
    for (kind, for_ever) in kinds {
        for nth in 1.. {
            let (disk, file) = disk(image);
            let fault = Fault { kind, nth, for_ever };
            disk.fail(Some(fault));
            let result = work(&*file);
            if disk.failed() == 0 {
                break;
            }
            failed += 1;
            judge(fault, &disk, result);
        }
    }
    failed
}

fn assert_sane(error: &crate::Error, fault: Fault, what: &str) {
    let expected = match fault.kind {
        FaultKind::NoSpace | FaultKind::Short => ErrorKind::NoSpace,
        _ => ErrorKind::Io,
    };
    assert_eq!(error.kind(), expected, "{what}: {fault:?}: {error}");
}

/// Repairs with each operation failing; returns how many failed.
fn repair_with_faults(name: &str, image: &[u8], mode: RepairMode) -> u64 {
    let seen = guest(image);
    let undisturbed = {
        let (_, file) = disk(image);
        repair_of(&*file, mode).unwrap()
    };
    fail_each(
        image,
        |file| repair_of(file, mode),
        |fault, disk, result| {
            let what = format!("{name}, {mode:?}: {fault:?}");
            let left = disk.now().content(Path::new(NAME)).unwrap();
            assert_same_guest(&seen, &guest(&left), &what);
            match result {
                Err(e) => assert_sane(&e, fault, &what),
                Ok(done) => {
                    assert_ne!(fault.kind, FaultKind::Sync, "{what}: a failed barrier was called good");
                    assert_eq!(done.after, undisturbed.after, "{what}");
                }
            }
            // No worse than before: nothing in use was freed.
            let (_, file) = self::disk(&left);
            let now = check(Path::new(NAME), &*file, None, &CheckOptions::default()).unwrap();
            assert!(too_low(&now) <= too_low(&undisturbed.before), "{what}: {now:#?}");
            // The same call finishes.
            let again = repair_of(&*file, mode).unwrap();
            assert_eq!(again.after.verdict(), undisturbed.after.verdict(), "{what}");
            assert_eq!(again.after.corruptions, undisturbed.after.corruptions, "{what}");
        },
    )
}

#[test]
fn a_repair_whose_nth_operation_fails_takes_nothing_away() {
    let mut failed = 0;
    for (name, image) in damaged_images() {
        for mode in [RepairMode::Leaks, RepairMode::All] {
            failed += repair_with_faults(name, &image, mode);
        }
    }
    assert!(failed > 1500, "{failed}");
}

/// A plan reads as a repair does, and never writes.
#[test]
fn a_plan_whose_nth_operation_fails_is_the_same_or_an_error() {
    for (name, image) in damaged_images() {
        let planned =
            |file: &dyn Storage| plan(Path::new(NAME), file, None, RepairMode::All, &CheckOptions::default());
        let undisturbed = planned(&*disk(&image).1).unwrap();
        fail_each(&image, planned, |fault, disk, result| {
            assert!(disk.now().content(Path::new(NAME)).unwrap() == image, "{name}: a plan has written");
            match result {
                Err(e) => assert_sane(&e, fault, name),
                Ok(plan) => assert_eq!(plan, undisturbed, "{name}: {fault:?}"),
            }
        });
    }
}

/// Many clusters, so that a small window needs many passes.
fn long_image() -> Vec<u8> {
    let mut sample = Sample::new(400);
    sample.snapshots = vec!["s".to_owned()];
    sample.bitmaps = vec!["b".to_owned()];
    for n in 0..400 {
        sample = sample.with(n * 397 % 400, Content::Data(n as u8));
    }
    sample.build().bytes
}

#[test]
fn a_check_tells_of_every_read_that_failed_in_any_window() {
    let image = long_image();
    for words in [super::super::census::WINDOW_WORDS, 8] {
        let checked = |file: &dyn Storage| -> Result<CheckReport> {
            check_subject(&Subject::open(Path::new(NAME), file, None, None)?, words)
        };
        let undisturbed = checked(&*disk(&image).1).unwrap();
        assert_eq!(undisturbed.verdict(), Verdict::Clean);
        let mut told = 0;
        let failed = fail_each(&image, checked, |fault, _, result| match result {
            Err(e) => assert_sane(&e, fault, "check"),
            // A table is tried again by itself: one read may fail without harm.
            Ok(report) if report == undisturbed => assert!(!fault.for_ever, "{fault:?}"),
            Ok(report) => {
                assert!(report.check_errors > 0 && !report.references_complete, "{fault:?}: {report:#?}");
                told += 1;
            }
        });
        assert!(failed > 20 && told > 5, "{words}: {failed} {told}");
    }
}
