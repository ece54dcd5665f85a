//! Garbage: what interrupted operations and removals leave. Nothing that a living process works on is
//! touched, since it holds the lock of that.

use std::collections::HashSet;
use std::path::Path;

use super::metadata::Row;
use super::snapshot::Kind;
use super::{Store, layout, staging};
use crate::digest::Digest;
use crate::error::{ErrorKind, IoContext, Result};
use crate::path::Name;
use crate::progress::ProgressFn;
use crate::sys::lock::{Sharing, try_lock};

/// What [`Store::gc`] removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct GcReport {
    /// Extractions and preparations that were never finished.
    pub staging: u64,
    /// Directories in `snapshots/` without a row.
    pub orphans: u64,
    /// Workdirs of committed snapshots.
    pub workdirs: u64,
    /// Trees of snapshots that were in use when those were committed.
    pub trees: u64,
    /// Removed snapshots whose files had not gone yet.
    pub trash: u64,
    /// Layers of imports that never became an image.
    pub layers: u64,
    /// Blobs that no image names.
    pub blobs: u64,
    /// Rows of mounts that are gone.
    pub mounts: u64,
}

impl Store {
    /// Removes what no snapshot and no image needs, and gives the reserve its blocks back.
    ///
    /// # Errors
    /// Those of the file system; [`ErrorKind::Cancelled`](crate::ErrorKind::Cancelled).
    pub fn gc(&self, progress: &mut ProgressFn<'_>) -> Result<GcReport> {
        let mut report = self.sweep_counted()?;
        for row in self.metadata.read(|tx| tx.every())? {
            if row.info.kind == Kind::Committed {
                report.trees += u64::from(self.sweep_tree(&row)?);
            }
            if row.info.kind == Kind::Committed && !row.handed_out {
                report.workdirs += u64::from(self.sweep_workdir(&row)?);
            }
        }
        let trash = match staging::empty_trash(&self.layout, progress) {
            Err(e) if e.kind() == ErrorKind::Cancelled => return Err(e),
            // What cannot be removed keeps nothing else from removal.
            trash => trash,
        };
        self.sweep_imports(&mut report)?;
        self.layout.fill_reserve()?;
        report.trash = trash?;
        Ok(report)
    }

    /// The quick part of [`Store::gc`]: staging, orphans, mount rows, intents.
    pub(super) fn sweep(&self) -> Result<()> {
        self.sweep_counted().map(drop)
    }

    fn sweep_counted(&self) -> Result<GcReport> {
        let mut report = GcReport {
            staging: staging::sweep_staging(&self.layout)?,
            orphans: self.sweep_orphans()?,
            ..GcReport::default()
        };
        report.mounts = self.sweep_mount_rows()?;
        // Ids are never given out twice, so an intent is worth nothing but while it is carried out;
        // and should its operation still run, it will find nothing to end.
        if !self.metadata.read(|tx| tx.intents())?.is_empty() {
            let rows: HashSet<i64> = self.unpublished()?;
            self.lazily(|tx| {
                for id in tx.intents()?.into_iter().filter(|id| !rows.contains(id)) {
                    tx.end_intent(id)?;
                }
                Ok(())
            })?;
        }
        Ok(report)
    }

    /// Ids of directories in `snapshots/` that have no row.
    fn unpublished(&self) -> Result<HashSet<i64>> {
        // The listing comes first: what is published meanwhile gets its row later.
        let mut ids: HashSet<i64> = self.snapshot_names()?.iter().filter_map(id_of).collect();
        for row in self.metadata.read(|tx| tx.every())? {
            ids.remove(&row.id);
        }
        Ok(ids)
    }

    fn snapshot_names(&self) -> Result<Vec<Name>> {
        let entries = self.layout.snapshots.entries();
        let entries = entries.at("list", self.layout.path.join("snapshots"))?;
        Ok(entries.into_iter().map(|entry| entry.name).collect())
    }

    fn sweep_orphans(&self) -> Result<u64> {
        let mut swept = 0;
        for id in self.unpublished()? {
            let name = layout::name(&id.to_string())?;
            let held = match self.layout.snapshots.open_dir(&name) {
                Ok(dir) => try_lock(dir.into(), Sharing::Exclusive).at("lock", &name)?,
                // Gone meanwhile.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                Err(e) => return Err(crate::Error::io("open", &name, e)),
            };
            // Its maker holds it, or has committed its row before letting go.
            let Ok(held) = held else { continue };
            if self.metadata.read(|tx| tx.find_id(id))?.is_none() {
                staging::discard(&self.layout, &self.layout.snapshots, &name)?;
                swept += 1;
            }
            drop(held);
        }
        Ok(swept)
    }

    fn sweep_workdir(&self, row: &Row) -> Result<bool> {
        let work = layout::name("work")?;
        let Ok(dir) = self.layout.snapshot_dir(row.id) else {
            // Damage that `check` reports.
            return Ok(false);
        };
        if dir.try_stat_at(&work).at("look at", &work)?.is_none() {
            return Ok(false);
        }
        let Some(_hold) = self.try_hold(row.id, Sharing::Exclusive)? else {
            return Ok(false);
        };
        if self.not_mounted(row).is_err() {
            return Ok(false);
        }
        staging::discard(&self.layout, &dir, &work)?;
        Ok(true)
    }

    /// Layers and blobs without an image, unless an image is being brought in.
    fn sweep_imports(&self, report: &mut GcReport) -> Result<()> {
        let at = self.layout.path.join("blobs/sha256");
        let dir = self.layout.blobs.reopen().at("open", &at)?;
        let Ok(_alone) = try_lock(dir.into(), Sharing::Exclusive).at("lock", &at)? else {
            return Ok(());
        };
        report.layers = self.sweep_layers()?;
        report.blobs = self.sweep_blobs(&at)?;
        Ok(())
    }

    fn sweep_layers(&self) -> Result<u64> {
        let mut swept = 0;
        // Children were made after their parents.
        for row in self.metadata.read(|tx| tx.every())?.into_iter().rev() {
            let imported = row.info.labels.contains_key(Store::IMAGE_LAYER_LABEL);
            if !imported || row.info.kind != Kind::Committed {
                continue;
            }
            match self.remove(&row.info.key) {
                Ok(()) => swept += 1,
                // It is needed, or gone.
                Err(e)
                    if matches!(
                        e.kind(),
                        ErrorKind::FailedPrecondition | ErrorKind::Busy | ErrorKind::NotFound
                    ) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(swept)
    }

    fn sweep_blobs(&self, at: &Path) -> Result<u64> {
        let needed = self.needed_blobs()?;
        let may_go = |name: &Name| {
            let digest = std::str::from_utf8(name.as_bytes()).ok().map(Digest::from_hex);
            match (digest, &needed) {
                (Some(Ok(digest)), Some(needed)) => !needed.contains(&digest),
                (Some(Ok(_)), None) => false,
                // Never finished.
                _ => true,
            }
        };
        let mut swept = 0;
        for entry in self.layout.blobs.entries().at("list", at)? {
            if may_go(&entry.name) {
                self.layout.blobs.unlink(&entry.name).at("remove blob", &entry.name)?;
                swept += 1;
            }
        }
        Ok(swept)
    }
}

fn id_of(name: &Name) -> Option<i64> {
    std::str::from_utf8(name.as_bytes()).ok()?.parse().ok()
}
