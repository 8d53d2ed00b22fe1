//! The N-th operation of a merge fails, for every N.

use std::path::Path;
use std::sync::Arc;

use qcow2::chain::Chain;
use qcow2::fuzzing::sample::{Content, Sample};
use qcow2::storage::sim::{Cuts, DiskOp, Fault, FaultKind, Garbage, SimHost, power_cuts};
use qcow2::{Error, ErrorKind};

use crate::chain::{After, BuiltLayer, Room, Scenario};
use crate::judge::{Judge, merge, merge_with};
use crate::power::{cuts, disk};
use crate::run::{Outcome, all, is_whole, tier};
use crate::scenarios;

pub(crate) const FAULTS: [(FaultKind, bool); 10] = [
    (FaultKind::Io, false),
    (FaultKind::Io, true),
    (FaultKind::NoSpace, false),
    (FaultKind::NoSpace, true),
    (FaultKind::Short, false),
    (FaultKind::Short, true),
    (FaultKind::Sync, false),
    (FaultKind::Sync, true),
    (FaultKind::Files, false),
    (FaultKind::Files, true),
];

/// The error says what happened.
pub(crate) fn is_sane(error: &Error, kind: FaultKind) -> bool {
    let expected = match kind {
        FaultKind::Io | FaultKind::Sync | FaultKind::Files => ErrorKind::Io,
        FaultKind::NoSpace | FaultKind::Short => ErrorKind::NoSpace,
    };
    error.kind() == expected
}

/// A failed barrier is final: nothing may be written to its file afterwards, and no second one may be tried.
pub(crate) fn goes_on_after_a_failed_barrier(log: &[DiskOp]) -> bool {
    let mut failed = Vec::new();
    for op in log {
        match op {
            DiskOp::Sync { file, .. } if failed.contains(file) => return true,
            DiskOp::Sync { file, done: false } => failed.push(*file),
            op if op.changed_file().is_some_and(|file| failed.contains(&file)) => return true,
            _ => {}
        }
    }
    false
}

/// Fails one operation, and judges what is left; says whether there was one to fail.
fn fail_one(judge: &Judge<'_>, fault: Fault, cuts: &Cuts, outcome: &mut Outcome) -> bool {
    let disk: SimHost = disk(judge.scenario, judge.start());
    disk.fail(Some(fault));
    let result = merge(judge.scenario, Arc::new(disk.clone()));
    if disk.failed() == 0 {
        if let Err(e) = result {
            outcome.fail(format!("{fault:?}: failed without a fault: {e}"));
        }
        return false;
    }
    let log = disk.log();
    match &result {
        Ok(_) if fault.kind == FaultKind::Sync => {
            outcome.fail(format!("{fault:?}: a failed barrier was called good"))
        }
        Err(e) if !is_sane(e, fault.kind) => {
            outcome.fail(format!("{fault:?}: the error is '{e}' ({:?})", e.kind()))
        }
        _ => {}
    }
    if goes_on_after_a_failed_barrier(&log) {
        outcome.fail(format!("{fault:?}: something was written, or synced again, after a failed barrier"));
    }
    // The process ends, the page cache stays.
    outcome.states += 1;
    if let Err(what) = judge.state(&disk.now()) {
        outcome.fail(format!("{fault:?}: {what}"));
    }
    // The power fails, too.
    power_cuts(disk.start(), &log, cuts, |cut| {
        if cut.reached < log.len() {
            // Judged for the merge that was not disturbed.
            return;
        }
        outcome.states += 1;
        let judged = match &result {
            Ok(_) => judge.done(&cut.state),
            Err(_) => judge.state(&cut.state),
        };
        if let Err(what) = judged {
            outcome.fail(format!("{fault:?}, then {cut}: {what}"));
        }
    });
    true
}

fn fail_everywhere(scenario: &Scenario, seed: u64) -> Outcome {
    let judge = Judge::new(scenario);
    let mut outcome = Outcome::default();
    let tier = tier();
    let few = Cuts { exhaustive: 2, listed: 1, random: 1, garbage: Garbage::None, ..cuts(seed, tier) };
    for (kind, for_ever) in FAULTS {
        let mut nth = 1;
        while fail_one(&judge, Fault { kind, nth, for_ever }, &few, &mut outcome) {
            nth += 1;
        }
    }
    outcome
}

/// What cannot be read is no damage of the image, which a user would then repair.
#[test]
fn an_image_that_cannot_be_read_is_not_called_inconsistent() {
    let scenario = scenarios::all(tier()).remove(0);
    let judge = Judge::new(&scenario);
    let mut errors = 0;
    for nth in 1.. {
        let disk = disk(&scenario, judge.start());
        disk.fail(Some(Fault { kind: FaultKind::Io, nth, for_ever: false }));
        match merge(&scenario, Arc::new(disk.clone())) {
            Err(e) => assert_eq!(e.kind(), ErrorKind::Io, "operation {nth}: {e}"),
            Ok(_) if disk.failed() == 0 => break,
            Ok(_) => {}
        }
        errors += 1;
    }
    assert!(errors > 50, "{errors}");
}

/// An image outside the chain uses a layer: that one is kept, and all that it reads through.
#[test]
fn layers_below_one_that_is_kept_stay() {
    let sample = |n: u64| Sample::new(8).with(n, Content::Data(0x40 + n as u8));
    let mut layers = vec![BuiltLayer::qcow2("/vm/0.qcow2", &sample(0), Room::Dirty(9))];
    for n in 1..4 {
        let on = sample(n).over(&format!("{}.qcow2", n - 1), "qcow2");
        layers.push(BuiltLayer::qcow2(&format!("/vm/{n}.qcow2"), &on, Room::Dirty(0)));
    }
    let mut scenario = Scenario::new("kept".into(), layers, 0, 3);
    scenario.after = After::Delete;
    let host = Judge::new(&scenario).start().host();
    let other = sample(7).over("2.qcow2", "qcow2").build();
    host.add("/vm/other.qcow2", &other.bytes).unwrap();
    let mut options = scenario.options();
    options.allow_shared_base = true;
    let report = merge_with(&scenario, &options, Arc::new(host.clone())).unwrap();
    assert_eq!(report.deleted, [scenario.path(3)]);
    let kept: Vec<_> = report.kept.iter().map(|kept| kept.path.as_path()).collect();
    assert_eq!((kept, report.marked.len()), (vec![scenario.path(2), scenario.path(1)], 2));
    let layers = Chain::open(&host, Path::new("/vm/other.qcow2"), &options.open).unwrap().layers().len();
    assert_eq!(layers, 4, "the image that uses the layer can still be read");
}

#[test]
fn the_nth_operation_fails_and_nothing_is_lost() {
    let tier = tier();
    let some = scenarios::some(tier, tier.of(29, 7));
    let total = all("failed operations", some, fail_everywhere);
    if is_whole() {
        assert!(total.states >= tier.of(30_000, 50_000), "{total:?}");
    }
}

/// Lets every operation fail, once, and then cuts the power with garbage in what was being written.
fn fail_and_cut(scenario: &Scenario, seed: u64) -> Outcome {
    let judge = Judge::new(scenario);
    let mut outcome = Outcome::default();
    for nth in 1.. {
        let disk = disk(scenario, judge.start());
        disk.fail(Some(Fault { kind: FaultKind::Io, nth, for_ever: false }));
        let failed = merge(scenario, Arc::new(disk.clone())).is_err();
        if disk.failed() == 0 {
            break;
        }
        let log = disk.log();
        let few = Cuts { exhaustive: 1, listed: 1, random: 1, ..cuts(seed, tier()) };
        let few = Cuts { garbage: Garbage::Sectors, damaged: 4, ..few };
        power_cuts(disk.start(), &log, &few, |cut| {
            // What is left without garbage is judged above.
            if cut.reached < log.len() || cut.garbage.is_empty() || !failed {
                return;
            }
            outcome.states += 1;
            if let Err(what) = judge.cut(cut) {
                outcome.fail(format!("operation {nth}, then {cut}: {what}"));
            }
        });
    }
    outcome
}

/// A full record is written in place in the middle of a write. What fails there is a failed barrier all the same, and
/// no later record may take the place of the one that heals it.
#[test]
fn a_failure_while_a_full_record_is_written_in_place_is_healed_from_it() {
    let total = all("failed operations of full records", scenarios::full_records(), fail_and_cut);
    if std::env::var_os("QMERGE_CRASH_ONLY").is_none() {
        assert!(total.states > 100, "{total:?}");
    }
}
