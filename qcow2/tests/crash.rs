//! Merges on a simulated disk whose power is cut, or whose operations fail, at every point: nothing that the
//! guest sees is lost, no image is corrupt, and the same merge goes on.
//!
//! Hundreds of small chains are merged, one for each kind of entry, table, growth and switch. Every state that
//! a power cut may leave of each (see [`qcow2::storage::sim`]) is judged: check, guest's bytes through every
//! layer that must be intact, the same merge again, check, guest's bytes. The same harness is run on wrong
//! orders of writing, and must find them. `QMERGE_CRASH=full` tries more than a million states.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests")]

#[path = "crash/chain.rs"]
mod chain;
#[path = "crash/fail.rs"]
mod fail;
#[path = "crash/judge.rs"]
mod judge;
#[path = "crash/orders.rs"]
mod orders;
#[path = "crash/power.rs"]
mod power;
#[path = "crash/rebase.rs"]
mod rebase;
#[path = "crash/run.rs"]
mod run;
#[path = "crash/scenarios.rs"]
mod scenarios;
#[path = "crash/table.rs"]
mod table;
#[path = "crash/verbs.rs"]
mod verbs;
