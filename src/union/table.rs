//! The nodes that are known, by number.
//!
//! A node stays in the table for as long as the kernel counts lookups of it, or anything else holds it:
//! the nodes below it, or a request at work. Then it goes of itself.
//!
//! No node may be dropped while a shard is locked, since that locks it, too.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::descriptors::Descriptors;
use super::node::{Node, NodeId, Real};
use crate::sys::memory;

/// A power of two.
const SHARDS: usize = 64;
/// Numbers from here on stand for no inode number of a layer.
const DYNAMIC: NodeId = 1 << 63;
/// Inode numbers of layers have as many bits; above them is which file system it is.
const INODE_BITS: u32 = 56;

/// When as many nodes were freed, memory is given back.
const GIVE_BACK: u64 = 8192;

/// How many lookups the kernel counts of a node. Changed while its shard is locked.
#[derive(Debug, Default)]
pub(super) struct Lookups(AtomicU64);

impl Lookups {
    fn count(&self, more: u64) {
        self.set(self.0.load(Ordering::Relaxed).saturating_add(more));
    }

    /// How many are left.
    fn take_back(&self, less: u64) -> u64 {
        self.set(self.0.load(Ordering::Relaxed).saturating_sub(less))
    }

    fn set(&self, n: u64) -> u64 {
        self.0.store(n, Ordering::Relaxed);
        n
    }
}

/// The nodes that are known.
#[derive(Debug)]
pub(super) struct Table {
    shards: Vec<Mutex<HashMap<NodeId, Slot>>>,
    generations: AtomicU64,
    dynamic: AtomicU64,
    /// How many nodes there are, and how many there were at most since memory was given back.
    live: AtomicU64,
    peak: AtomicU64,
    /// The file systems of the layers by device number, in the order in which they were met.
    file_systems: Mutex<Vec<u64>>,
    /// Numbers of files that do not follow from their inode number.
    others: Mutex<HashMap<Real, NodeId>>,
    pub(super) descriptors: Descriptors,
}

/// What is under a number. It is small, as are nodes: there may be millions of both.
#[derive(Debug)]
enum Slot {
    /// Nobody counts lookups of it.
    Known(Weak<Node>),
    /// Kept while there are lookups: [`Node::lookups`].
    Held(Arc<Node>),
}

impl Slot {
    fn node(&self) -> Option<Arc<Node>> {
        match self {
            Slot::Known(node) => node.upgrade(),
            Slot::Held(node) => Some(Arc::clone(node)),
        }
    }

    fn is_of(&self, node: &Node) -> bool {
        let known = match self {
            Slot::Known(known) => known.as_ptr(),
            Slot::Held(held) => Arc::as_ptr(held),
        };
        std::ptr::eq(known, node)
    }

    /// Whether there is no such node any more: then nobody else's is here.
    fn is_gone(&self) -> bool {
        match self {
            Slot::Known(node) => node.strong_count() == 0,
            Slot::Held(_) => false,
        }
    }

    /// Lets go of the node, and gives it back for the caller to drop when no shard is locked.
    fn let_go(&mut self) -> Option<Arc<Node>> {
        let Slot::Held(node) = self else { return None };
        let known = Slot::Known(Arc::downgrade(node));
        match std::mem::replace(self, known) {
            Slot::Held(node) => Some(node),
            Slot::Known(_) => None,
        }
    }
}

impl Table {
    pub(super) fn new(descriptors: Descriptors) -> Table {
        Table {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            generations: AtomicU64::new(1),
            dynamic: AtomicU64::new(0),
            live: AtomicU64::new(0),
            peak: AtomicU64::new(0),
            file_systems: Mutex::default(),
            others: Mutex::default(),
            descriptors,
        }
    }

    pub(super) fn next_generation(&self) -> u64 {
        self.generations.fetch_add(1, Ordering::Relaxed)
    }

    /// The number that a file has by itself; none if it does not fit.
    pub(super) fn direct_id(&self, real: Real) -> Option<NodeId> {
        if real.ino < 2 || real.ino >> INODE_BITS != 0 {
            return None;
        }
        let mut known = self.file_systems.lock();
        let index = match known.iter().position(|dev| *dev == real.dev) {
            Some(index) => index,
            None => {
                known.push(real.dev);
                known.len().saturating_sub(1)
            }
        };
        let index = u64::try_from(index).ok().filter(|index| *index < 127)?;
        Some(index << INODE_BITS | real.ino)
    }

    /// A number that no other node has or had.
    pub(super) fn dynamic_id(&self) -> NodeId {
        DYNAMIC | self.dynamic.fetch_add(1, Ordering::Relaxed)
    }

    /// The number of a file that has none by itself, for as long as it is known.
    pub(super) fn assigned_id(&self, real: Real) -> NodeId {
        *self.others.lock().entry(real).or_insert_with(|| self.dynamic_id())
    }

    /// The number that was noted for a file.
    pub(super) fn other_id(&self, real: Real) -> Option<NodeId> {
        self.others.lock().get(&real).copied()
    }

    /// Notes a file's number where it cannot be found out again.
    pub(super) fn note_other_id(&self, real: Real, id: NodeId) {
        self.others.lock().insert(real, id);
    }

    /// The file is gone, and its inode number may come back as another's.
    pub(super) fn forget_other_id(&self, real: Real) {
        self.others.lock().remove(&real);
    }

    fn shard(&self, id: NodeId) -> Option<&Mutex<HashMap<NodeId, Slot>>> {
        // The multiplication spreads numbers that follow each other or differ in high bits only.
        let hash = id.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        self.shards.get(usize::try_from(hash).unwrap_or(0) % SHARDS)
    }

    /// The node of this number.
    pub(super) fn get(&self, id: NodeId) -> Option<Arc<Node>> {
        self.shard(id)?.lock().get(&id)?.node()
    }

    /// Enters a new node under its number; gives back the one that has it already.
    pub(super) fn insert(&self, node: &Arc<Node>) -> Result<(), Arc<Node>> {
        let Some(shard) = self.shard(node.id) else { return Ok(()) };
        let mut shard = shard.lock();
        if let Some(existing) = shard.get(&node.id).and_then(Slot::node) {
            return Err(existing);
        }
        if shard.insert(node.id, Slot::Known(Arc::downgrade(node))).is_none() {
            let live = self.live.fetch_add(1, Ordering::Relaxed).saturating_add(1);
            self.peak.fetch_max(live, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Counts a lookup by the kernel.
    pub(super) fn retain(&self, node: &Arc<Node>) {
        let Some(shard) = self.shard(node.id) else { return };
        let mut shard = shard.lock();
        if let Some(slot) = shard.get_mut(&node.id)
            && slot.is_of(node)
        {
            node.lookups.count(1);
            if matches!(slot, Slot::Known(_)) {
                *slot = Slot::Held(Arc::clone(node));
            }
        }
    }

    /// Takes lookups back.
    pub(super) fn forget(&self, id: NodeId, lookups: u64) {
        let Some(shard) = self.shard(id) else { return };
        let mut shard = shard.lock();
        let held = match shard.get_mut(&id) {
            Some(slot) => match slot {
                Slot::Held(node) if node.lookups.take_back(lookups) == 0 => slot.let_go(),
                _ => None,
            },
            None => None,
        };
        drop(shard);
        drop(held);
    }

    /// A node is about to be freed.
    pub(super) fn node_gone(&self, node: &Node) {
        let Some(shard) = self.shard(node.id) else { return };
        let mut shard = shard.lock();
        if shard.get(&node.id).is_some_and(Slot::is_gone) {
            shard.remove(&node.id);
            if shard.len().saturating_mul(8) < shard.capacity() {
                let room = shard.len().saturating_mul(2);
                shard.shrink_to(room);
            }
            self.unassign(node);
            drop(shard);
            self.one_less();
        }
    }

    /// Nobody asks for an assigned number any more.
    fn unassign(&self, node: &Node) {
        for real in [node.lower, node.upper()].into_iter().flatten() {
            if node.id >= DYNAMIC && self.direct_id(real).is_none() {
                let mut others = self.others.lock();
                if others.get(&real) == Some(&node.id) {
                    others.remove(&real);
                }
            }
        }
    }

    /// Gives memory back when a great part of what was known is forgotten.
    fn one_less(&self) {
        let live = self.live.fetch_sub(1, Ordering::Relaxed).saturating_sub(1);
        let peak = self.peak.load(Ordering::Relaxed);
        let much = peak.saturating_sub(live) >= GIVE_BACK && live < peak / 2;
        let order = Ordering::Relaxed;
        // Only one does it.
        if much && self.peak.compare_exchange(peak, live, order, order).is_ok() {
            memory::give_back();
        }
    }

    /// Lets go of all nodes: the kernel is gone, or has forgotten them without saying so.
    pub(super) fn clear(&self) {
        for shard in &self.shards {
            let held: Vec<_> = shard.lock().values_mut().filter_map(Slot::let_go).collect();
            drop(held);
        }
    }

    /// How many nodes there are.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().len()).sum()
    }
}
