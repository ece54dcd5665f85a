//! A FUSE mount and the threads that serve it.

use std::ffi::OsString;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};
use crate::sys::mount::Attributes;
use crate::union::Union;

/// How the kernel is asked for the mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    /// By this process, which has CAP_SYS_ADMIN in its user namespace.
    Direct,
    /// By the setuid program fusermount3, for who has no such right.
    Fusermount,
}

/// Options of a mount over FUSE.
#[derive(Clone, Debug)]
pub(crate) struct SessionOptions {
    /// What /proc/mounts shows as the source.
    pub(crate) source: OsString,
    pub(crate) attributes: Attributes,
    /// Others than who mounted may use it.
    pub(crate) allow_other: bool,
    /// Further options for the kernel, such as `context=...`, as they are.
    pub(crate) kernel_options: Vec<OsString>,
    /// Small writes are collected by the kernel. Errors of a full disk then show at close and fsync.
    pub(crate) writeback: bool,
    /// How long the kernel may rely on what it was told of names and attributes; for ever, if none.
    pub(crate) timeout: Option<Duration>,
    /// By the number of processors, if none: 2 to 4.
    pub(crate) threads: Option<NonZeroUsize>,
    /// With [`Transport::Fusermount`]: unmounts when this process ends, however it does.
    pub(crate) auto_unmount: bool,
    pub(crate) transport: Transport,
}

/// A mount that this process serves. Dropped, it unmounts.
#[derive(Debug)]
pub(crate) struct Session {
    _private: (),
}

impl Session {
    /// Mounts on the directory `target`, of which `dir` is an open descriptor (O_PATH will do), and
    /// serves it on threads of its own. When this returns, the mount answers.
    pub(crate) fn mount(
        _union: Arc<Union>,
        _dir: &OwnedFd,
        target: &Path,
        _options: &SessionOptions,
    ) -> Result<Session> {
        Err(Error::new(ErrorKind::Unsupported, "FUSE is not built yet").with_path(target))
    }

    /// The features of the kernel that were asked for, by their names in `linux/fuse.h`, and whether
    /// they were granted.
    pub(crate) fn granted(&self) -> Vec<(&'static str, bool)> {
        Vec::new()
    }

    /// The root of the mount, opened with O_PATH: for its identity (`mountinfo::ids`). It keeps the
    /// mount busy for as long as it is open.
    pub(crate) fn root(&self) -> Result<OwnedFd> {
        Err(Error::new(ErrorKind::Unsupported, "FUSE is not built yet"))
    }

    /// Whether the threads that serve it have ended, since somebody unmounted it.
    pub(crate) fn has_ended(&self) -> bool {
        true
    }

    /// Waits until somebody has unmounted it, and all that was written is with the layer's file system.
    pub(crate) fn wait(&mut self) -> Result<()> {
        Ok(())
    }

    /// Unmounts, and waits as [`Session::wait`]. A mount that is in use is refused with
    /// [`ErrorKind::Busy`], or with `detach` leaves the tree at once and ends with its last file.
    pub(crate) fn unmount(&mut self, _detach: bool) -> Result<()> {
        Ok(())
    }
}
