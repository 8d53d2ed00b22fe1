//! The N-th operation of every verb fails, for every N: a merge that goes on, one that is given up, a flatten, a
//! comparison, a look at the map. Guest's bytes stay, the error says what happened, and the same call finishes.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use qcow2::chain::Chain;
use qcow2::chain::view::{Supplied, View};
use qcow2::compare::compare;
use qcow2::convert::{Flatten, FlattenOptions};
use qcow2::image::{ClusterCache, ImageFormat};
use qcow2::merge::{Silent, abort, heal_image};
use qcow2::storage::Host;
use qcow2::storage::sim::{Fault, FaultKind, SimHost, State};
use qcow2::units::{GuestOffset, GuestRange};
use qcow2::{Error, Refusal, Result};

use crate::chain::{Scenario, options};
use crate::fail::{FAULTS, is_sane};
use crate::judge::{Judge, Judged, merge};
use crate::power::disk;
use crate::run::{Outcome, all, share, tier};
use crate::scenarios;

/// Lets each operation of `call` fail on a disk that begins with `start`; `judge` looks at the disk afterwards, with what
/// the call has answered.
fn fail_each<T>(
    scenario: &Scenario,
    start: &State,
    outcome: &mut Outcome,
    what: &str,
    call: impl Fn(&SimHost) -> Result<T>,
    judge: impl Fn(Fault, &State, Option<&T>) -> Judged,
) {
    for (kind, for_ever) in FAULTS {
        for nth in 1.. {
            let fault = Fault { kind, nth, for_ever };
            let disk = disk(scenario, start);
            disk.fail(Some(fault));
            let result = call(&disk);
            if disk.failed() == 0 {
                break;
            }
            outcome.states += 1;
            match &result {
                Ok(_) if kind == FaultKind::Sync => {
                    outcome.fail(format!("{what}: {fault:?}: a failed barrier was called good"))
                }
                Err(e) if !is_sane(e, kind) => {
                    outcome.fail(format!("{what}: {fault:?}: the error is '{e}' ({:?})", e.kind()))
                }
                _ => {}
            }
            if let Err(wrong) = judge(fault, &disk.now(), result.as_ref().ok()) {
                outcome.fail(format!("{what}: {fault:?}: {wrong}"));
            }
        }
    }
}

/// Disks on which the merge was stopped: by a device that failed for ever, at some points of it.
fn stopped(judge: &Judge<'_>) -> Vec<State> {
    let scenario = judge.scenario;
    let operations = {
        let disk = disk(scenario, judge.start());
        // Counts, and never strikes.
        disk.fail(Some(Fault { kind: FaultKind::Io, nth: u64::MAX, for_ever: false }));
        let _ = merge(scenario, Arc::new(disk.clone()));
        disk.seen()
    };
    let at = [50, 70, 85, 97].map(|percent| operations * percent / 100);
    let stop = |nth: u64| {
        let disk = disk(scenario, judge.start());
        disk.fail(Some(Fault { kind: FaultKind::Io, nth, for_ever: true }));
        merge(scenario, Arc::new(disk.clone())).is_err().then(|| disk.now())
    };
    at.into_iter().filter_map(stop).collect()
}

fn go_on(scenario: &Scenario, _: u64) -> Outcome {
    let judge = Judge::new(scenario);
    let mut outcome = Outcome::default();
    for state in stopped(&judge) {
        let call = |disk: &SimHost| merge(scenario, Arc::new(disk.clone()));
        fail_each(scenario, &state, &mut outcome, "going on", call, |_, left, done| {
            if done.is_some() { judge.done(left) } else { judge.state(left) }
        });
    }
    outcome
}

fn give_up(scenario: &Scenario, _: u64) -> Outcome {
    let judge = Judge::new(scenario);
    let mut outcome = Outcome::default();
    let base = scenario.path(scenario.base);
    let dir = scenario.options().journal_dir;
    for state in stopped(&judge) {
        let call = |disk: &SimHost| {
            let (open, dir) = (scenario.options().open, dir.as_deref());
            let healed = heal_image(disk, base, &open, dir);
            match healed.and_then(|_| abort(disk, base, &open, dir, &AtomicBool::new(false))) {
                // The chain was changed: the merge is done, and can only be finished.
                Err(Error::Refused { reason: Refusal::MergeDone { .. }, .. }) => Ok(()),
                other => other.map(drop),
            }
        };
        fail_each(scenario, &state, &mut outcome, "giving up", call, |_, left, _| {
            judge.left(left)?;
            judge.given_up(left, false)
        });
    }
    outcome
}

/// What the guest sees through the active image, and what supplies it.
fn look(host: &dyn Host, path: &Path) -> Result<(Vec<Supplied>, Vec<u8>)> {
    let chain = Chain::open(host, path, &options())?;
    let images = chain.images();
    let view = View::new(&images, 0, chain.active());
    let mut supplied = Vec::new();
    view.resolve(GuestRange { start: GuestOffset::ZERO, len: view.size() }, &mut supplied)?;
    let mut bytes = vec![0xdd; view.size() as usize];
    view.read(GuestOffset::ZERO, &mut bytes, &mut ClusterCache::new())?;
    Ok((supplied, bytes))
}

/// An answer that is given is the right one.
fn read_only(scenario: &Scenario, _: u64) -> Outcome {
    let judge = Judge::new(scenario);
    let mut outcome = Outcome::default();
    let active = scenario.path(scenario.active());
    let start = judge.start();
    let right = look(&start.host(), active).unwrap();
    fail_each(
        scenario,
        start,
        &mut outcome,
        "looking",
        |disk| look(disk, active),
        |_, _, seen| {
            if seen.is_none_or(|seen| *seen == right) { Ok(()) } else { Err("a wrong answer".into()) }
        },
    );
    let base = scenario.path(scenario.base);
    let compared = |host: &dyn Host| {
        let (a, b) = (Chain::open(host, active, &options())?, Chain::open(host, base, &options())?);
        let (left, right) = (a.images(), b.images());
        let views = (View::new(&left, 0, a.active()), View::new(&right, 0, b.active()));
        compare(views.0, views.1, &Silent, &AtomicBool::new(false))
    };
    let right = compared(&start.host()).unwrap();
    fail_each(
        scenario,
        start,
        &mut outcome,
        "comparing",
        |disk| compared(disk),
        |_, _, found| {
            if found.is_none_or(|found| *found == right) { Ok(()) } else { Err("a wrong answer".into()) }
        },
    );
    outcome
}

fn flatten(scenario: &Scenario, _: u64) -> Outcome {
    let judge = Judge::new(scenario);
    let mut outcome = Outcome::default();
    let active = scenario.path(scenario.active());
    let output = Path::new("/vm/flat");
    for to in [ImageFormat::Raw, ImageFormat::Qcow2] {
        let flat = FlattenOptions::new(options(), output.to_owned(), to);
        let call = |disk: &SimHost| {
            let cancel = AtomicBool::new(false);
            let host: Arc<dyn Host> = Arc::new(disk.clone());
            Flatten::prepare(host, active, &flat, &cancel)?.execute(&Silent, &cancel)
        };
        let shows = |state: &State| -> Judged {
            let of = |path: &Path, format: Option<ImageFormat>| {
                let mut options = options();
                options.active_format = format;
                let host = state.host();
                let read = || -> Result<Vec<u8>> {
                    let chain = Chain::open(&host, path, &options)?;
                    let images = chain.images();
                    let view = View::new(&images, 0, chain.active());
                    let mut bytes = vec![0xdd; view.size() as usize];
                    view.read(GuestOffset::ZERO, &mut bytes, &mut ClusterCache::new())?;
                    Ok(bytes)
                };
                read().map_err(|e| e.to_string())
            };
            if of(output, Some(to))? == of(active, None)? { Ok(()) } else { Err("wrong bytes".into()) }
        };
        fail_each(scenario, judge.start(), &mut outcome, "flattening", call, |fault, left, done| {
            for name in judge.start().names() {
                if !left.has_same(name, judge.start()) {
                    return Err(format!("{} was changed", name.display()));
                }
            }
            let mut new = left.names().filter(|name| judge.start().inode(name).is_none());
            if done.is_some() {
                return shows(left);
            }
            // Only a device that answers nothing any more keeps what was begun.
            match new.next() {
                Some(name) if !(fault.for_ever && fault.kind == FaultKind::Io) => {
                    return Err(format!("{} was left behind", name.display()));
                }
                _ => {}
            }
            if left.inode(output).is_some() {
                return shows(left);
            }
            let again = disk(scenario, left);
            call(&again).map_err(|e| format!("the same call is refused: {e}"))?;
            shows(&again.now())
        });
    }
    outcome
}

fn run(what: &str, step: usize, least: u64, f: impl Fn(&Scenario, u64) -> Outcome + Sync) {
    let total = all(what, scenarios::some(tier(), tier().of(step, 7)), f);
    if std::env::var_os("QMERGE_CRASH_ONLY").is_none() {
        // A sampled run has fewer scenarios; `least` is what a fifth of them has.
        let least = if share() == 1 { least } else { least / 2 };
        assert!(total.states >= least, "{total:?}");
    }
}

#[test]
fn a_merge_that_goes_on_survives_the_nth_failure() {
    run("failed operations of merges that go on", 251, 2_000, go_on);
}

#[test]
fn a_merge_that_is_given_up_survives_the_nth_failure() {
    run("failed operations of merges that are given up", 61, 1_500, give_up);
}

#[test]
fn what_only_reads_answers_right_or_not_at_all() {
    run("failed operations of looks and comparisons", 29, 1_000, read_only);
}

#[test]
fn a_flatten_survives_the_nth_failure() {
    run("failed operations of flattens", 61, 1_000, flatten);
}
