//! Layer archives: tar in and out.

pub(crate) mod apply;
pub(crate) mod entry;
