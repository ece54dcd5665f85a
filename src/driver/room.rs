//! A directory in which engines try what they can do.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{IoContext, Result};

/// A directory for trials, removed with all that is in it.
#[derive(Debug)]
pub(super) struct Room(PathBuf);

impl Room {
    pub(super) fn make(dir: &Path) -> Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = dir.join(format!("probe-{}-{count}", std::process::id()));
        fs::create_dir(&path).at("create directory for trials", &path)?;
        Ok(Room(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// A new directory in it, which stays until the room is removed.
    pub(super) fn corner(&self) -> io::Result<PathBuf> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = self.0.join(count.to_string());
        fs::create_dir(&path)?;
        Ok(path)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_dir_all(&self.0) {
            tracing::warn!("the directory of a trial stays: {:?}: {e}", self.0);
        }
    }
}
