//! Names of marks and redirects. Invariants: `stratafs::fuzzing::marks`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| stratafs::fuzzing::marks(data));
