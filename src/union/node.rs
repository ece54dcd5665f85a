//! One file or directory of the union, as long as somebody knows it.
//!
//! A node is known by its number, which is also its inode number in the mount, and keeps it while it is
//! copied up, renamed and unlinked. It says where the file is now: in a lower layer, in the upper under
//! a name, in the upper under no name any more (then it is held open), or among the union's own links.
//!
//! A directory's place in the upper is its place in the union: the names of the nodes above it are its
//! path. Its parts in lower layers never move, so they are kept as paths.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use smallvec::SmallVec;

use super::listing::Listing;
use super::metacopy::Below;
use super::table::{Lookups, Table};
use crate::path::{Name, RelPath};
use crate::sys::dir::Dir;
use crate::sys::stat::{FileType, Stat};

/// The number of a node: what the kernel calls it by, and `st_ino`.
pub(crate) type NodeId = u64;
/// The root of the union.
pub(crate) const ROOT: NodeId = 1;

/// Which file of which file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Real {
    pub(super) dev: u64,
    pub(super) ino: u64,
}

impl From<&Stat> for Real {
    fn from(stat: &Stat) -> Real {
        Real { dev: stat.dev, ino: stat.ino }
    }
}

/// A directory of a lower layer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Part {
    /// Index of the layer among the lower ones, 0 being the topmost.
    pub(super) layer: usize,
    /// From the layer's root.
    pub(super) path: Arc<RelPath>,
}

/// Where a file that is in a lower layer is.
#[derive(Clone, Debug)]
pub(super) struct LowerPlace {
    pub(super) dir: Part,
    pub(super) name: Name,
}

/// Where a node's file is.
#[derive(Clone, Debug)]
pub(super) enum Place {
    /// In a lower layer; for directories the topmost of [`Directory::lowers`].
    Lower(Option<LowerPlace>),
    /// In the upper, under any of its names; for directories, the one name.
    Upper,
    /// In the upper without a name that is known.
    Pinned(Arc<OwnedFd>),
    /// In the upper, and under this name among the links that the union keeps of it: a file that has
    /// other names in a lower layer, which must show what was written.
    Linked(Name),
}

/// A name of a node: the directory and the name in it.
pub(super) type Link = (Arc<Node>, Name);

/// The names of a node; mostly there is one.
pub(super) type LinkList = SmallVec<[Link; 1]>;

/// What changes of a node.
pub(super) struct State {
    /// Changes with everything below, so that who has looked can tell whether it still holds.
    pub(super) version: u32,
    /// The names that are known, of directories just one. Empty for the root, and for what was unlinked.
    pub(super) links: LinkList,
    pub(super) place: Place,
    /// How many names of a file in a lower layer were unlinked.
    pub(super) unlinked: u32,
    /// Of a file in the upper: where its data are, if not there.
    pub(super) below: Option<Arc<Below>>,
    pub(super) directory: Option<Box<Directory>>,
}

/// What only directories have.
pub(super) struct Directory {
    /// The lower layers' parts of it, topmost first.
    pub(super) lowers: Arc<[Part]>,
    /// The path under which the union of the lower layers shows `lowers`: what a redirect has to say.
    pub(super) below: Arc<RelPath>,
    /// Set when it was removed: what is left of it.
    pub(super) dead: Option<Option<Arc<Dir>>>,
    /// Its entries, once they were asked for.
    pub(super) listing: Option<Arc<Listing>>,
}

/// A file or directory that is known.
pub(crate) struct Node {
    pub(super) id: NodeId,
    /// Different for each node there ever was.
    pub(super) generation: u64,
    pub(super) kind: FileType,
    /// The file in the lower layer that it is or was copied from.
    pub(super) lower: Option<Real>,
    /// The file in the upper, once there is one. Only a symlink that is given away becomes another.
    upper: Mutex<Option<Real>>,
    table: Arc<Table>,
    pub(super) lookups: Lookups,
    /// Whether there may be descriptors of it in the table's cache.
    pub(super) cached: AtomicBool,
    /// Whether its modification time was set by a call. Held while that is done, and while something is
    /// written that must not change it.
    pub(super) time_is_set: Mutex<bool>,
    /// Whether it was given capabilities, which what is handed over late must leave. Held while that is
    /// done, while they are taken away, and while something is written that was written before.
    pub(super) capable: Mutex<bool>,
    /// Whether it may have names that the union shows, and that its copy in the upper has not: of a file
    /// with several names in a lower layer.
    pub(super) unplaced: AtomicBool,
    /// Whether its data are, or were, in a lower layer though it was in the upper.
    pub(super) partial: AtomicBool,
    /// Held by who changes the names in this directory.
    pub(super) names: Mutex<()>,
    /// Held by who copies it up.
    pub(super) copying: Mutex<()>,
    pub(super) state: Mutex<State>,
}

/// What a node is made of.
pub(super) struct NewNode {
    pub(super) kind: FileType,
    pub(super) lower: Option<Real>,
    pub(super) upper: Option<Real>,
    pub(super) link: Option<Link>,
    pub(super) place: Place,
    pub(super) below: Option<Arc<Below>>,
    pub(super) directory: Option<Box<Directory>>,
}

impl Node {
    pub(super) fn new(table: &Arc<Table>, id: NodeId, new: NewNode) -> Arc<Node> {
        let upper = Mutex::new(new.upper);
        Arc::new(Node {
            id,
            generation: table.next_generation(),
            kind: new.kind,
            lower: new.lower,
            upper,
            table: Arc::clone(table),
            lookups: Lookups::default(),
            cached: AtomicBool::new(false),
            time_is_set: Mutex::new(false),
            capable: Mutex::new(false),
            unplaced: AtomicBool::new(false),
            partial: AtomicBool::new(new.below.is_some()),
            names: Mutex::new(()),
            copying: Mutex::new(()),
            state: Mutex::new(State {
                version: 0,
                links: new.link.into_iter().collect(),
                place: new.place,
                unlinked: 0,
                below: new.below,
                directory: new.directory,
            }),
        })
    }

    /// Its number.
    pub(crate) fn id(&self) -> NodeId {
        self.id
    }

    /// Tells this file from others that had the same number.
    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    pub(super) fn is_dir(&self) -> bool {
        self.kind == FileType::Directory
    }

    /// Whether the data of it, or of what is in it, may be in a lower layer though it is in the upper.
    pub(super) fn may_have_data_below(&self) -> bool {
        self.is_dir() || self.state.lock().below.is_some()
    }

    /// How many names its file in the upper has for the moment that nobody is to see.
    pub(super) fn hidden_names(&self) -> u64 {
        self.state.lock().hidden_names()
    }

    pub(super) fn is_root(&self) -> bool {
        self.id == ROOT
    }

    pub(super) fn upper(&self) -> Option<Real> {
        *self.upper.lock()
    }

    /// Notes the copy that was made of it.
    pub(super) fn set_upper(&self, real: Real) {
        *self.upper.lock() = Some(real);
    }

    /// The directory it is in and its name there; none for the root and for what has no name.
    pub(super) fn link(&self) -> Option<Link> {
        self.state.lock().links.first().cloned()
    }
}

impl State {
    /// Notes that something changed.
    pub(super) fn touch(&mut self) {
        self.version = self.version.wrapping_add(1);
    }

    pub(super) fn is_upper(&self) -> bool {
        !matches!(self.place, Place::Lower(_))
    }

    pub(super) fn has_link(&self, dir: &Node, name: &Name) -> bool {
        self.links.iter().any(|(d, n)| d.id == dir.id && n == name)
    }

    /// Takes a name away, and gives it back for the caller to drop when it holds no lock.
    #[must_use]
    pub(super) fn remove_link(&mut self, dir: &Node, name: &Name) -> Option<Link> {
        let at = self.links.iter().position(|(d, n)| d.id == dir.id && n == name)?;
        self.touch();
        Some(self.links.swap_remove(at))
    }

    pub(super) fn add_link(&mut self, dir: &Arc<Node>, name: &Name) {
        if !self.has_link(dir, name) {
            self.touch();
            self.links.push((Arc::clone(dir), name.clone()));
        }
    }

    pub(super) fn lowers(&self) -> Arc<[Part]> {
        self.directory.as_ref().map_or_else(|| Arc::from([]), |d| Arc::clone(&d.lowers))
    }

    /// As [`Node::hidden_names`].
    pub(super) fn hidden_names(&self) -> u64 {
        let shown = self.below.as_ref().and_then(|below| below.shown.as_ref());
        u64::from(shown.is_some_and(|kept| kept.note.is_some()))
    }

    pub(super) fn is_dead(&self) -> bool {
        self.directory.as_ref().is_some_and(|d| d.dead.is_some())
    }
}

impl Directory {
    pub(super) fn new(lowers: Vec<Part>, below: RelPath) -> Box<Directory> {
        Box::new(Directory {
            lowers: Arc::from(lowers),
            below: Arc::new(below),
            dead: None,
            listing: None,
        })
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.table.node_gone(self);
        if self.cached.load(Ordering::Relaxed) {
            self.table.descriptors.drop_node(self.generation);
        }
        // The nodes above may go with it, however many they are: not by recursion, whose depth users
        // would choose.
        let mut links = std::mem::take(&mut self.state.get_mut().links);
        while let Some((dir, _)) = links.pop() {
            if let Some(mut dir) = Arc::into_inner(dir) {
                links.append(&mut dir.state.get_mut().links);
            }
        }
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node").field("id", &self.id).field("kind", &self.kind).finish()
    }
}
