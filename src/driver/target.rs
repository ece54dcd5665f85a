//! The directory on which something is mounted.
//!
//! It is held as its parent and its name, since a descriptor of the directory itself names what was
//! there before the mount, and one of the mount keeps it busy. The kernel forbids to rename a mount
//! point, so that parent and name stay right while the mount is there.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::sys::mount as sys;
use crate::sys::mountinfo::{self, MountIds};

/// A name in an open directory: where a mount is, or is to be.
#[derive(Debug)]
pub(super) struct MountPoint {
    path: PathBuf,
    parent: OwnedFd,
    name: OsString,
}

impl MountPoint {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let Some(name) = path.file_name() else {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                "a mount target must end in a name, which this does not",
            )
            .with_path(path));
        };
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        Ok(MountPoint {
            path: path.to_owned(),
            parent: sys::open_dir_path(parent).at("open the directory of mount target", path)?,
            name: name.to_owned(),
        })
    }

    /// The path as it was given.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn parent(&self) -> BorrowedFd<'_> {
        self.parent.as_fd()
    }

    pub(super) fn name(&self) -> &std::ffi::OsStr {
        &self.name
    }

    /// What is there now: the root of the topmost mount, if it is a mount point.
    pub(super) fn open_topmost(&self) -> io::Result<OwnedFd> {
        sys::open_child(&self.parent, &self.name)
    }

    /// The topmost mount's ids; those of the parent's mount if nothing is mounted.
    pub(super) fn topmost(&self) -> io::Result<MountIds> {
        mountinfo::ids(self.open_topmost()?)
    }

    /// Whether anything is mounted there.
    pub(super) fn is_mounted(&self) -> io::Result<bool> {
        Ok(self.topmost()? != mountinfo::ids(&self.parent)?)
    }

    pub(super) fn unmount(&self, how: sys::Unmount) -> io::Result<()> {
        sys::unmount(&self.parent, &self.name, how)
    }
}

/// Whether anything is mounted at `path`; what is not there is no mount point.
pub(crate) fn is_mount_point(path: &Path) -> Result<bool> {
    match MountPoint::open(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        point => match point?.is_mounted() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            mounted => mounted.at("look for a mount at", path),
        },
    }
}

/// The ids of the topmost mount on a path.
pub(super) fn topmost(path: &Path) -> Result<MountIds> {
    MountPoint::open(path)?.topmost().at("look at mount target", path)
}

/// A directory that is about to be mounted on.
#[derive(Debug)]
pub(super) struct Target {
    point: MountPoint,
    dir: OwnedFd,
    /// None if the kernel cannot tell, as for paths of more than a page.
    place: Option<PathBuf>,
}

impl Target {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let point = MountPoint::open(path)?;
        let dir = point.open_topmost().at("open mount target", path)?;
        if !sys::is_directory(&dir).at("look at mount target", path)? {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                "the mount target is not a directory (symbolic links are not followed)",
            )
            .with_path(path));
        }
        let place = sys::where_is(&dir);
        Ok(Target { point, dir, place })
    }

    pub(super) fn path(&self) -> &Path {
        self.point.path()
    }

    pub(super) fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    pub(super) fn point(&self) -> &MountPoint {
        &self.point
    }

    pub(super) fn into_point(self) -> MountPoint {
        self.point
    }

    /// Takes away the mount just made, when what had to follow failed.
    pub(super) fn abandon(&self) {
        if let Err(e) = self.point.unmount(sys::Unmount::Detach) {
            tracing::error!("a mount stays on {:?}: {e}", self.path());
        }
    }

    /// Refuses to mount a layer inside or above itself: the one would change the layer, the other
    /// hide it. A guard against mistakes, which does not see through bind mounts.
    pub(super) fn keep_apart(&self, layer: impl AsFd, layer_path: &Path) -> Result<()> {
        let (Some(target), Some(layer)) = (self.place.as_deref(), sys::where_is(layer)) else {
            return Ok(());
        };
        let fault = if target.starts_with(&layer) {
            "holds"
        } else if layer.starts_with(target) {
            "would be hidden below"
        } else {
            return Ok(());
        };
        Err(Error::new(
            ErrorKind::InvalidArgument,
            format!(
                "the layer {layer_path:?} {fault} the mount target, which must be outside of its \
                 layers:"
            ),
        )
        .with_path(self.path()))
    }
}
