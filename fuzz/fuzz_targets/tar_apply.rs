//! Unpacking a layer archive. Invariants: `stratafs::fuzzing::tar_apply`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| stratafs::fuzzing::tar_apply(data));
