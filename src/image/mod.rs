//! OCI images: layouts in directories and tar files, read and written; Docker's archives, read.
//!
//! An image is a manifest that names a configuration and layers by digest; a layout is a set of
//! such blobs with an index. Nothing in a layout is believed: sizes and digests are checked as blobs
//! are read ([`blob`]), documents are bounded before they are parsed, and manifest and configuration
//! must agree ([`manifest`]). Docker's manifests (version 2, schema 2), which differ in media types
//! only, are read like OCI's, and what `docker save` writes is put in OCI's terms ([`docker`]); what is
//! written is OCI.
//!
//! Sources: OCI image specification 1.1: `image-layout.md`, `image-index.md`, `manifest.md`,
//! `config.md`; Docker's "Image Manifest Version 2, Schema 2" and "Docker Image Specification v1.2.0",
//! "Combined Image JSON + Filesystem Changeset Format".

mod blob;
mod compose;
mod docker;
mod docker_manifest;
mod import;
mod layout;
mod manifest;
mod media;
mod members;
mod overlap;
mod platform;
mod quote;
mod save;
mod select;
mod staging;
mod tar_index;
mod tar_write;
mod write;

#[cfg(fuzzing)]
pub(crate) use docker_manifest::parse_docker_manifest;
#[cfg(fuzzing)]
pub(crate) use manifest::parse_index;
#[cfg(fuzzing)]
pub(crate) use select::names_of;

pub use import::{ImportOptions, import_image};
pub use layout::ImageLayout;
pub use manifest::{Image, ImageLayer};
pub use platform::Platform;
pub use save::{SaveOptions, SavedImage, save_image};
pub use select::ImageSelector;
pub use write::{BlobWriter, LayoutWriter};
