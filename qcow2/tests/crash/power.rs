//! The power is cut at every point of every merge.

use std::sync::Arc;

use kit::Random;
use qcow2::storage::sim::{Cuts, Garbage, SimHost, State, Tear, power_cuts};

use crate::chain::Scenario;
use crate::judge::{Judge, merge};
use crate::run::{Outcome, Tier, all, garbage, is_whole, tier};
use crate::scenarios;

/// Power cuts for one scenario.
pub(crate) fn cuts(seed: u64, tier: Tier) -> Cuts {
    Cuts {
        seed,
        tear: Tear::Sector,
        exhaustive: tier.of(6, 9),
        listed: tier.of(2, 10),
        random: tier.of(4, 16),
        garbage: garbage(),
        damaged: tier.of(4, 12),
    }
}

/// Merges undisturbed, and gives the disk with its log.
pub(crate) fn undisturbed(judge: &Judge<'_>) -> Result<SimHost, String> {
    let scenario = judge.scenario;
    let disk = disk(scenario, judge.start());
    merge(scenario, Arc::new(disk.clone())).map_err(|e| format!("undisturbed: {e}"))?;
    judge.done(&disk.now()).map_err(|what| format!("undisturbed: {what}"))?;
    Ok(disk)
}

/// As [`undisturbed`]; what fails is an outcome.
fn merged(judge: &Judge<'_>, outcome: &mut Outcome) -> Option<SimHost> {
    undisturbed(judge).map_err(|what| outcome.fail(what)).ok()
}

/// The simulated disk of a scenario, which holds a state.
pub(crate) fn disk(scenario: &Scenario, state: &State) -> SimHost {
    let disk = SimHost::new(state);
    if scenario.device {
        disk.make_device(scenario.path(scenario.base)).unwrap();
    }
    disk
}

fn cut_everywhere(scenario: &Scenario, seed: u64, tier: Tier) -> Outcome {
    let judge = Judge::new(scenario);
    let mut outcome = Outcome::default();
    let Some(disk) = merged(&judge, &mut outcome) else { return outcome };
    let log = disk.log();
    outcome.states = power_cuts(disk.start(), &log, &cuts(seed, tier), |cut| {
        let mut judged = judge.cut(cut);
        if cut.reached == log.len() && cut.garbage.is_empty() {
            // Success was reported: everything is durable.
            judged = judged.and_then(|()| judge.done(&cut.state));
        }
        if let Err(what) = judged {
            outcome.fail(format!("seed {seed}: {cut}: {what}"));
        }
    });
    outcome
}

#[test]
fn no_power_cut_loses_anything() {
    let tier = tier();
    let some = scenarios::some(tier, 1);
    let total = all("power cuts", some, |scenario, seed| cut_everywhere(scenario, seed, tier));
    if is_whole() {
        assert!(total.scenarios >= 500 && total.states >= tier.of(100_000, 1_000_000), "{total:?}");
    }
}

#[test]
fn no_power_cut_in_the_midst_of_full_records_loses_anything() {
    let tier = tier();
    let list = scenarios::full_records();
    all("power cuts, full records", list, |scenario, seed| cut_everywhere(scenario, seed, tier));
}

/// The last mark of a merged layer is written when nothing names the layer any more.
#[test]
fn a_torn_mark_of_a_layer_that_has_left_the_chain_is_made_whole() {
    let below_another = |scenario: &Scenario| scenario.name.ends_with("below another");
    let scenario = scenarios::all(Tier::Quick).into_iter().find(below_another).unwrap();
    let judge = Judge::new(&scenario);
    let disk = undisturbed(&judge).unwrap();
    let top = disk.start().inode(scenario.path(scenario.top)).unwrap();
    let cuts = Cuts { garbage: Garbage::Sectors, damaged: 40, ..cuts(1, Tier::Quick) };
    let mut torn = 0;
    power_cuts(disk.start(), &disk.log(), &cuts, |cut| {
        if cut.garbage.iter().any(|(file, _)| *file == top) {
            torn += 1;
            judge.cut(cut).unwrap_or_else(|what| panic!("{cut}: {what}"));
        }
    });
    assert!(torn > 10, "{torn}");
}

/// What a power cut leaves is given up, and then merged again.
fn cut_and_give_up(scenario: &Scenario, seed: u64, tier: Tier) -> Outcome {
    let judge = Judge::new(scenario);
    let mut outcome = Outcome::default();
    let Some(disk) = merged(&judge, &mut outcome) else { return outcome };
    let few = Cuts { exhaustive: 2, listed: tier.of(1, 6), random: tier.of(1, 6), ..cuts(seed, tier) };
    outcome.states = power_cuts(disk.start(), &disk.log(), &few, |cut| {
        if let Err(what) = judge.given_up(&cut.state, !cut.garbage.is_empty()) {
            outcome.fail(format!("seed {seed}: {cut}: {what}"));
        }
    });
    outcome
}

#[test]
fn a_merge_that_a_power_cut_has_stopped_can_be_given_up() {
    let tier = tier();
    let some = scenarios::some(tier, tier.of(5, 2));
    all("power cuts, then given up", some, |scenario, seed| cut_and_give_up(scenario, seed, tier));
}

/// Of what a power cut leaves, the active image is merged into the layer below it.
fn cut_and_merge_above(scenario: &Scenario, seed: u64, tier: Tier) -> Outcome {
    let judge = Judge::new(scenario);
    let mut outcome = Outcome::default();
    let Some(disk) = merged(&judge, &mut outcome) else { return outcome };
    let few = Cuts { exhaustive: 2, listed: 1, random: 1, ..cuts(seed, tier) };
    let mut done = 0;
    outcome.states =
        power_cuts(disk.start(), &disk.log(), &few, |cut| match judge.merged_above(&cut.state) {
            Ok(is_done) => done += u64::from(is_done),
            Err(what) => outcome.fail(format!("seed {seed}: {cut}: {what}")),
        });
    if done == 0 {
        outcome.fail("it is never done".into());
    }
    outcome
}

#[test]
fn a_merge_above_one_that_a_power_cut_has_stopped_loses_nothing() {
    let tier = tier();
    let is_deep = |scenario: &Scenario| {
        scenario.name.starts_with("recorded") && scenario.layers.len() > 2 && scenario.base == 0
    };
    let some = scenarios::some(tier, 1).into_iter().filter(is_deep).collect();
    all("power cuts, then merged above", some, |scenario, seed| cut_and_merge_above(scenario, seed, tier));
}

/// What a power cut leaves is merged again, and the power is cut in the midst of that.
fn cut_twice(scenario: &Scenario, seed: u64, tier: Tier) -> Outcome {
    let judge = Judge::new(scenario);
    let mut outcome = Outcome::default();
    let Some(disk) = merged(&judge, &mut outcome) else { return outcome };
    let mut first: Vec<(State, String)> = Vec::new();
    let few = Cuts { exhaustive: 3, listed: 3, random: 3, garbage: Garbage::None, ..cuts(seed, tier) };
    power_cuts(disk.start(), &disk.log(), &few, |cut| first.push((cut.state.clone(), cut.to_string())));
    let mut dice = Random::new(seed);
    for _ in 0..tier.of(3, 6).min(first.len()) {
        let (state, how) = first.swap_remove(dice.below(first.len() as u64) as usize);
        if judge.is_over(&state) {
            // It cannot be asked for again.
            continue;
        }
        let second = self::disk(scenario, &state);
        if let Err(e) = merge(scenario, Arc::new(second.clone())) {
            outcome.fail(format!("seed {seed}: first: {how}; then: {e}"));
            continue;
        }
        let few = Cuts {
            exhaustive: tier.of(3, 6),
            listed: tier.of(2, 6),
            random: tier.of(2, 6),
            ..cuts(seed, tier)
        };
        outcome.states += power_cuts(second.start(), &second.log(), &few, |cut| {
            if let Err(what) = judge.cut(cut) {
                outcome.fail(format!("seed {seed}: first: {how}; then: {cut}: {what}"));
            }
        });
    }
    outcome
}

#[test]
fn no_power_cut_during_recovery_loses_anything() {
    let tier = tier();
    let some = scenarios::some(tier, tier.of(3, 2));
    let total = all("power cuts during recovery", some, |scenario, seed| cut_twice(scenario, seed, tier));
    if is_whole() {
        assert!(total.states >= tier.of(50_000, 100_000), "{total:?}");
    }
}
