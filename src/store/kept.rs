//! Layers kept as they came: blobs in `blobs/sha256` beside the manifests that name them.
//!
//! They are written while they are unpacked, under a name of their own, and get their digest's name once
//! it is verified. They are on disk with the row of their image. Which are needed is what the manifests
//! say: a layer's blob stays while an image names it. So an image of which every layer has its blob can
//! be given back as it came; whether all are there depends on how it, and others with the same layers,
//! were imported.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read, Write};

use serde::Deserialize;

use super::layout::name;
use super::metadata::ImageRow;
use super::{ImageRecord, Store, staging};
use crate::digest::{Digest, Hashing};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::path::Name;
use crate::progress::{Phase, Progress, ProgressFn, report};
use crate::sys::dir::OnExisting;

/// The unit in which blobs are read, in bytes.
const BUFFER: usize = 128 * 1024;

/// A layer's blob that is being written; dropped unpublished, it is removed. To be made while an image
/// is brought in.
#[derive(Debug)]
pub(crate) struct Keeping<'s> {
    store: &'s Store,
    name: Option<Name>,
    file: File,
}

impl Keeping<'_> {
    /// What was written has this digest.
    pub(crate) fn publish(mut self, digest: &Digest) -> Result<()> {
        let target = name(&digest.hex())?;
        let blobs = &self.store.layout.blobs;
        if let Some(own) = &self.name {
            blobs.rename(own, blobs, &target, OnExisting::Replace).at("publish blob", &target)?;
            self.name = None;
        }
        Ok(())
    }
}

impl Write for Keeping<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.file.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for Keeping<'_> {
    fn drop(&mut self) {
        if let Some(name) = &self.name
            && let Err(e) = self.store.layout.blobs.unlink(name)
        {
            tracing::warn!(?name, error = %e, "an unfinished blob is left for gc");
        }
    }
}

impl Store {
    /// Starts to keep a layer's blob.
    pub(crate) fn keep_blob(&self) -> Result<Keeping<'_>> {
        let own = name(&format!("new-{:016x}", staging::random()))?;
        let file = self.layout.blobs.create_file(&own, 0o600).at("create blob", &own)?;
        Ok(Keeping { store: self, name: Some(own), file })
    }

    /// Opens the blob of a layer, if it is kept. What is read is to be held to its digest.
    pub(crate) fn kept_blob(&self, digest: &Digest) -> Result<Option<File>> {
        match self.layout.blobs.open_file(&name(&digest.hex())?) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            file => file
                .at("open blob", self.layout.path.join("blobs/sha256").join(digest.hex()))
                .map(Some),
        }
    }

    /// Whether the blob of a layer is kept, and sound: all of it is read.
    ///
    /// # Errors
    /// [`ErrorKind::DigestMismatch`]: it is damaged.
    pub(crate) fn verify_kept(
        &self,
        digest: &Digest,
        progress: &mut ProgressFn<'_>,
    ) -> Result<bool> {
        let at = self.layout.path.join("blobs/sha256").join(digest.hex());
        let Some(file) = self.kept_blob(digest)? else {
            return Ok(false);
        };
        let mut file = Hashing::new(file);
        let mut buffer = vec![0; BUFFER];
        let mut state = Progress::new(Phase::Verify);
        while file.read(&mut buffer).at("read blob", &at)? > 0 {
            state.bytes = file.passed();
            report(progress, state)?;
        }
        let (_, found, _) = file.finish();
        if found == *digest {
            return Ok(true);
        }
        let text = "blob of a layer is damaged: import its image again with its blobs";
        Err(Error::new(ErrorKind::DigestMismatch, text).with_path(at))
    }

    /// The digests of the layers that an image's manifest names; none of one that is no manifest.
    ///
    /// # Errors
    /// Those of reading it: nobody knows what it names then.
    pub(super) fn layers_named(&self, manifest: &Digest) -> Result<Vec<Digest>> {
        #[derive(Deserialize)]
        struct Manifest {
            layers: Vec<Layer>,
        }
        #[derive(Deserialize)]
        struct Layer {
            digest: String,
        }
        let bytes = self.blob(manifest)?;
        let Ok(manifest) = serde_json::from_slice::<Manifest>(&bytes) else {
            return Ok(Vec::new());
        };
        Ok(manifest.layers.iter().filter_map(|layer| layer.digest.parse().ok()).collect())
    }

    /// All blobs that an image names, as far as can be told: where its manifest cannot be read, its
    /// layers are not among them.
    pub(crate) fn blobs_named(&self, manifest: Digest, config: Digest) -> Vec<Digest> {
        let mut named = vec![manifest, config];
        match self.layers_named(&manifest) {
            Ok(layers) => named.extend(layers),
            Err(e) => tracing::debug!(error = %e, "blobs of an image's layers are left for gc"),
        }
        named
    }

    /// The blobs that images name; none if that cannot be told, since a manifest cannot be read: nothing
    /// may be removed then.
    pub(super) fn needed_blobs(&self) -> Result<Option<HashSet<Digest>>> {
        let mut needed = HashSet::new();
        for ImageRow { manifest, config, name, .. } in self.metadata.read(|tx| tx.every_image())? {
            match self.layers_named(&manifest) {
                Ok(layers) => needed.extend(layers),
                Err(e) => {
                    tracing::warn!(image = name, error = %e, "no blob is removed while this is damaged");
                    return Ok(None);
                }
            }
            needed.extend([manifest, config]);
        }
        Ok(Some(needed))
    }

    /// Whether all layers of an image are kept as they came.
    pub(crate) fn keeps_layers_of(&self, image: &ImageRecord) -> Result<bool> {
        let layers = self.layers_named(&image.manifest)?;
        if layers.len() != image.layers.len() {
            return Ok(false);
        }
        for digest in &layers {
            if self.kept_blob(digest)?.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
