//! The harness judges itself: wrong orders of writing, made from the log of a right one, must be found.

use std::collections::BTreeSet;

use qcow2::storage::sim::{Cuts, DiskOp, Garbage, SimHost, power_cuts};

use crate::chain::Scenario;
use crate::judge::Judge;
use crate::power::{cuts, undisturbed};
use crate::run::{Outcome, Tier, count, say};
use crate::scenarios;

/// What a write to base changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Header,
    RefcountTable,
    Refcounts,
    L1,
    L2,
    Data,
}

/// Where the tables of an image lie: a reader of its own, so that the engine cannot hide its mistakes.
struct Tables {
    cluster: u64,
    places: Vec<(Part, std::ops::Range<u64>)>,
}

impl Tables {
    fn of(bytes: &[u8]) -> Self {
        let word = |at: u64| {
            bytes
                .get(at as usize..at as usize + 8)
                .map_or(0, |b| b.iter().fold(0, |w, b| w << 8 | u64::from(*b)))
        };
        let cluster = 1u64 << (word(16) & 63);
        let offset = |entry: u64| entry & 0x00ff_ffff_ffff_fe00;
        let mut places = vec![(Part::Header, 0..cluster)];
        let (table, table_len) = (word(48), (word(56) >> 32) * cluster);
        places.push((Part::RefcountTable, table..table + table_len));
        let blocks = (0..table_len / 8).map(|n| offset(word(table + n * 8))).filter(|at| *at != 0);
        places.extend(blocks.map(|at| (Part::Refcounts, at..at + cluster)));
        let (l1, entries) = (word(40), word(32) & 0xffff_ffff);
        places.push((Part::L1, l1..l1 + entries * 8));
        let tables = (0..entries).map(|n| offset(word(l1 + n * 8))).filter(|at| *at != 0);
        places.extend(tables.map(|at| (Part::L2, at..at + cluster)));
        Self { cluster, places }
    }

    fn part(&self, at: u64) -> Part {
        self.places.iter().find(|(_, place)| place.contains(&at)).map_or(Part::Data, |(part, _)| *part)
    }
}

/// The log of a merge, and what is known about it.
struct RecordedLog {
    log: Vec<DiskOp>,
    base: u64,
    before: Tables,
    after: Tables,
}

impl RecordedLog {
    fn of(scenario: &Scenario, disk: &SimHost) -> Self {
        let path = scenario.path(scenario.base);
        let tables = |state: &qcow2::storage::sim::State| Tables::of(&state.content(path).unwrap());
        let base = disk.start().inode(path).unwrap();
        Self { log: disk.log(), base, before: tables(disk.start()), after: tables(&disk.now()) }
    }

    /// What an entry changes in base, if it does; and whether that is a table that was there before.
    fn part(&self, op: &DiskOp) -> Option<(Part, bool)> {
        let DiskOp::Write { file, offset, .. } = op else { return None };
        if *file != self.base {
            return None;
        }
        let (old, new) = (self.before.part(*offset), self.after.part(*offset));
        Some(if old == Part::Data { (new, false) } else { (old, old == new) })
    }

    fn is_barrier_of_base(&self, op: &DiskOp) -> bool {
        matches!(op, DiskOp::Sync { file, .. } if *file == self.base)
    }

    /// The entries between the barriers of base, each group with its barrier.
    fn epochs(&self) -> Vec<&[DiskOp]> {
        self.log.split_inclusive(|op| self.is_barrier_of_base(op)).collect()
    }

    fn parts(&self, epoch: &[DiskOp]) -> BTreeSet<(Part, bool)> {
        epoch.iter().filter_map(|op| self.part(op)).collect()
    }

    /// The log with two groups exchanged where `first` and `second` say that they are the ones; the barriers
    /// stay where they are.
    fn exchanged(
        &self,
        first: impl Fn(&BTreeSet<(Part, bool)>) -> bool,
        second: impl Fn(&BTreeSet<(Part, bool)>) -> bool,
    ) -> Option<Vec<DiskOp>> {
        let mut epochs = self.epochs();
        let at =
            epochs.windows(2).position(|two| first(&self.parts(two[0])) && second(&self.parts(two[1])))?;
        epochs.swap(at, at + 1);
        Some(epochs.concat())
    }

    /// The log without the barrier between two groups.
    fn joined(
        &self,
        first: impl Fn(&BTreeSet<(Part, bool)>) -> bool,
        second: impl Fn(&BTreeSet<(Part, bool)>) -> bool,
    ) -> Option<Vec<DiskOp>> {
        let epochs = self.epochs();
        let at =
            epochs.windows(2).position(|two| first(&self.parts(two[0])) && second(&self.parts(two[1])))?;
        let mut log = epochs.concat();
        let end: usize = epochs[..=at].iter().map(|epoch| epoch.len()).sum();
        log.remove(end - 1);
        Some(log)
    }
}

/// A way to spoil the order.
type Spoil = fn(&RecordedLog) -> Option<Vec<DiskOp>>;

fn has(parts: &BTreeSet<(Part, bool)>, part: Part) -> bool {
    parts.iter().any(|(p, _)| *p == part)
}

fn live(parts: &BTreeSet<(Part, bool)>) -> bool {
    parts.contains(&(Part::L2, true)) || parts.contains(&(Part::L1, true))
}

fn staged(parts: &BTreeSet<(Part, bool)>) -> bool {
    has(parts, Part::Refcounts) && has(parts, Part::Data) && !live(parts)
}

fn fresh_table(parts: &BTreeSet<(Part, bool)>) -> bool {
    parts.contains(&(Part::L2, false))
}

fn freed(parts: &BTreeSet<(Part, bool)>) -> bool {
    has(parts, Part::Refcounts) && !live(parts) && !fresh_table(parts)
}

const WRONG: [(&str, Spoil); 8] = [
    ("no barrier at all", |r| Some(r.log.iter().filter(|op| !op.is_barrier()).cloned().collect())),
    ("one barrier at the end", |r| {
        let mut log: Vec<DiskOp> = r.log.iter().filter(|op| !op.is_barrier()).cloned().collect();
        log.push(DiskOp::Sync { file: r.base, done: true });
        Some(log)
    }),
    ("no barrier of base", |r| Some(r.log.iter().filter(|op| !r.is_barrier_of_base(op)).cloned().collect())),
    ("a new L2 table together with its L1 entry", |r| {
        r.joined(fresh_table, |p| p.contains(&(Part::L1, true)))
    }),
    ("mappings together with refcounts", |r| r.joined(staged, live)),
    ("mappings before refcounts", |r| r.exchanged(staged, live)),
    ("clusters freed before the mappings change", |r| r.exchanged(live, freed)),
    ("the switch before the data", |r| {
        let (switch, rest): (Vec<DiskOp>, Vec<DiskOp>) = r.log.iter().cloned().partition(|op| match op {
            DiskOp::Sync { file, .. } | DiskOp::Write { file, .. } | DiskOp::SetLen { file, .. } => {
                *file != r.base
            }
            _ => true,
        });
        Some([switch, rest].concat())
    }),
];

/// How many states of a log are wrong.
fn wrong_states(judge: &Judge<'_>, log: &[DiskOp], cuts: &Cuts) -> (u64, u64) {
    let mut wrong = 0;
    let states =
        power_cuts(judge.start(), log, cuts, |cut| wrong += u64::from(judge.state(&cut.state).is_err()));
    (states, wrong)
}

/// Chains with old bytes in free clusters: where those are zeros, some wrong orders look right.
fn chains() -> Vec<Scenario> {
    scenarios::all(Tier::Quick)
        .into_iter()
        .filter(|s| s.name.starts_with("entry") && s.layers[0].is_qcow2)
        .collect()
}

#[test]
fn wrong_orders_are_found() {
    let mut lines = Vec::new();
    for (name, spoil) in WRONG {
        let (total, _) = count(chains().into_iter().step_by(3).collect(), |scenario, seed| {
            let judge = Judge::new(scenario);
            let disk = undisturbed(&judge).unwrap();
            let recorded = RecordedLog::of(scenario, &disk);
            let mut outcome = Outcome::default();
            let Some(log) = spoil(&recorded) else { return outcome };
            let few = Cuts {
                exhaustive: 5,
                listed: 2,
                random: 2,
                garbage: Garbage::None,
                ..cuts(seed, Tier::Quick)
            };
            let (states, wrong) = wrong_states(&judge, &log, &few);
            outcome.states = states;
            (0..wrong).for_each(|_| outcome.fail(String::new()));
            outcome
        });
        say(&format!("crash tests, wrong order, {name}: {} states, {} found", total.states, total.failed));
        lines.push((name, total.states, total.failed));
    }
    for (name, states, found) in lines {
        assert!(states > 0 && found > 0, "{name}: {states} states, {found} found");
    }
}

/// Every barrier of base that a merge has is there for a reason, in some chain: without it, some state is wrong.
#[test]
fn a_missing_barrier_is_found() {
    let (total, _) = count(chains().into_iter().step_by(23).collect(), |scenario, seed| {
        let judge = Judge::new(scenario);
        let disk = undisturbed(&judge).unwrap();
        let log = disk.log();
        let few =
            Cuts { exhaustive: 5, listed: 2, random: 2, garbage: Garbage::None, ..cuts(seed, Tier::Quick) };
        let mut outcome = Outcome::default();
        for (at, _) in log.iter().enumerate().filter(|(_, op)| op.is_barrier()) {
            let mut without = log.clone();
            without.remove(at);
            let (_, wrong) = wrong_states(&judge, &without, &few);
            outcome.states += 1;
            if wrong > 0 {
                outcome.fail(String::new());
            }
        }
        outcome
    });
    say(&format!(
        "crash tests, one barrier missing: {} barriers of {} merges, {} of them found to be needed",
        total.states, total.scenarios, total.failed
    ));
    assert!(total.failed * 4 > total.states, "{} of {} barriers", total.failed, total.states);
}

/// Garbage in a sector of live metadata is found where no other file has its content.
#[test]
fn garbage_that_nothing_heals_is_found() {
    let (total, _) = count(chains().into_iter().step_by(23).collect(), |scenario, seed| {
        let judge = Judge::new(scenario);
        let disk = undisturbed(&judge).unwrap();
        let few = Cuts {
            exhaustive: 0,
            listed: 0,
            random: 0,
            garbage: Garbage::Sectors,
            damaged: 4,
            seed,
            ..cuts(seed, Tier::Quick)
        };
        let mut outcome = Outcome::default();
        power_cuts(judge.start(), &disk.log(), &few, |cut| {
            if cut.garbage.is_empty() {
                return;
            }
            let mut alone = cut.state.clone();
            let others = cut.state.names().filter(|name| judge.start().inode(name).is_none());
            others.for_each(|name| alone.apply(&DiskOp::Unlink { path: name.to_owned() }));
            outcome.states += 1;
            if judge.damaged(&alone).is_err() {
                outcome.fail(String::new());
            }
        });
        outcome
    });
    say(&format!("crash tests, garbage that nothing heals: {} states, {} found", total.states, total.failed));
    assert!(total.failed > 0, "{} states", total.states);
}

/// The tables that this file finds are those that are there.
#[test]
fn tables_are_found() {
    let scenario = chains().remove(0);
    let tables = Tables::of(&scenario.layers[0].file);
    assert_eq!(tables.cluster, scenario.layers[0].cluster_size);
    let parts: BTreeSet<Part> = tables.places.iter().map(|(part, _)| *part).collect();
    assert!(parts.contains(&Part::Refcounts) && parts.contains(&Part::L1), "{parts:?}");
}
