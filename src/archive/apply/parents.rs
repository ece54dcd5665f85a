//! Directories that an archive has no entry for: they are made up, and take their attributes from the
//! layers below.
//!
//! Which directories those are is known only at the archive's end, as an entry may come late; and the
//! layers below may not be there until then, as they are being unpacked too. So a directory that is
//! made up is noted, forgotten when its entry comes, and given its attributes at the end ([`settle`]).
//! What is noted is bounded: when it is [full](MadeUp::is_full), the attributes are given right away,
//! and an entry that comes later replaces them.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::attributes::{ACL_DEFAULT, set_by_policy};
use super::options::{ApplyOptions, Ownership};
use super::target::Inode;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::layer::descent::{Descent, Purpose};
use crate::layer::{LayerFormat, marks};
use crate::path::{Name, RelPath};
use crate::sys::dir::{self, Dir};
use crate::sys::errno;
use crate::sys::owners::Owners;
use crate::sys::stat::{Stat, Time};
use crate::sys::xattr::{self, Of};

/// What may be noted, in bytes, as near as one can tell.
const NOTED_MAX: usize = if cfg!(test) { 4 << 10 } else { 8 << 20 };
/// What noting one directory takes beside its path.
const NOTE: usize = 96;

const OWNER: u32 = 0o700;

/// The directories that were made up, by inode.
#[derive(Debug)]
pub(super) struct MadeUp {
    /// The format of the layers below; none of plain trees.
    format: Option<LayerFormat>,
    paths: HashMap<Inode, RelPath>,
    bytes: usize,
}

impl MadeUp {
    pub(super) fn new(format: Option<LayerFormat>) -> Self {
        MadeUp { format, paths: HashMap::new(), bytes: 0 }
    }

    pub(super) fn note(&mut self, inode: Inode, path: RelPath) {
        self.bytes += NOTE + path.as_bytes().len();
        self.paths.insert(inode, path);
    }

    /// An entry describes the directory, or the inode is another's now.
    pub(super) fn forget(&mut self, inode: Inode) {
        if let Some(path) = self.paths.remove(&inode) {
            self.bytes = self.bytes.saturating_sub(NOTE + path.as_bytes().len());
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.bytes > NOTED_MAX
    }
}

/// What [`settle`] did.
#[derive(Debug, Default)]
pub(super) struct Settled {
    /// How many bytes the directories grew by on disk.
    pub(super) bytes: u64,
    pub(super) skipped_xattrs: u64,
    /// Whether what is made in one of them may inherit access control lists.
    pub(super) has_default_acl: bool,
}

/// Opens one of [`ApplyOptions::parents`].
pub(super) fn open_parent(path: &Path, owners: Owners) -> Result<Dir> {
    Dir::open_with(path, owners).at("open directory that parents take their attributes from", path)
}

/// Gives the directories in `root` that were made up, and are still there, their attributes.
pub(super) fn settle(root: &Dir, made_up: &MadeUp, options: &ApplyOptions) -> Result<Settled> {
    let mut settled = Settled::default();
    if made_up.paths.is_empty() {
        return Ok(settled);
    }
    let parents = options.parents()?;
    if parents.is_empty() {
        return Ok(settled);
    }
    let clone = root.try_clone().at("open directory to unpack into", "")?;
    let mut walk = Walk::new(clone).at("open directory to unpack into", "")?;
    let mut noted: Vec<(&RelPath, &Inode)> =
        made_up.paths.iter().map(|(inode, path)| (path, inode)).collect();
    noted.sort();
    for (path, inode) in noted {
        if !walk.go(path).at("go to the missing directory", path)? {
            continue;
        }
        let stat = walk.descent.level().stat;
        if (stat.dev, stat.ino) != *inode {
            continue;
        }
        if let Some((model, like)) = model(&parents, path, made_up.format, root.owners())? {
            let dir = Arc::clone(walk.descent.dir());
            copy(&model, &like, &dir, path, options, &mut settled)?;
            let level = walk.descent.level_mut();
            level.data = Some((like.atime, like.mtime));
            level.mode = (like.mode & OWNER != OWNER).then_some(like.mode);
            let after = dir.stat().at("read attributes of", path)?.blocks;
            let grown = after.saturating_sub(stat.blocks).saturating_mul(512);
            settled.bytes = settled.bytes.saturating_add(grown);
        }
    }
    walk.end().at("leave directory", "")?;
    Ok(settled)
}

/// What a path is in one of the parents.
enum Found {
    Directory(Dir),
    /// Nothing, and what lies below shows.
    Nothing,
    /// Nothing that is a directory, and what lies below is hidden.
    Hidden,
}

/// The directory at `path` in the first of the parents that has the path, unless one before it hides
/// that. The parents are opened one after the other, as there may be hundreds.
fn model(
    parents: &[PathBuf],
    path: &RelPath,
    format: Option<LayerFormat>,
    owners: Owners,
) -> Result<Option<(Dir, Stat)>> {
    for parent in parents {
        let found = find(open_parent(parent, owners)?, path, format);
        match found.at("look for the attributes of parent", path)? {
            Found::Nothing => {}
            Found::Hidden => return Ok(None),
            Found::Directory(dir) => {
                let stat = dir.stat().at("read attributes of parent", path)?;
                return Ok(Some((dir, stat)));
            }
        }
    }
    Ok(None)
}

/// Follows no link: the directory that was made up takes the place of one.
fn find(root: Dir, path: &RelPath, format: Option<LayerFormat>) -> io::Result<Found> {
    let mut dir = root;
    let mut opaque = false;
    for name in path.components() {
        if let Some(format) = format {
            opaque |= marks::is_opaque(format, &dir)?;
        }
        let deleted = match format.and_then(|format| marks::separate_whiteout(format, &name)) {
            Some(mark) => dir.try_stat_at(&mark)?.is_some(),
            None => false,
        };
        dir = match dir.open_dir(&name) {
            Ok(dir) => dir,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Ok(if opaque || deleted { Found::Hidden } else { Found::Nothing });
            }
            // A whiteout, a link, another file.
            Err(e) if e.kind() == io::ErrorKind::NotADirectory || errno::is_loop(&e) => {
                return Ok(Found::Hidden);
            }
            Err(e) => return Err(e),
        };
        opaque |= deleted;
    }
    Ok(Found::Directory(dir))
}

/// Owner, xattrs and mode; the times are set when the directory is left.
fn copy(
    model: &Dir,
    like: &Stat,
    dir: &Dir,
    path: &RelPath,
    options: &ApplyOptions,
    settled: &mut Settled,
) -> Result<()> {
    if options.ownership != Ownership::Ignore {
        dir.chown(like.uid, like.gid).at("set owner of", path)?;
    }
    let keys = xattr::list(Of::dir(model)).at("list xattrs of parent", path)?;
    for key in keys.iter().filter(|key| !marks::is_union_xattr(key)) {
        if let Some(value) = xattr::get(Of::dir(model), key).at("read xattr of parent", path)? {
            let of = Of::dir(dir);
            let was_set = set_by_policy(options.xattrs, of, key, &value, path.as_path())?;
            settled.skipped_xattrs += u64::from(!was_set);
            settled.has_default_acl |= key == ACL_DEFAULT;
        }
    }
    dir.chmod(like.mode | OWNER).at("set mode of", path)
}

/// A walk over paths in order, which gives each directory its times when it is left.
struct Walk {
    descent: Descent<Option<(Time, Time)>>,
}

impl Walk {
    fn new(root: Dir) -> io::Result<Walk> {
        Ok(Walk { descent: Descent::new(root, Purpose::Change)? })
    }

    /// Goes to `path`; whether it is a directory.
    fn go(&mut self, path: &RelPath) -> io::Result<bool> {
        let names: Vec<Name> = path.components().collect();
        let common = self.descent.names().zip(&names).take_while(|(a, b)| a == b).count();
        while self.descent.depth() > common {
            self.leave()?;
        }
        for name in names.iter().skip(common) {
            match self.descent.enter(name) {
                Ok(()) => {}
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                    ) =>
                {
                    return Ok(false);
                }
                Err(e) if errno::is_loop(&e) => return Ok(false),
                Err(e) => return Err(e),
            }
        }
        Ok(true)
    }

    fn leave(&mut self) -> io::Result<()> {
        if let Some((atime, mtime)) = self.descent.level_mut().data.take() {
            dir::set_times(&**self.descent.dir(), atime, mtime)?;
        }
        self.descent.leave()
    }

    fn end(&mut self) -> io::Result<()> {
        while self.descent.depth() > 0 {
            self.leave()?;
        }
        self.leave()
    }
}

/// The layers below, where they are not there yet when unpacking begins: who needs to know them waits.
#[derive(Clone, Debug, Default)]
pub(crate) struct Below(Arc<Promise>);

#[derive(Debug, Default)]
struct Promise {
    told: Mutex<Option<Told>>,
    news: Condvar,
}

#[derive(Clone, Debug)]
enum Told {
    Are(Vec<PathBuf>),
    WillNotBe,
}

impl Below {
    /// They are there, in these directories, topmost first.
    pub(crate) fn are(&self, directories: Vec<PathBuf>) {
        self.tell(Told::Are(directories));
    }

    /// They will not be there: who waits is to give up. What was told before stays.
    pub(crate) fn will_not_be(&self) {
        self.tell(Told::WillNotBe);
    }

    fn tell(&self, told: Told) {
        self.0.told.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(told);
        self.0.news.notify_all();
    }

    /// Waits until they are there.
    ///
    /// # Errors
    /// [`ErrorKind::Cancelled`]: they will not be.
    pub(crate) fn wait(&self) -> Result<Vec<PathBuf>> {
        let mut told = self.0.told.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match &*told {
                Some(Told::Are(directories)) => return Ok(directories.clone()),
                Some(Told::WillNotBe) => {
                    let text = "stopped, as the layers below are not to be";
                    return Err(Error::new(ErrorKind::Cancelled, text));
                }
                None => told = self.0.news.wait(told).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

impl ApplyOptions {
    /// Whether there may be parents to ask.
    pub(super) fn has_parents(&self) -> bool {
        !self.parents.is_empty() || self.below.is_some()
    }

    /// The directories that are asked for attributes, topmost first.
    fn parents(&self) -> Result<Vec<PathBuf>> {
        let mut parents = self.parents.clone();
        if let Some(below) = &self.below {
            parents.extend(below.wait()?);
        }
        Ok(parents)
    }
}
