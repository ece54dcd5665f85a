//! Durable points: the moments at which an operation waits for the disk.
//!
//! Every wait of the store passes through here, so that a test can count them and copy the disk at
//! each. With [`Durability::None`] nothing waits: a power cut may then lose what was done last, and
//! what the file system had not written of it; the order of writes is the file system's.

use std::fmt;
use std::sync::Arc;

use super::metadata::{Metadata, Sync, Tx};
use crate::error::{IoContext, Result};
use crate::sys::dir::Dir;

/// Whether the store waits for the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Durability {
    /// What a call did is on disk when it returns.
    #[default]
    Full,
    /// Never waits; for caches and tests.
    None,
}

/// A moment at which the store waits for the disk: before it, and after it is done.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DurablePoint {
    pub name: &'static str,
    pub done: bool,
}

/// Called at every durable point; for the crash tests.
#[doc(hidden)]
#[derive(Clone)]
pub struct DurablePointHook(pub Arc<dyn Fn(DurablePoint) + Send + std::marker::Sync>);

impl fmt::Debug for DurablePointHook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DurablePointHook")
    }
}

/// The policy of one store.
#[derive(Clone, Debug, Default)]
pub(super) struct Waits {
    pub(super) durability: Durability,
    pub(super) hook: Option<DurablePointHook>,
}

impl Waits {
    fn at<T>(&self, name: &'static str, wait: impl FnOnce() -> Result<T>) -> Result<T> {
        self.tell(DurablePoint { name, done: false });
        let value = wait()?;
        self.tell(DurablePoint { name, done: true });
        Ok(value)
    }

    fn tell(&self, point: DurablePoint) {
        if let Some(hook) = &self.hook {
            (hook.0)(point);
        }
    }

    /// Data and names of everything on the file system of `dir`. The kernel tells a failed write once
    /// to each open file, and to one opened later if nobody was told: so `dir` must be the caller's own,
    /// lest an error of his be told to another.
    pub(super) fn sync_files(&self, dir: &Dir) -> Result<()> {
        match self.durability {
            Durability::None => Ok(()),
            Durability::Full => self.at("sync of the file system", || {
                dir.sync_file_system().at("sync the file system of", "the store")
            }),
        }
    }

    /// A transaction that is on disk when this returns.
    pub(super) fn transaction<T>(
        &self,
        metadata: &Metadata,
        change: impl FnOnce(&Tx<'_>) -> Result<T>,
    ) -> Result<T> {
        match self.durability {
            Durability::None => metadata.write(Sync::Lazy, change),
            Durability::Full => self.at("transaction", || metadata.write(Sync::Durable, change)),
        }
    }
}
