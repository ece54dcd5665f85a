//! What a layer is, read only: its format, its marks, and lookup over a stack of layers.

mod format;
pub(crate) mod marks;
pub(crate) mod stack;

pub use format::LayerFormat;
