//! From a store into a layout.
//!
//! An image of which the store has all layers as they came is written as it came. Else layers that were
//! imported are given back byte for byte where the store has a record of their archives, and packed from
//! what is on disk where not, as are layers made here. The configuration is that of the image that the
//! snapshot was built on: its very bytes where the layers are the same, else every field of it, with the
//! new layers' digests and a line of history for each layer added. The manifest is then made anew, since
//! layers are compressed anew.

use std::io::{Read as _, Write};

use serde_json::{Map, Value, json};

use super::blob::{Blob, Verified, reading};
use super::compose::compose_manifest;
use super::manifest::{Image, ImageLayer};
use super::platform::Platform;
use super::write::LayoutWriter;
use crate::archive::ExportOptions;
use crate::compression::{Compression, Compressor};
use crate::digest::{DiffId, Digest};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::progress::{Phase, Progress, ProgressFn, report};
use crate::store::{ImageRecord, Info, Kind, Store};

/// The unit in which blobs are copied, in bytes.
const BUFFER: usize = 128 * 1024;

/// How an image is saved.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct SaveOptions {
    /// How layers are compressed. The default, none, is as they came, for an image that was imported
    /// with [`keep_blobs`](crate::ImportOptions::keep_blobs); for any other gzip, which every tool
    /// reads.
    pub compression: Option<Compression>,
    /// How layers are packed.
    pub export: ExportOptions,
    /// The name that the layout gives the image; the default, none, is its name in the store.
    pub reference: Option<String>,
}

impl SaveOptions {
    /// The defaults.
    pub fn new() -> Self {
        SaveOptions::default()
    }
}

/// What was saved.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SavedImage {
    /// The digest of the manifest.
    pub manifest: Digest,
    /// The digest of the configuration.
    pub config: Digest,
    /// The digests of the uncompressed layers, the base first.
    pub diff_ids: Vec<DiffId>,
}

/// Saves the committed snapshot or the image `name` with all its layers, and finishes the layout. A
/// snapshot is meant where there are both.
///
/// # Errors
/// - [`ErrorKind::NotFound`]: there is neither.
/// - [`ErrorKind::FailedPrecondition`]: the snapshot is not committed, or holds what no archive can;
///   see [`Store::export`].
/// - [`ErrorKind::Cancelled`], and those of the store and the file system.
pub fn save_image(
    store: &Store,
    name: &str,
    mut layout: LayoutWriter,
    options: &SaveOptions,
    progress: &mut ProgressFn<'_>,
) -> Result<SavedImage> {
    let (layers, base) = find(store, name)?;
    let reference = options.reference.as_deref().unwrap_or(name);
    if let Some(image) = &base
        && image.layers.iter().eq(layers.iter().map(|layer| &layer.key))
        && options.compression.is_none()
        && store.keeps_layers_of(image)?
    {
        return save_as_kept(store, image, layout, reference, progress);
    }
    let compression = options.compression.unwrap_or_default();
    let mut diff_ids = Vec::new();
    let mut blobs = Vec::new();
    for layer in &layers {
        let mut out = Compressor::new(layout.blob()?, compression)?;
        let exported = store.export(&layer.key, &mut out, &options.export, progress)?;
        let (digest, size) =
            out.finish().at("finish the layer of snapshot", &layer.key)?.finish()?;
        diff_ids.push(exported.diff_id);
        blobs.push((Blob { digest, size }, compression));
    }
    let config = configure(store, &layers, base.as_ref(), &diff_ids)?;
    let mut blob = layout.blob()?;
    blob.write_all(&config).at("write the configuration of image", name)?;
    blob.finish()?;
    let manifest = compose_manifest(Blob::of(&config), &blobs)?;
    layout.add_image(&manifest, &config, Some(reference))?;
    layout.finish(progress)?;
    Ok(SavedImage { manifest: Digest::of(&manifest), config: Digest::of(&config), diff_ids })
}

/// Writes an image from its blobs: byte for byte what was imported.
fn save_as_kept(
    store: &Store,
    record: &ImageRecord,
    mut layout: LayoutWriter,
    reference: &str,
    progress: &mut ProgressFn<'_>,
) -> Result<SavedImage> {
    let (manifest, config) = (store.blob(&record.manifest)?, store.blob(&record.config)?);
    let image = Image::from_json(&manifest, &config)?;
    let mut state = Progress::new(Phase::Export);
    for layer in image.layers() {
        let digest = layer.digest();
        if layout.has_blob(digest) {
            continue;
        }
        let file = store.kept_blob(&digest)?.ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("the blob of layer {digest} is gone"))
        })?;
        let mut from = Verified::new(file, layer.blob());
        let mut to = layout.blob()?;
        let mut buffer = vec![0; BUFFER];
        loop {
            let n = from.read(&mut buffer).map_err(|e| reading(digest, e))?;
            if n == 0 {
                break;
            }
            to.write_all(buffer.get(..n).unwrap_or_default()).at("write layer", digest.hex())?;
            state.bytes = state.bytes.saturating_add(n as u64);
            report(progress, state)?;
        }
        to.finish()?;
    }
    layout.add_image(&manifest, &config, Some(reference))?;
    layout.finish(progress)?;
    Ok(SavedImage {
        manifest: image.digest(),
        config: image.config_digest(),
        diff_ids: image.layers().iter().map(ImageLayer::diff_id).collect(),
    })
}

/// The layers, the base first, and the image that they begin with, if there is one.
fn find(store: &Store, name: &str) -> Result<(Vec<Info>, Option<ImageRecord>)> {
    let top = match store.stat(name) {
        Ok(info) => Some(info),
        Err(e) if e.kind() == ErrorKind::NotFound => {
            let image = store.image(name).map_err(|e| {
                let text = format!("there is neither a snapshot nor an image {name:?}");
                if e.kind() == ErrorKind::NotFound { Error::new(e.kind(), text) } else { e }
            })?;
            let layers = image.layers.iter().map(|key| store.stat(key)).collect::<Result<_>>()?;
            return Ok((layers, Some(image)));
        }
        Err(e) => return Err(e),
    };
    let mut layers = Vec::new();
    let mut next = top;
    while let Some(info) = next {
        if info.kind != Kind::Committed {
            return Err(Error::new(
                ErrorKind::FailedPrecondition,
                format!("snapshot {name:?} is {}: commit it to save it", info.kind),
            ));
        }
        next = info.parent.as_deref().map(|parent| store.stat(parent)).transpose()?;
        layers.push(info);
    }
    layers.reverse();
    let base = store
        .images()?
        .into_iter()
        .filter(|image| {
            image.layers.len() <= layers.len()
                && image.layers.iter().zip(&layers).all(|(key, info)| *key == info.key)
        })
        .max_by_key(|image| image.layers.len());
    Ok((layers, base))
}

fn configure(
    store: &Store,
    layers: &[Info],
    base: Option<&ImageRecord>,
    diff_ids: &[DiffId],
) -> Result<Vec<u8>> {
    let damaged = |e: serde_json::Error| {
        Error::new(ErrorKind::InvalidImage, "the base image's configuration is no JSON object")
            .with_source(e)
    };
    let mut config: Map<String, Value> = match base {
        Some(image) => {
            let bytes = store.blob(&image.config)?;
            let config = serde_json::from_slice(&bytes).map_err(damaged)?;
            if has_layers(&config, diff_ids) {
                return Ok(bytes);
            }
            config
        }
        None => {
            let host = Platform::host();
            let mut config = Map::new();
            config.insert("architecture".into(), host.architecture().into());
            config.insert("os".into(), host.os().into());
            if let Some(variant) = host.variant() {
                config.insert("variant".into(), variant.into());
            }
            config
        }
    };
    let known = base.map_or(0, |image| image.layers.len());
    // A history that does not tell of every layer tells nothing of those added.
    let mut history: Vec<Value> = match config.remove("history") {
        Some(Value::Array(history)) if counts_layers(&history) == known => history,
        _ => vec![json!({ "created_by": "unknown" }); known],
    };
    for layer in layers.iter().skip(known) {
        history.push(json!({ "created_by": "stratafs commit", "comment": layer.key }));
    }
    config.insert("history".into(), history.into());
    let diff_ids: Vec<String> = diff_ids.iter().map(DiffId::to_string).collect();
    config.insert("rootfs".into(), json!({ "type": "layers", "diff_ids": diff_ids }));
    serde_json::to_vec(&config).map_err(damaged)
}

/// Whether a configuration is that of an image with these layers.
fn has_layers(config: &Map<String, Value>, diff_ids: &[DiffId]) -> bool {
    let ids = config.get("rootfs").and_then(|rootfs| rootfs.get("diff_ids"));
    ids.and_then(Value::as_array).is_some_and(|ids| {
        ids.len() == diff_ids.len()
            && ids.iter().zip(diff_ids).all(|(id, own)| id.as_str() == Some(&own.to_string()))
    })
}

/// How many lines of history stand for a layer.
fn counts_layers(history: &[Value]) -> usize {
    history.iter().filter(|line| line.get("empty_layer") != Some(&Value::Bool(true))).count()
}
