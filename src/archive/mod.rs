//! Layer archives: tar in and out.
//!
//! [`entry`] is the codec, over any `Read` and `Write`; [`export()`] packs a layer directory.

mod capability;
pub(crate) mod entry;
mod export;

pub(crate) use export::export;
pub use export::{ExportOptions, Exported};
