#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| qcow2::fuzzing::restore(bytes));
