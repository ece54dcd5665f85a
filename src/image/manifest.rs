//! Manifests, configurations and indexes: pure functions from bytes to what can be relied on.
//!
//! An [`Image`] exists only if its manifest and configuration are well formed and agree:
//! - the manifest has schema version 2, and is a manifest only: a document that could also be read
//!   as an index is refused (CVE-2021-41190), so is one whose own media type says otherwise;
//! - the configuration has the digest and size that the manifest gives it, its root file system is of
//!   type `layers`, and it has one diff id a layer;
//! - every digest is a sha256, every layer a tar of a known media type.
//!
//! Artifacts (anything whose configuration is not an image's) and non-distributable layers are
//! refused as unsupported. What a layer holds is verified as it is read, not here.

use oci_spec::image::{ImageConfiguration, ImageIndex, ImageManifest, MediaType};
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::{Map, Value};

use super::blob::Blob;
use super::media::{Media, refuse, require};
use super::platform::Platform;
use super::quote::{brief, quoted};
use crate::digest::{ChainId, DiffId, Digest};
use crate::error::{Error, ErrorKind, Result};

/// The longest document (index, manifest, configuration) that is read, in bytes.
pub(super) const DOCUMENT_MAX: u64 = 4 << 20;

/// The most layers that an image may have: more cannot be mounted.
pub(super) const LAYERS_MAX: usize = 500;

/// An image whose manifest and configuration are well formed and agree.
#[derive(Clone, Debug)]
pub struct Image {
    manifest: Blob,
    manifest_json: Vec<u8>,
    config: Blob,
    config_json: Vec<u8>,
    platform: Platform,
    layers: Vec<ImageLayer>,
}

/// A layer of an [`Image`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageLayer {
    blob: Blob,
    diff_id: DiffId,
    chain_id: ChainId,
}

impl Image {
    /// Checks a manifest and its configuration, as kept in a layout or got from a registry.
    ///
    /// ```
    /// let config = br#"{
    ///     "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": [] }
    /// }"#;
    /// let manifest = format!(
    ///     r#"{{ "schemaVersion": 2, "layers": [], "config": {{
    ///         "mediaType": "application/vnd.oci.image.config.v1+json",
    ///         "digest": "{}", "size": {} }} }}"#,
    ///     stratafs::Digest::of(config),
    ///     config.len(),
    /// );
    /// let image = stratafs::Image::from_json(manifest.as_bytes(), config)?;
    /// assert_eq!(image.platform().to_string(), "linux/amd64");
    /// # Ok::<(), stratafs::Error>(())
    /// ```
    ///
    /// # Errors
    /// - [`ErrorKind::InvalidImage`] if either is malformed, or if they contradict each other;
    /// - [`ErrorKind::DigestMismatch`] if the configuration is not the one that the manifest names;
    /// - [`ErrorKind::Unsupported`] for artifacts, non-distributable layers, unknown media types
    ///   and digests other than sha256;
    /// - [`ErrorKind::LimitExceeded`] if either is longer than 4 MiB, or for more than 500 layers.
    pub fn from_json(manifest: &[u8], config: &[u8]) -> Result<Self> {
        Manifest::parse(manifest)?.with_config(config)
    }

    /// The digest of the manifest: the identity of the image.
    pub fn digest(&self) -> Digest {
        self.manifest.digest
    }

    /// The manifest, byte for byte.
    pub fn manifest_json(&self) -> &[u8] {
        &self.manifest_json
    }

    /// The digest of the configuration, which Docker calls the image's id.
    pub fn config_digest(&self) -> Digest {
        self.config.digest
    }

    /// The configuration, byte for byte.
    pub fn config_json(&self) -> &[u8] {
        &self.config_json
    }

    /// The configuration, parsed.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidImage`] if a part of it that the image itself does not depend on, such as
    /// the command to run, is malformed.
    pub fn configuration(&self) -> Result<ImageConfiguration> {
        parse("configuration", self.config.digest, &self.config_json)
    }

    /// What the configuration says that the image is for.
    pub fn platform(&self) -> &Platform {
        &self.platform
    }

    /// The layers, the lowest first.
    pub fn layers(&self) -> &[ImageLayer] {
        &self.layers
    }

    /// The identity of all layers together: the chain id of the last. None if there are no layers.
    pub fn chain_id(&self) -> Option<ChainId> {
        self.layers.last().map(|layer| layer.chain_id)
    }
}

impl ImageLayer {
    /// The digest of the layer as stored and sent, most often compressed.
    pub fn digest(&self) -> Digest {
        self.blob.digest
    }

    /// Its size as stored and sent, in bytes.
    pub fn size(&self) -> u64 {
        self.blob.size
    }

    /// The digest of its uncompressed tar.
    pub fn diff_id(&self) -> DiffId {
        self.diff_id
    }

    /// Its identity on top of the layers below it: the name under which it is committed.
    pub fn chain_id(&self) -> ChainId {
        self.chain_id
    }

    pub(crate) fn blob(&self) -> Blob {
        self.blob
    }
}

/// A manifest that is well formed, its configuration not yet seen.
#[derive(Clone, Debug)]
pub(super) struct Manifest {
    blob: Blob,
    json: Vec<u8>,
    config: Blob,
    layers: Vec<Blob>,
}

impl Manifest {
    pub(super) fn parse(json: &[u8]) -> Result<Self> {
        bounded("manifest", json)?;
        let blob = Blob::of(json);
        let what = format!("manifest {}", blob.digest);
        Shape::of("manifest", blob.digest, json)?.require(&what, Media::Manifest)?;
        let manifest: ImageManifest = parse("manifest", blob.digest, json)?;
        if let Some(artifact) = manifest.artifact_type()
            && Media::of(artifact) != Media::Config
        {
            return Err(artifact_refused(&what, artifact));
        }
        let config = manifest.config();
        match Media::of(config.media_type()) {
            Media::Config => {}
            _ => return Err(artifact_refused(&what, config.media_type())),
        }
        let count = manifest.layers().len();
        if count > LAYERS_MAX {
            return Err(Error::new(
                ErrorKind::LimitExceeded,
                format!("{what} has {count} layers: {LAYERS_MAX} are the most that can be mounted"),
            ));
        }
        let layers = manifest
            .layers()
            .iter()
            .map(|layer| {
                let name = format!("layer {} of {what}", brief(layer.digest().as_ref()));
                require(&name, layer.media_type(), Media::Layer)?;
                Blob::try_from(layer).map_err(|e| e.context(format!("cannot use {name}")))
            })
            .collect::<Result<_>>()?;
        Ok(Manifest {
            blob,
            json: json.to_owned(),
            config: Blob::try_from(config)
                .map_err(|e| e.context(format!("cannot use the configuration of {what}")))?,
            layers,
        })
    }

    /// The configuration that [`with_config`](Manifest::with_config) wants.
    pub(super) fn config(&self) -> Blob {
        self.config
    }

    pub(super) fn with_config(self, json: &[u8]) -> Result<Image> {
        bounded("configuration", json)?;
        let found = Blob::of(json);
        if found != self.config {
            return Err(Error::new(
                ErrorKind::DigestMismatch,
                format!(
                    "the configuration of manifest {} is {} of {} bytes, not {} of {}",
                    self.blob.digest,
                    self.config.digest,
                    self.config.size,
                    found.digest,
                    found.size
                ),
            ));
        }
        let digest = found.digest;
        let config: Configuration = parse("configuration", digest, json)?;
        if config.rootfs.kind != "layers" {
            return Err(invalid(format!(
                "configuration {digest} has a root file system of type {}: only layers exist",
                quoted(&config.rootfs.kind)
            )));
        }
        // The rest is not looked into, but saving must be able to read it.
        let _: Map<String, Value> = parse("configuration", digest, json)?;
        let diff_ids = config.rootfs.diff_ids.unwrap_or_default();
        if diff_ids.len() != self.layers.len() {
            return Err(invalid(format!(
                "configuration {digest} has {} diff ids for the {} layers of manifest {}",
                diff_ids.len(),
                self.layers.len(),
                self.blob.digest
            )));
        }
        let mut below = None;
        let mut layers = Vec::with_capacity(self.layers.len());
        for (blob, diff_id) in self.layers.into_iter().zip(&diff_ids) {
            let diff_id: DiffId = diff_id.parse().map_err(|e: Error| {
                let kind = match e.kind() {
                    ErrorKind::InvalidArgument => ErrorKind::InvalidImage,
                    other => other,
                };
                Error::new(kind, format!("configuration {digest} has a bad diff id"))
                    .with_source(brief(&e.to_string()))
            })?;
            let chain_id = ChainId::new(below, diff_id);
            below = Some(chain_id);
            layers.push(ImageLayer { blob, diff_id, chain_id });
        }
        Ok(Image {
            manifest: self.blob,
            manifest_json: self.json,
            config: found,
            config_json: json.to_owned(),
            platform: Platform::new(&config.os, &config.architecture, config.variant.as_deref()),
            layers,
        })
    }
}

/// Reads an image index, or Docker's manifest list.
pub(crate) fn parse_index(json: &[u8]) -> Result<ImageIndex> {
    bounded("index", json)?;
    let digest = Digest::of(json);
    Shape::of("index", digest, json)?.require(&format!("index {digest}"), Media::Index)?;
    parse("index", digest, json)
}

fn artifact_refused(what: &str, media_type: &MediaType) -> Error {
    match Media::of(media_type) {
        Media::Unknown => Error::new(
            ErrorKind::Unsupported,
            format!("{what} is an artifact ({}), not an image", quoted(media_type.as_ref())),
        ),
        _ => refuse(&format!("the configuration of {what}"), media_type),
    }
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidImage, message)
}

fn bounded(what: &str, json: &[u8]) -> Result<()> {
    if json.len() as u64 > DOCUMENT_MAX {
        return Err(Error::new(
            ErrorKind::LimitExceeded,
            format!("the {what} is {} bytes long: {DOCUMENT_MAX} are allowed", json.len()),
        ));
    }
    Ok(())
}

/// Parses JSON; serde_json bounds its depth at 128 and refuses a field given twice.
fn parse<T: DeserializeOwned>(what: &str, digest: Digest, json: &[u8]) -> Result<T> {
    serde_json::from_slice(json).map_err(|e| {
        invalid(format!("{what} {digest} is malformed")).with_source(brief(&e.to_string()))
    })
}

/// What tells the kinds of documents apart.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Shape {
    schema_version: Option<u32>,
    media_type: Option<String>,
    config: Option<IgnoredAny>,
    layers: Option<IgnoredAny>,
    manifests: Option<IgnoredAny>,
    fs_layers: Option<IgnoredAny>,
}

impl Shape {
    fn of(what: &str, digest: Digest, json: &[u8]) -> Result<Self> {
        parse(what, digest, json)
    }

    /// Checks that the document is an index or a manifest, as wanted, and cannot be another.
    fn require(&self, what: &str, wanted: Media) -> Result<()> {
        if let Some(media_type) = &self.media_type {
            require(what, &MediaType::from(media_type.as_str()), wanted)?;
        }
        match self.schema_version {
            Some(2) => {}
            Some(1) => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!(
                        "{what} has schema version 1: convert it, for instance with skopeo copy"
                    ),
                ));
            }
            Some(n) => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!("{what} has schema version {n}: only 2 is supported"),
                ));
            }
            None => return Err(invalid(format!("{what} has no schema version"))),
        }
        let other = match wanted {
            Media::Index => [&self.config, &self.layers, &self.fs_layers],
            _ => [&self.manifests, &self.fs_layers, &None],
        };
        if other.iter().any(|field| field.is_some()) {
            return Err(invalid(format!(
                "{what} is ambiguous: it has the fields of another kind of document too"
            )));
        }
        Ok(())
    }
}

/// The part of a configuration that an image depends on. The rest is for who runs it, and an oddity
/// there must not keep an image out.
#[derive(Deserialize)]
struct Configuration {
    architecture: String,
    os: String,
    variant: Option<String>,
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    #[serde(rename = "type")]
    kind: String,
    /// Go writes an empty list as null.
    diff_ids: Option<Vec<String>>,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

    fn config() -> Value {
        json!({
            "architecture": "amd64", "os": "linux",
            "rootfs": { "type": "layers", "diff_ids": [
                Digest::of(b"one").to_string(), Digest::of(b"two").to_string(),
            ] },
        })
    }

    fn layer(media_type: &str, of: &[u8]) -> Value {
        json!({ "mediaType": media_type, "digest": Digest::of(of).to_string(), "size": of.len() })
    }

    fn manifest(config: &[u8]) -> Value {
        json!({
            "schemaVersion": 2,
            "config": layer("application/vnd.oci.image.config.v1+json", config),
            "layers": [layer(OCI_LAYER, b"1"), layer(OCI_LAYER, b"2")],
        })
    }

    /// The image after `edit` changed its manifest and configuration.
    fn image(edit: impl Fn(&mut Value, &mut Value)) -> Result<Image> {
        let mut edited = config();
        edit(&mut Value::Null, &mut edited);
        let config = serde_json::to_vec(&edited).unwrap();
        let mut manifest = manifest(&config);
        edit(&mut manifest, &mut edited);
        Image::from_json(&serde_json::to_vec(&manifest).unwrap(), &config)
    }

    #[track_caller]
    fn refused(kind: ErrorKind, why: &str, edit: impl Fn(&mut Value, &mut Value)) {
        let e = image(edit).unwrap_err();
        assert!(e.to_string().contains(why), "{e}");
        assert_eq!(e.kind(), kind, "{e}");
        assert!(e.to_string().contains("sha256:"), "{e} names no blob");
    }

    /// Sets a field of the manifest; before there is one, nothing.
    fn set(manifest: &mut Value, field: &str, value: Value) {
        if let Some(field) = manifest.pointer_mut(field) {
            *field = value;
        } else if let (Some(map), Some(name)) = (manifest.as_object_mut(), field.strip_prefix('/'))
        {
            map.insert(name.to_owned(), value);
        }
    }

    #[test]
    fn an_image_knows_its_layers_and_their_chain() {
        let image = image(|_, _| ()).unwrap();
        assert_eq!(image.platform().to_string(), "linux/amd64");
        let diffs = [b"one", b"two"].map(|d| DiffId::from(Digest::of(d)));
        let first = ChainId::new(None, diffs[0]);
        let second = ChainId::new(Some(first), diffs[1]);
        let layers: Vec<_> = image
            .layers()
            .iter()
            .map(|l| (l.digest(), l.size(), l.diff_id(), l.chain_id()))
            .collect();
        assert_eq!(
            layers,
            [(Digest::of(b"1"), 1, diffs[0], first), (Digest::of(b"2"), 1, diffs[1], second),]
        );
        assert_eq!(image.chain_id(), Some(second));
        assert_eq!(image.digest(), Digest::of(image.manifest_json()));
        assert_eq!(image.config_digest(), Digest::of(image.config_json()));
        assert_eq!(image.configuration().unwrap().architecture().to_string(), "amd64");
    }

    #[test]
    fn docker_media_types_mean_the_same() {
        let image = image(|m, _| {
            let docker = "application/vnd.docker";
            set(m, "/mediaType", json!(format!("{docker}.distribution.manifest.v2+json")));
            set(m, "/config/mediaType", json!(format!("{docker}.container.image.v1+json")));
            set(m, "/layers/0/mediaType", json!(format!("{docker}.image.rootfs.diff.tar.gzip")));
        })
        .unwrap();
        assert_eq!(image.layers().len(), 2);
    }

    #[test]
    fn what_contradicts_itself_is_invalid() {
        let invalid = ErrorKind::InvalidImage;
        refused(invalid, "2 diff ids for the 1 layers", |m, _| {
            set(m, "/layers", json!([layer(OCI_LAYER, b"1")]));
        });
        refused(invalid, "type \"tarballs\"", |_, c| {
            set(c, "/rootfs/type", json!("tarballs"));
        });
        refused(invalid, "0 diff ids", |_, c| {
            set(c, "/rootfs/diff_ids", Value::Null);
        });
        refused(invalid, "bad diff id", |_, c| {
            set(c, "/rootfs/diff_ids/1", json!("sha256:zz"));
        });
        refused(invalid, "ambiguous", |m, _| {
            set(m, "/manifests", json!([]));
        });
        refused(invalid, "no schema version", |m, _| {
            set(m, "/schemaVersion", Value::Null);
        });
        refused(invalid, "malformed", |m, _| {
            set(m, "/layers/0/size", json!(-1));
        });
        refused(invalid, "malformed", |m, _| {
            set(m, "/layers/0/digest", json!("sha256:../../etc/passwd"));
        });
        refused(invalid, "malformed", |_, c| {
            set(c, "/os", Value::Null);
        });
    }

    #[test]
    fn another_configuration_than_the_one_named_is_refused() {
        refused(ErrorKind::DigestMismatch, "configuration of", |m, _| {
            set(m, "/config/digest", json!(Digest::of(b"").to_string()));
        });
        refused(ErrorKind::DigestMismatch, "configuration of", |m, _| {
            set(m, "/config/size", json!(u64::MAX));
        });
    }

    #[test]
    fn what_is_no_image_of_ours_is_named() {
        let unsupported = ErrorKind::Unsupported;
        refused(unsupported, "artifact", |m, _| {
            set(m, "/config/mediaType", json!("application/vnd.oci.empty.v1+json"));
        });
        refused(unsupported, "artifact (\"application/spdx\")", |m, _| {
            set(m, "/artifactType", json!("application/spdx"));
        });
        refused(unsupported, "non-distributable", |m, _| {
            set(
                m,
                "/layers/1/mediaType",
                json!("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"),
            );
        });
        refused(unsupported, "tar+encrypted", |m, _| {
            set(
                m,
                "/layers/1/mediaType",
                json!("application/vnd.oci.image.layer.v1.tar+encrypted"),
            );
        });
        refused(unsupported, "image.index", |m, _| {
            set(m, "/mediaType", json!("application/vnd.oci.image.index.v1+json"));
        });
        refused(unsupported, "skopeo", |m, _| {
            set(m, "/schemaVersion", json!(1));
        });
        refused(unsupported, "sha512", |m, _| {
            let digest = format!("sha512:{}", "0".repeat(128));
            set(m, "/layers/0/digest", json!(digest));
        });
    }

    #[test]
    fn oddities_that_the_layers_do_not_depend_on_keep_no_image_out() {
        let image = image(|_, c| set(c, "/config", json!({ "Cmd": "not a list" }))).unwrap();
        assert_eq!(image.configuration().unwrap_err().kind(), ErrorKind::InvalidImage);
    }

    #[test]
    fn deep_long_and_doubled_documents_are_refused() {
        let deep = format!(r#"{{"schemaVersion":2,"x":{}"#, "[".repeat(100_000));
        let doubled = r#"{"schemaVersion":2,"layers":[],"layers":[]}"#;
        for json in [deep.as_str(), doubled, "", "[]", "null", "\u{0}"] {
            let e = Image::from_json(json.as_bytes(), b"{}").unwrap_err();
            assert_eq!(e.kind(), ErrorKind::InvalidImage, "{e}");
            assert_eq!(parse_index(json.as_bytes()).unwrap_err().kind(), ErrorKind::InvalidImage);
        }
        let long = vec![b' '; DOCUMENT_MAX as usize + 1];
        let e = Image::from_json(&long, b"{}").unwrap_err();
        assert_eq!(e.kind(), ErrorKind::LimitExceeded);
    }

    #[test]
    fn an_index_with_layers_is_refused() {
        let index = json!({ "schemaVersion": 2, "manifests": [] });
        assert!(parse_index(&serde_json::to_vec(&index).unwrap()).is_ok());
        let both = json!({ "schemaVersion": 2, "manifests": [], "layers": [] });
        let e = parse_index(&serde_json::to_vec(&both).unwrap()).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidImage);
    }
}
