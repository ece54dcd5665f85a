//! The list of options that `stratafs-fuse` takes after `-o`.
//!
//! Invariants: no list makes it panic; what is refused is refused with a text; directories have no empty
//! names; and a list without a backslash names in `lowerdir=` exactly the parts between its colons.
#![no_main]

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

#[allow(dead_code)]
#[path = "../../src/bin/stratafs-fuse/options.rs"]
mod options;

use options::{Caller, Request};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let caller = Caller { reads_trusted: data.len() % 2 == 0, is_root: data.len() % 3 == 0 };
    let arguments = ["/mnt".into(), "-o".into(), OsString::from_vec(data.to_vec())];
    match options::parse(arguments, caller) {
        Err(message) => assert!(!message.is_empty()),
        Ok(Request::Mount(request)) => {
            let options = &request.options;
            assert!(options.upper.is_some() || !options.lowers.is_empty());
            assert!(options.lowers.iter().all(|layer| !layer.dir.as_os_str().is_empty()));
            for range in options.uids.iter().chain(&options.gids) {
                assert!(range.len > 0 && range.host.checked_add(range.len - 1).is_some());
            }
            if let Some(list) = data.strip_prefix(b"lowerdir=")
                && !data.iter().any(|b| matches!(b, b'\\' | b','))
            {
                assert_eq!(options.lowers.len(), list.split(|b| *b == b':').count());
            }
        }
        Ok(other) => panic!("{other:?} of options alone"),
    }
});
