//! Layered copy-on-write snapshots for container runtimes.
#![deny(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![deny(clippy::undocumented_unsafe_blocks)]
#![warn(missing_docs, missing_debug_implementations, unreachable_pub)]

mod archive;
mod changes;
mod compression;
mod digest;
mod error;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
mod image;
mod layer;
mod path;
mod progress;
mod store;
mod sys;

pub use archive::apply::{
    Applied, ApplyLimits, ApplyOptions, Devices, LayerTarget, Ownership, UnionXattrs, XattrPolicy,
    apply_layer,
};
pub use changes::{Change, ChangeKind};
pub use compression::Compression;
pub use digest::{ChainId, DiffId, Digest};
pub use error::{Error, ErrorKind, Result};
pub use image::{
    BlobWriter, Image, ImageLayer, ImageLayout, ImageSelector, LayoutWriter, Platform,
};
pub use layer::{LayerFormat, Usage};
pub use path::{NAME_MAX, Name, RelPath};
pub use progress::{Phase, Progress, ProgressFn, ignore_progress};
pub use store::{
    CheckReport, CommitOptions, Durability, Filter, GcReport, ImageRecord, Info, Kind, Labels,
    Problem, Store, StoreOptions,
};
#[doc(hidden)]
pub use store::{DurablePoint, DurablePointHook};

/// The types of the OCI specifications, re-exported on purpose: [`Image::configuration`] gives one of
/// them, and an embedder should not have to guess which version of the crate they are of.
pub use oci_spec;
