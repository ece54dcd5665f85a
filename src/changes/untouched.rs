//! What is known of a tree that was made as a copy, without reading it: that a part of it is still as
//! it was made.
//!
//! Whoever made the copy knows a moment since when it has been edited. What has no later ctime, and is
//! in a directory that is still where it was, has not been edited: nobody can set a ctime. A directory
//! is where it was if its own ctime, or that of the directory above, is no later either: to move it
//! changes both. So most of a tree need not be read to be compared, which counts where mtimes, coming
//! from archives, say little.

use crate::layer::stack::Visible;
use crate::sys::stat::{Stat, Time};

/// What is known of a directory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Untouched {
    /// The moment; none where it is not known.
    since: Option<Time>,
    /// It is where it was.
    in_place: bool,
    /// No name in it was made or removed, nor its attributes changed.
    itself: bool,
}

impl Untouched {
    /// Of the root of a copy.
    pub(super) fn root(since: Option<Time>) -> Self {
        Untouched { since, in_place: true, itself: false }
    }

    /// Of an entry of the directory.
    pub(super) fn entry(self, stat: &Stat) -> Self {
        let itself = self.since.is_some_and(|since| stat.ctime <= since);
        Untouched { itself, in_place: self.in_place && (self.itself || itself), ..self }
    }

    /// Whether this entry of a copy is surely equal to `old`, of which it was made or its directory was.
    pub(super) fn is_equal(self, new: &Visible, old: &Visible) -> bool {
        // A clock that was set back may have given it an early ctime: then something differs, as a rule.
        let of = |s: &Stat| (s.file_type, s.mode, s.uid, s.gid, s.rdev, s.mtime);
        self.in_place
            && self.itself
            && of(&new.stat) == of(&old.stat)
            && (new.stat.is_dir() || new.stat.size == old.stat.size)
    }
}
