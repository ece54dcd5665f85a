//! A walk down a tree that may be of any depth, with a bounded number of descriptors.
//!
//! Every directory on the way from the root to where the walk stands is remembered; the topmost
//! [`HELD`] keep their descriptor, the others are opened again by `..` on the way up, and must then
//! still be the inode that was left. No symlink is followed.
//!
//! A directory that its owner lacks the rights to is given them while the walk is in or below it, and
//! gets its mode back when the walk leaves: ordinary users own such layers too.

use std::io;
use std::sync::Arc;

use crate::path::Name;
use crate::sys::dir::Dir;
use crate::sys::errno;
use crate::sys::stat::Stat;

/// How many directories of one walk stay open, beside the root and the last.
const HELD: usize = 48;

/// All rights of an owner.
const OWNER: u32 = 0o700;

/// What a walk is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// To look: modes are left alone unless this process may not list or search a directory.
    Look,
    /// To make and remove names.
    Change,
}

/// A walk, with a value of `T` for each directory on the way.
#[derive(Debug)]
pub(crate) struct Descent<T> {
    purpose: Purpose,
    root: Level<T>,
    root_dir: Arc<Dir>,
    below: Vec<(Name, Level<T>)>,
    current: Arc<Dir>,
}

/// A directory on the way.
#[derive(Debug)]
pub(crate) struct Level<T> {
    /// What it was when the walk came to it.
    pub(crate) stat: Stat,
    /// The mode that it gets when the walk leaves it, if not the one it has.
    pub(crate) mode: Option<u32>,
    pub(crate) data: T,
    /// Kept for the topmost ones only.
    dir: Option<Arc<Dir>>,
}

impl<T: Default> Descent<T> {
    /// Stands at `root`.
    pub(crate) fn new(root: Dir, purpose: Purpose) -> io::Result<Self> {
        let stat = root.stat()?;
        let mode = open_up(&root, &stat, purpose)?;
        let root = Arc::new(root);
        Ok(Descent {
            purpose,
            root: Level { stat, mode, data: T::default(), dir: None },
            current: Arc::clone(&root),
            root_dir: root,
            below: Vec::new(),
        })
    }

    /// The directory where the walk stands.
    pub(crate) fn dir(&self) -> &Arc<Dir> {
        &self.current
    }

    /// What is remembered of it.
    pub(crate) fn level(&self) -> &Level<T> {
        self.below.last().map_or(&self.root, |(_, level)| level)
    }

    /// What is remembered of it, to be changed.
    pub(crate) fn level_mut(&mut self) -> &mut Level<T> {
        match self.below.last_mut() {
            Some((_, level)) => level,
            None => &mut self.root,
        }
    }

    /// How many names below the root it stands.
    pub(crate) fn depth(&self) -> usize {
        self.below.len()
    }

    /// The names from the root to where it stands; none of them is a symlink.
    pub(crate) fn names(&self) -> impl Iterator<Item = &Name> {
        self.below.iter().map(|(name, _)| name)
    }

    /// The directories from the root to where it stands.
    pub(crate) fn levels(&self) -> impl Iterator<Item = &Level<T>> {
        std::iter::once(&self.root).chain(self.below.iter().map(|(_, level)| level))
    }

    /// Goes down into a child.
    ///
    /// # Errors
    /// As open(2) with O_DIRECTORY and O_NOFOLLOW: ENOTDIR for a symlink.
    pub(crate) fn enter(&mut self, name: &Name) -> io::Result<()> {
        let mut before = None;
        let child = match self.current.open_dir(name) {
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                let stat = self.current.stat_at(name)?;
                if !stat.is_dir() {
                    return Err(e);
                }
                self.current.chmod_at(name, stat.mode | OWNER)?;
                before = Some(stat.mode);
                self.current.open_dir(name)?
            }
            opened => opened?,
        };
        let stat = child.stat()?;
        let mode = match before {
            None => open_up(&child, &stat, self.purpose)?,
            some => some,
        };
        let child = Arc::new(child);
        let dir = (self.below.len() < HELD).then(|| Arc::clone(&child));
        let level = Level { stat, mode, data: T::default(), dir };
        self.below.push((name.clone(), level));
        self.current = child;
        Ok(())
    }
}

impl<T> Descent<T> {
    /// Gives the directory its mode, and goes up; at the root it stays there.
    pub(crate) fn leave(&mut self) -> io::Result<()> {
        let level = self.below.last_mut().map_or(&mut self.root, |(_, level)| level);
        if let Some(mode) = level.mode.take() {
            self.current.chmod(mode)?;
        }
        if self.below.pop().is_none() {
            return Ok(());
        }
        self.current = match self.below.last() {
            None => Arc::clone(&self.root_dir),
            Some((_, level)) => match &level.dir {
                Some(dir) => Arc::clone(dir),
                None => {
                    let parent = self.current.open_parent()?;
                    if !parent.stat()?.same_inode(&level.stat) {
                        // Somebody moved the directory while we were in it.
                        return Err(errno::eio());
                    }
                    Arc::new(parent)
                }
            },
        };
        Ok(())
    }
}

/// A walk that an error ends gives the directories their modes too.
impl<T> Drop for Descent<T> {
    fn drop(&mut self) {
        while self.root.mode.is_some() || self.below.iter().any(|(_, level)| level.mode.is_some()) {
            if let Err(e) = self.leave() {
                tracing::warn!(error = %e, "directories keep the rights that a walk gave them");
                return;
            }
        }
    }
}

/// Gives the owner all rights if they are missing and needed; returns the mode to restore.
fn open_up(dir: &Dir, stat: &Stat, purpose: Purpose) -> io::Result<Option<u32>> {
    if stat.mode & OWNER == OWNER || (purpose == Purpose::Look && may_search(dir, stat)?) {
        return Ok(None);
    }
    match dir.chmod(stat.mode | OWNER) {
        Ok(()) => Ok(Some(stat.mode)),
        // Somebody else's: what may be done in it will be seen.
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Ok(None),
        Err(e) => Err(e),
    }
}

/// Whether this process may look up names in an open directory.
fn may_search(dir: &Dir, stat: &Stat) -> io::Result<bool> {
    if stat.mode & 0o500 == 0o500 {
        return Ok(true);
    }
    let any = Name::new("any").map_err(io::Error::other)?;
    match dir.try_stat_at(&any) {
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Ok(false),
        looked => looked.map(|_| true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn name(s: &str) -> Name {
        Name::new(s).unwrap()
    }

    #[test]
    fn depth_costs_no_descriptors_and_the_way_back_is_the_same() {
        let tmp = tempfile::tempdir().unwrap();
        let mut walk: Descent<()> =
            Descent::new(Dir::open(tmp.path()).unwrap(), Purpose::Change).unwrap();
        let mut inodes = vec![walk.level().stat.ino];
        for _ in 0..1500 {
            walk.dir().make_dir(&name("d"), 0o700).unwrap();
            walk.enter(&name("d")).unwrap();
            inodes.push(walk.level().stat.ino);
        }
        assert!(walk.levels().filter(|l| l.dir.is_some()).count() <= HELD);
        for ino in inodes.iter().rev() {
            assert_eq!(walk.dir().stat().unwrap().ino, *ino);
            walk.leave().unwrap();
        }
        assert_eq!(walk.depth(), 0);
        crate::sys::remove::remove_tree(walk.dir(), &name("d"), &mut || Ok(())).unwrap();
    }

    #[test]
    fn a_closed_directory_is_open_while_in_it_and_closed_again_after() {
        let tmp = tempfile::tempdir().unwrap();
        let closed = tmp.path().join("closed");
        std::fs::create_dir(&closed).unwrap();
        std::fs::set_permissions(&closed, PermissionsExt::from_mode(0o1010)).unwrap();
        let mut walk: Descent<()> =
            Descent::new(Dir::open(tmp.path()).unwrap(), Purpose::Change).unwrap();
        walk.enter(&name("closed")).unwrap();
        walk.dir().make_dir(&name("inside"), 0o700).unwrap();
        walk.leave().unwrap();
        let mode = std::fs::metadata(&closed).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o1010);
    }

    #[test]
    fn who_may_look_leaves_modes_alone() {
        let tmp = tempfile::tempdir().unwrap();
        std::fs::set_permissions(tmp.path(), PermissionsExt::from_mode(0o500)).unwrap();
        let root = Dir::open(tmp.path()).unwrap();
        let walk: Descent<()> = Descent::new(root, Purpose::Look).unwrap();
        assert_eq!((walk.level().mode, walk.dir().stat().unwrap().mode), (None, 0o500));
    }

    #[test]
    fn a_walk_given_up_in_a_closed_directory_closes_it_again() {
        let tmp = tempfile::tempdir().unwrap();
        let closed = tmp.path().join("closed");
        std::fs::create_dir_all(closed.join("open")).unwrap();
        std::fs::set_permissions(&closed, PermissionsExt::from_mode(0o1010)).unwrap();
        let root = Dir::open(tmp.path()).unwrap();
        let mut walk: Descent<()> = Descent::new(root, Purpose::Change).unwrap();
        walk.enter(&name("closed")).unwrap();
        walk.enter(&name("open")).unwrap();
        drop(walk);
        let mode = std::fs::metadata(&closed).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o1010);
    }

    #[test]
    fn links_are_not_entered() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = Dir::open(tmp.path()).unwrap();
        dir.symlink(b"/etc", &name("link")).unwrap();
        let mut walk: Descent<()> = Descent::new(dir, Purpose::Look).unwrap();
        assert!(walk.enter(&name("link")).is_err());
        assert_eq!(walk.depth(), 0);
    }
}
