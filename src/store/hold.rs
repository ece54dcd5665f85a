//! Holds: the lock of a snapshot's directory, which says that somebody is using it.

use std::os::fd::AsFd;
use std::sync::Arc;

use super::Store;
use super::snapshot::Info;
use crate::driver::SharedLock;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::sys::lock::{Flock, Sharing, lock, try_lock};

/// A held snapshot; dropping it lets go.
#[derive(Debug)]
pub(super) struct Hold {
    lock: Flock,
}

impl Hold {
    /// The same hold, for another process to keep.
    pub(super) fn share(&self) -> Result<SharedLock> {
        let shared = self.lock.as_fd().try_clone_to_owned();
        Ok(SharedLock(Arc::new(shared.at("share", "the lock of a snapshot")?)))
    }

    /// Leaves it to the process that has it, too.
    pub(super) fn hand_over(self) {
        self.lock.hand_over();
    }
}

impl Store {
    /// Waits until nobody holds the snapshot.
    pub(super) fn wait_until_free(&self, id: i64) -> Result<()> {
        let dir = match self.layout.snapshot_dir(id) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            dir => dir?,
        };
        let at = self.layout.path.join("snapshots").join(id.to_string());
        lock(dir.into(), Sharing::Exclusive).at("wait for the lock of", at).map(drop)
    }

    /// Holds the snapshot if nobody does in a way that excludes it.
    pub(super) fn try_hold(&self, id: i64, sharing: Sharing) -> Result<Option<Hold>> {
        let dir = self.layout.snapshot_dir(id)?;
        let lock = try_lock(dir.into(), sharing)
            .at("lock", self.layout.path.join("snapshots").join(id.to_string()))?;
        Ok(lock.ok().map(|lock| Hold { lock }))
    }
}

/// The error for a snapshot that somebody holds.
pub(super) fn held(info: &Info) -> Error {
    Error::new(
        ErrorKind::Busy,
        format!(
            "snapshot {:?} is in use: it is mounted, or another operation is at it; unmount it or \
             wait, and try again",
            info.key
        ),
    )
}
