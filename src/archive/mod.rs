//! Layer archives: tar in and out.
//!
//! [`entry`] is the codec, over any `Read` and `Write`; [`apply()`] unpacks an archive into a directory,
//! [`export()`] packs a layer directory.

mod apply;
mod blocks;
mod capability;
pub(crate) mod entry;
mod export;
mod output;
pub(crate) mod record;

#[cfg(fuzzing)]
pub(crate) use apply::model::check as check_against_model;
pub use apply::{
    Applied, ApplyLimits, ApplyOptions, Devices, LayerTarget, Ownership, UnionXattrs, XattrPolicy,
    apply_layer,
};
pub(crate) use apply::{Below, apply};
#[doc(hidden)]
pub use entry::{ListedEntry, list_archive};
pub use export::{ArchiveForm, ExportOptions, Exported, SecurityLabels, diff_trees, export_diff};
pub(crate) use export::{export, export_trees};
pub use record::RecordOptions;
