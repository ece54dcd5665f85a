//! Giving an archive back from its record. Invariants: `stratafs::fuzzing::record`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| stratafs::fuzzing::record(data));
