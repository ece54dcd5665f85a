//! From a layout into a store.
//!
//! Layers become committed snapshots named by their chain ids, so that images share what they have in
//! common; what is there already is not read again. Each blob is verified, by size and digest, and each
//! layer by the digest of its uncompressed archive, before it is committed. A failure removes the
//! layers that this import brought.

use std::io::Read;

use super::blob::Verified;
use super::layout::{Chosen, ImageLayout};
use super::manifest::ImageLayer;
use super::select::ImageSelector;
use crate::archive::ApplyOptions;
use crate::error::{Error, ErrorKind, Result};
use crate::progress::ProgressFn;
use crate::store::{ImageRecord, Kind, Labels, Store, check_key};

/// How an image is imported.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct ImportOptions {
    /// Which image of the layout, and for which platform; the default is the only one, and the host's.
    pub select: ImageSelector,
    /// How layers are unpacked, with their bounds.
    pub apply: ApplyOptions,
}

impl ImportOptions {
    /// The defaults.
    pub fn new() -> Self {
        ImportOptions::default()
    }
}

/// Puts an image of `layout` into `store`, under `name`; an image of that name is replaced.
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

fn layers(
    store: &Store,
    chosen: &Chosen<'_>,
    options: &ImportOptions,
    brought: &mut Vec<String>,
    progress: &mut ProgressFn<'_>,
) -> Result<Vec<String>> {
    let mut names: Vec<String> = Vec::new();
    for layer in chosen.image.layers() {
        let name = layer.chain_id().to_string();
        let parent = names.last().cloned();
        if !is_there(store, layer, &name, parent.as_deref())? {
            match bring(store, chosen, layer, &name, parent.as_deref(), options, progress) {
                Ok(()) => brought.push(name.clone()),
                // Another import was faster.
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {
                    is_there(store, layer, &name, parent.as_deref())?;
                }
                Err(e) => return Err(e.context(format!("layer {} failed", layer.digest()))),
            }
        }
        names.push(name);
    }
    Ok(names)
}

/// Whether the store has the layer. A snapshot of that name that is something else is an error.
fn is_there(store: &Store, layer: &ImageLayer, name: &str, parent: Option<&str>) -> Result<bool> {
    let info = match store.stat(name) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
        info => info?,
    };
    if info.kind == Kind::Committed
        && info.diff_id == Some(layer.diff_id())
        && info.parent.as_deref() == parent
    {
        return Ok(true);
    }
    Err(Error::new(
        ErrorKind::AlreadyExists,
        format!(
            "the snapshot {name:?} has the name of a layer of the image, but not its contents: \
             remove or rename it"
        ),
    ))
}

fn bring(
    store: &Store,
    chosen: &Chosen<'_>,
    layer: &ImageLayer,
    name: &str,
    parent: Option<&str>,
    options: &ImportOptions,
    progress: &mut ProgressFn<'_>,
) -> Result<()> {
    let mut blob = Verified::new(chosen.layer(layer.blob())?, layer.blob());
    let reader: &mut dyn Read = &mut blob;
    let labels = Labels::from([(Store::IMAGE_LAYER_LABEL.to_owned(), "true".to_owned())]);
    let expected = Some(layer.diff_id());
    store.apply_expecting(name, parent, reader, &options.apply, labels, expected, progress)?;
    Ok(())
}
