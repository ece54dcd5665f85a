//! What a layer is, read only: its format, its marks, and lookup over a stack of layers.

pub(crate) mod cursor;
pub(crate) mod descent;
pub(crate) mod entry;
pub(crate) mod foreign;
mod format;
#[cfg(feature = "fuse")]
pub(crate) mod lower_marks;
pub(crate) mod marks;
pub(crate) mod stack;
pub(crate) mod usage;
pub(crate) mod walk;

pub use foreign::ForeignFormat;
pub use format::LayerFormat;
pub use usage::Usage;
