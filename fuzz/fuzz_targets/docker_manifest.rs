//! `manifest.json` of Docker's archives. Invariants: `stratafs::fuzzing::docker_manifest`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| stratafs::fuzzing::docker_manifest(data));
