//! Holds: the lock of a snapshot's directory, which says that somebody is using it.

use std::os::fd::AsFd;
use std::sync::Arc;
#[cfg(feature = "fuse")]
use std::time::{Duration, Instant};

use super::Store;
use super::metadata::Row;
use super::snapshot::Info;
use crate::driver::SharedLock;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::sys::lock::{Flock, Sharing, lock, try_lock};

/// How long a server that has given up its layer may take to end.
#[cfg(feature = "fuse")]
const TO_END: Duration = Duration::from_secs(3);

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

    /// Holds a snapshot alone, if nobody else holds it; but for a process that serves a mount of it which nobody
    /// sees any more: that is asked to end.
    pub(super) fn try_hold_alone(&self, row: &Row) -> Result<Option<Hold>> {
        let hold = self.try_hold(row.id, Sharing::Exclusive)?;
        #[cfg(feature = "fuse")]
        if hold.is_none() && self.end_unseen_server(row) {
            // It lets go of the snapshot at its very end.
            let start = Instant::now();
            while start.elapsed() < TO_END {
                let hold = self.try_hold(row.id, Sharing::Exclusive)?;
                if hold.is_some() {
                    return Ok(hold);
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        Ok(hold)
    }

    /// Whether there was such a server, and has given up. What keeps that from being found out does not change that
    /// the snapshot is in use.
    #[cfg(feature = "fuse")]
    fn end_unseen_server(&self, row: &Row) -> bool {
        self.try_end_unseen_server(row).unwrap_or_else(|e| {
            tracing::warn!(key = row.info.key, error = %e, "cannot ask who has the snapshot");
            false
        })
    }

    #[cfg(feature = "fuse")]
    fn try_end_unseen_server(&self, row: &Row) -> Result<bool> {
        use crate::fuse::{ViewUpper, unseen};

        let (dir, work) =
            (self.layout.snapshot_path(row.id, "fs"), self.layout.snapshot_path(row.id, "work"));
        let own = crate::driver::own_work()?;
        if !work.join(own.as_os_str()).exists() {
            // No union has been there, or it was committed long ago.
            return Ok(false);
        }
        unseen::end_unseen_server(&ViewUpper { dir, work, own })
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
