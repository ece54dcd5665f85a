//! From a layout into a store.
//!
//! Layers become committed snapshots named by their chain ids, so that images share what they have in
//! common; what is there already is not read again. The others are unpacked side by side ([`overlap`]).
//! Each blob is verified, by size and digest, and each layer by the digest of its uncompressed archive,
//! before it is committed. A failure removes the layers that this import brought.

use std::num::NonZeroUsize;

use super::layout::{Chosen, ImageLayout};
use super::manifest::ImageLayer;
use super::overlap::{self, Layer, bring_all};
use super::select::ImageSelector;
use crate::archive::{ApplyOptions, Below};
use crate::error::{Error, ErrorKind, Result};
use crate::progress::ProgressFn;
use crate::store::{Expected, ImageRecord, Kind, Labels, Store, check_key};

/// How an image is imported.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct ImportOptions {
    /// Which image of the layout, and for which platform; the default is the only one, and the host's.
    pub select: ImageSelector,
    /// How layers are unpacked, with their bounds.
    pub apply: ApplyOptions,
    /// How many layers are unpacked at the same time. The default, none, is as many as this process may
    /// run threads at once, and at most 8. Each takes some megabytes of memory, for zstd up to 128 MiB
    /// more, and up to 64 descriptors.
    pub threads: Option<NonZeroUsize>,
}

impl ImportOptions {
    /// The defaults.
    pub fn new() -> Self {
        ImportOptions::default()
    }
}

/// Puts an image of `layout` into `store`, under `name`; an image of that name is replaced.
///
/// Progress is of all layers together, in bytes as they are stored.
///
/// # Errors
/// - [`ErrorKind::InvalidImage`], [`ErrorKind::InvalidArchive`], [`ErrorKind::DigestMismatch`],
///   [`ErrorKind::LimitExceeded`], [`ErrorKind::Unsupported`]: the image is damaged, hostile, or not
///   of a kind that is known; the message names the blob.
/// - [`ErrorKind::NotFound`]: the layout has no such image, or not for that platform.
/// - [`ErrorKind::Cancelled`], and those of the store and the file system.
///
/// Nothing of it is left in the store then.
pub fn import_image(
    store: &Store,
    layout: &ImageLayout,
    name: &str,
    options: &ImportOptions,
    progress: &mut ProgressFn<'_>,
) -> Result<ImageRecord> {
    check_key(name)?;
    let chosen = layout.choose(&options.select)?;
    let image = &chosen.image;
    image.layers().iter().try_for_each(|layer| chosen.layer(layer.blob()).map(drop))?;
    let importing = store.begin_import()?;
    let mut brought = Vec::new();
    let done = layers(store, &chosen, options, &mut brought, progress).and_then(|layers| {
        store.put_image(name, image.manifest_json(), image.config_json(), &layers)
    });
    drop(importing);
    // What another import counts on meanwhile is left for gc.
    if done.is_err()
        && let Err(e) = store.remove_unneeded(brought)
    {
        tracing::warn!(error = %e, "layers of a failed import are left for gc");
    }
    done.map_err(|e| e.context(format!("import of image {name:?} failed")))
}

/// The names of all layers, once they are there.
fn layers(
    store: &Store,
    chosen: &Chosen<'_>,
    options: &ImportOptions,
    brought: &mut Vec<String>,
    progress: &mut ProgressFn<'_>,
) -> Result<Vec<String>> {
    let mut all: Vec<Bringing<'_>> = Vec::new();
    for layer in chosen.image.layers() {
        let parent = all.last().map(|below| below.name.clone());
        let name = layer.chain_id().to_string();
        all.push(Bringing { store, chosen, layer, name, parent, options });
    }
    // A layer has all below it: those that are missing are the upper ones.
    let mut there = 0;
    for layer in &all {
        if !layer.is_there()? {
            break;
        }
        there += 1;
    }
    let (present, missing) = all.split_at(there);
    let parent = Below::default();
    match present.last() {
        Some(layer) => layer.tell(&parent)?,
        None => parent.are(Vec::new()),
    }
    let threads = options.threads.unwrap_or_else(overlap::default_threads);
    let (new, done) = bring_all(missing, &parent, threads, progress);
    brought.extend(new.iter().filter_map(|n| missing.get(*n)).map(|layer| layer.name.clone()));
    done?;
    Ok(all.into_iter().map(|layer| layer.name).collect())
}

/// A layer of the image that is imported.
struct Bringing<'a> {
    store: &'a Store,
    chosen: &'a Chosen<'a>,
    layer: &'a ImageLayer,
    name: String,
    parent: Option<String>,
    options: &'a ImportOptions,
}

impl Bringing<'_> {
    /// Whether the store has the layer. A snapshot of that name that is something else is an error.
    fn is_there(&self) -> Result<bool> {
        let info = match self.store.stat(&self.name) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
            info => info?,
        };
        if info.kind == Kind::Committed
            && info.diff_id == Some(self.layer.diff_id())
            && info.parent == self.parent
        {
            return Ok(true);
        }
        Err(Error::new(
            ErrorKind::AlreadyExists,
            format!(
                "the snapshot {:?} has the name of a layer of the image, but not its contents: \
                 remove or rename it",
                self.name
            ),
        ))
    }

    fn unpack(&self, below: &Below, progress: &mut ProgressFn<'_>) -> Result<()> {
        let mut blob = self.chosen.layer(self.layer.blob())?;
        let labels = Labels::from([(Store::IMAGE_LAYER_LABEL.to_owned(), "true".to_owned())]);
        let expected = Expected {
            blob: self.layer.digest(),
            diff_id: self.layer.diff_id(),
            below: below.clone(),
        };
        let (name, parent) = (&self.name, self.parent.as_deref());
        let how = &self.options.apply;
        let expected = Some(&expected);
        self.store
            .apply_expecting(name, parent, &mut blob, how, labels, expected, progress)
            .map(drop)
    }
}

impl Layer for Bringing<'_> {
    fn size(&self) -> u64 {
        self.layer.size()
    }

    fn bring(&self, below: &Below, progress: &mut ProgressFn<'_>) -> Result<bool> {
        match self.unpack(below, progress) {
            Ok(()) => Ok(true),
            // Another import was faster.
            Err(e) if e.kind() == ErrorKind::AlreadyExists && self.is_there()? => Ok(false),
            Err(e) => Err(e.context(format!("layer {} failed", self.layer.digest()))),
        }
    }

    fn tell(&self, above: &Below) -> Result<()> {
        above.are(self.store.layer_paths(&self.name)?);
        Ok(())
    }
}
