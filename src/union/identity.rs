//! Which number a file has.
//!
//! A file's number is its inode number in its layer, with the layer's file system in the high bits. A
//! copy keeps the number of what it was copied from: while the union is open by the table of nodes, and
//! later by an xattr of the union's own on the copy, `<prefix>stratafs.origin`. It is only a hint: whoever
//! finds the number taken by another file gets the copy's own, or one that was never used.
//!
//! The xattr holds the file system (what statfs(2) tells of it, 8 bytes) and the inode number (8 bytes),
//! both little-endian. Only directories and files with one name get it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Union;
use super::lookup::Found;
use super::metacopy::Below;
use super::node::{Directory, NewNode, Node, NodeId, Place, Real};
use crate::layer::LayerFormat;
use crate::path::Name;
use crate::sys::file;
use crate::sys::stat::FileType;
use crate::sys::xattr::{self, Of};

/// What is made of a [`Found`].
pub(super) enum Identified {
    Node(Arc<Node>),
    /// It was copied up while it was looked for.
    Changed,
}

impl Union {
    /// The key of one of the union's own xattrs.
    pub(super) fn own_key(format: LayerFormat, what: &str) -> Option<Vec<u8>> {
        format.xattr_prefix().map(|prefix| format!("{prefix}stratafs.{what}").into_bytes())
    }

    /// Notes on a copy what it was copied from. Without an xattr for it, the number is kept for as long
    /// as the union is open.
    pub(super) fn write_origin(
        &self,
        format: LayerFormat,
        of: Of<'_>,
        origin: Real,
    ) -> io::Result<()> {
        let Some(key) = Self::own_key(format, "origin") else { return Ok(()) };
        let Some(fs) = self.file_systems.iter().find(|fs| fs.dev == origin.dev && fs.id != 0)
        else {
            return Ok(());
        };
        let mut value = fs.id.to_le_bytes().to_vec();
        value.extend_from_slice(&origin.ino.to_le_bytes());
        xattr::set(of, &key, &value)
    }

    fn read_origin(
        &self,
        format: LayerFormat,
        file: file::Place<'_>,
        keys: &[Vec<u8>],
    ) -> io::Result<Option<Real>> {
        let Some(key) = Self::own_key(format, "origin").filter(|key| keys.contains(key)) else {
            return Ok(None);
        };
        let value = file.despite_its_mode(|| xattr::get(file.xattrs(), &key))?;
        let Some(value) = value else { return Ok(None) };
        let Some((fs, ino)) = value.split_at_checked(8) else { return Ok(None) };
        let (Ok(fs), Ok(ino)) = (<[u8; 8]>::try_from(fs), <[u8; 8]>::try_from(ino)) else {
            return Ok(None);
        };
        let id = u64::from_le_bytes(fs);
        let known = self.file_systems.iter().find(|fs| fs.id == id && id != 0);
        Ok(known.map(|fs| Real { dev: fs.dev, ino: u64::from_le_bytes(ino) }))
    }

    /// The numbers that a file may have, best first; without a look at the file itself.
    fn candidates_at_hand(&self, found: &Found) -> Vec<NodeId> {
        let real = Real::from(&found.stat);
        let mut ids = Vec::with_capacity(4);
        if let Some(linked) = self.linked(found) {
            ids.push(linked.id());
        }
        ids.extend(self.table.other_id(real));
        ids.extend(self.table.direct_id(real));
        ids
    }

    /// The numbers that a file may have, best first; `keys` are those of its xattrs.
    fn candidates(&self, found: &Found, keys: &[Vec<u8>]) -> io::Result<Vec<NodeId>> {
        let mut ids = self.candidates_at_hand(found);
        let direct = self.table.direct_id(Real::from(&found.stat));
        let last = ids.len().saturating_sub(usize::from(direct.is_some()));
        if let (Some(upper), Some(dir)) = (&self.upper, &found.upper)
            && let Some(origin) =
                self.read_origin(upper.format, file::Place::Child(dir, &found.name), keys)?
        {
            // Before its own.
            ids.splice(last..last, self.table.direct_id(origin));
        }
        Ok(ids)
    }

    /// The keys of the xattrs of what was found in the upper, if it is such as the union marks.
    fn keys(&self, found: &Found) -> io::Result<Vec<Vec<u8>>> {
        let marked = self.upper.as_ref().is_some_and(|upper| upper.format.xattr_prefix().is_some())
            && matches!(found.stat.file_type, FileType::Regular | FileType::Directory);
        match &found.upper {
            Some(dir) if marked => xattr::list(Of::Child(dir, &found.name)),
            _ => Ok(Vec::new()),
        }
    }

    /// Where the data of a regular file are that was found in the upper, or has a copy there, if not with
    /// that.
    fn data_of(
        &self,
        parent: &Arc<Node>,
        found: &Found,
        linked: Option<&super::links::Linked>,
        keys: &[Vec<u8>],
    ) -> io::Result<Option<Arc<Below>>> {
        let Some(upper) = &self.upper else { return Ok(None) };
        if !found.stat.is_file() || upper.format.xattr_prefix().is_none() {
            return Ok(None);
        }
        let at = (parent, &found.name);
        match (&found.upper, linked) {
            (Some(dir), _) => {
                self.data_below(upper.format, at, file::Place::Child(dir, &found.name), keys)
            }
            (None, Some(linked)) => {
                let file = file::Place::Child(upper.work.links(), &linked.name);
                self.data_below(upper.format, at, file, &xattr::list(file.xattrs())?)
            }
            (None, None) => Ok(None),
        }
    }

    fn linked(&self, found: &Found) -> Option<Arc<super::links::Linked>> {
        if found.stat.nlink < 2 || found.stat.is_dir() {
            return None;
        }
        self.links.of(Real::from(&found.stat))
    }

    /// The node of what was found in `parent`, if it is known.
    pub(super) fn known(&self, parent: &Arc<Node>, found: &Found) -> io::Result<Option<Arc<Node>>> {
        let first_of = |ids: &[NodeId]| {
            let mut nodes = ids.iter().filter_map(|id| self.table.get(*id));
            nodes.find(|node| self.is_same(node, parent, found, None))
        };
        if let Some(node) = first_of(&self.candidates_at_hand(found)) {
            return Ok(Some(node));
        }
        Ok(first_of(&self.candidates(found, &self.keys(found)?)?))
    }

    /// The node of what was found in `parent`, made if it is not known. `since` is how many files had
    /// been copied up before it was looked for.
    pub(super) fn identify(
        &self,
        parent: &Arc<Node>,
        found: Found,
        since: u64,
    ) -> io::Result<Identified> {
        let real = Real::from(&found.stat);
        for id in self.candidates_at_hand(&found) {
            if let Some(node) = self.table.get(id)
                && self.is_same(&node, parent, &found, Some(since))
            {
                self.note_link(&node, parent, &found);
                return Ok(Identified::Node(node));
            }
        }
        let keys = self.keys(&found)?;
        let mut ids = self.candidates(&found, &keys)?;
        for id in &ids {
            if let Some(node) = self.table.get(*id) {
                if self.is_same(&node, parent, &found, Some(since)) {
                    self.note_link(&node, parent, &found);
                    return Ok(Identified::Node(node));
                }
                if self.published.load(Ordering::Acquire) != since && found.upper.is_none() {
                    return Ok(Identified::Changed);
                }
            }
        }
        if self.published.load(Ordering::Acquire) != since && found.upper.is_none() {
            return Ok(Identified::Changed);
        }
        let direct = self.table.direct_id(real);
        let linked = self.linked(&found);
        if direct.is_none() && linked.is_none() {
            // By which whoever comes next finds this node.
            ids.push(self.table.assigned_id(real));
        }
        let noted = ids.len();
        ids.push(self.table.dynamic_id());
        let below = self.data_of(parent, &found, linked.as_deref(), &keys);
        if !matches!(below, Ok(None)) && self.published.load(Ordering::Acquire) != since {
            // It may have been completed since its marks were read, or while they were.
            return Ok(Identified::Changed);
        }
        let below = below?;
        let child_dir = found.own_dir.clone();
        let new = |found: &Found| NewNode {
            kind: found.stat.file_type,
            lower: match (&found.upper, &linked) {
                (_, Some(linked)) => Some(linked.lower),
                (None, None) => Some(real),
                (Some(_), None) => None,
            },
            upper: match (&found.upper, &linked) {
                (_, Some(linked)) => Some(linked.upper),
                (Some(_), None) => Some(real),
                (None, None) => None,
            },
            link: Some((Arc::clone(parent), found.name.clone())),
            place: match (&found.upper, &linked) {
                (_, Some(linked)) => Place::Linked(linked.name.clone()),
                (Some(_), None) => Place::Upper,
                (None, None) => Place::Lower(found.lower.clone()),
            },
            below: below.clone(),
            directory: found
                .stat
                .is_dir()
                .then(|| Directory::new(found.lowers.clone(), found.below.clone())),
        };
        for (index, id) in ids.iter().enumerate() {
            let node = Node::new(&self.table, *id, new(&found));
            node.unplaced.store(found.upper.is_none() && linked.is_some(), Ordering::Relaxed);
            match self.table.insert(&node) {
                Ok(()) => {
                    if let Some(linked) = &linked {
                        // By which it is found under its other names.
                        linked.set_id(*id);
                    } else if index == noted {
                        tracing::debug!(?direct, id, name = ?found.name, "number taken by another");
                        self.table.note_other_id(real, *id);
                    } else if direct.is_none() {
                        // Whoever had it before may have gone just now.
                        self.table.note_other_id(real, *id);
                    }
                    if let (Some(dir), true) = (child_dir, found.upper.is_some()) {
                        node.cached.store(true, Ordering::Relaxed);
                        let key = super::descriptors::DirKey::Upper(node.generation);
                        self.table.descriptors.keep_dir(key, &dir);
                    }
                    return Ok(Identified::Node(node));
                }
                Err(existing) if self.is_same(&existing, parent, &found, Some(since)) => {
                    self.note_link(&existing, parent, &found);
                    return Ok(Identified::Node(existing));
                }
                Err(_) => {}
            }
        }
        // A number that was never used is free.
        Err(crate::sys::errno::eio())
    }

    /// Whether a known node is what was found.
    fn is_same(
        &self,
        node: &Arc<Node>,
        parent: &Arc<Node>,
        found: &Found,
        since: Option<u64>,
    ) -> bool {
        let real = Real::from(&found.stat);
        let in_upper = found.upper.is_some();
        if node.kind != found.stat.file_type {
            return false;
        }
        let state = node.state.lock();
        if node.is_dir() {
            let same = if in_upper { node.upper() == Some(real) } else { node.lower == Some(real) };
            return same && !state.is_dead() && state.has_link(parent, &found.name);
        }
        let elsewhere = !state.links.is_empty() && !state.has_link(parent, &found.name);
        if elsewhere && found.stat.nlink < 2 {
            return false;
        }
        if in_upper {
            return node.upper() == Some(real);
        }
        if node.lower != Some(real) {
            return false;
        }
        // One name in the lower layer, and copied up: then it was found before that.
        let stale = state.is_upper() && found.stat.nlink < 2;
        !stale || since.is_none()
    }

    /// Notes the name under which a node was found, if it is a further one.
    fn note_link(&self, node: &Arc<Node>, parent: &Arc<Node>, found: &Found) {
        if node.is_dir() {
            return;
        }
        let mut state = node.state.lock();
        if state.has_link(parent, &found.name) {
            return;
        }
        state.add_link(parent, &found.name);
        if found.upper.is_none() {
            node.unplaced.store(true, Ordering::Relaxed);
        }
        let unpinned = match state.place {
            Place::Pinned(_) if found.upper.is_some() => {
                Some(std::mem::replace(&mut state.place, Place::Upper))
            }
            _ => None,
        };
        drop(state);
        drop(unpinned);
    }

    /// The number of a file that was just made in the upper, under `name`; its node.
    pub(super) fn new_node(
        &self,
        parent: &Arc<Node>,
        name: &Name,
        stat: &crate::sys::stat::Stat,
        directory: Option<Box<Directory>>,
    ) -> Arc<Node> {
        let real = Real::from(stat);
        let make = |id: NodeId, directory: Option<Box<Directory>>| {
            let new = NewNode {
                kind: stat.file_type,
                lower: None,
                upper: Some(real),
                link: Some((Arc::clone(parent), name.clone())),
                place: Place::Upper,
                below: None,
                directory,
            };
            Node::new(&self.table, id, new)
        };
        let lowers = directory.as_ref().map(|d| (d.lowers.to_vec(), (*d.below).clone()));
        if let Some(id) = self.table.direct_id(real) {
            let node = make(id, directory);
            if self.table.insert(&node).is_ok() {
                return node;
            }
        }
        let directory = lowers.map(|(lowers, below)| Directory::new(lowers, below));
        let id = self.table.dynamic_id();
        let node = make(id, directory);
        self.table.note_other_id(real, id);
        // Never taken: the number is new.
        let _ = self.table.insert(&node);
        node
    }
}
