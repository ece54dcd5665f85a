//! Files with several names: where the first one was written, until all are.

use std::collections::HashMap;

use crate::path::RelPath;
use crate::sys::stat::Stat;

/// Remembers the files of a source that have names still to come.
#[derive(Debug, Default)]
pub(super) struct Links(HashMap<(u64, u64), Link>);

#[derive(Debug)]
struct Link {
    first: RelPath,
    /// How many names are still to come.
    rest: u64,
}

impl Links {
    /// Where an earlier name of the same file was written.
    pub(super) fn earlier(&mut self, stat: &Stat) -> Option<RelPath> {
        let key = (stat.dev, stat.ino);
        let link = self.0.get_mut(&key)?;
        link.rest = link.rest.saturating_sub(1);
        match link.rest {
            0 => self.0.remove(&key).map(|link| link.first),
            _ => Some(link.first.clone()),
        }
    }

    /// The file was written here.
    pub(super) fn written(&mut self, stat: &Stat, at: &RelPath) {
        if stat.nlink > 1 && !stat.is_dir() {
            let link = Link { first: at.clone(), rest: stat.nlink.saturating_sub(1) };
            self.0.insert((stat.dev, stat.ino), link);
        }
    }

    /// Whether names of what was written were not met.
    pub(super) fn are_incomplete(&self) -> bool {
        !self.0.is_empty()
    }

    /// Whether other names of this file were written.
    pub(super) fn know(&self, stat: &Stat) -> bool {
        self.0.contains_key(&(stat.dev, stat.ino))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_forgotten_with_its_last_name() {
        let tmp = tempfile::tempdir().unwrap();
        std::fs::write(tmp.path().join("a"), "").unwrap();
        for name in ["b", "c"] {
            std::fs::hard_link(tmp.path().join("a"), tmp.path().join(name)).unwrap();
        }
        let stat = crate::sys::stat::fstat(std::fs::File::open(tmp.path().join("a")).unwrap());
        let stat = stat.unwrap();
        let a = RelPath::new("a").unwrap();
        let mut links = Links::default();
        assert_eq!(links.earlier(&stat), None);
        links.written(&stat, &a);
        assert_eq!(links.earlier(&stat).as_ref(), Some(&a));
        assert!(links.are_incomplete() && links.know(&stat));
        assert_eq!(links.earlier(&stat), Some(a));
        assert!(!links.are_incomplete());
    }
}
