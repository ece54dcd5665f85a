//! Composing the documents of an image: descriptors and manifests, as JSON of a fixed
//! field order.

use oci_spec::image::{Descriptor, ImageManifest, ImageManifestBuilder, MediaType, SCHEMA_VERSION};
use serde::Serialize;

use super::blob::Blob;
use crate::compression::Compression;
use crate::error::{Error, ErrorKind, Result};

/// The manifest of an image of these layers, the lowest first.
pub(crate) fn compose_manifest(config: Blob, layers: &[(Blob, Compression)]) -> Result<Vec<u8>> {
    let layers = layers
        .iter()
        .map(|(blob, compression)| {
            let media_type = match compression {
                Compression::None => MediaType::ImageLayer,
                Compression::Gzip => MediaType::ImageLayerGzip,
                Compression::Zstd => MediaType::ImageLayerZstd,
            };
            descriptor(media_type, *blob)
        })
        .collect::<Result<Vec<_>>>()?;
    let manifest: ImageManifest = ImageManifestBuilder::default()
        .schema_version(SCHEMA_VERSION)
        .media_type(MediaType::ImageManifest)
        .config(descriptor(MediaType::ImageConfig, config)?)
        .layers(layers)
        .build()
        .map_err(composing)?;
    to_json(&manifest)
}

pub(super) fn descriptor(media_type: MediaType, blob: Blob) -> Result<Descriptor> {
    let digest = oci_spec::image::Digest::try_from(blob.digest.to_string()).map_err(composing)?;
    Ok(Descriptor::new(media_type, blob.size, digest))
}

pub(super) fn composing(e: oci_spec::OciSpecError) -> Error {
    Error::new(ErrorKind::InvalidArgument, "cannot compose the image").with_source(e)
}

/// Fields in the order of the type, so that the bytes depend on the values alone.
pub(super) fn to_json(value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|e| {
        Error::new(ErrorKind::InvalidArgument, "cannot compose the image").with_source(e)
    })
}
