//! Mount options as text. Invariants: `stratafs::fuzzing::mount_options`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| stratafs::fuzzing::mount_options(data));
