//! Engines that turn a stack of layers into one directory tree.
//!
//! The store asks for a view of layers with a [`MountRequest`]. A [`Driver`] answers in one of two
//! ways: with [`Mount`]s, plain data that anybody may carry out, as containerd's snapshotters do; or
//! by mounting it and giving a [`Guard`], which unmounts when it is dropped.
//!
//! The engine here is [`OverlayDriver`], the kernel's overlayfs.

mod bind;
mod guard;
mod identity;
mod mounts;
mod overlay;
mod probe;
mod target;

use std::fmt::Debug;
use std::path::{Path, PathBuf};

pub use guard::{Guard, Visibility, unmount_at};
pub use identity::{MountIdentity, MountState, NamespaceId};
pub use mounts::{Mount, Restrictions};
pub use overlay::{MAX_LAYERS, OverlayDriver, Rung};
pub use probe::{Feature, Probe, ProbeTarget};

pub(crate) use target::is_mount_point;

use crate::error::Result;
use crate::layer::LayerFormat;

mod sealed {
    pub trait Sealed {}
}

/// The two directories of a writable layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpperDir {
    /// The layer itself: everything that is changed or deleted goes here.
    pub dir: PathBuf,
    /// An empty directory of the engine's own, on the same mount as `dir` and not inside it.
    pub work: PathBuf,
}

/// Options of a mount; the default has none set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MountOptions {
    /// Never syncs the upper directory: faster, and after a crash of the machine the upper is lost.
    /// The kernel refuses to mount such an upper again; discard it, or delete
    /// `work/incompat/volatile` in its work directory. Without meaning where there is no upper, or
    /// no lower.
    pub volatile: bool,
    /// What the mount forbids. Containers need setuid and devices: the default forbids nothing.
    pub restrictions: Restrictions,
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
    /// Whether a single lower bears whiteouts or opaque marks, which a bind mount of it would show.
    /// When in doubt, `true`, the default.
    pub lower_has_marks: bool,
    /// A directory that is and stays empty: a second lower where the engine needs two.
    pub empty: PathBuf,
    /// How to mount it.
    pub options: MountOptions,
}

impl MountRequest {
    /// A request without layers; set the fields.
    pub fn new(format: LayerFormat, empty: impl Into<PathBuf>) -> Self {
        MountRequest {
            lower: Vec::new(),
            upper: None,
            format,
            lower_has_marks: true,
            empty: empty.into(),
            options: MountOptions::default(),
        }
    }
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

    /// What has to be mounted, without mounting it and without looking at the layers.
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
}
