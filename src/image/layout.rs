//! An OCI image layout, opened for reading: a directory, or a tar file of one; or a Docker archive,
//! which is both read like one.
//!
//! A directory is read through symbolic links, as some tools build layouts of links into a cache; what
//! is read is held to its digest whatever the way to it. A tar is read in place ([`TarIndex`]), so it
//! must be a plain file: what is compressed or comes through a pipe is spooled first.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::image::ImageIndex;
use serde::Deserialize;

use super::blob::{Blob, Section, Verified};
use super::docker::DockerArchive;
use super::manifest::{DOCUMENT_MAX, Image, parse_index};
use super::members::{Members, Place};
use super::quote::{brief, quoted};
use super::select::{self, ImageSelector};
use super::tar_index::{Part, TarIndex};
use crate::compression::{Compression, Decompressor, sniff};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::path::RelPath;
use crate::progress::{Phase, Progress, ProgressFn, report};
use crate::sys::dir::Dir;

/// An OCI image layout, or an archive of `docker save`, opened for reading.
///
/// An archive of Docker's that is an OCI layout too, as those since Docker 25 are, is read as that. Of
/// an older one, a manifest is made up: the image's identity is then not that in the registry.
///
/// ```no_run
/// use stratafs::{ImageLayout, ImageSelector};
///
/// let layout = ImageLayout::open("busybox.oci.tar")?;
/// let image = layout.image(&ImageSelector::default())?;
/// println!("{} has {} layers", image.digest(), image.layers().len());
/// # Ok::<(), stratafs::Error>(())
/// ```
#[derive(Debug)]
pub struct ImageLayout {
    path: PathBuf,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Directory,
    Tar(TarIndex),
    Docker(DockerArchive),
}

/// An image that was chosen, and where a Docker archive has its layers.
#[derive(Debug)]
pub(super) struct Chosen<'l> {
    pub(super) image: Image,
    layout: &'l ImageLayout,
    layers: BTreeMap<Digest, Place>,
}

impl Chosen<'_> {
    /// A layer as it is stored; not verified.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if it is missing, [`ErrorKind::DigestMismatch`] if it has another size.
    pub(super) fn layer(&self, blob: Blob) -> Result<Section> {
        match (&self.layout.source, self.layers.get(&blob.digest)) {
            (Source::Docker(archive), Some(place)) => {
                let section = archive.open(place, &self.layout.path)?;
                self.layout.sized(Some(section), blob)
            }
            _ => self.layout.sized(self.layout.section(Part::Blob(blob.digest))?, blob),
        }
    }
}

/// How much may be uncompressed before the ratio counts, in bytes.
const RATIO_FROM: u64 = 64 << 20;
/// The most uncompressed bytes for each compressed one.
const RATIO_MAX: u64 = 1100;

/// Counts what comes.
struct Counted<'a, R> {
    inner: R,
    came: &'a Cell<u64>,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.came.set(self.came.get().saturating_add(n as u64));
        Ok(n)
    }
}

/// A blob of a layout, verified as it is read.
pub(crate) type BlobReader = Verified<Section>;

impl ImageLayout {
    /// Opens the layout at `path`: a directory, or a tar file.
    ///
    /// # Errors
    /// - [`ErrorKind::InvalidImage`] if it is neither an OCI layout nor a Docker archive, or damaged;
    /// - [`ErrorKind::Unsupported`] if its version is not 1.0, if the tar is compressed or not a
    ///   regular file (see [`spool`](ImageLayout::spool)).
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let metadata = fs::metadata(path).at("open image layout", path)?;
        if metadata.is_dir() {
            let layout = ImageLayout { path: path.to_owned(), source: Source::Directory };
            if layout.section(Part::Version)?.is_none()
                && layout.section(Part::DockerManifest)?.is_some()
            {
                let dir = Dir::open(path).at("open image", path)?;
                return ImageLayout::from_docker(Members::Directory(dir), path);
            }
            return layout.checked();
        }
        if !metadata.is_file() {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "an image layout is a directory or a tar file: spool what comes from a pipe or device",
            )
            .with_path(path));
        }
        let file = File::open(path).at("open image layout", path)?;
        ImageLayout::from_tar(file, path)
    }

    /// Whether what is at `path` can be read by [`spool`](ImageLayout::spool) alone: a compressed file, a
    /// pipe, a device.
    ///
    /// # Errors
    /// What the file system fails with.
    pub fn needs_spool(path: impl AsRef<Path>) -> Result<bool> {
        let path = path.as_ref();
        let metadata = fs::metadata(path).at("open image layout", path)?;
        if !metadata.is_file() {
            return Ok(!metadata.is_dir());
        }
        let file = File::open(path).at("open image layout", path)?;
        Ok(compression_of(&file, path)? != Compression::None)
    }

    /// Copies a tar from `stream`, which may be compressed, to a nameless file in `temp_dir`, and
    /// opens that. It may have at most `max_bytes` uncompressed; and from 64 MiB on, at most 1100 for
    /// each compressed one, more than which no gzip has.
    ///
    /// # Errors
    /// As [`open`](ImageLayout::open); and [`ErrorKind::InvalidArchive`] if the compressed stream is
    /// damaged, [`ErrorKind::LimitExceeded`], [`ErrorKind::Cancelled`].
    pub fn spool(
        stream: impl Read,
        temp_dir: impl AsRef<Path>,
        max_bytes: u64,
        progress: &mut ProgressFn<'_>,
    ) -> Result<Self> {
        let temp_dir = temp_dir.as_ref();
        let mut file = nameless_file(temp_dir)?;
        let came = Cell::new(0);
        let mut stream = Decompressor::new(Counted { inner: stream, came: &came })?;
        let mut state = Progress::new(Phase::Verify);
        let mut buf = vec![0; 128 * 1024];
        loop {
            report(progress, state)?;
            let bytes = match stream.read(&mut buf) {
                Ok(0) => break,
                Ok(n) => buf.get(..n).unwrap_or_default(),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(Error::io("read the image to spool to", temp_dir, e)),
            };
            state.bytes = state.bytes.saturating_add(bytes.len() as u64);
            if state.bytes > max_bytes {
                return Err(Error::new(
                    ErrorKind::LimitExceeded,
                    format!("the image is larger than the {max_bytes} bytes allowed"),
                ));
            }
            if state.bytes > RATIO_FROM && state.bytes > came.get().saturating_mul(RATIO_MAX) {
                return Err(Error::new(
                    ErrorKind::LimitExceeded,
                    format!("the image is over {RATIO_MAX} times as large as its compressed form"),
                ));
            }
            file.write_all(bytes).at("spool the image to", temp_dir)?;
        }
        ImageLayout::from_tar(file, Path::new("(stream)"))
    }

    fn from_tar(file: File, path: &Path) -> Result<Self> {
        match compression_of(&file, path)? {
            Compression::None => {}
            compression => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!("the image is compressed with {compression}: decompress or spool"),
                )
                .with_path(path));
            }
        }
        let file = Arc::new(file);
        let index = TarIndex::new(Arc::clone(&file), path)?;
        // Docker's newer archives are OCI layouts too, which say more.
        if index.get(Part::Version).is_none() && index.get(Part::DockerManifest).is_some() {
            return ImageLayout::from_docker(Members::Tar(file), path);
        }
        ImageLayout { path: path.to_owned(), source: Source::Tar(index) }.checked()
    }

    fn from_docker(members: Members, path: &Path) -> Result<Self> {
        let name = RelPath::new("manifest.json")?;
        let places = members.find(&[name.clone()].into(), path)?;
        let mut json = Vec::new();
        for place in places.values() {
            // One byte too many is enough to be refused.
            let section = members.open(place, path)?.take(DOCUMENT_MAX + 1);
            { section }.read_to_end(&mut json).at("read", path.join(&name))?;
        }
        let archive = DockerArchive::new(members, &json)
            .map_err(|e| e.context("cannot use").with_path_if_none(path))?;
        Ok(ImageLayout { path: path.to_owned(), source: Source::Docker(archive) })
    }

    /// The image that is asked for, its manifest and configuration verified.
    ///
    /// # Errors
    /// - [`ErrorKind::NotFound`] if no image has the name, if none is for the platform, or if a blob
    ///   is missing;
    /// - [`ErrorKind::InvalidArgument`] if no name was given and there are several images;
    /// - else as [`Image::from_json`].
    ///
    /// The manifest of an image in a Docker archive is made up, and so is not the registry's.
    pub fn image(&self, which: &ImageSelector) -> Result<Image> {
        self.choose(which).map(|chosen| chosen.image)
    }

    pub(super) fn choose(&self, which: &ImageSelector) -> Result<Chosen<'_>> {
        let chosen = match &self.source {
            Source::Docker(archive) => archive.convert(which, &self.path),
            Source::Directory | Source::Tar(_) => {
                select::find(self, which).map(|image| (image, BTreeMap::new()))
            }
        };
        let chosen = chosen.map(|(image, layers)| Chosen { image, layout: self, layers });
        chosen.map_err(|e| match e.path() {
            Some(_) => e,
            None => e.context("cannot use the image in").with_path(&self.path),
        })
    }

    /// The names of the images, sorted; an image without one is not among them.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidImage`] if the index is malformed.
    pub fn names(&self) -> Result<Vec<String>> {
        if let Source::Docker(archive) = &self.source {
            return Ok(archive.tags());
        }
        let index = self.index()?;
        let mut names: Vec<String> = index
            .manifests()
            .iter()
            .filter_map(|d| select::names_of(d).next().map(str::to_owned))
            .collect();
        names.sort();
        names.dedup();
        Ok(names)
    }

    /// The index at the top.
    pub(super) fn index(&self) -> Result<ImageIndex> {
        parse_index(&self.document(Part::Index)?).map_err(|e| self.wrap("bad index.json in", e))
    }

    /// A blob, verified as it is read.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if it is missing, [`ErrorKind::DigestMismatch`] if it has another size.
    pub(crate) fn blob(&self, blob: Blob) -> Result<BlobReader> {
        let section = self.sized(self.section(Part::Blob(blob.digest))?, blob)?;
        Ok(Verified::new(section, blob))
    }

    fn sized(&self, section: Option<Section>, blob: Blob) -> Result<Section> {
        let section = section.ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("blob {} is missing in", blob.digest))
                .with_path(&self.path)
        })?;
        if section.len() != blob.size {
            return Err(Error::new(
                ErrorKind::DigestMismatch,
                format!(
                    "blob {} has {} bytes, not the {} promised, in",
                    blob.digest,
                    section.len(),
                    blob.size
                ),
            )
            .with_path(&self.path));
        }
        Ok(section)
    }

    /// A manifest, configuration or index, whole and verified.
    pub(super) fn small_blob(&self, blob: Blob) -> Result<Vec<u8>> {
        self.blob(blob)?.read_all(DOCUMENT_MAX)
    }

    /// Checks the version, so that what is no layout is refused at once.
    fn checked(self) -> Result<Self> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Version {
            image_layout_version: String,
        }
        let version: Version =
            serde_json::from_slice(&self.document(Part::Version)?).map_err(|e| {
                self.invalid("malformed oci-layout file in").with_source(brief(&e.to_string()))
            })?;
        let version = version.image_layout_version;
        let patch = version.strip_prefix("1.0.").unwrap_or_default();
        if patch.is_empty() || !patch.bytes().all(|b| b.is_ascii_digit()) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("layout version {} is not supported: only 1.0 is:", quoted(&version)),
            )
            .with_path(&self.path));
        }
        Ok(self)
    }

    /// One of the documents with a name, bounded in size.
    fn document(&self, part: Part) -> Result<Vec<u8>> {
        let name = match part {
            Part::Index => "index.json",
            _ => "oci-layout",
        };
        let Some(mut section) = self.section(part)? else {
            return Err(self.invalid(format!("no OCI image layout, as there is no {name} in")));
        };
        if section.len() > DOCUMENT_MAX {
            return Err(Error::new(
                ErrorKind::LimitExceeded,
                format!("{name} is longer than {DOCUMENT_MAX} bytes in"),
            )
            .with_path(&self.path));
        }
        let mut bytes = Vec::new();
        section
            .read_to_end(&mut bytes)
            .map_err(|e| Error::io("read image layout", &self.path, e))?;
        Ok(bytes)
    }

    fn section(&self, part: Part) -> Result<Option<Section>> {
        match &self.source {
            Source::Tar(index) => Ok(index.get(part).cloned()),
            // Its parts have other names.
            Source::Docker(_) => Ok(None),
            Source::Directory => {
                let path = match part {
                    Part::Version => self.path.join("oci-layout"),
                    Part::Index => self.path.join("index.json"),
                    Part::DockerManifest => self.path.join("manifest.json"),
                    Part::Blob(digest) => self.path.join("blobs/sha256").join(digest.hex()),
                };
                open_regular(&path)
            }
        }
    }

    fn invalid(&self, message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
        Error::new(ErrorKind::InvalidImage, message).with_path(&self.path)
    }

    fn wrap(&self, message: &'static str, e: Error) -> Error {
        e.context(message).with_path(&self.path)
    }
}

/// A file of a layout directory as a section; none if there is no such file.
fn open_regular(path: &Path) -> Result<Option<Section>> {
    let not_regular = || {
        Error::new(ErrorKind::InvalidImage, "part of an image layout is not a regular file:")
            .with_path(path)
    };
    // Before opening, since to open a fifo may take for ever.
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => {}
        Ok(_) => return Err(not_regular()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io("stat", path, e)),
    }
    let file = File::open(path).at("open", path)?;
    let metadata = file.metadata().at("stat", path)?;
    if !metadata.is_file() {
        return Err(not_regular());
    }
    Ok(Some(Section::new(Arc::new(file), 0, metadata.len())))
}

fn compression_of(file: &File, path: &Path) -> Result<Compression> {
    let mut prefix = [0; 16];
    let n = file.read_at(&mut prefix, 0).at("read", path)?;
    Ok(sniff(prefix.get(..n).unwrap_or_default()))
}

/// A name that nobody else uses, and that nobody can take beforehand: the directory may be open to all.
pub(super) fn unique_name(stem: &str) -> String {
    let mut hasher = RandomState::new().build_hasher();
    // A child after fork has the same random state.
    hasher.write_u32(std::process::id());
    format!(".{stem}.stratafs-{:016x}", hasher.finish())
}

/// A file without a name: it is gone when closed, however this process ends.
fn nameless_file(dir: &Path) -> Result<File> {
    let path = dir.join(unique_name("spool"));
    let mut options = File::options();
    options.read(true).write(true).create_new(true).mode(0o600);
    let file = options.open(&path).at("create", &path)?;
    fs::remove_file(&path).at("remove", &path)?;
    Ok(file)
}
