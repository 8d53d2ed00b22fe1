//! Bodies of fuzz targets over their seeds, thousands of deterministic mutations of them, and every input that
//! once broke something. An input may be refused; it may not panic, take long, or hold more than 64 MiB.
//!
//! `FUZZ_ROUNDS=N` multiplies the number of mutations, `FUZZ_SEED=N` takes other ones, `FUZZ_BODY=NAME`
//! runs one body. A failure names the file that its input was written to.
//!
//! The crates' tests include this file.
#![allow(unsafe_code, reason = "a counting allocator is unsafe by its interface")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};
use std::{env, fs};

#[path = "counting.rs"]
mod counting;

use counting::{MEMORY, counted};

/// A body with what it is run over.
pub(crate) struct Body {
    /// The name, as in `fuzz/fuzz_targets/NAME.rs` and `testdata/crashes/NAME`.
    pub(crate) name: &'static str,
    /// Runs one input.
    pub(crate) run: fn(&[u8]),
    /// Named inputs to start from.
    pub(crate) seeds: Vec<(&'static str, Vec<u8>)>,
    /// How many mutations of them are run.
    pub(crate) mutations: u64,
}

/// The longest that an input may take. A machine that is busy with something else can be slow once, so an input
/// that takes longer is tried again before it counts.
const TIME: Duration = Duration::from_secs(1);
const TRIES: u32 = 4;

/// Runs one input; the most that it made the engine hold, or what was broken.
fn run(body: &Body, input: &[u8]) -> Result<usize, String> {
    let mut took = Duration::MAX;
    for _ in 0..TRIES {
        let start = Instant::now();
        let (outcome, held) = counted(|| catch_unwind(AssertUnwindSafe(|| (body.run)(input))));
        took = took.min(start.elapsed());
        if outcome.is_err() {
            return Err("it panicked, see above".into());
        }
        if held > MEMORY {
            return Err(format!("it held {held} bytes"));
        }
        if took <= TIME {
            return Ok(held);
        }
    }
    Err(format!("it took {took:?}, in the fastest of {TRIES} tries"))
}

fn number(name: &str, default: u64) -> u64 {
    env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(default)
}

/// Runs the bodies; `mutator` gives, for a seed, what changes an input. What the allocator counts belongs to one
/// input at a time, so a test program calls this in one test only, and has no other.
pub(crate) fn run_all<M: FnMut(&mut Vec<u8>)>(bodies: Vec<Body>, mutator: impl Fn(u64) -> M) {
    let (rounds, seed) = (number("FUZZ_ROUNDS", 1), number("FUZZ_SEED", 1));
    let mut failures = Vec::new();
    let only = env::var("FUZZ_BODY").ok();
    for body in bodies.iter().filter(|b| only.as_ref().is_none_or(|name| name == b.name)) {
        let start = Instant::now();
        let mutations = body.mutations * rounds / body.seeds.len() as u64;
        let (mut inputs, mut most) = (0, 0);
        let mut check = |name: &str, input: &[u8]| {
            inputs += 1;
            match run(body, input) {
                Ok(held) => {
                    most = most.max(held);
                    true
                }
                Err(why) => {
                    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-{name}", body.name));
                    fs::write(&file, input).unwrap();
                    failures.push(format!("{}: {name}: {why}; the input is {}", body.name, file.display()));
                    false
                }
            }
        };
        let crashes = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/crashes").join(body.name);
        let mut once_broken: Vec<_> =
            fs::read_dir(crashes).into_iter().flatten().map(|entry| entry.unwrap().path()).collect();
        once_broken.sort();
        for file in once_broken {
            check(&file.file_name().unwrap().to_string_lossy(), &fs::read(&file).unwrap());
        }
        'seeds: for (name, input) in &body.seeds {
            if !check(name, input) {
                break;
            }
            let mut mutate = mutator(seed);
            for n in 0..mutations {
                let mut changed = input.clone();
                mutate(&mut changed);
                if !check(&format!("{name}-{seed}-{n}"), &changed) {
                    break 'seeds;
                }
            }
        }
        println!("{}: {inputs} inputs in {:.1?}, {} KiB at most", body.name, start.elapsed(), most >> 10);
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
