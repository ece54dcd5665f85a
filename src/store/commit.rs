//! Settling a snapshot, and committing it.
//!
//! A settled layer refers to nothing below it (no redirect, no metacopy), and its usage is known. The
//! note that a snapshot is settled goes when it is handed out for mounting; mounts that outlive the
//! settling are their owner's to take down first. What is used as a tree is made a layer by it
//! (`trees`).

use super::hold::Hold;
use super::metadata::Row;
use super::prepare::committed_parent;
use super::snapshot::{CommitOptions, Info, Kind, check_key};
use super::{Store, layout, staging, wrong_kind};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::layer::marks::{self, Mark};
use crate::layer::usage::Counter;
use crate::layer::walk::{Descend, has_vanished, walk};
use crate::layer::{LayerFormat, Usage};
use crate::progress::{Phase, Progress, ProgressFn, ignore_progress, report};
use crate::sys::dir::Dir;
use crate::sys::lock::Flock;
use crate::sys::xattr::Of;

impl Store {
    /// Makes sure that an active snapshot's layer stands on its own, and notes what it takes on disk, so
    /// that [`Store::commit`] need not. Gives that usage.
    ///
    /// Of directories that were renamed over FUSE, and of files of which only attributes were changed, a
    /// lower layer may still have the contents: they are copied, and share their data with the originals
    /// where the file system can do that. This may be stopped, by a kill too, and called again; what the
    /// snapshot shows stays the same throughout. While it is mounted, files alone can be completed; from then
    /// on the mount copies data along with attributes, and directories of lower layers cannot be renamed in it
    /// (EXDEV).
    ///
    /// # Errors
    /// - [`ErrorKind::FailedPrecondition`]: not an active snapshot; or a file or directory in it has
    ///   its data or contents in a lower layer, as overlayfs leaves it under `metacopy` or
    ///   `redirect_dir`.
    /// - [`ErrorKind::Busy`]: directories were renamed in it, and it is mounted, or another operation is
    ///   at it.
    /// - [`ErrorKind::NoSpace`], [`ErrorKind::Cancelled`], and those of the file system: what was copied
    ///   by then stays in the layer.
    pub fn settle(&self, key: &str, progress: &mut ProgressFn<'_>) -> Result<Usage> {
        let needed = "only an active one can be settled";
        let (row, hold) = self.hold_active(key, self.active(key, needed)?, needed)?;
        self.catch_up_held(&row, hold.as_ref(), progress)?;
        let (settled, _folding) = self.up_to_date(&row, progress)?;
        // While it is mounted it may change again.
        if hold.is_some() && self.is_unmounted(&row)? {
            // The note must not outlive a power cut that loses what it is about.
            self.waits.sync_files(&self.layout.layer_dir(row.id)?)?;
            self.durably(|tx| match tx.find(key)? {
                Some(now) if now.id == row.id => {
                    // Else somebody was told meanwhile how to mount it.
                    let same = now.handed_out == row.handed_out;
                    if same { tx.set_settled(row.id, Some(settled)) } else { Ok(()) }
                }
                _ => Err(gone(key)),
            })?;
        }
        Ok(settled.0)
    }

    /// Makes an active snapshot immutable, under the name `name`; the key is free afterwards.
    ///
    /// Settles first, if [`Store::settle`] was not called after the last mount: that copies directories
    /// that were renamed, and takes long if they are large. Legal while mounted, as in containerd; writes that come later are then part of the committed layer, but for those to
    /// a copy ([`CopyDriver`](crate::CopyDriver)), which are lost.
    ///
    /// # Errors
    /// - [`ErrorKind::AlreadyExists`]: the name is in use; the active snapshot stays.
    /// - [`ErrorKind::NotFound`]: there is no such key, or no such new parent.
    /// - [`ErrorKind::FailedPrecondition`]: the key is a view or committed; the new parent is not
    ///   committed; the layer cannot be settled.
    /// - [`ErrorKind::Busy`]: as [`Store::settle`].
    /// - [`ErrorKind::InvalidArgument`]: a new parent for a snapshot that has one.
    pub fn commit(&self, name: &str, key: &str, options: CommitOptions) -> Result<Info> {
        check_key(name)?;
        let needed = "only an active one can be committed";
        let row = self.active(key, needed)?;
        self.metadata.read(|tx| {
            tx.free_key(name)?;
            new_parent(tx, &row, options.parent.as_deref()).map(drop)
        })?;
        let (row, hold) = self.hold_active(key, row, needed)?;
        let had_tree = self.tree_dir(&row)?.is_some();
        let (settled, _folding) = match (row.settled, row.info.usage, row.has_marks) {
            (true, Some(usage), Some(has_marks)) => {
                let folding = had_tree.then(|| self.lock_folding(&row)).transpose()?;
                ((usage, has_marks), folding)
            }
            _ => {
                self.catch_up_held(&row, hold.as_ref(), &mut ignore_progress)?;
                self.up_to_date(&row, &mut ignore_progress)?
            }
        };
        self.waits.sync_files(&self.layout.layer_dir(row.id)?)?;
        let row = self.durably(|tx| {
            let row = match tx.find(key)? {
                Some(now) if now.id == row.id && now.info.kind == Kind::Active => now,
                _ => return Err(gone(key)),
            };
            let parent = new_parent(tx, &row, options.parent.as_deref())?;
            tx.commit_as(&row, name, parent, &options.labels, settled)?;
            tx.get(name)
        })?;
        if hold.is_some() && (had_tree || !row.handed_out) {
            match self.is_unmounted(&row) {
                Ok(true) => {
                    if had_tree {
                        self.drop_committed_tree(&row);
                    }
                    if !row.handed_out {
                        self.drop_workdir(row.id);
                    }
                }
                Ok(false) => {}
                // It is committed all the same.
                Err(e) => {
                    tracing::warn!(name, error = %e, "workdir of a committed snapshot is left")
                }
            }
        }
        Ok(row.info)
    }

    /// Makes sure that the layer is what the snapshot shows, adds it up, and sees that it refers to
    /// nothing below it. The lock is to be kept until that is noted.
    fn up_to_date(
        &self,
        row: &Row,
        progress: &mut ProgressFn<'_>,
    ) -> Result<((Usage, bool), Option<Flock>)> {
        if self.ahead(row)?.is_some() {
            let folded = self.fold(row, progress)?;
            return Ok((folded.settled, Some(folded.folding)));
        }
        Ok((self.inspect(row, progress)?, None))
    }

    /// Holds the snapshot of `row`, if nobody else does, and reads it again: it may have been mounted,
    /// changed and unmounted before it was held.
    fn hold_active(&self, key: &str, row: Row, needed: &str) -> Result<(Row, Option<Hold>)> {
        let hold = match self.try_hold_alone(&row) {
            Err(e) if e.kind() == ErrorKind::NotFound && self.is_gone(&row)? => {
                return Err(gone(key));
            }
            hold => hold?,
        };
        match self.active(key, needed)? {
            now if now.id == row.id => Ok((now, hold)),
            _ => Err(gone(key)),
        }
    }

    fn is_gone(&self, row: &Row) -> Result<bool> {
        Ok(self.metadata.read(|tx| tx.find_id(row.id))?.is_none())
    }

    /// Whether this store has it mounted nowhere, as far as it knows.
    fn is_unmounted(&self, row: &Row) -> Result<bool> {
        match self.not_mounted(row) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == ErrorKind::Busy => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// The snapshot, which must be active.
    pub(super) fn active(&self, key: &str, needed: &str) -> Result<Row> {
        let row = self.metadata.read(|tx| tx.get(key))?;
        if row.info.kind == Kind::Active { Ok(row) } else { Err(wrong_kind(&row.info, needed)) }
    }

    /// Removes the workdir of a committed snapshot that nobody has mounted; failing costs nothing but
    /// its room.
    pub(super) fn drop_workdir(&self, id: i64) {
        let dropped = self
            .layout
            .snapshot_dir(id)
            .and_then(|dir| staging::discard(&self.layout, &dir, &layout::name("work")?));
        if let Err(e) = dropped {
            tracing::warn!(id, error = %e, "the workdir of a committed snapshot is left for gc");
        }
    }

    /// Adds the layer up, and makes sure that it refers to nothing below it.
    pub(super) fn inspect(
        &self,
        row: &Row,
        progress: &mut ProgressFn<'_>,
    ) -> Result<(Usage, bool)> {
        let layer = self.layout.layer_dir(row.id)?;
        inspect_layer(&layer, self.layout.format, progress).map_err(|e| {
            let kind = e.kind();
            let text = format!("snapshot {:?} cannot be settled", row.info.key);
            Error::new(kind, text).with_source(e)
        })
    }
}

fn gone(key: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("snapshot {key:?} was removed or committed meanwhile"))
}

/// The parent that the committed snapshot will have.
fn new_parent(tx: &super::Tx<'_>, row: &Row, wanted: Option<&str>) -> Result<Option<i64>> {
    let Some(wanted) = wanted else {
        return Ok(row.parent);
    };
    match &row.info.parent {
        Some(parent) if parent == wanted => Ok(row.parent),
        Some(parent) => Err(Error::new(
            ErrorKind::InvalidArgument,
            format!(
                "{:?} has the parent {parent:?} and cannot get {wanted:?}: prepare without a parent \
                 to give one at commit",
                row.info.key
            ),
        )),
        None => match committed_parent(tx, wanted) {
            Err(e) if e.kind() == ErrorKind::InvalidArgument => {
                Err(Error::new(ErrorKind::FailedPrecondition, e.to_string()))
            }
            parent => Ok(Some(parent?.id)),
        },
    }
}

/// Adds a layer up, sees whether it bears marks, and refuses what refers to layers below.
pub(super) fn inspect_layer(
    layer: &Dir,
    format: LayerFormat,
    progress: &mut ProgressFn<'_>,
) -> Result<(Usage, bool)> {
    let mut done = Progress::new(Phase::Walk);
    let mut counter = Counter::default();
    let root = layer.stat().at("look at", "the layer's root")?;
    counter.add(&root);
    let mut has_marks =
        marks::is_opaque(format, layer).at("read the marks of", "the layer's root")?;
    walk(layer, &mut |visit| {
        done.entries += 1;
        report(progress, done)?;
        // It may be mounted: whatever has vanished when it is looked at again is passed over.
        counter.add(visit.stat);
        match marks::decode(format, visit.name, visit.stat) {
            Mark::None => {}
            Mark::Whiteout(_) | Mark::Opaque | Mark::Internal => has_marks = true,
        }
        let may_refer = visit.stat.is_dir() || visit.stat.is_file();
        if may_refer {
            let of = Of::Child(visit.dir, visit.name);
            let refers = match marks::refers_below(format, of) {
                Err(e) if has_vanished(&e) => false,
                refers => refers.at("read the marks of", visit.path)?,
            };
            if refers {
                return Err(Error::new(
                    ErrorKind::FailedPrecondition,
                    "its contents are in a lower layer (a redirect or metacopy mark): mount with \
                     redirect_dir=off and metacopy=off, or copy it in the mount",
                )
                .with_path(visit.path));
            }
        }
        if visit.stat.is_dir() && !has_marks {
            let child = match visit.dir.open_dir(visit.name) {
                Err(e) if has_vanished(&e) => return Ok(Descend::Past),
                child => child.at("open directory", visit.path)?,
            };
            has_marks = marks::is_opaque(format, &child).at("read the marks of", visit.path)?;
        }
        Ok(Descend::Into)
    })?;
    Ok((counter.usage(), has_marks))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::ops::ControlFlow;

    #[test]
    fn what_vanishes_from_a_live_layer_is_passed_over() {
        let tmp = tempfile::tempdir().unwrap();
        for dir in ["a", "b"] {
            fs::create_dir(tmp.path().join(dir)).unwrap();
        }
        fs::write(tmp.path().join("c"), "").unwrap();
        let layer = Dir::open(tmp.path()).unwrap();
        // Called for each name after it was listed and looked at.
        let mut vanish = |progress: Progress| {
            match progress.entries {
                1 => fs::remove_dir(tmp.path().join("a")).unwrap(),
                2 => fs::remove_dir(tmp.path().join("b")).unwrap(),
                _ => fs::remove_file(tmp.path().join("c")).unwrap(),
            }
            ControlFlow::Continue(())
        };
        let found = inspect_layer(&layer, LayerFormat::OverlayUser, &mut vanish).unwrap();
        assert!(!found.1);
    }
}
