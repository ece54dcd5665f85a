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

mod digest;
mod driver;
mod error;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
mod layer;
mod path;
mod progress;
mod store;
mod sys;

pub use digest::{ChainId, DiffId, Digest};
#[doc(hidden)]
pub use driver::Rung;
pub use driver::{
    Driver, Feature, Guard, MAX_LAYERS, Mount, MountIdentity, MountOptions, MountRequest,
    MountState, NamespaceId, OverlayDriver, Probe, ProbeTarget, Restrictions, UpperDir, Visibility,
    unmount_at,
};
pub use error::{Error, ErrorKind, Result};
pub use layer::{LayerFormat, Usage};
pub use path::{NAME_MAX, Name, RelPath};
pub use progress::{Phase, Progress, ProgressFn, ignore_progress};
pub use store::{
    CheckReport, CommitOptions, Durability, Filter, GcReport, ImageRecord, Info, Kind, Labels,
    Problem, Store, StoreOptions,
};
#[doc(hidden)]
pub use store::{DurablePoint, DurablePointHook};
