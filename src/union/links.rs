//! Files with several names in a lower layer that were copied up.
//!
//! The copy has one of the names, while the others are still the lower file's. So that a write through
//! one name shows under all of them, the union keeps a further link to the copy in its work directory,
//! and remembers for as long as it is mounted which lower file the copy stands for.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::node::{NodeId, Real};
use crate::path::Name;

/// One such file.
#[derive(Debug)]
pub(super) struct Linked {
    /// Its name among the union's own links.
    pub(super) name: Name,
    pub(super) id: NodeId,
    pub(super) lower: Real,
    pub(super) upper: Real,
    /// How many names the union shows of it.
    names: AtomicU64,
}

impl Linked {
    pub(super) fn new(name: Name, id: NodeId, lower: Real, upper: Real, names: u64) -> Linked {
        Linked { name, id, lower, upper, names: AtomicU64::new(names) }
    }

    pub(super) fn names(&self) -> u64 {
        self.names.load(Ordering::Relaxed)
    }

    pub(super) fn add_name(&self) {
        self.names.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes a name away; how many are left.
    pub(super) fn remove_name(&self) -> u64 {
        let less = |n: u64| Some(n.saturating_sub(1));
        let before = self.names.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        before.unwrap_or(0).saturating_sub(1)
    }
}

/// All such files.
#[derive(Debug, Default)]
pub(super) struct Links {
    /// By the lower file and by the copy.
    by_file: Mutex<HashMap<Real, Arc<Linked>>>,
}

impl Links {
    pub(super) fn of(&self, real: Real) -> Option<Arc<Linked>> {
        self.by_file.lock().get(&real).cloned()
    }

    pub(super) fn insert(&self, linked: Linked) {
        let linked = Arc::new(linked);
        let mut by_file = self.by_file.lock();
        by_file.insert(linked.lower, Arc::clone(&linked));
        by_file.insert(linked.upper, linked);
    }

    pub(super) fn remove(&self, linked: &Linked) {
        let mut by_file = self.by_file.lock();
        by_file.remove(&linked.lower);
        by_file.remove(&linked.upper);
    }
}
