//! Makes files as they are in a source, in the order in which a walk comes to them.
//!
//! Directories are made private and get their attributes when the writer leaves them for good: so
//! their times are those of the source, nothing inherits their group or access control lists, and
//! nobody is kept out by their modes. Directories on the way to a path that were not written
//! themselves are made as they are in the source.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::AsFd;

use super::attributes::{Attributes, drop_inherited_acls};
use super::links::Links;
use crate::error::{IoContext, Result};
use crate::layer::LayerFormat;
use crate::layer::cursor::Cursor;
use crate::layer::descent::{Descent, Purpose};
use crate::layer::stack::{LayerStack, Visible};
use crate::path::{Name, RelPath};
use crate::progress::{Phase, Progress, ProgressFn, report};
use crate::sys::copy::Copier;
use crate::sys::dir::{self, Dir, Node};
use crate::sys::file::Place;
use crate::sys::stat::{FileType, Stat, Time};
use crate::sys::xattr::Of;

/// Modes while something is being made.
const PRIVATE_DIR: u32 = 0o700;
const PRIVATE_FILE: u32 = 0o600;

/// A callback that a walk and what it calls both report to.
pub(super) struct Reports<'p, 'f> {
    callback: RefCell<&'p mut ProgressFn<'f>>,
    entries: Cell<u64>,
    bytes: Cell<u64>,
}

impl<'p, 'f> Reports<'p, 'f> {
    pub(super) fn new(callback: &'p mut ProgressFn<'f>) -> Self {
        Reports { callback: RefCell::new(callback), entries: Cell::new(0), bytes: Cell::new(0) }
    }

    /// The walk has come to another entry.
    pub(super) fn entry(&self) -> Result<()> {
        self.entries.set(self.entries.get().saturating_add(1));
        self.report()
    }

    fn bytes(&self, more: u64) -> Result<()> {
        self.bytes.set(self.bytes.get().saturating_add(more));
        self.report()
    }

    fn report(&self) -> Result<()> {
        let mut progress = Progress::new(Phase::Copy);
        progress.entries = self.entries.get();
        progress.bytes = self.bytes.get();
        report(&mut **self.callback.borrow_mut(), progress)
    }
}

/// What a directory gets when the writer leaves it.
#[derive(Debug, Default)]
enum Owed {
    #[default]
    Nothing,
    Attributes(Box<Attributes>),
    /// It was left before, and has been changed since.
    Times(Time, Time),
}

/// Writes to one directory.
pub(super) struct Writer<'a, 'p, 'f> {
    /// Where directories on the way have their attributes from.
    source: Cursor<'a>,
    format: LayerFormat,
    walk: Descent<Owed>,
    /// Where the walk stands.
    at: RelPath,
    root: Dir,
    pub(super) links: Links,
    copier: Copier,
    reports: &'a Reports<'p, 'f>,
}

impl<'a, 'p, 'f> Writer<'a, 'p, 'f> {
    /// Into an empty directory, of paths of `source`, in which marks of `format` are left out.
    pub(super) fn new(
        source: &'a LayerStack,
        format: LayerFormat,
        into: &Dir,
        reports: &'a Reports<'p, 'f>,
    ) -> Result<Self> {
        let what = "the root of a new tree";
        let open = || Ok((into.try_clone()?, into.try_clone()?));
        let (root, top) = open().at("open", what)?;
        root.chmod(PRIVATE_DIR).at("set the mode of", what)?;
        drop_inherited_acls(&root).at("remove inherited access control lists of", what)?;
        let mut walk: Descent<Owed> = Descent::new(top, Purpose::Change).at("open", what)?;
        let mut source = Cursor::new(source);
        walk.level_mut().data = owed(&mut source, &RelPath::ROOT, format)?;
        Ok(Writer {
            source,
            format,
            walk,
            at: RelPath::ROOT,
            root,
            links: Links::default(),
            copier: Copier::new(),
            reports,
        })
    }

    /// Goes to a directory, making what is missing on the way; gives it, open.
    pub(super) fn go_to(&mut self, path: &RelPath) -> Result<&Dir> {
        while !path.starts_with(&self.at) {
            self.leave()?;
        }
        if self.at != *path {
            for name in path.components().skip(self.walk.depth()) {
                self.at.push(&name);
                match self.walk.enter(&name) {
                    Ok(()) => {
                        let Stat { atime, mtime, .. } = self.walk.level().stat;
                        self.walk.level_mut().data = Owed::Times(atime, mtime);
                    }
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {
                        let owed = owed(&mut self.source, &self.at, self.format)?;
                        self.make_dir(&name, owed)?;
                    }
                    Err(e) => return Err(e).at("open directory", &self.at),
                }
            }
        }
        Ok(self.walk.dir())
    }

    /// Makes the directory `self.at`, whose name is `name`, and enters it.
    fn make_dir(&mut self, name: &Name, owed: Owed) -> Result<()> {
        let dir = self.walk.dir();
        dir.make_dir(name, PRIVATE_DIR).at("create directory", &self.at)?;
        self.walk.enter(name).at("open directory", &self.at)?;
        // Whatever the umask is.
        let made = self.walk.dir();
        made.chmod(PRIVATE_DIR).at("set the mode of", &self.at)?;
        self.walk.level_mut().mode = None;
        self.walk.level_mut().data = owed;
        Ok(())
    }

    /// Leaves the directory where the walk stands, which gets what it is owed.
    fn leave(&mut self) -> Result<()> {
        let dir = std::sync::Arc::clone(self.walk.dir());
        let owed = std::mem::take(&mut self.walk.level_mut().data);
        // First, since a mode may forbid to look up `..` in it.
        self.walk.leave().at("leave directory", &self.at)?;
        match owed {
            Owed::Nothing => {}
            Owed::Attributes(attributes) => attributes.give(Place::dir(&dir), &self.at)?,
            Owed::Times(atime, mtime) => {
                dir::set_times(&*dir, atime, mtime).at("set the times of", &self.at)?;
            }
        }
        self.at.pop();
        Ok(())
    }

    /// Makes what the source has at `path`; a directory without its contents, in which the writer
    /// stands then.
    pub(super) fn write(&mut self, path: &RelPath, from: &Visible) -> Result<()> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Ok(());
        };
        self.go_to(&parent)?;
        if from.stat.is_dir() {
            let attributes =
                Attributes::of(Of::Child(&from.dir, &from.name), from.stat, self.format)
                    .at("read the xattrs of", path)?;
            self.at.push(&name);
            return self.make_dir(&name, Owed::Attributes(Box::new(attributes)));
        }
        if let Some(earlier) = self.links.earlier(&from.stat) {
            return self.link(&earlier, &name, path);
        }
        match from.stat.file_type {
            FileType::Regular => self.file(path, &name, from)?,
            _ => self.special(path, &name, from)?,
        }
        self.links.written(&from.stat, path);
        Ok(())
    }

    /// Makes another name of a file that was written.
    fn link(&self, earlier: &RelPath, name: &Name, path: &RelPath) -> Result<()> {
        let root = self.root.try_clone().at("open", "the root of a new tree")?;
        // Directories on the way may have their modes already.
        let mut way: Descent<()> =
            Descent::new(root, Purpose::Look).at("open", "the root of a new tree")?;
        let names: Vec<Name> = earlier.components().collect();
        let Some((old, dirs)) = names.split_last() else { return Ok(()) };
        for dir in dirs {
            way.enter(dir).at("open a directory on the way to", earlier)?;
        }
        way.dir().hard_link(old, self.walk.dir(), name).at("link", path)
    }

    fn file(&mut self, path: &RelPath, name: &Name, from: &Visible) -> Result<()> {
        let file = from.dir.open_file_of_mode(&from.name, from.stat.mode);
        let file = file.at("open for a copy", path)?;
        let attributes = Attributes::of(Of::Fd(file.as_fd()), from.stat, self.format)
            .at("read the xattrs of", path)?;
        let to = self.walk.dir().create_file(name, PRIVATE_FILE).at("create file", path)?;
        let reports = self.reports;
        let mut copied = |n| reports.bytes(n).map_err(io::Error::from);
        let Stat { dev, size, .. } = from.stat;
        self.copier.copy(&file, dev, size, &to, &mut copied).at("copy", path)?;
        attributes.give(Place::Open(to.as_fd(), self.root.owners()), path)
    }

    fn special(&self, path: &RelPath, name: &Name, from: &Visible) -> Result<()> {
        let dir = self.walk.dir();
        let (major, minor) = from.stat.rdev;
        let node = match from.stat.file_type {
            FileType::Symlink => {
                let target = from.dir.read_link(&from.name).at("read link", path)?;
                dir.symlink(&target, name).at("make symlink", path)?;
                None
            }
            FileType::CharDevice => Some(Node::Char { major, minor }),
            FileType::BlockDevice => Some(Node::Block { major, minor }),
            FileType::Socket => Some(Node::Socket),
            _ => Some(Node::Fifo),
        };
        if let Some(node) = node {
            dir.make_node(name, node, PRIVATE_FILE).at("make a fifo, socket or device", path)?;
        }
        Attributes::of(Of::Child(&from.dir, &from.name), from.stat, self.format)
            .at("read the xattrs of", path)?
            .give_to_name(dir, name, path)
    }

    /// Leaves all directories; the root last.
    pub(super) fn finish(mut self) -> Result<()> {
        while self.walk.depth() > 0 {
            self.leave()?;
        }
        self.leave()
    }
}

/// What a directory on the way is owed: the attributes that the source shows of it.
fn owed(source: &mut Cursor<'_>, path: &RelPath, format: LayerFormat) -> Result<Owed> {
    let Some(dir) = source.directory(path)?.and_then(|dir| dir.own().cloned()) else {
        return Ok(Owed::Nothing);
    };
    let stat = dir.stat().at("look at", path)?;
    let attributes = Attributes::of(Of::dir(&dir), stat, format).at("read the xattrs of", path)?;
    Ok(Owed::Attributes(Box::new(attributes)))
}
