//! What is being made and what is being removed.
//!
//! An entry of `staging/` is made and locked under a shared lock of `staging/` itself; whoever looks
//! for abandoned entries holds that lock exclusively, so an entry is never seen before it is locked.
//! The lock is of the entry's directory, goes with it when it is renamed into `snapshots/`, and is
//! held until its row is committed: an entry whose lock is free has lost its maker.
//!
//! Removal renames into `trash/`, which is emptied by whoever comes by, holding the lock of the entry.

use std::hash::{BuildHasher, Hasher};
use std::io;

use super::layout::{Layout, name};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::path::Name;
use crate::progress::{Phase, Progress, ProgressFn, report};
use crate::sys::dir::{Dir, OnExisting};
use crate::sys::errno;
use crate::sys::lock::{Flock, Sharing, lock, try_lock};
use crate::sys::remove::remove_tree;

/// A number that nobody else draws; nor does a child after fork, which has the same random state.
pub(super) fn random() -> u64 {
    let mut hasher = std::hash::RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    hasher.finish()
}

/// A locked entry of `staging/`; dropped unpublished, it is removed.
#[derive(Debug)]
pub(super) struct Staged<'s> {
    layout: &'s Layout,
    name: Name,
    dir: Dir,
    lock: Option<Flock>,
}

impl<'s> Staged<'s> {
    /// Makes an empty one.
    pub(super) fn new(layout: &'s Layout) -> Result<Staged<'s>> {
        let entry = name(&format!("{:016x}", random()))?;
        let at = layout.path.join("staging");
        let _gate = layout
            .staging
            .reopen()
            .and_then(|dir| lock(dir.into(), Sharing::Shared))
            .at("lock", &at)?;
        layout.staging.make_dir(&entry, 0o700).at("create a directory in", &at)?;
        let open = || -> io::Result<(Dir, Option<Flock>)> {
            let dir = layout.staging.open_dir(&entry)?;
            let held = try_lock(dir.reopen()?.into(), Sharing::Exclusive)?.ok();
            Ok((dir, held))
        };
        let (dir, lock) = open().at("lock a new directory in", &at)?;
        Ok(Staged { layout, name: entry, dir, lock })
    }

    /// Its name in `staging/`.
    pub(super) fn name(&self) -> &std::ffi::OsStr {
        self.name.as_os_str()
    }

    /// Its directory.
    pub(super) fn dir(&self) -> &Dir {
        &self.dir
    }

    /// Moves it to `snapshots/<id>`. The lock goes with it: keep it until the row is committed.
    pub(super) fn publish(mut self, id: i64) -> Result<Published<'s>> {
        let target = name(&id.to_string())?;
        let rename = || {
            self.layout.staging.rename(
                &self.name,
                &self.layout.snapshots,
                &target,
                OnExisting::Fail,
            )
        };
        let renamed = match rename() {
            // The id was given out before, and its row was lost with the power: nobody's directory.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                discard(self.layout, &self.layout.snapshots, &target)?;
                rename()
            }
            done => done,
        };
        renamed.at("publish", self.layout.path.join("snapshots").join(id.to_string()))?;
        Ok(Published { layout: self.layout, name: target, lock: self.lock.take(), kept: false })
    }
}

impl Drop for Staged<'_> {
    fn drop(&mut self) {
        if self.lock.is_some()
            && let Err(e) = remove_tree(&self.layout.staging, &self.name, &mut || Ok(()))
        {
            tracing::warn!(name = ?self.name, error = %e, "staging entry left for gc");
        }
    }
}

/// A directory in `snapshots/` whose row is not there yet; dropped unkept, it is removed.
#[derive(Debug)]
pub(super) struct Published<'s> {
    layout: &'s Layout,
    name: Name,
    lock: Option<Flock>,
    kept: bool,
}

impl Published<'_> {
    /// The row is committed, or may be.
    pub(super) fn keep(mut self) {
        self.kept = true;
        drop(self.lock.take());
    }
}

impl Drop for Published<'_> {
    fn drop(&mut self) {
        if !self.kept
            && let Err(e) = discard(self.layout, &self.layout.snapshots, &self.name)
        {
            tracing::warn!(name = ?self.name, error = %e, "unfinished snapshot left for gc");
        }
    }
}

/// Moves `entry` of `dir` to the trash and removes it from there. What could not be removed is left to
/// [`empty_trash`].
pub(super) fn discard(layout: &Layout, dir: &Dir, entry: &Name) -> Result<()> {
    if let Some(trashed) = to_trash(layout, dir, entry)? {
        remove_trashed(layout, &trashed);
    }
    Ok(())
}

/// Removes an entry of the trash. It is out of everybody's way already: failing costs but its room.
fn remove_trashed(layout: &Layout, trashed: &Name) {
    if let Err(e) = remove_tree(&layout.trash, trashed, &mut || Ok(())) {
        tracing::warn!(name = ?trashed, error = %e, "entry of the trash is left for cleanup");
    }
}

/// Moves `entry` of `dir` to the trash, and gives its name there; none if it is gone already.
fn to_trash(layout: &Layout, dir: &Dir, entry: &Name) -> Result<Option<Name>> {
    let trashed = name(&format!("{:016x}", random()))?;
    match dir.rename(entry, &layout.trash, &trashed, OnExisting::Fail) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        // No room for a name in the trash: then from where it is.
        Err(e) if errno::is_full(&e) => {
            remove_tree(dir, entry, &mut || Ok(())).at("remove", entry).map(|()| None)
        }
        done => done.at("move to the trash", entry).map(|()| Some(trashed)),
    }
}

/// Removes everything in the trash; how many entries. What cannot be removed stays, and the first
/// reason is given when all else is done.
pub(super) fn empty_trash(layout: &Layout, progress: &mut ProgressFn<'_>) -> Result<u64> {
    let mut done = Progress::new(Phase::Remove);
    let mut removed = 0;
    let mut failed = None;
    for entry in layout.trash.entries().at("list", layout.path.join("trash"))? {
        let held = match layout.trash.open_dir(&entry.name) {
            Ok(dir) => match try_lock(dir.into(), Sharing::Exclusive).at("lock", &entry.name)? {
                Ok(held) => Some(held),
                // Somebody else is at it.
                Err(_) => continue,
            },
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            // Not a directory, or not readable: removal sees to it.
            Err(_) => None,
        };
        let mut each = || -> io::Result<()> {
            done.entries += 1;
            report(progress, done).map_err(io::Error::from)
        };
        match remove_tree(&layout.trash, &entry.name, &mut each) {
            Ok(()) => removed += 1,
            Err(e) => match cancelled_or(e, &entry.name) {
                e if e.kind() == ErrorKind::Cancelled => return Err(e),
                e => failed = failed.or(Some(e)),
            },
        }
        drop(held);
    }
    failed.map_or(Ok(removed), Err)
}

fn cancelled_or(e: io::Error, path: &Name) -> Error {
    let e = Error::io("remove from the trash", path, e);
    if e.kind() == ErrorKind::Cancelled {
        return Error::new(ErrorKind::Cancelled, "stopped by the progress callback");
    }
    e
}

/// Removes entries of `staging/` whose maker is gone; how many.
pub(super) fn sweep_staging(layout: &Layout) -> Result<u64> {
    let at = layout.path.join("staging");
    let gate = layout.staging.reopen().at("open", &at)?;
    // Somebody is just making one: there will be another sweep.
    let Ok(gate) = try_lock(gate.into(), Sharing::Exclusive).at("lock", &at)? else {
        return Ok(0);
    };
    let mut swept = Vec::new();
    for entry in layout.staging.entries().at("list", &at)? {
        if is_abandoned(&layout.staging, &entry.name).at("lock", &entry.name)? {
            swept.extend(to_trash(layout, &layout.staging, &entry.name)?);
        }
    }
    // Makers wait for no more than the renames.
    drop(gate);
    for trashed in &swept {
        remove_trashed(layout, trashed);
    }
    Ok(swept.len() as u64)
}

/// Whether nobody holds the lock of the directory `entry`. What is no directory has no maker.
pub(super) fn is_abandoned(dir: &Dir, entry: &Name) -> io::Result<bool> {
    match dir.open_dir(entry) {
        Ok(opened) => Ok(try_lock(opened.into(), Sharing::Exclusive)?.is_ok()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => Ok(true),
        Err(e) => Err(e),
    }
}
