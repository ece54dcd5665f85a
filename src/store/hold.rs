//! Holds: the lock of a snapshot's directory, which says that somebody is using it.

use super::Store;
use super::snapshot::Info;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::sys::lock::{Flock, Sharing, try_lock};

/// A held snapshot; dropping it lets go.
#[derive(Debug)]
pub(super) struct Hold {
    _lock: Flock,
}

impl Store {
    /// Holds the snapshot if nobody does in a way that excludes it.
    pub(super) fn try_hold(&self, id: i64, sharing: Sharing) -> Result<Option<Hold>> {
        let dir = self.layout.snapshot_dir(id)?;
        let lock = try_lock(dir.into(), sharing)
            .at("lock", self.layout.path.join("snapshots").join(id.to_string()))?;
        Ok(lock.ok().map(|lock| Hold { _lock: lock }))
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
