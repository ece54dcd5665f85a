//! Whole trees, as an ordinary file system shows them: made of a stack of layers ([`materialise`]),
//! and made a layer again ([`delta`]).
//!
//! Both are the same work, the second on fewer paths: a [`writer`] is told of paths in the order of a
//! walk, and makes each as it is in its source: type, owner, mode, times to the nanosecond, xattrs,
//! access control lists and capabilities, hard links among what is written, holes. Data is shared with
//! the source where the file system can. No symlink is followed, no name is taken for UTF-8, depth is
//! no limit, and descriptors are bounded; memory is that of listings on the way down, and of files
//! with several names until all of them are met.
//!
//! A tree has no marks. What would be one in a layer can be neither shown nor kept: the format's own
//! xattrs are left out both ways, and a tree with a name or device that a layer would take for a mark
//! cannot become one; overlayfs does not let anybody make such either.

mod attributes;
mod delta;
mod links;
mod materialise;
mod writer;

#[cfg(test)]
mod tests;

pub(crate) use delta::{count_delta, write_delta};
pub(crate) use materialise::materialise;
