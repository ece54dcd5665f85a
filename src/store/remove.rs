//! Removing snapshots.

use super::hold::held;
use super::{Store, layout, staging};
use crate::error::{Error, ErrorKind, Result};
use crate::progress::ignore_progress;

impl Store {
    /// Removes a snapshot of any kind. Its name is free at once; its files go now too, or, should that
    /// fail, with the next [`Store::cleanup`]. Works on a full disk.
    ///
    /// # Errors
    /// - [`ErrorKind::NotFound`]: there is none.
    /// - [`ErrorKind::FailedPrecondition`]: it has children, or is an image's layer; the message
    ///   names them.
    /// - [`ErrorKind::Busy`]: it is mounted by this store, or another operation is at it.
    pub fn remove(&self, key: &str) -> Result<()> {
        let row = self.metadata.read(|tx| {
            let row = tx.get(key)?;
            removable(tx, &row)?;
            Ok(row)
        })?;
        // A row without its directory is damage; removing it is the remedy.
        let hold = match self.try_hold_alone(&row) {
            Err(e) if e.kind() == ErrorKind::NotFound => None,
            Ok(None) => return Err(held(&row.info)),
            hold => hold?,
        };
        self.not_mounted(&row)?;
        self.durably(|tx| {
            let row = match tx.find(key)? {
                Some(now) if now.id == row.id => now,
                _ => {
                    let text = format!("there is no snapshot {key:?} any more");
                    return Err(Error::new(ErrorKind::NotFound, text));
                }
            };
            removable(tx, &row)?;
            tx.delete(row.id)
        })?;
        let name = layout::name(&row.id.to_string())?;
        if let Err(e) = staging::discard(&self.layout, &self.layout.snapshots, &name) {
            tracing::warn!(key, error = %e, "files of a removed snapshot are left for cleanup");
        }
        drop(hold);
        Ok(())
    }

    /// Frees what removals and interrupted operations left.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn cleanup(&self) -> Result<()> {
        self.sweep()?;
        let emptied = staging::empty_trash(&self.layout, &mut ignore_progress);
        self.layout.fill_reserve()?;
        emptied.map(drop)
    }
}

fn removable(tx: &super::Tx<'_>, row: &super::metadata::Row) -> Result<()> {
    let refuse = |what: String| Err(Error::new(ErrorKind::FailedPrecondition, what));
    let key = &row.info.key;
    let children = tx.children(row.id)?;
    if let Some(first) = children.first() {
        return refuse(format!(
            "snapshot {key:?} is the parent of {first:?}{}: remove that first",
            match children.len() {
                1 => String::new(),
                n => format!(" and {} more", n - 1),
            }
        ));
    }
    if let Some(image) = tx.images_of(row.id)?.first() {
        return refuse(format!("snapshot {key:?} is a layer of image {image:?}: remove the image"));
    }
    Ok(())
}
