//! Rows of images.

use std::time::SystemTime;

use rusqlite::params;

use super::{Tx, from_nanos, to_nanos};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};

/// An image as it stands in the database; its layers are rows of their own.
#[derive(Clone, Debug)]
pub(in crate::store) struct ImageRow {
    pub(in crate::store) name: String,
    pub(in crate::store) manifest: Digest,
    pub(in crate::store) config: Digest,
    pub(in crate::store) created: SystemTime,
}

impl Tx<'_> {
    /// The image of that name.
    pub(in crate::store) fn find_image(&self, name: &str) -> Result<Option<ImageRow>> {
        Ok(self.every_image()?.into_iter().find(|image| image.name == name))
    }

    /// All images, by name.
    pub(in crate::store) fn every_image(&self) -> Result<Vec<ImageRow>> {
        let sql = "SELECT name, manifest, config, created FROM images ORDER BY name";
        type Raw = (String, String, String, i64);
        let rows: Vec<Raw> =
            self.all(sql, (), |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)))?;
        rows.into_iter()
            .map(|(name, manifest, config, created)| {
                Ok(ImageRow {
                    name,
                    manifest: manifest.parse()?,
                    config: config.parse()?,
                    created: from_nanos(created),
                })
            })
            .collect()
    }

    /// The keys of an image's layers, the base first.
    pub(in crate::store) fn image_layers(&self, name: &str) -> Result<Vec<String>> {
        self.all(
            "SELECT s.key FROM image_layers l JOIN snapshots s ON s.id = l.snapshot \
             WHERE l.image = ?1 ORDER BY l.position",
            [name],
            |row| row.get(0),
        )
    }

    /// The images that have the snapshot as a layer.
    pub(in crate::store) fn images_of(&self, snapshot: i64) -> Result<Vec<String>> {
        let sql = "SELECT DISTINCT image FROM image_layers WHERE snapshot = ?1 ORDER BY image";
        self.all(sql, [snapshot], |row| row.get(0))
    }

    /// Writes an image; one of the same name is replaced.
    pub(in crate::store) fn put_image(&self, image: &ImageRow, layers: &[String]) -> Result<()> {
        self.delete_image(&image.name)?;
        self.execute(
            "INSERT INTO images (name, manifest, config, created) VALUES (?1, ?2, ?3, ?4)",
            params![
                image.name,
                image.manifest.to_string(),
                image.config.to_string(),
                to_nanos(image.created),
            ],
        )?;
        for (position, key) in layers.iter().enumerate() {
            let layer = self.get(key)?;
            if layer.info.kind != crate::store::snapshot::Kind::Committed {
                return Err(Error::new(
                    ErrorKind::FailedPrecondition,
                    format!("image layer {key:?} is not committed"),
                ));
            }
            self.execute(
                "INSERT INTO image_layers (image, position, snapshot) VALUES (?1, ?2, ?3)",
                params![image.name, i64::try_from(position).unwrap_or(i64::MAX), layer.id],
            )?;
        }
        Ok(())
    }

    /// Forgets an image; its layers stay.
    pub(in crate::store) fn delete_image(&self, name: &str) -> Result<bool> {
        Ok(self.execute("DELETE FROM images WHERE name = ?1", [name])? > 0)
    }
}
