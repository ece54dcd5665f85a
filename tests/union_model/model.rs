//! What a union file system must be: a tree in memory, and for every operation what it gives.
//!
//! Errors are those of Linux on a local file system, in the order in which it finds them.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use stratafs::{LayerFormat, Owners};

use super::ops::{At, Bits, How, Op, Outcome, SLOTS, Set, Stat, Time, pattern};
use crate::support::union_mount::UMASK;

pub type Id = usize;

pub const ROOT: Id = 0;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    Dir(Dir),
    File(Vec<u8>),
    Symlink(OsString),
    Fifo,
    Char(u32, u32),
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dir {
    pub entries: BTreeMap<OsString, Id>,
    /// A lower layer has it, too: it cannot be renamed without a redirect.
    pub merged: bool,
    /// None once it is removed.
    pub parent: Option<Id>,
}

/// A file of any kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inode {
    pub what: What,
    pub mode: u32,
    pub owner: (u32, u32),
    pub xattrs: BTreeMap<String, Vec<u8>>,
    pub nlink: u64,
    /// None where the clock has set it.
    pub mtime: Option<(i64, u32)>,
}

impl Inode {
    pub fn new(what: What, mode: u32, owner: (u32, u32)) -> Inode {
        Inode { what, mode, owner, xattrs: BTreeMap::new(), nlink: 1, mtime: None }
    }

    pub fn kind(&self) -> char {
        match self.what {
            What::Dir(_) => 'd',
            What::File(_) => 'f',
            What::Symlink(_) => 'l',
            What::Fifo => 'p',
            What::Char(..) => 'c',
        }
    }

    pub fn stat(&self) -> Stat {
        let size = match &self.what {
            What::File(bytes) => Some(bytes.len() as u64),
            What::Symlink(target) => Some(target.len() as u64),
            _ => None,
        };
        let rdev = match self.what {
            What::Char(major, minor) => Some((major, minor)),
            _ => None,
        };
        let kind = self.kind();
        let nlink = (kind != 'd').then_some(self.nlink);
        Stat {
            kind,
            mode: Bits(self.mode),
            owner: self.owner,
            size,
            nlink,
            rdev,
            mtime: self.mtime,
        }
    }

    pub(super) fn data(&mut self) -> &mut Vec<u8> {
        match &mut self.what {
            What::File(bytes) => bytes,
            other => panic!("no regular file: {other:?}"),
        }
    }
}

/// What depends on the file system at work.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    pub format: LayerFormat,
    pub owners: Owners,
    pub redirects: bool,
    pub zero_devices: ZeroDevices,
}

/// What becomes of a new character device 0:0, by which overlay formats mark that nothing is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroDevices {
    /// It is made, and told from the marks.
    Made,
    /// The kernel refuses it.
    Refused,
    /// It is not tried: one engine does not show what the other made.
    Untried,
}

/// What an operation must give.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expected {
    /// It is not to be done: nothing that is asked for here would be tested by it.
    Skip,
    Just(Outcome),
    /// One of these errors, since the order is nobody's promise.
    OneOf(Vec<Errno>),
}

impl std::fmt::Display for Expected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Expected::Skip => f.write_str("anything"),
            Expected::Just(outcome) => write!(f, "{outcome:?}"),
            Expected::OneOf(errors) => {
                let errors = errors.iter().map(|&errno| Outcome::Failed(errno));
                write!(f, "one of {:?}", errors.collect::<Vec<_>>())
            }
        }
    }
}

impl Expected {
    pub fn allows(&self, outcome: &Outcome) -> bool {
        match (self, outcome) {
            (Expected::Skip, _) => true,
            (Expected::OneOf(errors), Outcome::Failed(errno)) => errors.contains(errno),
            (Expected::OneOf(_), _) => false,
            (Expected::Just(Outcome::Stat(expected)), Outcome::Stat(stat)) => {
                let mut stat = stat.clone();
                forget_unpromised(&mut stat, expected);
                stat == *expected
            }
            (Expected::Just(expected), outcome) => expected == outcome,
        }
    }
}

/// Takes from what was seen what nothing is expected of.
pub fn forget_unpromised(seen: &mut Stat, expected: &Stat) {
    seen.mtime = seen.mtime.filter(|_| expected.mtime.is_some());
    seen.nlink = seen.nlink.filter(|_| expected.nlink.is_some());
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Open {
    pub(super) id: Id,
    pub(super) how: How,
}

#[derive(Clone, Debug)]
pub struct Model {
    pub rules: Rules,
    pub(super) inodes: BTreeMap<Id, Inode>,
    next: Id,
    pub(super) open: [Option<Open>; SLOTS],
}

/// What went otherwise than well.
pub(super) enum Stop {
    Skip,
    Errno(Errno),
    OneOf(Vec<Errno>),
}

impl From<Errno> for Stop {
    fn from(errno: Errno) -> Stop {
        Stop::Errno(errno)
    }
}

pub(super) type Attempt<T> = Result<T, Stop>;

impl Model {
    pub fn new(rules: Rules, root: Inode) -> Model {
        let inodes = BTreeMap::from([(ROOT, root)]);
        Model { rules, inodes, next: ROOT + 1, open: [None; SLOTS] }
    }

    pub fn has(&self, id: Id) -> bool {
        self.inodes.contains_key(&id)
    }

    pub fn inode(&self, id: Id) -> &Inode {
        &self.inodes[&id]
    }

    pub fn inode_mut(&mut self, id: Id) -> &mut Inode {
        self.inodes.get_mut(&id).unwrap()
    }

    pub fn dir(&self, id: Id) -> &Dir {
        match &self.inode(id).what {
            What::Dir(dir) => dir,
            other => panic!("no directory: {other:?}"),
        }
    }

    pub(super) fn dir_mut(&mut self, id: Id) -> &mut Dir {
        match &mut self.inode_mut(id).what {
            What::Dir(dir) => dir,
            other => panic!("no directory: {other:?}"),
        }
    }

    /// Adds a file, in place of what has its name.
    pub fn put(&mut self, parent: Id, name: &OsStr, mut inode: Inode) -> Id {
        if let Some(&old) = self.dir(parent).entries.get(name) {
            self.discard(old);
        }
        if let What::Dir(dir) = &mut inode.what {
            dir.parent = Some(parent);
        }
        let id = self.next;
        self.next += 1;
        self.inodes.insert(id, inode);
        self.dir_mut(parent).entries.insert(name.to_owned(), id);
        id
    }

    /// Takes away a name and all below it.
    pub fn remove(&mut self, parent: Id, name: &OsStr) {
        if let Some(old) = self.dir_mut(parent).entries.remove(name) {
            self.discard(old);
        }
    }

    /// All paths by which something can be reached without links.
    pub fn paths(&self) -> Vec<PathBuf> {
        let mut paths = Vec::new();
        let mut dirs = vec![(PathBuf::new(), ROOT)];
        while let Some((path, id)) = dirs.pop() {
            for (name, &child) in &self.dir(id).entries {
                paths.push(path.join(name));
                if self.is_dir(child) {
                    dirs.push((path.join(name), child));
                }
            }
        }
        paths
    }

    /// The paths that an operation is about, with all names of an open file, and without links: where
    /// what it changes is.
    pub fn paths_of(&self, op: &Op) -> Vec<PathBuf> {
        let (paths, slot) = op.about();
        let below = paths.into_iter().filter(|path| !path.as_os_str().is_empty());
        let named = below.filter_map(|path| self.place(path));
        let open = slot.and_then(|slot| self.open_id(slot));
        let all =
            self.paths().into_iter().filter(|path| open.is_some() && self.id_at(path) == open);
        named.chain(all).collect()
    }

    /// A path without links.
    fn place(&self, path: &Path) -> Option<PathBuf> {
        let (parent, name) = self.parent(path).ok()?;
        if parent == ROOT {
            return Some(name.into());
        }
        let is_parent = |path: &PathBuf| self.id_at(path) == Some(parent);
        Some(self.paths().into_iter().find(is_parent)?.join(name))
    }

    /// The kind of what has a path, if something has it.
    pub fn kind_at(&self, path: &Path) -> Option<char> {
        self.lookup(path).ok().map(|id| self.inode(id).kind())
    }

    pub fn id_at(&self, path: &Path) -> Option<Id> {
        self.lookup(path).ok()
    }

    pub fn open_id(&self, slot: usize) -> Option<Id> {
        self.open[slot].map(|open| open.id)
    }

    /// What the regular files hold.
    pub fn files(&self) -> impl Iterator<Item = (Id, &Vec<u8>)> {
        self.inodes.iter().filter_map(|(&id, inode)| match &inode.what {
            What::File(bytes) => Some((id, bytes)),
            _ => None,
        })
    }

    pub fn content(&self, id: Id) -> Option<&Vec<u8>> {
        match &self.inodes.get(&id)?.what {
            What::File(bytes) => Some(bytes),
            _ => None,
        }
    }

    pub fn is_open(&self, slot: usize) -> bool {
        self.open[slot].is_some()
    }

    /// Whether a file is open that has lost its last name.
    pub fn is_nameless(&self, slot: usize) -> bool {
        self.open[slot].is_some_and(|open| self.inode(open.id).nlink == 0)
    }

    /// Closes what is open, as before a remount.
    pub fn close_all(&mut self) {
        for slot in 0..SLOTS {
            self.close(slot);
        }
    }

    /// What an operation gives; it is carried out.
    pub fn carry_out(&mut self, op: &Op) -> Expected {
        match self.attempt(op) {
            Ok(outcome) => Expected::Just(outcome),
            Err(Stop::Skip) => Expected::Skip,
            Err(Stop::Errno(errno)) => Expected::Just(Outcome::Failed(errno)),
            Err(Stop::OneOf(errors)) => Expected::OneOf(errors),
        }
    }

    fn attempt(&mut self, op: &Op) -> Attempt<Outcome> {
        match op {
            Op::Open { slot, path, how, mode } => {
                let opened = self.open_path(path, *how, *mode);
                if !matches!(opened, Err(Stop::Skip)) {
                    // Only now: a file without names lives on until its number is another's.
                    self.close(*slot);
                }
                self.open[*slot] = Some(Open { id: opened?, how: *how });
            }
            Op::Close { slot } => self.close(*slot),
            Op::Put { path, how, offset, len, seed } => {
                let id = self.open_path(path, *how, Bits(0o666))?;
                self.write(Open { id, how: *how }, *offset, &pattern(*len, *seed))?;
            }
            Op::Write { slot, offset, len, seed } => {
                self.write(self.slot(*slot)?, *offset, &pattern(*len, *seed))?;
            }
            Op::Read { slot, offset, len } => {
                let open = self.slot(*slot)?;
                return Ok(Outcome::Bytes(self.read(open, *offset, *len)?));
            }
            Op::ReadFile { path } => {
                let id = self.open_path(path, How::Read, Bits(0))?;
                return Ok(Outcome::Bytes(self.read(
                    Open { id, how: How::Read },
                    0,
                    usize::MAX,
                )?));
            }
            Op::CopyRange { from, to, from_offset, offset, len } => {
                let (from, to) = (self.slot(*from)?, self.slot(*to)?);
                let plain = self.is_file(from.id) && self.is_file(to.id) && from.id != to.id;
                if !plain || !from.how.reads() || !to.how.writes() || to.how == How::Append {
                    return Err(Stop::Skip);
                }
                let bytes = self.read(from, *from_offset, *len)?;
                self.write(to, *offset, &bytes)?;
            }
            Op::Truncate { at, len } => self.truncate(at, *len)?,
            Op::Allocate { slot, space, offset, len } => {
                self.allocate(self.slot(*slot)?, *space, *offset, *len)?;
            }
            Op::Sync { slot } => _ = self.slot(*slot)?,
            Op::Stat { at } => {
                let id = self.at(at)?;
                return Ok(Outcome::Stat(self.inode(id).stat()));
            }
            Op::Chmod { at, mode } => {
                let id = self.at(at)?;
                if matches!(at, At::Path(_)) && self.inode(id).kind() == 'l' {
                    return Err(Stop::Skip);
                }
                self.inode_mut(id).mode = mode.0;
            }
            Op::Chown { at, uid, gid } => {
                let id = self.at(at)?;
                let inode = self.inode(id);
                if self.rules.owners == Owners::InXattrs && inode.kind() == 'l' && inode.nlink != 1
                {
                    // It would have to become another file at all its names.
                    return Err(Stop::Skip);
                }
                self.chown(id, *uid, *gid);
            }
            Op::Utimens { at, mtime } => {
                let id = self.at(at)?;
                match *mtime {
                    Time::At(sec, nsec) => self.inode_mut(id).mtime = Some((sec, nsec)),
                    Time::Now => self.inode_mut(id).mtime = None,
                    Time::Omit => {}
                }
            }
            Op::SetXattr { at, name, value, set } => {
                let id = self.at_with_xattrs(at, name)?;
                let xattrs = &mut self.inode_mut(id).xattrs;
                match (set, xattrs.contains_key(*name)) {
                    (Set::Create, true) => return Err(Errno::EXIST.into()),
                    (Set::Replace, false) => return Err(Errno::NODATA.into()),
                    _ => xattrs.insert((*name).to_owned(), value.clone()),
                };
            }
            Op::RemoveXattr { at, name } => {
                let id = self.at_with_xattrs(at, name)?;
                self.inode_mut(id).xattrs.remove(*name).ok_or(Errno::NODATA)?;
            }
            Op::Xattrs { at } => {
                let id = self.at(at)?;
                return Ok(Outcome::Xattrs(self.inode(id).xattrs.clone()));
            }
            Op::Symlink { path, target } => {
                self.make(path, What::Symlink((*target).into()), 0o777)?;
            }
            Op::ReadLink { path } => {
                return match &self.inode(self.lookup(path)?).what {
                    What::Symlink(target) => Ok(Outcome::Text(target.as_bytes().to_vec())),
                    _ => Err(Errno::INVAL.into()),
                };
            }
            Op::Fifo { path, mode } => _ = self.make(path, What::Fifo, mode.0 & !UMASK)?,
            Op::Char { path, mode, major, minor } => {
                if (*major, *minor) == (0, 0) {
                    self.make_zero_device(path)?;
                }
                self.make(path, What::Char(*major, *minor), mode.0 & !UMASK)?;
            }
            Op::Mkdir { path, mode } => {
                self.make(path, What::Dir(Dir::default()), mode.0 & 0o1777 & !UMASK)?;
            }
            Op::Rmdir { path } => {
                let (parent, name) = self.parent(path)?;
                let id = self.child(parent, &name)?;
                let What::Dir(dir) = &self.inode(id).what else {
                    return Err(Errno::NOTDIR.into());
                };
                if !dir.entries.is_empty() {
                    return Err(Errno::NOTEMPTY.into());
                }
                self.take(parent, &name);
            }
            Op::Unlink { path } => {
                let (parent, name) = self.parent(path)?;
                let id = self.child(parent, &name)?;
                if self.is_dir(id) {
                    return Err(Errno::ISDIR.into());
                }
                self.take(parent, &name);
            }
            Op::Link { from, to } => self.link(from, to)?,
            Op::Rename { from, to, how } => self.rename(from, to, *how)?,
            Op::List { path } => {
                let id = if path.as_os_str().is_empty() { ROOT } else { self.lookup(path)? };
                let What::Dir(dir) = &self.inode(id).what else {
                    // O_DIRECTORY comes before O_NOFOLLOW.
                    return Err(Errno::NOTDIR.into());
                };
                let name = |(name, id): (&OsString, &Id)| (name.clone(), self.inode(*id).kind());
                return Ok(Outcome::Names(dir.entries.iter().map(name).collect()));
            }
            Op::Remount | Op::Forget | Op::Switch => unreachable!("not done by hand"),
        }
        Ok(Outcome::Done)
    }
}
