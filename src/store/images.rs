//! Images: names for a manifest, a configuration and the layers that they need.

use std::io;
use std::time::SystemTime;

use super::metadata::ImageRow;
use super::snapshot::check_key;
use super::{Store, Tx, layout};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::sys::lock::{Flock, Sharing, lock, try_lock};

/// An image that the store holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageRecord {
    /// Its name in the store.
    pub name: String,
    /// The digest of its manifest, a blob of the store.
    pub manifest: Digest,
    /// The digest of its configuration, a blob of the store.
    pub config: Digest,
    /// The names of its layers, the base first: committed snapshots.
    pub layers: Vec<String>,
    /// When it was put into the store.
    pub created: SystemTime,
}

/// An import that is under way: what it brings has no image yet, and is left alone by gc.
#[derive(Debug)]
pub(crate) struct Importing {
    _lock: Flock,
}

impl Store {
    /// The label of snapshots that an import brought: without an image or child they are garbage.
    pub(crate) const IMAGE_LAYER_LABEL: &str = "stratafs.image-layer";

    /// To be held while an image is brought in.
    pub(crate) fn begin_import(&self) -> Result<Importing> {
        let lock = self
            .layout
            .blobs
            .reopen()
            .and_then(|dir| lock(dir.into(), Sharing::Shared))
            .at("lock", self.layout.path.join("blobs/sha256"))?;
        Ok(Importing { _lock: lock })
    }

    /// Puts an image into the store: its manifest and configuration, and which committed snapshots
    /// are its layers. An image of the same name is replaced. A failure leaves the store as it was.
    ///
    /// # Errors
    /// - [`ErrorKind::NotFound`]: a layer is missing.
    /// - [`ErrorKind::FailedPrecondition`]: a layer is not committed.
    /// - [`ErrorKind::InvalidArgument`]: the name cannot be one.
    /// - [`ErrorKind::LimitExceeded`]: manifest or configuration of more than 64 MiB.
    pub fn put_image(
        &self,
        name: &str,
        manifest: &[u8],
        config: &[u8],
        layers: &[String],
    ) -> Result<ImageRecord> {
        check_key(name)?;
        // Against the removal of blobs that no image names yet.
        let writing = self.begin_import()?;
        let mut written = Vec::new();
        let mut write = || {
            let mut blob = |bytes| -> Result<Digest> {
                let digest = self.write_blob(bytes)?;
                written.push(digest);
                Ok(digest)
            };
            let row = ImageRow {
                name: name.to_owned(),
                manifest: blob(manifest)?,
                config: blob(config)?,
                created: SystemTime::now(),
            };
            let at = self.layout.path.join("blobs/sha256");
            self.waits.sync_files(&self.layout.blobs.reopen().at("open", at)?)?;
            self.durably(|tx| {
                let replaced = tx.find_image(name)?;
                tx.put_image(&row, layers)?;
                Ok((record(tx, &row)?, replaced))
            })
        };
        let put = write();
        drop(writing);
        if let Ok((_, Some(replaced))) = &put {
            written = self.blobs_named(replaced.manifest, replaced.config);
        }
        if !matches!(put, Ok((_, None))) {
            self.drop_unneeded_blobs(&written);
        }
        put.map(|(image, _)| image)
    }

    /// Removes those blobs that no image names. What an import that runs may count on, and what cannot
    /// be removed, is left for gc.
    pub(crate) fn drop_unneeded_blobs(&self, blobs: &[Digest]) {
        let at = self.layout.path.join("blobs/sha256");
        let drop_them = || -> Result<()> {
            let dir = self.layout.blobs.reopen().at("open", &at)?;
            let Ok(_alone) = try_lock(dir.into(), Sharing::Exclusive).at("lock", &at)? else {
                return Ok(());
            };
            // Under the lock: nobody else writes an image now.
            let Some(needed) = self.needed_blobs()? else {
                return Ok(());
            };
            for digest in blobs.iter().filter(|digest| !needed.contains(digest)) {
                match self.layout.blobs.unlink(&layout::name(&digest.hex())?) {
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                    done => done.at("remove blob", at.join(digest.hex()))?,
                }
            }
            Ok(())
        };
        if let Err(e) = drop_them() {
            tracing::warn!(error = %e, "blobs that no image needs are left for gc");
        }
    }

    /// The image of that name.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    pub fn image(&self, name: &str) -> Result<ImageRecord> {
        self.metadata.read(|tx| match tx.find_image(name)? {
            Some(row) => record(tx, &row),
            None => Err(no_image(name)),
        })
    }

    /// All images, by name.
    ///
    /// # Errors
    /// Those of the metadata.
    pub fn images(&self) -> Result<Vec<ImageRecord>> {
        self.metadata.read(|tx| tx.every_image()?.iter().map(|row| record(tx, row)).collect())
    }

    /// Removes an image, and those of its layers that neither another image nor a snapshot needs and
    /// that nothing holds. Gives the names of the layers removed. Layers that an import brought are
    /// left for [`Store::gc`] while another import runs, which may count on them.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]: there is no such image.
    pub fn remove_image(&self, name: &str) -> Result<Vec<String>> {
        let find = |tx: &Tx<'_>| tx.find_image(name)?.ok_or_else(|| no_image(name));
        let row = self.metadata.read(find)?;
        let named = self.blobs_named(row.manifest, row.config);
        let image = self.durably(|tx| {
            let row = find(tx)?;
            let image = record(tx, &row)?;
            tx.delete_image(name)?;
            Ok(image)
        })?;
        // Should another image have come by that name meanwhile, its layers' blobs are left for gc.
        self.drop_unneeded_blobs(&named);
        self.remove_unneeded(image.layers)
    }

    /// Removes those of an image's layers, given with the base first, that nothing needs. Gives the
    /// names of those removed.
    pub(crate) fn remove_unneeded(&self, layers: Vec<String>) -> Result<Vec<String>> {
        let at = self.layout.path.join("blobs/sha256");
        let blobs = self.layout.blobs.reopen().at("open", &at)?;
        let alone = try_lock(blobs.into(), Sharing::Exclusive).at("lock", &at)?.ok();
        let mut removed = Vec::new();
        for layer in layers.into_iter().rev() {
            if alone.is_none() && self.is_imported(&layer)? {
                break;
            }
            match self.remove(&layer) {
                Ok(()) => removed.push(layer),
                // Something else needs it, and so all below it.
                Err(e) if matches!(e.kind(), ErrorKind::FailedPrecondition | ErrorKind::Busy) => {
                    break;
                }
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(e) => return Err(e),
            }
        }
        Ok(removed)
    }

    /// Whether an import brought the snapshot, so that gc removes it when nothing needs it.
    fn is_imported(&self, key: &str) -> Result<bool> {
        let row = self.metadata.read(|tx| tx.find(key))?;
        Ok(row.is_some_and(|row| row.info.labels.contains_key(Store::IMAGE_LAYER_LABEL)))
    }
}

fn record(tx: &Tx<'_>, row: &ImageRow) -> Result<ImageRecord> {
    Ok(ImageRecord {
        name: row.name.clone(),
        manifest: row.manifest,
        config: row.config,
        layers: tx.image_layers(&row.name)?,
        created: row.created,
    })
}

fn no_image(name: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("there is no image {name:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::LayerFormat;
    use crate::progress::ignore_progress;
    use crate::store::{CommitOptions, Labels, StoreOptions};

    #[test]
    fn layers_that_a_running_import_may_count_on_outlive_their_image() {
        let tmp = tempfile::tempdir().unwrap();
        let mut options = StoreOptions::new();
        options.format = Some(LayerFormat::Aufs);
        let store = Store::open(tmp.path(), options).unwrap();
        store.prepare("a", None, Labels::new()).unwrap();
        let labels = Labels::from([(Store::IMAGE_LAYER_LABEL.to_owned(), "true".to_owned())]);
        store.commit("layer", "a", CommitOptions { labels, ..CommitOptions::new() }).unwrap();
        store.put_image("image", b"manifest", b"config", &["layer".to_owned()]).unwrap();
        // It has seen that the layer is there, and will name it.
        let importing = store.begin_import().unwrap();
        assert!(store.remove_image("image").unwrap().is_empty());
        store.stat("layer").unwrap();
        drop(importing);
        assert_eq!(store.gc(&mut ignore_progress).unwrap().layers, 1);
    }
}
