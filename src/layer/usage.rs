//! What a layer takes on disk.

use std::collections::HashSet;

use super::walk::{Descend, walk};
use crate::error::{IoContext, Result};
use crate::sys::dir::Dir;
use crate::sys::stat::Stat;

/// What a snapshot takes on disk, its parents not counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, serde::Serialize)]
pub struct Usage {
    /// Bytes allocated: 512 times `st_blocks`, each inode once.
    pub bytes: u64,
    /// Inodes, the layer's root included.
    pub inodes: u64,
}

/// Adds files up, each inode once.
#[derive(Debug, Default)]
pub(crate) struct Counter {
    usage: Usage,
    linked: HashSet<(u64, u64)>,
}

impl Counter {
    /// Counts a file, unless it has been counted under another name.
    pub(crate) fn add(&mut self, stat: &Stat) {
        if stat.nlink > 1 && !stat.is_dir() && !self.linked.insert((stat.dev, stat.ino)) {
            return;
        }
        self.usage.bytes = self.usage.bytes.saturating_add(stat.blocks.saturating_mul(512));
        self.usage.inodes = self.usage.inodes.saturating_add(1);
    }

    /// The sum.
    pub(crate) fn usage(&self) -> Usage {
        self.usage
    }
}

/// Walks a layer and adds it up; `each` is called for every entry, and stops the walk by its error.
pub(crate) fn count(root: &Dir, each: &mut dyn FnMut() -> Result<()>) -> Result<Usage> {
    let mut counter = Counter::default();
    counter.add(&root.stat().at("look at", "the root of a layer")?);
    walk(root, &mut |visit| {
        each()?;
        counter.add(visit.stat);
        Ok(Descend::Into)
    })?;
    Ok(counter.usage())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_with_two_names_counts_once() {
        let tmp = tempfile::tempdir().unwrap();
        std::fs::write(tmp.path().join("a"), vec![1; 4096]).unwrap();
        std::fs::hard_link(tmp.path().join("a"), tmp.path().join("b")).unwrap();
        let usage = count(&Dir::open(tmp.path()).unwrap(), &mut || Ok(())).unwrap();
        assert_eq!(usage.inodes, 2);
    }
}
