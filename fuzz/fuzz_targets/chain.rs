#![no_main]

#[path = "../limits.rs"]
mod limits;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| limits::run(qcow2::fuzzing::chain, bytes));
