//! Media types: OCI's, and Docker's that mean the same.
//!
//! A layer's type says nothing of how it is compressed that the layer's first bytes do not say
//! better, so only its being a layer counts.

use oci_spec::image::MediaType;

use super::quote::quoted;
use crate::error::{Error, ErrorKind, Result};

/// What a document or blob is, by its media type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Media {
    Index,
    Manifest,
    Config,
    Layer,
    /// A layer that may not be passed on; its blob is most often not there.
    ForeignLayer,
    /// Docker's first manifests, which name no configuration.
    SchemaOne,
    Unknown,
}

impl Media {
    pub(super) fn of(media_type: &MediaType) -> Self {
        match media_type {
            MediaType::ImageIndex => Media::Index,
            MediaType::ImageManifest => Media::Manifest,
            MediaType::ImageConfig => Media::Config,
            MediaType::ImageLayer | MediaType::ImageLayerGzip | MediaType::ImageLayerZstd => {
                Media::Layer
            }
            MediaType::ImageLayerNonDistributable
            | MediaType::ImageLayerNonDistributableGzip
            | MediaType::ImageLayerNonDistributableZstd => Media::ForeignLayer,
            MediaType::Other(name) => Media::of_docker(name),
            _ => Media::Unknown,
        }
    }

    fn of_docker(name: &str) -> Self {
        match name {
            "application/vnd.docker.distribution.manifest.list.v2+json" => Media::Index,
            "application/vnd.docker.distribution.manifest.v2+json" => Media::Manifest,
            "application/vnd.docker.container.image.v1+json" => Media::Config,
            "application/vnd.docker.image.rootfs.diff.tar"
            | "application/vnd.docker.image.rootfs.diff.tar.gzip"
            | "application/vnd.docker.image.rootfs.diff.tar.zstd" => Media::Layer,
            "application/vnd.docker.image.rootfs.foreign.diff.tar"
            | "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip" => Media::ForeignLayer,
            "application/vnd.docker.distribution.manifest.v1+json"
            | "application/vnd.docker.distribution.manifest.v1+prettyjws" => Media::SchemaOne,
            _ => Media::Unknown,
        }
    }
}

/// Says that `what` is of a type that cannot be used here, and what to do about it.
pub(super) fn refuse(what: &str, media_type: &MediaType) -> Error {
    let name = media_type.as_ref();
    let message = match Media::of(media_type) {
        Media::SchemaOne => format!(
            "{what} is a Docker schema 1 manifest ({name}): convert it, for instance with skopeo copy"
        ),
        Media::ForeignLayer => format!(
            "{what} is non-distributable ({name}): rebuild the image on a base without such layers"
        ),
        _ => format!("{what} has the media type {}, which is not supported here", quoted(name)),
    };
    Error::new(ErrorKind::Unsupported, message)
}

/// Checks that `what` is the kind of thing it must be.
pub(super) fn require(what: &str, media_type: &MediaType, wanted: Media) -> Result<()> {
    if Media::of(media_type) == wanted { Ok(()) } else { Err(refuse(what, media_type)) }
}
