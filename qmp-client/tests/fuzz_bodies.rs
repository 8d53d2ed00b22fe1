//! The bodies of the client's fuzz targets; see the harness.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

#[path = "../../fuzz/harness.rs"]
mod harness;

use kit::Random;
use qmp_client::fuzzing::{BODIES, mutate};

#[test]
fn no_input_panics_hangs_or_takes_much_memory() {
    let bodies = BODIES.map(|body| harness::Body {
        name: body.name,
        run: body.run,
        seeds: (body.seeds)(),
        mutations: body.mutations,
    });
    harness::run_all(bodies.into(), |seed| {
        let mut random = Random::new(seed);
        move |input: &mut Vec<u8>| mutate(input, &mut random)
    });
}
