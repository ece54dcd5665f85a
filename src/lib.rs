//! Layered copy-on-write snapshots for container runtimes.
#![deny(unsafe_code)]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]
#![deny(clippy::undocumented_unsafe_blocks)]
#![warn(missing_docs, missing_debug_implementations, unreachable_pub)]

mod compression;
mod digest;
mod error;
mod layer;
mod path;
mod progress;
mod sys;

pub use compression::Compression;
pub use digest::{ChainId, DiffId, Digest};
pub use error::{Error, ErrorKind, Result};
pub use layer::LayerFormat;
pub use path::{NAME_MAX, Name, RelPath};
pub use progress::{Phase, Progress, ProgressFn, ignore_progress};
