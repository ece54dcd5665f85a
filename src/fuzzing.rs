//! Doors for the fuzz targets in `fuzz/`: pure functions over bytes, each of which asserts what must
//! hold for any input. Compiled under `cfg(fuzzing)` alone, which cargo-fuzz sets; no part of the
//! crate's interface.
#![allow(clippy::expect_used)]

use std::borrow::Cow;

use crate::error::ErrorKind;
use crate::store::{Fields, Filter};

/// A snapshot with every field that a filter may ask for.
struct Everything;

impl Fields for Everything {
    fn field(&self, path: &[&str]) -> Option<Cow<'_, str>> {
        assert!(!path.is_empty(), "a path has at least one part");
        (path.len() < 4).then(|| path.join(".").into())
    }
}

/// The filter language: any text is either a filter or an invalid argument that says where; a filter
/// gives its text back, means the same when read again, and means the same when ANDed with itself.
pub fn filter(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let filter = match Filter::parse(text) {
        Ok(filter) => filter,
        Err(e) => {
            assert_eq!(e.kind(), ErrorKind::InvalidArgument);
            assert!(e.to_string().contains("at byte "), "{e}");
            return;
        }
    };
    assert_eq!(filter.to_string(), text);
    let holds = filter.matches(&Everything);
    if !text.is_empty()
        && let Ok(twice) = Filter::parse(&format!("{text},{text}"))
    {
        assert_eq!(twice.matches(&Everything), holds);
    }
    let again = Filter::parse(text).expect("what was read once is read again");
    assert_eq!(again.matches(&Everything), holds);
    assert_eq!(Filter::any_matches(&[filter], &Everything), holds);
}
