//! What of a plain tree this archive made: its whiteouts do not mean that.
//!
//! In a directory that the archive made everything is the archive's, so of those only the directory is
//! remembered; of a file only if its directory was there before. All as hashes of 64 bits, keyed so
//! that no archive can choose what they collide with: 31 bytes for a file at most and 58 for a
//! directory, the moment when a table grows included. Two names with the same hash would leave an old
//! file where it should be deleted; among ten million new names and as many old ones the chance of
//! one such pair is one in a hundred thousand.
//!
//! A directory is known by its inode, which cannot be another's while it exists, and is forgotten when
//! a new one gets the number ([`Placed::made`]).

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};

use super::target::Inode;
use crate::path::Name;

/// What this archive made.
#[derive(Debug, Default)]
pub(super) struct Placed {
    directories: HashMap<u64, Facts>,
    /// Of what is no directory, in directories from before.
    names: HashSet<u64>,
    key: RandomState,
}

/// What is known of a directory.
#[derive(Clone, Copy, Debug, Default)]
struct Facts(u8);

impl Facts {
    /// It was not there before.
    const MADE: u8 = 1;
    /// It has an entry of its own.
    const OWN: u8 = 2;
    /// Something in it, or further below, was made.
    const WAY: u8 = 4;
    /// It has nothing from before any more.
    const CLEARED: u8 = 8;

    fn any(self, of: u8) -> bool {
        self.0 & of != 0
    }
}

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// What was there before.
    Before,
    /// A directory that no entry asked for, with something of the archive in or below it.
    OnTheWay,
    /// What an entry made.
    Own,
}

impl Placed {
    fn facts(&self, directory: Inode) -> Facts {
        self.directories.get(&self.key.hash_one(directory)).copied().unwrap_or_default()
    }

    /// Adds a fact; returns whether it is news.
    fn note(&mut self, directory: Inode, fact: u8) -> bool {
        let facts = self.directories.entry(self.key.hash_one(directory)).or_default();
        let news = !facts.any(fact);
        facts.0 |= fact;
        news
    }

    /// Notes that a directory was made, whoever had its inode number before.
    pub(super) fn made(&mut self, directory: Inode) {
        self.directories.insert(self.key.hash_one(directory), Facts(Facts::MADE));
    }

    /// Notes that a directory has an entry.
    pub(super) fn own(&mut self, directory: Inode) {
        self.note(directory, Facts::OWN);
    }

    /// Notes that something was made in a directory. If it returns true, all above must be told, too.
    pub(super) fn way(&mut self, directory: Inode) -> bool {
        self.note(directory, Facts::WAY)
    }

    /// Notes that an entry made what is no directory.
    pub(super) fn name(&mut self, parent: Inode, name: &Name) {
        if !self.facts(parent).any(Facts::MADE) {
            self.names.insert(self.key.hash_one((parent, name)));
        }
    }

    /// Notes that a directory has nothing from before any more, so that it is not walked for every
    /// mark that says so again.
    pub(super) fn clear(&mut self, directory: Inode) {
        self.note(directory, Facts::CLEARED);
    }

    /// Whether that was noted for one of these.
    pub(super) fn is_cleared(&self, mut directories: impl Iterator<Item = Inode>) -> bool {
        directories.any(|inode| self.facts(inode).any(Facts::CLEARED))
    }

    /// What `name` is in `parent`; `directory` is its inode if it is one.
    pub(super) fn find(&self, parent: Inode, name: &Name, directory: Option<Inode>) -> Found {
        let parent_made = self.facts(parent).any(Facts::MADE);
        match directory.map(|inode| self.facts(inode)) {
            Some(facts) if facts.any(Facts::OWN) => Found::Own,
            Some(facts) if parent_made || facts.any(Facts::MADE | Facts::WAY) => Found::OnTheWay,
            None if parent_made || self.names.contains(&self.key.hash_one((parent, name))) => {
                Found::Own
            }
            _ => Found::Before,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_what_was_made_from_what_was_there() {
        let name = |s: &str| Name::new(s).unwrap();
        let (root, old, new, way) = ((1, 1), (1, 2), (1, 3), (1, 4));
        let mut placed = Placed::default();
        placed.made(new);
        placed.name(old, &name("a"));
        placed.name(new, &name("b"));
        assert!(placed.way(way) && !placed.way(way));
        for (parent, n, directory, found) in [
            (old, "a", None, Found::Own),
            (old, "b", None, Found::Before),
            (old, "a", Some((1, 9)), Found::Before),
            (new, "anything", None, Found::Own),
            (root, "old", Some(old), Found::Before),
            (root, "new", Some(new), Found::OnTheWay),
            (root, "way", Some(way), Found::OnTheWay),
            (root, "a", None, Found::Before),
        ] {
            assert_eq!(placed.find(parent, &name(n), directory), found, "{n}");
        }
        assert_eq!(placed.names.len(), 1, "what is in a new directory is not remembered");
        placed.own(old);
        assert_eq!(placed.find(root, &name("old"), Some(old)), Found::Own);
        placed.clear(old);
        assert!(
            placed.is_cleared([root, old].into_iter()) && !placed.is_cleared([root].into_iter())
        );
        placed.made(old);
        assert_eq!(placed.find(root, &name("old"), Some(old)), Found::OnTheWay);
        assert!(!placed.is_cleared([old].into_iter()));
    }
}
