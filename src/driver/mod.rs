//! Engines that turn a stack of layers into one directory tree.
//!
//! The store asks for a view of layers with a [`MountRequest`]. A [`Driver`] answers in one of two
//! ways: with [`Mount`]s, plain data that anybody may carry out, as containerd's snapshotters do; or
//! by mounting it and giving a [`Guard`], which unmounts when it is dropped.
//!
//! The engines are [`OverlayDriver`], the kernel's overlayfs; `FuseDriver`, this crate's own union over
//! FUSE; and [`CopyDriver`], which needs nothing of the kernel and copies everything.

mod bind;
mod copy;
#[cfg(feature = "fuse")]
mod fuse_mount;
mod guard;
mod identity;
mod mapped;
mod mounts;
mod overlay;
mod probe;
mod room;
#[cfg(feature = "fuse")]
mod settle;
mod target;
#[cfg(feature = "fuse")]
mod union;
#[cfg(feature = "fuse")]
mod unseen;

use std::fmt::Debug;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use copy::CopyDriver;
#[cfg(feature = "fuse")]
pub use fuse_mount::{
    FuseLayer, FuseMount, FuseMountOptions, FuseUnmounter, fuse_privileges,
    is_of_containers_storage, leave_terminal,
};
pub use guard::{Guard, Visibility, unmount_at};
pub use identity::{MountIdentity, MountState, NamespaceId};
pub use mounts::{Mount, Restrictions};
pub use overlay::{MAX_LAYERS, OverlayDriver, Rung};
pub use probe::{Feature, Probe, ProbeTarget};
#[cfg(feature = "fuse")]
pub use settle::settle_upper;
#[cfg(feature = "fuse")]
pub use union::{FuseDriver, FuseServer};
#[cfg(feature = "fuse")]
pub use unseen::{end_unseen_server, nobody_sees_the_mount_on};

pub(crate) use guard::{WriteBack, detach_at, write_back};
pub(crate) use target::is_mount_point;

use crate::error::{Error, ErrorKind, Result};
use crate::idmap::ShownIds;
use crate::layer::LayerFormat;
use crate::path::Name;
use crate::sys::owners::Owners;

mod sealed {
    pub trait Sealed {}
}

/// The name, in the work directory of a writable layer, of the directory that is the union's own: all
/// else there is the kernel's. What the union keeps in it tells whether the layer is settled, also where
/// there is no FUSE.
pub(crate) fn own_work() -> Result<Name> {
    Name::new("stratafs")
}

/// The two directories of a writable layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpperDir {
    /// The layer itself: everything that is changed or deleted goes here.
    pub dir: PathBuf,
    /// An empty directory of the engines' own, on the same mount as `dir` and not inside it.
    pub work: PathBuf,
}

/// Options of a mount; the default has none set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MountOptions {
    /// Never syncs the upper directory: faster, and after a crash of the machine the upper is lost.
    /// The kernel refuses to mount such an upper again; discard it, or delete
    /// `work/incompat/volatile` in its work directory. Without meaning where there is no upper, or
    /// no lower, and for copies.
    pub volatile: bool,
    /// What the mount forbids. Containers need setuid and devices: the default forbids nothing.
    pub restrictions: Restrictions,
    /// The mount namespace of this process is its own, and that of what it starts and what dies with it; so
    /// that, should it be killed, nothing is mounted any more, though nobody can look into the namespace. For
    /// a guard that is not [left](Guard::leave).
    pub private: bool,
    /// As whose the files are shown. The kernel engine and the copies do it by id-mapped mounts of the
    /// layers (mount_setattr(2)): Linux 5.19 for a union, 5.12 else, a file system that can, and the rights
    /// of who mounted that. The union over FUSE needs nothing for it.
    ///
    /// Who is not shown can create nothing in such a mount of the kernel's, root included: that fails with
    /// EOVERFLOW.
    pub ids: ShownIds,
}

/// What the store asks of a driver: one view of a stack of layers.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MountRequest {
    /// Read-only layers, the topmost first.
    pub lower: Vec<PathBuf>,
    /// The writable layer above them; without one the view is read-only.
    pub upper: Option<UpperDir>,
    /// The format of all these layers.
    pub format: LayerFormat,
    /// Where all these layers keep owners. The default is where file systems do.
    pub owners: Owners,
    /// Whether a single lower bears whiteouts or opaque marks, which a bind mount of it would show.
    /// When in doubt, `true`, the default.
    pub lower_has_marks: bool,
    /// A directory that is and stays empty: a second lower where the engine needs two.
    pub empty: PathBuf,
    /// Where an engine that copies has the merged tree: a name on the file system of the layers, in a
    /// directory of the caller's. What is there already is taken to be the tree. The default is none.
    pub tree: Option<PathBuf>,
    /// How to mount it.
    pub options: MountOptions,
    /// To be kept open by the process that serves the mount.
    pub(crate) lock: Option<SharedLock>,
}

/// A descriptor that has a lock, as has another of the same open file.
#[derive(Clone, Debug)]
pub(crate) struct SharedLock(pub(crate) Arc<OwnedFd>);

impl PartialEq for SharedLock {
    fn eq(&self, other: &SharedLock) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for SharedLock {}

impl MountRequest {
    /// A request without layers; set the fields.
    pub fn new(format: LayerFormat, empty: impl Into<PathBuf>) -> Self {
        MountRequest {
            lower: Vec::new(),
            upper: None,
            format,
            owners: Owners::OfFiles,
            lower_has_marks: true,
            empty: empty.into(),
            tree: None,
            options: MountOptions::default(),
            lock: None,
        }
    }
}

/// How a view is to be seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Shown {
    /// By a mount, somewhere.
    Mounted,
    /// As a tree, where it is.
    InPlace,
}

/// An engine. The trait is sealed: engines share the on-disk format, and that is this crate's.
pub trait Driver: sealed::Sealed + Debug + Send + Sync {
    /// The engine's name, as options and reports spell it.
    fn name(&self) -> &'static str;

    /// Finds out what the engine can do on a file system, by doing it; says why where it cannot.
    ///
    /// # Errors
    /// Only if the directory given cannot be used for trials. What an engine cannot do is an answer.
    fn probe(&self, target: &ProbeTarget) -> Result<Probe>;

    /// The part of [`Driver::probe`] that tells, without mounting anything, whether the engine can work
    /// there at all.
    ///
    /// # Errors
    /// Why it does not: [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) if nothing that this
    /// process could be given would help.
    fn try_out(&self, target: &ProbeTarget) -> Result<()>;

    /// What has to be mounted, without mounting it and without looking at the layers. For a request
    /// that [needs a tree](Driver::needs_tree), that must have been made.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) for formats that only engines of
    /// this crate read, [`ErrorKind::LimitExceeded`](crate::ErrorKind::LimitExceeded) for too many
    /// layers.
    fn mounts(&self, request: &MountRequest) -> Result<Vec<Mount>>;

    /// Mounts the view on the directory `target`. A symbolic link in its last component is not
    /// followed.
    ///
    /// # Errors
    /// Those of [`Driver::mounts`];
    /// [`ErrorKind::PermissionDenied`](crate::ErrorKind::PermissionDenied) without the rights;
    /// [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) for a target that is no
    /// directory, or lies inside or above one of the layers; and whatever the kernel refuses, with
    /// its own text.
    fn activate(&self, request: &MountRequest, target: &Path) -> Result<Guard>;

    /// Whether mounts are served by a process that they die with.
    fn is_served(&self) -> bool {
        false
    }

    /// Whether mounts are served by a process that this one may leave behind, and that ends with them.
    fn has_helpers(&self) -> bool {
        false
    }

    /// Whether the engine shows directories that the union of this crate renamed, and of which lower
    /// layers have the contents, as they are. The default is that it does not: they are completed first.
    fn follows_redirects(&self) -> bool {
        false
    }

    /// Whether the engine shows owners that are kept so. The default is that it does.
    fn reads_owners(&self, _owners: Owners) -> bool {
        true
    }

    /// Whether the view is shown as a tree at [`MountRequest::tree`], a copy of the layers that no
    /// longer needs them. The default is that it is not: the layers themselves are used.
    fn needs_tree(&self, _request: &MountRequest, _shown: Shown) -> bool {
        false
    }

    /// Fails if the view surely cannot be shown so, before a tree is made for that. By default that is
    /// known only of views in place, which an engine that has no trees cannot give.
    ///
    /// # Errors
    /// Those of [`Driver::activate`] or [`Driver::activate_in_place`].
    fn may_show(&self, _request: &MountRequest, shown: Shown) -> Result<()> {
        match shown {
            Shown::Mounted => Ok(()),
            Shown::InPlace => Err(only_by_mounting(self.name())),
        }
    }

    /// Gives the view as a plain directory, without mounting anything, for who may not: the guard's
    /// target is where it is. `lease` is a file that stands for the use, which the caller makes once he
    /// has the guard: while it is there the tree [counts as mounted](MountState::Mounted); ending the
    /// use removes it.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported), the default: the engine has no such
    /// directory; or the request forbids something, which only a mount can.
    fn activate_in_place(&self, _request: &MountRequest, _lease: &Path) -> Result<Guard> {
        Err(only_by_mounting(self.name()))
    }
}

fn only_by_mounting(driver: &str) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!(
            "the driver {driver} shows snapshots by mounting alone: name a directory to mount on, or \
             use the driver copy"
        ),
    )
}
