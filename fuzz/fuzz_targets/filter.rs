//! The filter language of snapshot walks. Invariants: `stratafs::fuzzing::filter`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| stratafs::fuzzing::filter(data));
