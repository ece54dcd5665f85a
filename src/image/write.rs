//! Writing a layout: to a directory, a tar file, or a stream.
//!
//! Blobs are streamed into a staging directory, which names them by digest as they end; the tar needs
//! their sizes before their bytes. A directory is published by renaming the staging directory, a tar
//! file by renaming a temporary one beside it; both are synced first. So a reader sees all or
//! nothing, and after an error, or a writer dropped unfinished, nothing is left. (After a crash there
//! may be a directory `.NAME.stratafs-NUMBER`, which is safe to delete.)
//!
//! The same blobs give the same tar: entries are in a fixed order, with no time, owner or host in
//! them.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use oci_spec::image::{
    ANNOTATION_REF_NAME, Descriptor, MediaType, PlatformBuilder, SCHEMA_VERSION,
};
use serde::Serialize;

use super::blob::Blob;
use super::compose::{composing, descriptor, to_json};
use super::layout::unique_name;
use super::manifest::Image;
use super::staging::{Partial, Staging, occupied, replaceable, split, sync};
use super::tar_write::Layout;
use crate::digest::{Digest, Hashing};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::progress::{Phase, Progress, ProgressFn, report};

/// Writes an OCI image layout.
///
/// ```
/// use std::io::Write;
/// use stratafs::{ImageLayout, ImageSelector, LayoutWriter, ignore_progress};
/// # let dir = std::env::temp_dir().join(format!("stratafs-doc-{}", std::process::id()));
/// # std::fs::create_dir_all(&dir)?;
///
/// let mut writer = LayoutWriter::to_tar_file(dir.join("empty.oci.tar"), &dir)?;
/// let config = br#"{
///     "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": [] }
/// }"#;
/// let mut blob = writer.blob()?;
/// blob.write_all(config)?;
/// let (digest, size) = blob.finish()?;
/// let manifest = format!(
///     r#"{{ "schemaVersion": 2, "layers": [], "config": {{
///         "mediaType": "application/vnd.oci.image.config.v1+json",
///         "digest": "{digest}", "size": {size} }} }}"#
/// );
/// writer.add_image(manifest.as_bytes(), config, Some("empty"))?;
/// writer.finish(&mut ignore_progress)?;
///
/// let layout = ImageLayout::open(dir.join("empty.oci.tar"))?;
/// assert!(layout.image(&ImageSelector::default())?.layers().is_empty());
/// # std::fs::remove_dir_all(&dir)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct LayoutWriter {
    staging: Staging,
    output: Output,
    blobs: BTreeMap<Digest, u64>,
    images: Vec<Descriptor>,
}

enum Output {
    Directory(PathBuf),
    TarFile(PathBuf),
    Stream(Box<dyn Write + Send>),
}

impl LayoutWriter {
    /// Writes the directory `path`, which must be absent or empty.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`] if it is neither; else what the file system fails with.
    pub fn to_directory(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        match fs::symlink_metadata(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io("stat", path, e)),
            Ok(metadata) if metadata.is_dir() => {
                if fs::read_dir(path).at("list", path)?.next().is_some() {
                    return Err(occupied(
                        "the directory to write the image to is not empty:",
                        path,
                    ));
                }
            }
            Ok(_) => {
                return Err(occupied(
                    "the image needs a new directory, and there is a file:",
                    path,
                ));
            }
        }
        let (parent, name) = split(path)?;
        fs::metadata(&parent).at("open the directory to write the image to", &parent)?;
        // With the mode that the published directory shall have.
        let staging = Staging::new(&parent, &name, 0o777)?;
        Ok(LayoutWriter::new(staging, Output::Directory(path.to_owned())))
    }

    /// Writes the tar file `path`, and replaces a regular file there. `temp_dir` takes the blobs
    /// until all are known.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`] if there is anything but a regular file; else what the file
    /// system fails with.
    pub fn to_tar_file(path: impl AsRef<Path>, temp_dir: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        replaceable(path)?;
        let (parent, _) = split(path)?;
        fs::metadata(&parent).at("open the directory to write the image to", &parent)?;
        let staging = Staging::new(temp_dir.as_ref(), "image", 0o700)?;
        Ok(LayoutWriter::new(staging, Output::TarFile(path.to_owned())))
    }

    /// Writes a tar to `stream`, all of it in [`finish`](LayoutWriter::finish). `temp_dir` takes the
    /// blobs until all are known.
    ///
    /// # Errors
    /// What the file system fails with.
    pub fn to_stream(
        stream: impl Write + Send + 'static,
        temp_dir: impl AsRef<Path>,
    ) -> Result<Self> {
        let staging = Staging::new(temp_dir.as_ref(), "image", 0o700)?;
        Ok(LayoutWriter::new(staging, Output::Stream(Box::new(stream))))
    }

    fn new(staging: Staging, output: Output) -> Self {
        LayoutWriter { staging, output, blobs: BTreeMap::new(), images: Vec::new() }
    }

    /// Starts a blob: write its bytes, then call [`BlobWriter::finish`].
    ///
    /// # Errors
    /// What the file system fails with.
    pub fn blob(&mut self) -> Result<BlobWriter<'_>> {
        let path = self.staging.path.join(unique_name("blob"));
        let file = File::create_new(&path).at("create", &path)?;
        Ok(BlobWriter {
            layout: self,
            partial: Partial(path),
            bytes: Hashing::new(BufWriter::with_capacity(128 * 1024, file)),
        })
    }

    /// Whether a blob was written already.
    pub fn has_blob(&self, digest: Digest) -> bool {
        self.blobs.contains_key(&digest)
    }

    fn add_blob(&mut self, bytes: &[u8]) -> Result<Blob> {
        let blob = Blob::of(bytes);
        if !self.has_blob(blob.digest) {
            let mut writer = self.blob()?;
            let path = writer.partial.0.clone();
            writer.write_all(bytes).at("write", path)?;
            writer.finish()?;
        }
        Ok(blob)
    }

    /// Adds an image, the layers of which were written as blobs before.
    ///
    /// # Errors
    /// As [`Image::from_json`]; [`ErrorKind::FailedPrecondition`] if a layer was not written, or has
    /// another size.
    pub fn add_image(&mut self, manifest: &[u8], config: &[u8], name: Option<&str>) -> Result<()> {
        let image = Image::from_json(manifest, config)?;
        for layer in image.layers() {
            let Blob { digest, size } = layer.blob();
            if self.blobs.get(&digest) != Some(&size) {
                return Err(Error::new(
                    ErrorKind::FailedPrecondition,
                    format!("layer {digest} of {size} bytes must be written before its image"),
                ));
            }
        }
        let manifest = self.add_blob(manifest)?;
        self.add_blob(config)?;
        let mut descriptor = descriptor(MediaType::ImageManifest, manifest)?;
        let platform = image.platform();
        let mut builder =
            PlatformBuilder::default().os(platform.os()).architecture(platform.architecture());
        if let Some(variant) = platform.variant() {
            builder = builder.variant(variant);
        }
        descriptor.set_platform(Some(builder.build().map_err(composing)?));
        if let Some(name) = name {
            let annotation = (ANNOTATION_REF_NAME.to_owned(), name.to_owned());
            descriptor.set_annotations(Some([annotation].into()));
        }
        self.images.push(descriptor);
        Ok(())
    }

    /// Writes the index, and publishes the whole.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`] if something came to be at the path meanwhile;
    /// [`ErrorKind::Cancelled`]; else what the file system or the stream fails with. Nothing is
    /// published then, though a stream has got a part.
    pub fn finish(self, progress: &mut ProgressFn<'_>) -> Result<()> {
        let LayoutWriter { staging, output, blobs, images } = self;
        let index = to_json(&Index {
            schema_version: SCHEMA_VERSION,
            media_type: MediaType::ImageIndex,
            manifests: &images,
        })?;
        let layout = Layout {
            blobs: &staging.path.join("blobs/sha256"),
            sizes: &blobs,
            documents: [("oci-layout", VERSION), ("index.json", &index)],
        };
        match output {
            Output::Directory(path) => {
                for (name, bytes) in layout.documents {
                    let path = staging.path.join(name);
                    fs::write(&path, bytes).at("write", &path)?;
                }
                report(progress, Progress::new(Phase::Export))?;
                staging.publish_directory(&path)
            }
            Output::TarFile(path) => {
                let (parent, name) = split(&path)?;
                let partial = Partial(parent.join(unique_name(&name)));
                let file = File::create_new(&partial.0).at("create", &partial.0)?;
                let file = layout.write_tar(file, &partial.0, progress)?;
                file.sync_all().at("sync", &partial.0)?;
                drop(file);
                replaceable(&path)?;
                partial.publish(&path)?;
                sync(&parent)
            }
            Output::Stream(stream) => {
                layout.write_tar(stream, Path::new("(stream)"), progress).map(drop)
            }
        }
    }
}

impl fmt::Debug for LayoutWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LayoutWriter")
            .field("staging", &self.staging.path)
            .field("blobs", &self.blobs)
            .finish_non_exhaustive()
    }
}

/// A blob being written to a [`LayoutWriter`]. Dropped without [`finish`](BlobWriter::finish), it
/// was never there.
#[derive(Debug)]
pub struct BlobWriter<'a> {
    layout: &'a mut LayoutWriter,
    partial: Partial,
    bytes: Hashing<BufWriter<File>>,
}

impl BlobWriter<'_> {
    /// Ends the blob, and gives its digest and its size in bytes.
    ///
    /// # Errors
    /// What the file system fails with.
    pub fn finish(self) -> Result<(Digest, u64)> {
        let (file, digest, size) = self.bytes.finish();
        let file = file.into_inner().map_err(|e| e.into_error()).at("write", &self.partial.0)?;
        if !self.layout.has_blob(digest) {
            if matches!(self.layout.output, Output::Directory(_)) {
                file.sync_all().at("sync", &self.partial.0)?;
            }
            let path = self.layout.staging.path.join("blobs/sha256");
            self.partial.publish(&path.join(digest.hex()))?;
            self.layout.blobs.insert(digest, size);
        }
        Ok((digest, size))
    }
}

impl Write for BlobWriter<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.bytes.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.bytes.flush()
    }
}

const VERSION: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;

/// `index.json`; the crate's own type cannot be had without cloning the descriptors.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Index<'a> {
    schema_version: u32,
    media_type: MediaType,
    manifests: &'a [Descriptor],
}

#[cfg(test)]
mod tests {
    #[cfg(feature = "zstd")]
    use std::io::Read;
    use std::ops::ControlFlow;
    use std::os::unix::fs::symlink;
    use std::sync::{Arc, Mutex};

    use serde_json::json;

    use super::*;
    use crate::compression::Compression;
    use crate::image::compose::compose_manifest;
    use crate::image::{ImageLayout, ImageSelector};
    use crate::progress::ignore_progress;

    /// Adds an image of these layers, which are their own diffs.
    fn add(writer: &mut LayoutWriter, layers: &[&[u8]], name: Option<&str>) -> Digest {
        let mut blobs = Vec::new();
        for bytes in layers {
            let mut blob = writer.blob().unwrap();
            blob.write_all(bytes).unwrap();
            let (digest, size) = blob.finish().unwrap();
            blobs.push((Blob { digest, size }, Compression::None));
        }
        let diff_ids: Vec<_> = blobs.iter().map(|(b, _)| b.digest.to_string()).collect();
        let config = json!({
            "architecture": "arm", "variant": "v6", "os": "linux",
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = serde_json::to_vec(&config).unwrap();
        let manifest = compose_manifest(Blob::of(&config), &blobs).unwrap();
        writer.add_image(&manifest, &config, name).unwrap();
        Digest::of(&manifest)
    }

    /// What is in a directory, hidden files too.
    fn names_in(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[track_caller]
    fn check(path: &Path, name: Option<&str>, digest: Digest, layers: &[&[u8]]) {
        let layout = ImageLayout::open(path).unwrap();
        let which = ImageSelector { name: name.map(str::to_owned), platform: None };
        let image = layout.image(&which).unwrap();
        assert_eq!(image.digest(), digest);
        let read: Vec<_> = image
            .layers()
            .iter()
            .map(|l| layout.blob(l.blob()).unwrap().read_all(1 << 20).unwrap())
            .collect();
        assert_eq!(read, layers);
        assert_eq!(image.platform().to_string(), "linux/arm/v6");
    }

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(buf)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_is_written_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let layers: &[&[u8]] = &[b"base", b"", b"top", b"base"];
        let dir_out = dir.path().join("layout");
        let tar_out = dir.path().join("image.tar");
        for (mut writer, path) in [
            (LayoutWriter::to_directory(&dir_out).unwrap(), &dir_out),
            (LayoutWriter::to_tar_file(&tar_out, dir.path()).unwrap(), &tar_out),
        ] {
            let a = add(&mut writer, layers, Some("a"));
            let b = add(&mut writer, &[b"top"], Some("b"));
            writer.finish(&mut ignore_progress).unwrap();
            check(path, Some("a"), a, layers);
            check(path, Some("b"), b, &[b"top"]);
            assert_eq!(ImageLayout::open(path).unwrap().names().unwrap(), ["a", "b"]);
        }
        assert_eq!(names_in(dir.path()), ["image.tar", "layout"]);
        assert_eq!(names_in(&dir_out), ["blobs", "index.json", "oci-layout"]);
    }

    #[test]
    fn the_same_image_gives_the_same_tar_whatever_the_order_of_writing() {
        let dir = tempfile::tempdir().unwrap();
        let tar = |order: &[&[u8]]| {
            let out = Shared::default();
            let mut writer = LayoutWriter::to_stream(out.clone(), dir.path()).unwrap();
            for bytes in order {
                let mut blob = writer.blob().unwrap();
                blob.write_all(bytes).unwrap();
                blob.finish().unwrap();
            }
            add(&mut writer, &[b"a", b"b"], Some("x"));
            writer.finish(&mut ignore_progress).unwrap();
            out.0.lock().unwrap().clone()
        };
        let one = tar(&[b"a", b"b"]);
        assert_eq!(one, tar(&[b"b", b"a"]));
        assert_eq!(names_in(dir.path()), [""; 0]);
        let layout =
            ImageLayout::spool(&one[..], dir.path(), 1 << 20, &mut ignore_progress).unwrap();
        assert_eq!(layout.image(&ImageSelector::default()).unwrap().layers().len(), 2);
        assert_eq!(names_in(dir.path()), [""; 0]);
    }

    #[test]
    fn a_compressed_tar_is_spooled_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image.tar");
        let mut writer = LayoutWriter::to_tar_file(&path, dir.path()).unwrap();
        add(&mut writer, &[b"a"], None);
        writer.finish(&mut ignore_progress).unwrap();
        let tar = fs::read(&path).unwrap();
        let mut gzip = crate::compression::Compressor::new(Vec::new(), Compression::Gzip).unwrap();
        gzip.write_all(&tar).unwrap();
        let gzip = gzip.finish().unwrap();

        fs::write(&path, &gzip).unwrap();
        let e = ImageLayout::open(&path).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Unsupported, "{e}");
        let spool =
            |bytes: &[u8], max| ImageLayout::spool(bytes, dir.path(), max, &mut ignore_progress);
        assert!(spool(&gzip, tar.len() as u64).is_ok());
        let kind = |bytes, max| spool(bytes, max).unwrap_err().kind();
        assert_eq!(kind(&gzip, tar.len() as u64 - 1), ErrorKind::LimitExceeded);
        let cut = &gzip[..gzip.len() - 9];
        assert_eq!(kind(cut, 1 << 20), ErrorKind::InvalidArchive);
        let e = ImageLayout::spool(&gzip[..], dir.path(), 1 << 20, &mut |_| ControlFlow::Break(()));
        assert_eq!(e.unwrap_err().kind(), ErrorKind::Cancelled);
        assert_eq!(names_in(dir.path()), ["image.tar"]);
    }

    #[test]
    fn nobody_can_take_the_names_of_temporary_files_beforehand() {
        let dir = tempfile::tempdir().unwrap();
        let taken = unique_name("spool");
        let (stem, n) = taken.rsplit_once('-').unwrap();
        if let Ok(n) = n.parse::<u64>() {
            // Other tests draw names too.
            for n in n..n + 1000 {
                fs::write(dir.path().join(format!("{stem}-{n}")), "").unwrap();
            }
        }
        let e = ImageLayout::spool(io::empty(), dir.path(), 1, &mut ignore_progress).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidImage, "it got as far as looking inside: {e}");
    }

    #[cfg(feature = "zstd")]
    #[test]
    fn a_bomb_does_not_fill_the_spool() {
        let dir = tempfile::tempdir().unwrap();
        let mut bomb = crate::compression::Compressor::new(Vec::new(), Compression::Zstd).unwrap();
        io::copy(&mut io::repeat(0).take(80 << 20), &mut bomb).unwrap();
        let bomb = bomb.finish().unwrap();
        let e = ImageLayout::spool(&bomb[..], dir.path(), u64::MAX, &mut ignore_progress);
        assert_eq!(e.unwrap_err().kind(), ErrorKind::LimitExceeded);
        assert_eq!(names_in(dir.path()), [""; 0]);
    }

    #[test]
    fn only_regular_files_and_empty_directories_give_way() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("file"), "old").unwrap();
        symlink("file", at("link")).unwrap();
        fs::create_dir_all(at("full/x")).unwrap();
        fs::create_dir(at("empty")).unwrap();
        for name in ["link", "full", "empty"] {
            let e = LayoutWriter::to_tar_file(at(name), dir.path()).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::AlreadyExists, "{name}");
        }
        for name in ["link", "full", "file"] {
            let e = LayoutWriter::to_directory(at(name)).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::AlreadyExists, "{name}");
        }
        for path in ["", "/", ".."] {
            assert!(LayoutWriter::to_tar_file(path, dir.path()).is_err(), "{path}");
            assert!(LayoutWriter::to_directory(path).is_err(), "{path}");
        }
        let before = names_in(dir.path());
        for mut writer in [
            LayoutWriter::to_directory(at("empty")).unwrap(),
            LayoutWriter::to_tar_file(at("file"), dir.path()).unwrap(),
        ] {
            add(&mut writer, &[b"a"], None);
            writer.finish(&mut ignore_progress).unwrap();
        }
        assert!(ImageLayout::open(at("empty")).is_ok());
        assert!(ImageLayout::open(at("file")).is_ok());
        assert_eq!(names_in(dir.path()), before);
    }

    #[test]
    fn what_is_not_finished_leaves_nothing_and_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("old.tar"), "old").unwrap();
        let start = || {
            [
                LayoutWriter::to_directory(at("new")).unwrap(),
                LayoutWriter::to_tar_file(at("old.tar"), dir.path()).unwrap(),
            ]
        };
        for mut writer in start() {
            add(&mut writer, &[b"a"], None);
            writer.blob().unwrap().write_all(b"dropped").unwrap();
            drop(writer);
        }
        for mut writer in start() {
            add(&mut writer, &[b"a"], None);
            let e = writer.finish(&mut |_| ControlFlow::Break(())).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Cancelled);
        }
        // Something comes to be there while we write.
        let [mut directory, mut tar] = start();
        add(&mut directory, &[b"a"], None);
        add(&mut tar, &[b"a"], None);
        fs::create_dir_all(at("new/x")).unwrap();
        let e = directory.finish(&mut ignore_progress).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::AlreadyExists, "{e}");
        drop(tar);
        assert_eq!(names_in(dir.path()), ["new", "old.tar"].map(String::from).to_vec());
    }

    #[test]
    fn an_image_without_its_layers_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = LayoutWriter::to_directory(dir.path().join("new")).unwrap();
        let config = json!({
            "architecture": "amd64", "os": "linux",
            "rootfs": { "type": "layers", "diff_ids": [Digest::of(b"a").to_string()] },
        })
        .to_string();
        let layer = (Blob::of(b"a"), Compression::Gzip);
        let manifest = compose_manifest(Blob::of(config.as_bytes()), &[layer]).unwrap();
        let e = writer.add_image(&manifest, config.as_bytes(), None).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::FailedPrecondition);
    }
}
