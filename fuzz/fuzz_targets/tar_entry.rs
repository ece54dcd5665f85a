//! The tar codec. Invariants: `stratafs::fuzzing::tar_entry`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| stratafs::fuzzing::tar_entry(data));
