//! Which names of a plain tree this archive made: its whiteouts do not mean those.
//!
//! A tree of names, since that is smaller than whole paths. The way to a name is remembered as
//! well, so what is not found here has nothing of the archive below it either.

use std::collections::HashMap;

use crate::path::Name;

/// The names that were made.
#[derive(Debug)]
pub(super) struct Placed(Vec<Node>);

#[derive(Debug, Default)]
struct Node {
    /// Made by an entry, not just on the way to one.
    own: bool,
    /// A directory that has nothing from before any more.
    cleared: bool,
    below: HashMap<Name, usize>,
}

impl Default for Placed {
    /// The root alone.
    fn default() -> Self {
        Placed(vec![Node::default()])
    }
}

impl Placed {
    /// Adds the name at the end of `names`, which start at the root.
    pub(super) fn add<'a>(&mut self, names: impl Iterator<Item = &'a Name>) {
        let mut at = 0;
        for name in names {
            let next = self.0.len();
            let Some(node) = self.0.get_mut(at) else {
                return;
            };
            at = match node.below.get(name) {
                Some(known) => *known,
                None => {
                    node.below.insert(name.clone(), next);
                    self.0.push(Node::default());
                    next
                }
            };
        }
        if let Some(node) = self.0.get_mut(at) {
            node.own = true;
        }
    }

    /// The name at the end of `names`, if it or something below it was added.
    pub(super) fn find<'a>(&self, mut names: impl Iterator<Item = &'a Name>) -> Option<usize> {
        names.try_fold(0, |at, name| self.0.get(at)?.below.get(name).copied())
    }

    /// Notes that the directory at the end of `names` has nothing from before any more, so that it is
    /// not walked for every mark that says so again.
    pub(super) fn clear<'a>(&mut self, names: impl Iterator<Item = &'a Name>) {
        if let Some(node) = self.find(names).and_then(|at| self.0.get_mut(at)) {
            node.cleared = true;
        }
    }

    /// Whether that was noted for the directory at the end of `names`, or for one above it.
    pub(super) fn is_cleared<'a>(&self, mut names: impl Iterator<Item = &'a Name>) -> bool {
        let mut node = self.0.first();
        loop {
            match node {
                None => return false,
                Some(node) if node.cleared => return true,
                Some(here) => {
                    let Some(name) = names.next() else { return false };
                    node = here.below.get(name).and_then(|at| self.0.get(*at));
                }
            }
        }
    }

    /// Whether what was found was itself added.
    pub(super) fn is_own(&self, found: usize) -> bool {
        self.0.get(found).is_some_and(|node| node.own)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_was_added_and_the_way_to_it() {
        let names =
            |s: &str| -> Vec<Name> { s.split('/').map(|n| Name::new(n).unwrap()).collect() };
        let mut placed = Placed::default();
        placed.add(names("a/b/c").iter());
        placed.add(names("a/d").iter());
        for (path, own) in [
            ("a", Some(false)),
            ("a/b", Some(false)),
            ("a/b/c", Some(true)),
            ("a/d", Some(true)),
            ("b", None),
            ("a/c", None),
        ] {
            let found = placed.find(names(path).iter());
            assert_eq!(found.map(|f| placed.is_own(f)), own, "{path}");
        }
        placed.clear(names("a/b").iter());
        for (path, cleared) in [("a", false), ("a/b", true), ("a/b/c", true), ("a/d", false)] {
            assert_eq!(placed.is_cleared(names(path).iter()), cleared, "{path}");
        }
    }
}
