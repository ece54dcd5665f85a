//! Docker's archives, as `docker save` writes them: which image is meant, and what it is in OCI's terms.
//!
//! They have no digests of layers and no OCI manifest. The layers' digests are told from their files:
//! of a plain one it is that of the configuration's diff id, which is verified as it is read; a
//! compressed one is read once for it. From these, a manifest is made up; the configuration is kept
//! byte for byte. The same archive gives the same manifest, but another than the registry's.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::path::Path;

use serde::Deserialize;

use super::blob::{Blob, Section};
use super::compose::compose_manifest;
use super::docker_manifest::{DockerImage, parse_docker_manifest};
use super::manifest::{DOCUMENT_MAX, Image};
use super::members::{Members, Place};
use super::quote::quoted;
use super::select::{ImageSelector, LISTED_MAX, join};
use crate::compression::{Compression, sniff};
use crate::digest::{DiffId, Digest, Hashing};
use crate::error::{Error, ErrorKind, Result};
use crate::path::RelPath;

/// An archive, its `manifest.json` read.
#[derive(Debug)]
pub(super) struct DockerArchive {
    members: Members,
    images: Vec<DockerImage>,
}

impl DockerArchive {
    pub(super) fn new(members: Members, manifest: &[u8]) -> Result<Self> {
        Ok(DockerArchive { members, images: parse_docker_manifest(manifest)? })
    }

    /// The tags of all images, sorted.
    pub(super) fn tags(&self) -> Vec<String> {
        let tags: BTreeSet<&String> = self.images.iter().flat_map(|image| &image.tags).collect();
        tags.into_iter().cloned().collect()
    }

    /// The bytes of a layer that [`convert`](DockerArchive::convert) gave.
    pub(super) fn open(&self, place: &Place, path: &Path) -> Result<Section> {
        self.members.open(place, path)
    }

    /// The image that is meant, in OCI's terms, and where its layers are; `path` is the archive's, for
    /// messages.
    pub(super) fn convert(
        &self,
        which: &ImageSelector,
        path: &Path,
    ) -> Result<(Image, BTreeMap<Digest, Place>)> {
        let meant = self.meant(which.name.as_deref())?;
        let names: BTreeSet<RelPath> =
            meant.layers.iter().chain([&meant.config]).cloned().collect();
        let places = self.members.find(&names, path)?;
        let place = |name: &RelPath| {
            places.get(name).ok_or_else(|| Error::new(ErrorKind::NotFound, "a file is missing"))
        };
        let config = self.read_config(place(&meant.config)?, path)?;
        let asked: Option<Digest> = which.name.as_deref().and_then(|name| name.parse().ok());
        let found = Digest::of(&config);
        if let Some(asked) = asked.filter(|asked| *asked != found) {
            return Err(Error::new(
                ErrorKind::DigestMismatch,
                format!("the configuration of the image {asked} has the digest {found}"),
            ));
        }
        let diff_ids = diff_ids(&config, meant.layers.len())?;
        let mut blobs = Vec::new();
        let mut layers = BTreeMap::new();
        for (name, diff_id) in meant.layers.iter().zip(diff_ids) {
            let place = place(name)?;
            let described = describe(self.members.open(place, path)?, diff_id)
                .map_err(|e| Error::io("read", path.join(name), e))?;
            layers.insert(described.0.digest, place.clone());
            blobs.push(described);
        }
        let manifest = compose_manifest(Blob::of(&config), &blobs)?;
        let image = Image::from_json(&manifest, &config)?;
        if let Some(wanted) = &which.platform
            && wanted.suits(image.platform()).is_none()
        {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("the image is not for {wanted}, but for {}", image.platform()),
            ));
        }
        Ok((image, layers))
    }

    /// The image of that tag or id, or the only one.
    fn meant(&self, name: Option<&str>) -> Result<&DockerImage> {
        let wanted = |image: &DockerImage| match name {
            None => true,
            Some(name) => {
                let id = || name.parse::<Digest>().ok().filter(|id| image.id() == Some(*id));
                image.tags.iter().any(|tag| tag == name) || id().is_some()
            }
        };
        let mut found = self.images.iter().filter(|image| wanted(image));
        match (found.next(), found.next(), name) {
            (None, _, None) => Err(Error::new(ErrorKind::NotFound, "there is no image")),
            (None, _, Some(name)) => Err(Error::new(
                ErrorKind::NotFound,
                format!("no image is named {}: there {}", quoted(name), self.listed()),
            )),
            (Some(image), None, _) => Ok(image),
            (Some(image), Some(other), _) if image == other && found.all(|o| o == image) => {
                Ok(image)
            }
            (Some(_), Some(_), None) => Err(Error::new(
                ErrorKind::InvalidArgument,
                format!("there are several images: name one; there {}", self.listed()),
            )),
            (Some(_), Some(_), Some(name)) => Err(Error::new(
                ErrorKind::InvalidImage,
                format!("several images are named {}", quoted(name)),
            )),
        }
    }

    /// What a name could have been, for a message.
    fn listed(&self) -> String {
        let names: BTreeSet<String> = self
            .images
            .iter()
            .filter_map(|image| match (image.tags.first(), image.id()) {
                (Some(tag), _) => Some(quoted(tag)),
                (None, id) => id.map(|id| id.to_string()),
            })
            .collect();
        match names.len() {
            0 => format!("are {} without names", self.images.len()),
            n if n > LISTED_MAX => format!("are {n}"),
            1 => format!("is {}", join(names)),
            _ => format!("are {}", join(names)),
        }
    }

    fn read_config(&self, place: &Place, path: &Path) -> Result<Vec<u8>> {
        let mut section = self.members.open(place, path)?;
        if section.len() > DOCUMENT_MAX {
            return Err(Error::new(
                ErrorKind::LimitExceeded,
                format!("the configuration is longer than {DOCUMENT_MAX} bytes"),
            ));
        }
        let mut config = Vec::new();
        section.read_to_end(&mut config).map_err(|e| Error::io("read", path, e))?;
        Ok(config)
    }
}

/// The diff ids of a configuration. What is wrong with the rest of it, [`Image::from_json`] finds.
fn diff_ids(config: &[u8], layers: usize) -> Result<Vec<DiffId>> {
    #[derive(Deserialize)]
    struct Configuration {
        rootfs: RootFs,
    }
    #[derive(Deserialize)]
    struct RootFs {
        diff_ids: Option<Vec<String>>,
    }
    let digest = Digest::of(config);
    let invalid = |message: String| Error::new(ErrorKind::InvalidImage, message);
    let config: Configuration = serde_json::from_slice(config).map_err(|e| {
        invalid(format!("configuration {digest} is malformed"))
            .with_source(super::quote::brief(&e.to_string()))
    })?;
    let diff_ids = config.rootfs.diff_ids.unwrap_or_default();
    if diff_ids.len() != layers {
        return Err(invalid(format!(
            "configuration {digest} has {} diff ids for the {layers} layers of manifest.json",
            diff_ids.len()
        )));
    }
    let read = |diff_id: &String| {
        diff_id.parse().map_err(|_| {
            invalid(format!("configuration {digest} has the bad diff id {}", quoted(diff_id)))
        })
    };
    diff_ids.iter().map(read).collect()
}

/// The digest, the size and the compression of a layer's file.
fn describe(mut section: Section, diff_id: DiffId) -> io::Result<(Blob, Compression)> {
    let size = section.len();
    let mut prefix = Vec::new();
    section.clone().take(16).read_to_end(&mut prefix)?;
    let compression = sniff(&prefix);
    if compression == Compression::None {
        return Ok((Blob { digest: *diff_id.digest(), size }, compression));
    }
    let mut hashing = Hashing::new(&mut section);
    io::copy(&mut hashing, &mut io::sink())?;
    let (_, digest, size) = hashing.finish();
    Ok((Blob { digest, size }, compression))
}
