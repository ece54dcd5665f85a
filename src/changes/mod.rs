//! What differs between a layer and what lies below it ([`upper()`]), or between any two trees
//! ([`trees()`]).
//!
//! Two files are equal if they are the same inode; else if type, mode, owner, device number, link
//! target, xattrs (those of unions aside), size and mtime are, the latter to the nanosecond and not on
//! a whole second; where only the mtime differs or is on a whole second, contents decide. A directory
//! that differs only in times or size is no change.
//!
//! Both ways say the same of every layer whose edits moved mtimes, but for one thing: a directory that
//! was deleted and made again with the attributes that it had is `M` from the upper, which is opaque
//! there, while two trees do not show it.

mod equal;
mod trees;
mod untouched;
mod upper;

#[cfg(test)]
mod agreement_tests;

use std::fmt;

use crate::path::RelPath;

pub(crate) use equal::Mtimes;
pub(crate) use trees::{Difference, added, are_equal, between, between_since, trees, trees_since};
pub(crate) use upper::upper;

/// What happened to a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ChangeKind {
    /// It is new.
    Added,
    /// It was there and differs: another type, content or attribute; or it is a directory that was
    /// deleted and made again.
    Modified,
    /// It is gone, with all that was below it.
    Deleted,
}

impl ChangeKind {
    /// The letter of listings: A, M or D.
    pub fn letter(self) -> char {
        match self {
            ChangeKind::Added => 'A',
            ChangeKind::Modified => 'M',
            ChangeKind::Deleted => 'D',
        }
    }
}

/// One difference.
///
/// Displayed as `A /path`, with bytes that are not UTF-8 replaced; programs use the fields.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Change {
    /// The path, from the root of the snapshot.
    pub path: RelPath,
    /// What happened to it.
    pub kind: ChangeKind,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} /{}", self.kind.letter(), self.path.as_path().display())
    }
}
