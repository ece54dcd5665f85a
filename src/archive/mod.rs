//! Layer archives: tar in and out.

pub(crate) mod entry;
