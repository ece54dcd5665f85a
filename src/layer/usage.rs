//! What a layer takes on disk.

use std::collections::HashSet;
use std::io;
use std::path::PathBuf;

use super::descent::{Descent, Purpose};
use crate::error::{IoContext, Result};
use crate::path::Name;
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
/// Names that vanish meanwhile are passed over. Directories that their owner closed to himself are
/// looked into all the same.
pub(crate) fn count(root: &Dir, each: &mut dyn FnMut() -> Result<()>) -> Result<Usage> {
    let mut counter = Counter::default();
    let root = root.try_clone().at("open", "the root of a layer")?;
    let mut walk: Descent<Vec<Name>> =
        Descent::new(root, Purpose::Look).at("look at", "the root of a layer")?;
    counter.add(&walk.level().stat);
    walk.level_mut().data = count_files(&walk, &mut counter, each)?;
    loop {
        let Some(child) = walk.level_mut().data.pop() else {
            let done = walk.depth() == 0;
            walk.leave().at("leave directory", at(&walk))?;
            if done {
                return Ok(counter.usage());
            }
            continue;
        };
        match walk.enter(&child) {
            Ok(()) => {
                counter.add(&walk.level().stat);
                walk.level_mut().data = count_files(&walk, &mut counter, each)?;
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e).at("open directory", at(&walk).join(&child)),
        }
    }
}

/// Counts what is no directory in the one where the walk stands; returns the directories.
fn count_files(
    walk: &Descent<Vec<Name>>,
    counter: &mut Counter,
    each: &mut dyn FnMut() -> Result<()>,
) -> Result<Vec<Name>> {
    let mut directories = Vec::new();
    for entry in walk.dir().entries().at("list", at(walk))? {
        each()?;
        match walk.dir().try_stat_at(&entry.name).at("look into", at(walk))? {
            None => {}
            Some(stat) if stat.is_dir() => directories.push(entry.name),
            Some(stat) => counter.add(&stat),
        }
    }
    Ok(directories)
}

/// Where the walk stands, for messages.
fn at(walk: &Descent<Vec<Name>>) -> PathBuf {
    walk.names().map(Name::as_os_str).collect()
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

    #[test]
    fn depth_and_closed_directories_are_no_obstacle() {
        use std::os::unix::fs::PermissionsExt;
        let tmp = tempfile::tempdir().unwrap();
        let name = Name::new("d").unwrap();
        let root = Dir::open(tmp.path()).unwrap();
        let mut dir = root.try_clone().unwrap();
        for _ in 0..1200 {
            dir.make_dir(&name, 0o700).unwrap();
            dir = dir.open_dir(&name).unwrap();
        }
        std::fs::set_permissions(tmp.path().join("d/d"), PermissionsExt::from_mode(0o000)).unwrap();
        assert_eq!(count(&root, &mut || Ok(())).unwrap().inodes, 1201);
        assert_eq!(root.open_dir(&name).unwrap().stat_at(&name).unwrap().mode, 0);
        crate::sys::remove::remove_tree(&root, &name, &mut || Ok(())).unwrap();
    }
}
