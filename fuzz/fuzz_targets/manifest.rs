//! Manifests and configurations of images. Invariants: `stratafs::fuzzing::manifest`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| stratafs::fuzzing::manifest(data));
