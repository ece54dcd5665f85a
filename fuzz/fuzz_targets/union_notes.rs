//! What a union notes of copies for the next one. Invariants: `stratafs::fuzzing::union_notes`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| stratafs::fuzzing::union_notes(data));
