//! Scenarios on all cores, and what came out.

use std::collections::{BTreeMap, VecDeque};
use std::io::Write;
use std::sync::Mutex;
use std::time::Instant;

use qcow2::storage::sim::Garbage;

use crate::chain::Scenario;

/// How much is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tier {
    /// Few sets of each scenario.
    Quick,
    /// With `QMERGE_CRASH=full`.
    Full,
}

/// The tier that was asked for.
pub(crate) fn tier() -> Tier {
    match std::env::var("QMERGE_CRASH").as_deref() {
        Ok("full") => Tier::Full,
        Ok("all") | Err(_) => Tier::Quick,
        Ok(other) => panic!("QMERGE_CRASH={other}: only 'all' and 'full' are known"),
    }
}

/// One of how many scenarios is run: each with `QMERGE_CRASH=all` or `full`, a sample of them in a run that was not asked
/// for more.
pub(crate) fn share() -> usize {
    if std::env::var_os("QMERGE_CRASH").is_some() { 1 } else { 9 }
}

/// Whether the numbers of a whole run are to be expected.
pub(crate) fn is_whole() -> bool {
    share() == 1 && std::env::var_os("QMERGE_CRASH_ONLY").is_none()
}

/// What may hold garbage after a power cut: sectors, unless `QMERGE_CRASH_GARBAGE` says `blocks` or `none`.
pub(crate) fn garbage() -> Garbage {
    match std::env::var("QMERGE_CRASH_GARBAGE").as_deref() {
        Ok("none") => Garbage::None,
        Ok("blocks") => Garbage::Blocks,
        Ok(other) => panic!("QMERGE_CRASH_GARBAGE={other}: only 'blocks' and 'none' are known"),
        Err(_) => Garbage::Sectors,
    }
}

impl Tier {
    /// One of two numbers.
    pub(crate) fn of<T>(self, quick: T, full: T) -> T {
        if self == Self::Quick { quick } else { full }
    }
}

/// What came out.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) scenarios: u64,
    pub(crate) states: u64,
    pub(crate) failed: u64,
    /// How often what was wrong.
    pub(crate) kinds: BTreeMap<String, u64>,
    /// The first failures, in words.
    pub(crate) failures: Vec<String>,
}

impl Outcome {
    pub(crate) fn fail(&mut self, what: String) {
        self.failed += 1;
        let kind = what.rsplit(": ").next().unwrap_or_default();
        // Numbers tell failures of one kind apart.
        let words = kind.split(|c: char| !c.is_alphabetic()).filter(|word| word.len() > 3);
        *self.kinds.entry(words.collect::<Vec<_>>().join(" ")).or_default() += 1;
        if self.failures.len() < 5 {
            self.failures.push(what);
        }
    }

    fn add(&mut self, other: Self) {
        self.scenarios += other.scenarios;
        self.states += other.states;
        self.failed += other.failed;
        other.kinds.into_iter().for_each(|(kind, count)| *self.kinds.entry(kind).or_default() += count);
        self.failures.extend(other.failures);
    }
}

/// The seed of a scenario's random choices: from its name, and from `QMERGE_TEST_SEED`.
pub(crate) fn seed(name: &str) -> u64 {
    let given: u64 = std::env::var("QMERGE_TEST_SEED").map_or(0, |seed| seed.parse().unwrap());
    let hash = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    name.bytes().fold(0xcbf2_9ce4_8422_2325, hash) ^ given
}

/// Runs every scenario that `QMERGE_CRASH_ONLY` is a part of the name of, on all cores, each on one thread, so
/// that the same seed gives the same order of writes. Says at the end what came out.
///
/// # Panics
/// If anything failed.
pub(crate) fn all(
    what: &str,
    scenarios: Vec<Scenario>,
    f: impl Fn(&Scenario, u64) -> Outcome + Sync,
) -> Outcome {
    let total = count(scenarios, f);
    let start = total.1;
    let total = total.0;
    say(&format!(
        "crash tests, {what}: {} scenarios, {} states, {} failures ({:.0} s)",
        total.scenarios,
        total.states,
        total.failed,
        start.elapsed().as_secs_f64()
    ));
    for (kind, count) in &total.kinds {
        say(&format!("  {count} times: {kind}"));
    }
    assert!(total.failed == 0, "{} failures; the first ones:\n{}", total.failed, total.failures.join("\n"));
    total
}

/// As [`all`], without judging.
pub(crate) fn count(
    scenarios: Vec<Scenario>,
    f: impl Fn(&Scenario, u64) -> Outcome + Sync,
) -> (Outcome, Instant) {
    let start = Instant::now();
    let only = std::env::var("QMERGE_CRASH_ONLY").unwrap_or_default();
    let queue: Mutex<VecDeque<Scenario>> =
        Mutex::new(scenarios.into_iter().filter(|scenario| scenario.name.contains(&only)).collect());
    let total = Mutex::new(Outcome::default());
    let work = || {
        while let Some(scenario) = { queue.lock().unwrap().pop_front() } {
            let seed = seed(&scenario.name);
            let began = Instant::now();
            let mut outcome = f(&scenario, seed);
            outcome.scenarios += 1;
            outcome.failures.iter_mut().for_each(|text| *text = format!("[{}] {text}", scenario.name));
            if std::env::var_os("QMERGE_CRASH_TIMES").is_some() {
                say(&format!("{}: {} states, {:?}", scenario.name, outcome.states, began.elapsed()));
            }
            total.lock().unwrap().add(outcome);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap().install(work));
        }
    });
    (total.into_inner().unwrap(), start)
}

/// Says something even when the test succeeds.
pub(crate) fn say(text: &str) {
    writeln!(std::io::stderr().lock(), "{text}").unwrap();
}
