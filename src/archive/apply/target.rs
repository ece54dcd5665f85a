//! Finding the directory that an entry goes into.
//!
//! Paths are resolved here, name by name with O_NOFOLLOW from a descriptor of the root, and not by
//! openat2, for three reasons: what is missing must be made on the way, behind a symlink too; what
//! was reached by two spellings must be known to be one directory; and no concurrent rename can lead
//! out, since going up is going back. A symlink is followed by reading it: an absolute one starts at
//! the root again, and `..` stops there.
//!
//! Where the last entry led is kept, so that the next one nearby costs a call or none. A directory
//! on the way is left only when the walk turns elsewhere, and then gets the times that it should
//! have: its own entry's, or those from before it was touched. So nothing is remembered of the
//! millions of directories that an archive may have.

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;

use super::Unpack;
use super::refuse;
use super::tally::Tally;
use crate::error::{IoContext, Result};
use crate::layer::descent::{Descent, Purpose};
use crate::layer::marks::{self, DotWh};
use crate::path::{Name, RelPath};
use crate::sys::dir::{self, Dir};
use crate::sys::stat::{FileType, Stat, Time};

/// As the kernel: more symlinks than this in one path are a loop.
const MAX_SYMLINKS: u32 = 40;
/// More names than this on the way of one path are a waste of time: no path is as long without links.
const MAX_TURNS: u32 = 4096;

/// The directories from the root to the one that is worked in.
#[derive(Debug)]
pub(super) struct Target {
    walk: Descent<Place>,
    /// The path that led here, as the archive wrote it; none if it may lead elsewhere by now.
    written: Option<RelPath>,
    /// What everything takes on disk.
    pub(super) tally: Tally,
}

/// Which directory: device and inode number.
pub(super) type Inode = (u64, u64);

fn inode_of(stat: &Stat) -> Inode {
    (stat.dev, stat.ino)
}

/// What is remembered of a directory on the way.
#[derive(Debug, Default)]
struct Place {
    /// Access and modification time to set when it is left; none while nothing in it changed.
    times: Option<(Time, Time)>,
}

/// What to do where a directory on the way does not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Missing {
    /// Make it, for an entry of this time.
    Make(Time),
    /// Make it in order to hold a mark; but not in a place that is already hidden from below.
    MakeForMark(Time),
    /// Give up.
    Stop,
}

/// Where a path led.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reached {
    /// To the directory, where the target now stands.
    Directory,
    /// To nothing: a name on the way does not exist.
    Nothing,
    /// To a name on the way that hides what lies below, and is no directory: a whiteout, a file, or
    /// nothing in an opaque directory.
    Hidden,
}

/// What one name on the way is.
enum Step {
    Entered,
    Absent,
    /// A whiteout of this layer.
    Deleted,
    Symlink(Vec<u8>),
    Other,
}

/// One name of a path or of a symlink's target.
enum Turn {
    Down(Name),
    Up,
}

impl Target {
    /// Stands at `root`, which may be empty.
    pub(super) fn new(root: Dir, empty: bool) -> io::Result<Self> {
        let walk = Descent::new(root, Purpose::Change)?;
        let tally = Tally::new(&walk.level().stat, empty);
        Ok(Target { walk, written: None, tally })
    }

    /// The directory where it stands.
    pub(super) fn dir(&self) -> std::sync::Arc<Dir> {
        std::sync::Arc::clone(self.walk.dir())
    }

    /// Where it stands, every name a directory.
    pub(super) fn names(&self) -> impl Iterator<Item = &Name> {
        self.walk.names()
    }

    pub(super) fn at_root(&self) -> bool {
        self.walk.depth() == 0
    }

    /// The same for messages.
    pub(super) fn path(&self) -> PathBuf {
        self.walk.names().map(Name::as_os_str).collect()
    }

    /// The length of its path, with a slash at the end.
    pub(super) fn path_bytes(&self) -> usize {
        self.walk.names().map(|name| name.as_bytes().len() + 1).sum()
    }

    /// Notes that the current directory, just entered, is new.
    pub(super) fn count_directory(&mut self) {
        self.tally.add(&self.walk.level().stat);
    }

    /// The owner and group that the current directory had when it was entered.
    pub(super) fn owner(&self) -> (u32, u32) {
        let stat = &self.walk.level().stat;
        (stat.uid, stat.gid)
    }

    /// The current directory's inode.
    pub(super) fn inode(&self) -> Inode {
        inode_of(&self.walk.level().stat)
    }

    /// The inodes of all directories from the root to here.
    pub(super) fn inodes(&self) -> impl Iterator<Item = Inode> {
        self.walk.levels().map(|level| inode_of(&level.stat))
    }

    /// Notes that names in the current directory are about to change.
    pub(super) fn touch(&mut self) {
        let level = self.walk.level_mut();
        let (atime, mtime) = (level.stat.atime, level.stat.mtime);
        level.data.times.get_or_insert((atime, mtime));
    }

    /// The times and the mode that the current directory gets when it is left.
    pub(super) fn leave_with(&mut self, atime: Time, mtime: Time, mode: Option<u32>) {
        let level = self.walk.level_mut();
        level.data.times = Some((atime, mtime));
        level.mode = mode;
    }

    /// Forgets that the written path led here: a symlink or directory was removed.
    pub(super) fn forget_written(&mut self) {
        self.written = None;
    }

    /// Notes which path, as the archive wrote it, leads here.
    pub(super) fn set_written(&mut self, path: &RelPath) {
        self.written = Some(path.clone());
    }

    /// Goes down into a directory.
    pub(super) fn enter(&mut self, name: &Name) -> Result<()> {
        self.written = None;
        let entered = self.walk.enter(name);
        entered.map_err(|e| crate::Error::io("open directory", self.path().join(name), e))
    }

    /// Goes up, giving the directory its times and mode.
    pub(super) fn leave(&mut self) -> Result<()> {
        self.written = None;
        if let Some((atime, mtime)) = self.walk.level_mut().data.times.take() {
            let set = dir::set_times(&**self.walk.dir(), atime, mtime);
            set.map_err(|e| crate::Error::io("set times of directory", self.path(), e))?;
            if self.tally.counts() {
                let now = self.walk.dir().stat();
                let now = now.map_err(|e| crate::Error::io("look at directory", self.path(), e))?;
                self.tally.change(&self.walk.level().stat, &now);
            }
        }
        match self.walk.leave() {
            Ok(()) => Ok(()),
            Err(e) => Err(e).at("leave directory", self.path()),
        }
    }

    /// Goes up to the root and leaves it too, so that every directory is as it should be.
    pub(super) fn finish(&mut self) -> Result<()> {
        while !self.at_root() {
            self.leave()?;
        }
        self.leave()
    }

    /// Goes up to the last directory that `path` has in common with where it stands. Returns how
    /// many names of `path` lead there.
    fn turn_to(&mut self, path: &RelPath) -> Result<usize> {
        let common = self
            .walk
            .names()
            .zip(path.components())
            .take_while(|(here, there)| *here == there)
            .count();
        while self.walk.depth() > common {
            self.leave()?;
        }
        Ok(common)
    }
}

impl Unpack<'_> {
    /// Goes to the directory `path`, following the symlinks inside the root.
    ///
    /// `entry` is the path of the entry that asks, for messages.
    pub(super) fn reach(
        &mut self,
        path: &RelPath,
        missing: Missing,
        entry: &RelPath,
    ) -> Result<Reached> {
        if self.target.written.as_ref() == Some(path) {
            return Ok(Reached::Directory);
        }
        let common = self.target.turn_to(path)?;
        let mut turns: VecDeque<Turn> = path.components().skip(common).map(Turn::Down).collect();
        let mut links = 0;
        let mut walked = 0;
        let mut skipped = false;
        while let Some(turn) = turns.pop_front() {
            walked += 1;
            if walked > MAX_TURNS && links > 0 {
                return Err(refuse(entry, "symlinks lead it by way of more than 4096 names"));
            }
            let name = match turn {
                Turn::Up => {
                    // What stands at the root goes nowhere.
                    if !self.target.at_root() {
                        self.target.leave()?;
                    }
                    continue;
                }
                Turn::Down(name) => name,
            };
            if marks::decode_name(&name) != DotWh::Plain {
                return Err(refuse(
                    entry,
                    format!("it goes through {name:?}, a name reserved for marks"),
                ));
            }
            match self.step(&name, entry)? {
                Step::Entered => {}
                Step::Symlink(to) => {
                    links += 1;
                    if links > MAX_SYMLINKS {
                        return Err(refuse(entry, "it goes through more than 40 symlinks"));
                    }
                    self.redirect(&to, &mut turns, entry)?;
                }
                // There and back again.
                Step::Absent | Step::Deleted if matches!(turns.front(), Some(Turn::Up)) => {
                    turns.pop_front();
                    skipped = true;
                }
                Step::Absent => match missing {
                    Missing::Stop => return Ok(Reached::Nothing),
                    Missing::MakeForMark(_) if self.below_opaque() => return Ok(Reached::Hidden),
                    Missing::Make(time) => self.make_parent(&name, time, false, entry)?,
                    Missing::MakeForMark(time) => {
                        self.make_parent(&name, time, false, entry)?;
                        self.note_only_for_marks();
                    }
                },
                Step::Deleted => match missing {
                    Missing::Make(time) => {
                        self.remove_whiteout(&name)?;
                        self.make_parent(&name, time, true, entry)?;
                    }
                    Missing::MakeForMark(_) | Missing::Stop => return Ok(Reached::Hidden),
                },
                Step::Other => match missing {
                    Missing::Make(_) => {
                        let at = self.target.path().join(&name);
                        return Err(refuse(
                            entry,
                            format!("it is inside of {at:?}, which is not a directory"),
                        ));
                    }
                    Missing::MakeForMark(_) | Missing::Stop => return Ok(Reached::Hidden),
                },
            }
        }
        if skipped {
            // What is missing may be made, and then lead elsewhere.
            self.target.forget_written();
        } else {
            self.target.set_written(path);
        }
        Ok(Reached::Directory)
    }

    /// Goes into `name` if that is a directory; else says what it is.
    fn step(&mut self, name: &Name, entry: &RelPath) -> Result<Step> {
        match self.target.walk.enter(name) {
            Ok(()) => {
                self.target.written = None;
                return Ok(Step::Entered);
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Ok(if self.has_separate_whiteout(name)? {
                    Step::Deleted
                } else {
                    Step::Absent
                });
            }
            Err(e) => {
                let stat = self.target.dir().try_stat_at(name);
                match stat.at("read attributes on the way to", entry)? {
                    Some(stat) if stat.file_type == FileType::Symlink => {}
                    Some(stat) if self.is_whiteout(&stat) => return Ok(Step::Deleted),
                    Some(stat) if !stat.is_dir() => return Ok(Step::Other),
                    _ => return Err(e).at("open a directory on the way to", entry),
                }
            }
        }
        let to = self.target.dir().read_link(name);
        Ok(Step::Symlink(to.at("read symlink on the way to", entry)?))
    }

    /// Puts a symlink's target before the turns that are left.
    fn redirect(&mut self, to: &[u8], turns: &mut VecDeque<Turn>, entry: &RelPath) -> Result<()> {
        if to.first() == Some(&b'/') {
            while !self.target.at_root() {
                self.target.leave()?;
            }
        }
        for component in to.rsplit(|b| *b == b'/') {
            match component {
                b"" | b"." => {}
                b".." => turns.push_front(Turn::Up),
                name => turns
                    .push_front(Turn::Down(Name::new(name).map_err(|_| {
                        refuse(entry, "it goes through a symlink to no valid path")
                    })?)),
            }
        }
        Ok(())
    }
}
