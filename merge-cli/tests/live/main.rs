//! `qmerge live` against real QEMUs and storage daemons.
//!
//! Without QEMU every test that needs it says `SKIPPED` on standard error and passes, except where `CI` is set.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod article;
mod clients;
mod control;
mod data_file;
mod elsewhere;
mod hints;
mod left;
mod look;
mod machine;
mod names;
mod oldest;
mod paused;
mod plans;
mod pull;
mod refusals;
mod snapshots;
mod space;
mod support;
