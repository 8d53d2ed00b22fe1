#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| qmp_client::fuzzing::state(bytes));
