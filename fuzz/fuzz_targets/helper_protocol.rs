//! The messages of helper processes. Invariants: `stratafs::fuzzing::helper_protocol`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| stratafs::fuzzing::helper_protocol(data));
