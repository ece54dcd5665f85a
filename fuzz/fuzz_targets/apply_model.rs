//! Unpacking a layer archive, against a model. Invariants: `stratafs::fuzzing::apply_model`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| stratafs::fuzzing::apply_model(data));
