//! The union file system: what is read through a stack of branches, and what is changed in the
//! topmost of them. It knows nothing of FUSE.
//!
//! # Where things are
//!
//! - `spec`: what a union is made of. `node`, `table`: what is known of files, by number.
//!   `descriptors`, `backing`: how a node's file is reached. `identity`, `links`: which number a file has.
//! - `lookup`, `listing`, `attr`, `xattr`, `acl`, `data`: what is read, and changed of a file. `caller`:
//!   who asks.
//! - `create`, `remove`, `rename`, `copyup`, `workdir`: what is changed. `metacopy`: copies whose data are
//!   still below; `complete`: they get these. `settle`: all that refers to lower layers is made to stand on its own.
//!
//! # Invariants
//!
//! - The layers below the upper never change. The upper is changed by this union alone; a change that
//!   somebody else makes there shows as late as caches end.
//! - Every change is one atomic step in the upper (a rename, mostly) that takes the tree from one
//!   right state to the next, so that a kill at any moment leaves what was before or after. What is not
//!   complete is in the work directory's `temp`, which is emptied when the union is opened.
//! - No lock is held while file data are copied, but the one of that file's copy-up.
//!
//! # Lock order
//!
//! 1. `moving`; [`Node::names`] of the directories whose names change, by number;
//! 2. [`Node::time_is_set`] of one node; [`Node::capable`] of one node; [`Node::copying`] of one node; that
//!    file's turn in `completions`; `metacopies_end`;
//! 3. `tree`: for reading while paths in the upper are put together and walked, for writing while a
//!    directory gets another place;
//! 4. [`Node::state`], of two nodes by number;
//! 5. the table's shards and maps, the descriptors: for a moment, nothing is called under them.

mod acl;
mod attr;
mod backing;
mod caller;
mod complete;
mod copyup;
mod create;
mod data;
mod descriptors;
mod identity;
mod links;
mod listing;
mod lookup;
mod metacopy;
mod node;
mod remove;
mod rename;
mod settle;
mod spec;
mod table;
mod workdir;
mod xattr;

#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

pub(crate) use attr::{Attr, SetAttr};
pub(crate) use caller::Caller;
pub(crate) use create::{Make, NewFile};
pub(crate) use listing::Listed;
pub(crate) use lookup::Entry;
pub(crate) use node::{Node, NodeId};
pub(crate) use rename::RenameMode;
pub use settle::Settled;
pub(crate) use settle::settle;
pub(crate) use spec::{Lower, SyncPolicy, UnionOptions, UnionSpec, Upper};

use self::complete::Completions;
use self::descriptors::Descriptors;
use self::links::Links;
use self::node::{Directory, NewNode, Part, Place, ROOT, Real};
use self::table::Table;
use self::workdir::Work;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::layer::{LayerFormat, marks};
use crate::path::RelPath;
use crate::sys::copy::Copier;
use crate::sys::dir::Dir;
use crate::sys::errno::Code;
use crate::sys::file;
use crate::sys::fs_features;
use crate::sys::lock::Flock;
use crate::sys::owners::Owners;
use crate::sys::stat::{FileType, Time};

/// A union of branches, at work.
#[derive(Debug)]
pub(crate) struct Union {
    lowers: Vec<Lower>,
    upper: Option<UpperBranch>,
    options: UnionOptions,
    table: Arc<Table>,
    root: Arc<Node>,
    tree: RwLock<()>,
    links: Links,
    /// How many files were copied up: a lookup that saw the lower file begins anew if this has changed.
    published: AtomicU64,
    /// No more metadata-only copies are made. Held for reading while one is.
    metacopies_end: RwLock<bool>,
    /// How often something got another name that has, or may hold what has, data in a lower layer. Changed
    /// while `moving` is held for reading, by whoever gives names.
    moved: AtomicU64,
    moving: RwLock<()>,
    completions: Completions,
    /// Since when it may be used.
    opened: Time,
    /// Whether the kernel tells when files were changed, and knows it better.
    times_are_told: AtomicBool,
    /// The file systems of the branches: what they tell of themselves, and their device number.
    file_systems: Vec<FileSystem>,
    copiers: Mutex<Vec<Copier>>,
    #[cfg(test)]
    hooks: tests::Hooks,
}

#[derive(Clone, Copy, Debug)]
struct FileSystem {
    id: u64,
    dev: u64,
}

/// What is noted of a copy (`of_a_copy`), or of a file with several names, read and written again; none if it
/// is damaged.
#[cfg(fuzzing)]
pub(crate) fn recoded(bytes: &[u8], of_a_copy: bool) -> Option<Vec<u8>> {
    if of_a_copy { complete::Kept::recoded(bytes) } else { links::recoded(bytes) }
}

/// The branch that takes all changes.
#[derive(Debug)]
struct UpperBranch {
    dir: Arc<Dir>,
    format: LayerFormat,
    work: Work,
    /// Whether what is done to one name may reach the disk before what was done to another, and nobody
    /// said that it may.
    needs_order: bool,
    _lock: Option<Flock>,
}

impl UpperBranch {
    /// Called for a directory in which, or on which, something was put that hides what lower layers have, before
    /// anything relies on that: has it come first on the disk, too. A power cut could otherwise bring back what
    /// a lower layer has, beside what is there instead.
    fn keep_order(&self, dir: &Dir) -> io::Result<()> {
        if self.needs_order { dir.sync() } else { Ok(()) }
    }

    /// The same where it was put there in one step with what relies on it.
    fn keep_order_afterwards(&self, dir: &Dir) {
        if let Err(e) = self.keep_order(dir) {
            tracing::warn!(error = %e, "cannot write a directory to disk: after a power cut it may show again \
                                        what was removed or renamed");
        }
    }
}

impl Union {
    /// Takes the branches into use. With an upper, what an earlier union left unfinished in its work
    /// directory is removed first.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] without any branch; those of the system, on a branch's root or
    /// the work directory.
    pub(crate) fn open(spec: UnionSpec) -> Result<Union> {
        if spec.lowers.is_empty() && spec.upper.is_none() {
            return Err(Error::new(ErrorKind::InvalidArgument, "a union needs a branch"));
        }
        let upper = match spec.upper {
            None => None,
            Some(Upper { dir, format, work, lock }) => {
                let work = Work::open(work, format)?;
                let strict = spec.options.sync == SyncPolicy::Strict;
                let needs_order = strict
                    && !fs_features::keeps_order(&dir)
                        .at("ask for the file system of", "a layer")?;
                Some(UpperBranch { dir, format, work, needs_order, _lock: lock })
            }
        };
        let table = Arc::new(Table::new(Descriptors::new(file::descriptor_limit())));
        let mut roots = Vec::new();
        roots.extend(upper.as_ref().map(|upper| Arc::clone(&upper.dir)));
        roots.extend(spec.lowers.iter().map(|lower| Arc::clone(&lower.dir)));
        let mut options = spec.options;
        if roots.iter().any(|dir| dir.owners().are_in_xattrs()) {
            // Their ids and the file's own mode would be this user's.
            options.no_acl = true;
        }
        let mut file_systems: Vec<FileSystem> = Vec::new();
        for dir in &roots {
            let dev = dir.stat().at("look at", "the root of a layer")?.dev;
            if file_systems.iter().any(|known| known.dev == dev) {
                continue;
            }
            let id = file::file_system_stat(dir).at("ask for the file system of", "a layer")?.id;
            // Two that say the same cannot be told apart, so neither is.
            let id = if file_systems.iter().any(|known| known.id == id) { 0 } else { id };
            file_systems.push(FileSystem { id, dev });
            // Numbers the file systems in this order.
            table.direct_id(Real { dev, ino: 2 });
        }
        let root = root_node(&table, upper.as_ref(), &spec.lowers)
            .at("read the marks of", "the root of a layer")?;
        if table.insert(&root).is_ok() {
            table.retain(&root);
        }
        let union = Union {
            lowers: spec.lowers,
            upper,
            options,
            table,
            root,
            tree: RwLock::new(()),
            links: Links::default(),
            published: AtomicU64::new(0),
            metacopies_end: RwLock::new(false),
            moved: AtomicU64::new(0),
            moving: RwLock::new(()),
            completions: Completions::default(),
            opened: Time::now(),
            times_are_told: AtomicBool::new(false),
            file_systems,
            copiers: Mutex::default(),
            #[cfg(test)]
            hooks: tests::Hooks::default(),
        };
        union.load_links().at("take up the links in", "the work directory")?;
        Ok(union)
    }

    /// From now on the kernel tells by itself when files were changed (FUSE's writeback).
    pub(crate) fn times_will_be_told(&self) {
        self.times_are_told.store(true, Ordering::Relaxed);
    }

    /// Whether POSIX ACLs are shown and taken.
    pub(crate) fn has_acls(&self) -> bool {
        !self.options.no_acl
    }

    /// The root of the union.
    pub(crate) fn root(&self) -> &Arc<Node> {
        &self.root
    }

    /// The node of a number that was given out.
    ///
    /// # Errors
    /// ESTALE if there is none any more.
    pub(crate) fn node(&self, id: NodeId) -> io::Result<Arc<Node>> {
        if id == ROOT {
            return Ok(Arc::clone(&self.root));
        }
        self.table.get(id).ok_or_else(|| Code::Stale.into())
    }

    /// Takes back as many lookups as were counted by [`Union::lookup`] and the calls that create.
    pub(crate) fn forget(&self, id: NodeId, lookups: u64) {
        if id != ROOT {
            self.table.forget(id, lookups);
        }
    }

    /// Ends the union: nothing may be asked of it any more but this. Waits until all is on disk, if it
    /// is to care for that, and leaves the work directory empty.
    pub(crate) fn close(&self) -> io::Result<()> {
        self.table.clear();
        let Some(upper) = &self.upper else { return Ok(()) };
        upper.work.empty()?;
        self.prune_links()?;
        match self.options.sync {
            SyncPolicy::Strict => upper.dir.sync_file_system(),
            SyncPolicy::Volatile => Ok(()),
        }
    }

    /// The upper, for what changes.
    ///
    /// # Errors
    /// EROFS without one.
    fn writable(&self) -> io::Result<&UpperBranch> {
        self.upper.as_ref().ok_or_else(|| Code::ReadOnly.into())
    }

    /// Where all branches keep owners.
    fn owners(&self) -> Owners {
        let upper = self.upper.as_ref().map(|upper| &upper.dir);
        let dir = upper.or_else(|| self.lowers.first().map(|lower| &lower.dir));
        dir.map_or(Owners::OfFiles, |dir| dir.owners())
    }

    fn lower(&self, layer: usize) -> io::Result<&Lower> {
        self.lowers.get(layer).ok_or_else(|| Code::Io.into())
    }
}

impl Drop for Union {
    /// Nodes that were looked up and not forgotten hold each other.
    fn drop(&mut self) {
        self.table.clear();
    }
}

fn root_node(
    table: &Arc<Table>,
    upper: Option<&UpperBranch>,
    lowers: &[Lower],
) -> io::Result<Arc<Node>> {
    let mut parts = Vec::new();
    let mut ends = match upper {
        None => false,
        Some(upper) => marks::is_opaque(upper.format, &upper.dir)?,
    };
    for (layer, lower) in lowers.iter().enumerate() {
        if ends {
            break;
        }
        parts.push(Part { layer, path: Arc::new(RelPath::ROOT) });
        ends = lower.marks().is_opaque(&lower.dir)?;
    }
    let real = |dir: &Arc<Dir>| dir.stat().map(|stat| Real::from(&stat));
    Ok(Node::new(
        table,
        ROOT,
        NewNode {
            kind: FileType::Directory,
            lower: lowers.first().map(|lower| real(&lower.dir)).transpose()?,
            upper: upper.map(|upper| real(&upper.dir)).transpose()?,
            link: None,
            place: if upper.is_some() { Place::Upper } else { Place::Lower(None) },
            below: None,
            directory: Some(Directory::new(parts, RelPath::ROOT)),
        },
    ))
}
