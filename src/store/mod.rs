//! The store: the facade that embedders use, over snapshots, their metadata and their mounts.

mod filter;

pub(crate) use filter::Fields;
pub use filter::Filter;
