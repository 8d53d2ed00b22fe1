//! Rebases: the power is cut at every point, once and in the midst of recovery, operations fail, and what is left goes on or
//! is given up. In every state the guest sees what it saw, and no other file is touched.
//!
//! A scenario has the layers of the image up to `base`, which is the image itself, and behind it those that are to lie below
//! it, up to `top`. Where `top` is the image, nothing is to lie below.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use kit::Random;
use qcow2::chain::Chain;
use qcow2::chain::view::View;
use qcow2::check::{CheckOptions, check};
use qcow2::fuzzing::sample::Content;
use qcow2::image::ClusterCache;
use qcow2::merge::{
    CommitOptions, Rebase, RebaseOptions, Silent, UpReport, abort, heal, heal_image, open_whole,
};
use qcow2::storage::sim::{Cut, Cuts, DiskOp, Fault, Garbage, State, power_cuts};
use qcow2::storage::{Access, Host, MemHost};
use qcow2::units::GuestOffset;
use qcow2::{Error, Result};

use crate::chain::{BuiltLayer, JOURNALS, Room, Scenario, guest, options};
use crate::fail::{FAULTS, goes_on_after_a_failed_barrier, is_sane};
use crate::judge::Judged;
use crate::power::{cuts, disk};
use crate::run::{Outcome, Tier, all, count, is_whole, say, share, tier};
use crate::scenarios::{SHAPE, Shape};

const MIXED: Content = Content::Subclusters { allocated: 0x00ff_00ff, zero: 0x0f00_0f00, fill: 0x77 };

/// The image of each shape, with each kind of entry below it, now and then.
fn scenarios() -> Vec<Scenario> {
    let shapes = [
        SHAPE,
        Shape { name: "512 v2", version: 2, ..SHAPE },
        Shape { name: "512 refcounts of 64 bits", refcount_order: 6, ..SHAPE },
        Shape { name: "1K refcounts of 8 bits", cluster_bits: 10, refcount_order: 3, ..SHAPE },
        Shape { name: "4K", cluster_bits: 12, ..SHAPE },
        Shape { name: "16K extended", cluster_bits: 14, extended_l2: true, ..SHAPE },
    ];
    let entries = |fill| {
        [
            None,
            Some(Content::Data(fill)),
            Some(Content::Compressed(fill)),
            Some(Content::Zero),
            Some(Content::ZeroAllocated(fill)),
            Some(MIXED),
        ]
    };
    let mut list = Vec::new();
    for shape in shapes {
        for (n, old) in entries(0x22).into_iter().enumerate() {
            for (m, new) in entries(if n % 2 == 0 { 0x22 } else { 0x44 }).into_iter().enumerate() {
                let turn = list.len();
                let label = format!("rebase {}: {old:?} onto {new:?}", shape.name);
                list.extend(scenario(shape, (old.clone(), n), (new, m), turn, label));
            }
        }
    }
    list
}

fn scenario(
    shape: Shape,
    (old, n): (Option<Content>, usize),
    (new, m): (Option<Content>, usize),
    turn: usize,
    label: String,
) -> Option<Scenario> {
    if old.iter().chain(&new).any(|content| !shape.can(content)) {
        return None;
    }
    let below = |name: &str, shape: Shape, clusters: u64, content: Option<Content>| {
        let mut sample = shape.sample(clusters).with(0, Content::Data(0x11));
        for at in [2, 3, 5].into_iter().filter(|at| *at < clusters) {
            sample = content.iter().fold(sample, |sample, content| sample.with(at, content.clone()));
        }
        BuiltLayer::qcow2(&format!("/vm/{name}.qcow2"), &sample, Room::Dirty(0))
    };
    // What lies below may be shorter or longer than the image, now and then.
    let mut layers = vec![match n {
        0 => BuiltLayer::raw("/vm/old.raw", 5, 0x61),
        _ => below("old", shape, [8, 4, 9][turn % 3], old),
    }];
    let on = layers[0].path.file_name()?.to_str()?.to_owned();
    let sample = shape.sample(8).with(1, Content::Data(0x33)).over(&on, layers[0].format());
    // A block device does not grow.
    let is_device = turn % 11 == 10;
    let near = !is_device && shape.cluster_bits == 9 && shape.refcount_order >= 4;
    let room =
        if near && turn % 4 == 3 { Room::NoBlock } else { Room::Dirty(if is_device { 90 } else { 12 }) };
    layers.push(BuiltLayer::qcow2("/vm/image.qcow2", &sample, room));
    match (m, turn % 5) {
        (0, 0) => {}
        (0, _) => layers.push(BuiltLayer::raw("/vm/new.raw", 1 + turn as u64 * 7 % 80, 0x61)),
        // Another cluster size.
        (_, 1) if !matches!(new, Some(Content::Subclusters { .. })) => {
            layers.push(below("new", Shape { cluster_bits: 11, extended_l2: false, ..SHAPE }, 5, new));
        }
        _ => layers.push(below("new", shape, [9, 8, 4][turn % 3], new)),
    }
    let top = layers.len() - 1;
    let mut scenario = Scenario::new(label, layers, 1, top);
    scenario.device = is_device;
    Some(scenario)
}

fn journal_dir(scenario: &Scenario) -> Option<PathBuf> {
    scenario.device.then(|| PathBuf::from(JOURNALS))
}

fn onto(scenario: &Scenario) -> Option<&Path> {
    (scenario.top > scenario.base).then(|| scenario.path(scenario.top))
}

/// Rebases as the scenario says.
fn rebase(scenario: &Scenario, host: Arc<dyn Host>) -> Result<UpReport> {
    let (image, journal_dir) = (scenario.path(scenario.base), journal_dir(scenario));
    let mut heals = CommitOptions::new(options());
    heals.journal_dir.clone_from(&journal_dir);
    heal(&*host, image, &heals)?;
    let mut options = RebaseOptions::new(options());
    options.onto = onto(scenario).map(Path::to_owned);
    options.up.journal_dir = journal_dir;
    let never = AtomicBool::new(false);
    Rebase::prepare(host, image, &options, &Silent, &never)?.execute(&Silent, &never)
}

/// A scenario with what the image shows.
struct UpJudge<'a> {
    scenario: &'a Scenario,
    start: State,
    shown: Vec<u8>,
}

impl<'a> UpJudge<'a> {
    fn new(scenario: &'a Scenario) -> Self {
        Self { scenario, start: scenario.start(), shown: guest(&scenario.layers, scenario.base) }
    }

    fn image(&self) -> &Path {
        self.scenario.path(self.scenario.base)
    }

    fn is_shown(&self, chain: Result<Chain>) -> Judged {
        let chain = chain.map_err(|e| format!("the image cannot be opened: {e}"))?;
        let images = chain.images();
        let view = View::new(&images, 0, chain.active());
        let mut bytes = vec![0xdd; view.size() as usize];
        view.read(GuestOffset::ZERO, &mut bytes, &mut ClusterCache::new())
            .map_err(|e| format!("the image cannot be read: {e}"))?;
        match bytes.iter().zip(&self.shown).position(|(is, was)| is != was) {
            Some(at) => Err(format!("the guest's bytes differ at {at}")),
            None => Ok(()),
        }
    }

    fn is_sound(&self, host: &MemHost) -> Judged {
        let file = host.open(self.image(), Access::Read).map_err(|e| e.to_string())?;
        match check(self.image(), &*file, None, &CheckOptions::default()) {
            Ok(report) if report.is_consistent() => Ok(()),
            Ok(report) => Err(format!("corrupt: {:?}", report.first_corruption())),
            Err(e) => Err(format!("cannot be checked: {e}")),
        }
    }

    /// No other file is touched.
    fn others(&self, state: &State) -> Judged {
        let mut others = self.start.names().filter(|name| *name != self.image());
        match others.find(|name| !state.has_same(name, &self.start)) {
            Some(name) => Err(format!("{} was changed", name.display())),
            None => Ok(()),
        }
    }

    /// The image is sound, and shows what it showed, whatever lies below it by now.
    fn left(&self, state: &State) -> Judged {
        let host = state.host();
        self.is_sound(&host)?;
        self.others(state)?;
        self.is_shown(Chain::open(&host, self.image(), &options()))
    }

    /// All is done, and nothing is left behind.
    fn done(&self, state: &State) -> Judged {
        self.left(state)?;
        let chain = Chain::open(&state.host(), self.image(), &options()).map_err(|e| e.to_string())?;
        let below = chain.layers().iter().rev().nth(1).map(|layer| layer.path.as_path());
        if below.and_then(|below| state.inode(below)) != onto(self.scenario).and_then(|p| state.inode(p)) {
            return Err(format!("{below:?} lies below"));
        }
        let is_new = |name: &&Path| self.start.inode(name).is_none() && !name.starts_with(JOURNALS);
        match state.names().find(is_new) {
            Some(name) => Err(format!("{} was left behind", name.display())),
            None => Ok(()),
        }
    }

    fn again(&self, state: &State) -> Judged {
        let host = disk(self.scenario, state);
        rebase(self.scenario, Arc::new(host.clone()))
            .map_err(|e| format!("the same rebase is refused: {e}"))?;
        self.done(&host.now()).map_err(|what| format!("after the same rebase: {what}"))
    }

    fn cut(&self, cut: &Cut<'_>) -> Judged {
        self.found(cut)?;
        self.again(&cut.state)
    }

    /// What a power cut leaves, before anything else is done. Where sectors hold garbage, whoever only reads is right, or is
    /// refused.
    fn found(&self, cut: &Cut<'_>) -> Judged {
        if cut.garbage.is_empty() {
            return self.left(&cut.state);
        }
        let dir = journal_dir(self.scenario);
        match open_whole(&disk(self.scenario, &cut.state), self.image(), &options(), dir.as_deref()) {
            Ok(chain) => self.is_shown(Ok(chain)).or_else(|what| {
                // A table may be damaged so that it cannot be read.
                if what.contains("cannot be read") { Ok(()) } else { Err(what) }
            }),
            Err(_) => Ok(()),
        }
    }

    fn given_up(&self, state: &State) -> Judged {
        let host = disk(self.scenario, state);
        let dir = journal_dir(self.scenario);
        let healed = heal_image(&host, self.image(), &options(), dir.as_deref());
        healed
            .and_then(|_| {
                abort(&host, self.image(), &options(), dir.as_deref(), &AtomicBool::new(false)).map(drop)
            })
            .map_err(|e| format!("cannot be given up: {e}"))?;
        self.left(&host.now()).map_err(|what| format!("given up: {what}"))?;
        self.again(&host.now()).map_err(|what| format!("given up, and begun again: {what}"))
    }

    /// The log of a rebase that nothing disturbs.
    fn undisturbed(&self) -> std::result::Result<Vec<DiskOp>, String> {
        let disk = disk(self.scenario, &self.start);
        rebase(self.scenario, Arc::new(disk.clone())).map_err(|e| format!("undisturbed: {e}"))?;
        self.done(&disk.now()).map_err(|what| format!("undisturbed: {what}"))?;
        Ok(disk.log())
    }
}

/// Every `step`th scenario of a whole run, or a sample of these.
fn some(step: usize) -> Vec<Scenario> {
    let asked = std::env::var_os("QMERGE_CRASH_ONLY").is_some();
    scenarios().into_iter().step_by(if asked { 1 } else { step * share() }).collect()
}

fn cut_everywhere(scenario: &Scenario, seed: u64) -> Outcome {
    let judge = UpJudge::new(scenario);
    let mut outcome = Outcome::default();
    let log = match judge.undisturbed() {
        Ok(log) => log,
        Err(what) => {
            outcome.fail(what);
            return outcome;
        }
    };
    let mut turn = 0;
    outcome.states = power_cuts(&judge.start, &log, &cuts(seed, tier()), |cut| {
        turn += 1;
        let judged = match turn % 3 {
            0 => judge.found(cut).and_then(|()| judge.given_up(&cut.state)),
            _ => judge.cut(cut),
        };
        let is_end = cut.reached == log.len() && cut.garbage.is_empty();
        // Success was reported: everything is durable.
        let judged = judged.and_then(|()| if is_end { judge.done(&cut.state) } else { Ok(()) });
        if let Err(what) = judged {
            outcome.fail(format!("seed {seed}: {cut}: {what}"));
        }
    });
    outcome
}

#[test]
fn no_power_cut_in_a_rebase_loses_anything() {
    let total = all("power cuts in rebases", some(1), cut_everywhere);
    if is_whole() {
        assert!(total.scenarios >= 140 && total.states >= 15_000, "{total:?}");
    }
}

/// What a power cut leaves goes on, and the power is cut in the midst of that.
fn cut_twice(scenario: &Scenario, seed: u64) -> Outcome {
    let judge = UpJudge::new(scenario);
    let mut outcome = Outcome::default();
    let log = match judge.undisturbed() {
        Ok(log) => log,
        Err(what) => {
            outcome.fail(what);
            return outcome;
        }
    };
    let mut first: Vec<(State, String)> = Vec::new();
    let few = Cuts { exhaustive: 3, listed: 3, random: 3, ..cuts(seed, tier()) };
    power_cuts(&judge.start, &log, &few, |cut| first.push((cut.state.clone(), cut.to_string())));
    let mut dice = Random::new(seed);
    for _ in 0..tier().of(3, 6).min(first.len()) {
        let (state, how) = first.swap_remove(dice.below(first.len() as u64) as usize);
        let second = disk(scenario, &state);
        if let Err(e) = rebase(scenario, Arc::new(second.clone())) {
            outcome.fail(format!("seed {seed}: first: {how}; then: {e}"));
            continue;
        }
        let few = Cuts { exhaustive: 3, listed: 2, random: 2, ..cuts(seed, tier()) };
        outcome.states += power_cuts(second.start(), &second.log(), &few, |cut| {
            // The first cut may have left garbage that only the journal heals: then all that counts is that it goes on.
            let judged = if how.contains("garbage") { judge.again(&cut.state) } else { judge.cut(cut) };
            if let Err(what) = judged {
                outcome.fail(format!("seed {seed}: first: {how}; then: {cut}: {what}"));
            }
        });
    }
    outcome
}

#[test]
fn no_power_cut_in_the_recovery_of_a_rebase_loses_anything() {
    let total = all("power cuts in the recovery of rebases", some(3), cut_twice);
    if is_whole() {
        assert!(total.states >= 5_000, "{total:?}");
    }
}

fn fail_everywhere(scenario: &Scenario, seed: u64) -> Outcome {
    let judge = UpJudge::new(scenario);
    let mut outcome = Outcome::default();
    let few = Cuts { exhaustive: 1, listed: 1, random: 1, garbage: Garbage::None, ..cuts(seed, tier()) };
    for (kind, for_ever) in FAULTS {
        for nth in 1.. {
            let fault = Fault { kind, nth, for_ever };
            let disk = disk(scenario, &judge.start);
            disk.fail(Some(fault));
            let result = rebase(scenario, Arc::new(disk.clone()));
            if disk.failed() == 0 {
                break;
            }
            let log = disk.log();
            match &result {
                Ok(_) if kind == qcow2::storage::sim::FaultKind::Sync => {
                    outcome.fail(format!("{fault:?}: a failed barrier was called good"));
                }
                Err(e) if !is_sane(e, kind) => {
                    outcome.fail(format!("{fault:?}: the error is '{e}' ({:?})", Error::kind(e)));
                }
                _ => {}
            }
            if goes_on_after_a_failed_barrier(&log) {
                outcome.fail(format!("{fault:?}: something was written after a failed barrier"));
            }
            // The process ends, the page cache stays; or the power fails, too.
            outcome.states += 1;
            let now = disk.now();
            if let Err(what) = judge.left(&now).and_then(|()| judge.again(&now)) {
                outcome.fail(format!("{fault:?}: {what}"));
            }
            power_cuts(disk.start(), &log, &few, |cut| {
                if cut.reached < log.len() {
                    return;
                }
                outcome.states += 1;
                let judged = if result.is_ok() { judge.done(&cut.state) } else { judge.cut(cut) };
                if let Err(what) = judged {
                    outcome.fail(format!("{fault:?}, then {cut}: {what}"));
                }
            });
        }
    }
    outcome
}

#[test]
fn the_nth_operation_of_a_rebase_fails_and_nothing_is_lost() {
    let total = all("failed operations of rebases", some(tier().of(9, 3)), fail_everywhere);
    if is_whole() {
        assert!(total.states >= 10_000, "{total:?}");
    }
}

/// The writes that change the backing name, brought before all data: what `qemu-img rebase` of QEMU 10 does.
fn switched_first(scenario: &Scenario, start: &State, log: &[DiskOp]) -> Option<Vec<DiskOp>> {
    let image = start.inode(scenario.path(scenario.base))?;
    let cluster = scenario.layers[scenario.base].cluster_size;
    let in_header: Vec<usize> = (0..log.len())
        .filter(
            |n| matches!(&log[*n], DiskOp::Write { file, offset, .. } if *file == image && *offset < cluster),
        )
        .collect();
    // The first sets the dirty bit, and the last clears it.
    let (first, rest) = in_header.split_first()?;
    let (_, switch) = rest.split_last()?;
    let begun = first + 1 + log.get(first + 1..)?.iter().position(DiskOp::is_barrier)?;
    let mut spoilt = log.get(..=begun)?.to_vec();
    spoilt.extend(switch.iter().map(|n| log[*n].clone()));
    spoilt.push(DiskOp::Sync { file: image, done: true });
    spoilt.extend((begun + 1..log.len()).filter(|n| !switch.contains(n)).map(|n| log[n].clone()));
    (!switch.is_empty()).then_some(spoilt)
}

#[test]
fn a_backing_name_that_changes_before_the_data_is_durable_is_found() {
    let version_3 = |scenario: &Scenario| !scenario.name.contains(" v2") && !scenario.device;
    let list = scenarios().into_iter().filter(version_3).step_by(13).collect();
    let (total, _) = count(list, |scenario, seed| {
        let judge = UpJudge::new(scenario);
        let mut outcome = Outcome::default();
        let log = judge.undisturbed().unwrap();
        let few =
            Cuts { exhaustive: 3, listed: 1, random: 1, garbage: Garbage::None, ..cuts(seed, Tier::Quick) };
        let wrong = |log: &[DiskOp]| {
            let mut wrong = 0;
            let states = power_cuts(&judge.start, log, &few, |cut| {
                wrong += u64::from(judge.left(&cut.state).is_err())
            });
            (states, wrong)
        };
        assert_eq!(wrong(&log).1, 0, "{}: the right order", scenario.name);
        if let Some(spoilt) = switched_first(scenario, &judge.start, &log) {
            let (states, wrong) = wrong(&spoilt);
            outcome.states = states;
            (0..wrong).for_each(|_| outcome.fail(String::new()));
        }
        outcome
    });
    say(&format!(
        "crash tests, wrong order, the backing name of a rebase before its data: {} states, {} found",
        total.states, total.failed
    ));
    assert!(total.states > 100 && total.failed > 20, "{} states, {} found", total.states, total.failed);
}
