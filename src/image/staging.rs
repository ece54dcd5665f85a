//! What is not published yet: directories and files that go away unless renamed into place.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use super::layout::unique_name;
use crate::error::{Error, ErrorKind, IoContext, Result};

/// A directory for what is not published yet; removed when dropped.
#[derive(Debug)]
pub(super) struct Staging {
    pub(super) path: PathBuf,
}

impl Staging {
    pub(super) fn new(parent: &Path, stem: &str, mode: u32) -> Result<Self> {
        let path = parent.join(unique_name(stem));
        DirBuilder::new().mode(mode).create(&path).at("create directory", &path)?;
        let staging = Staging { path };
        let blobs = staging.path.join("blobs/sha256");
        fs::create_dir_all(&blobs).at("create directory", &blobs)?;
        Ok(staging)
    }

    /// Syncs all and renames the directory; only an empty one gives way to it.
    pub(super) fn publish_directory(self, to: &Path) -> Result<()> {
        for name in ["oci-layout", "index.json", "blobs/sha256", "blobs", ""] {
            sync(&self.path.join(name))?;
        }
        fs::rename(&self.path, to).map_err(|e| match e.kind() {
            io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotADirectory => {
                occupied("something is already at", to).with_source(e)
            }
            _ => Error::io("publish image", to, e),
        })?;
        sync(&split(to)?.0)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        match fs::remove_dir_all(&self.path) {
            // Not found: it was published.
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = ?self.path, error = %e, "cannot remove staging directory");
            }
            _ => {}
        }
    }
}

/// A file that is not published yet; removed when dropped.
#[derive(Debug)]
pub(super) struct Partial(pub(super) PathBuf);

impl Partial {
    pub(super) fn publish(self, to: &Path) -> Result<()> {
        fs::rename(&self.0, to).at("publish", to)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        match fs::remove_file(&self.0) {
            // Not found: it was published.
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = ?self.0, error = %e, "cannot remove partial file");
            }
            _ => {}
        }
    }
}

/// Checks that a tar file may take this place: only a regular file gives way to it, since a device or
/// a symbolic link there is hardly meant to be replaced.
pub(super) fn replaceable(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_file() => Ok(()),
        Ok(_) => Err(occupied("there is something that is not a regular file at", path)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Error::io("stat", path, e)),
    }
}

pub(super) fn occupied(message: &'static str, path: &Path) -> Error {
    Error::new(ErrorKind::AlreadyExists, message).with_path(path)
}

/// The directory and the name that make up `path`.
pub(super) fn split(path: &Path) -> Result<(PathBuf, String)> {
    let Some(name) = path.file_name() else {
        return Err(
            Error::new(ErrorKind::InvalidArgument, "no name of a file to write:").with_path(path)
        );
    };
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    // The name is for people who find a file left by a crash: it need not be whole.
    let name = name.to_string_lossy().chars().take(32).collect();
    Ok((parent.to_owned(), name))
}

/// Makes a file, or the names in a directory, outlast a power cut.
pub(super) fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).at("sync", path)
}
