//! A mount that a helper process serves.

use std::os::fd::BorrowedFd;
use std::path::{Path, absolute};
use std::time::Duration;

use crate::driver::guard::{self, ActiveMount, is_topmost};
use crate::driver::identity::{MountIdentity, MountState};
use crate::driver::target::{MountPoint, Target};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::fuse::View;
use crate::helper::{Helper, HelperCommand};
use crate::sys::mount::Unmount;

/// How long a helper may take to notice that its mount is gone; in vain, if files in it are still open.
const TO_NOTICE: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Helped {
    helper: Helper,
    point: MountPoint,
    identity: MountIdentity,
    has_lock: bool,
}

impl Helped {
    pub(super) fn mount(
        command: &HelperCommand,
        view: &View,
        target: Target,
        lock: Option<BorrowedFd<'_>>,
    ) -> Result<Helped> {
        let path = absolute(target.path()).at("make absolute the path", target.path())?;
        let helper = Helper::start(command, view, &path, lock)?;
        match MountIdentity::new(helper.mount()) {
            Ok(identity) => {
                let point = target.into_point();
                Ok(Helped { helper, point, identity, has_lock: lock.is_some() })
            }
            Err(e) => {
                target.abandon();
                Err(e)
            }
        }
    }

    /// Whether the mount stands without a server.
    fn is_dead(&self) -> Result<bool> {
        // Unmounted by somebody, the helper ends after the mount: the mount is looked at second.
        let ended = self.helper.has_ended(Duration::ZERO);
        Ok(ended && self.identity.state(self.point.path())? != MountState::Gone)
    }
}

impl ActiveMount for Helped {
    fn target(&self) -> &Path {
        self.point.path()
    }

    fn identity(&self) -> &MountIdentity {
        &self.identity
    }

    fn state(&self) -> Result<MountState> {
        match self.is_dead()? {
            true => Ok(MountState::Dead),
            false => self.identity.state(self.point.path()),
        }
    }

    fn unmount(&mut self, how: Unmount) -> Result<()> {
        if !is_topmost(&self.point, &self.identity)? {
            if self.helper.has_ended(TO_NOTICE) {
                self.helper.reap();
            }
            return Ok(());
        }
        let path = self.point.path();
        if self.is_dead()? {
            guard::unmount(&self.point, Unmount::Detach)?;
            self.helper.reap();
            return Err(Error::new(
                ErrorKind::Io,
                "the process that served the mount has died: the mount was taken away, and what had not \
                 been closed or synced may be lost; activate it again: it was on",
            )
            .with_path(path));
        }
        self.helper.unmount(how == Unmount::Detach).map_err(|e| e.with_path_if_none(path))
    }

    fn leave(self: Box<Self>) -> Result<MountIdentity> {
        if !self.is_dead()? {
            return Ok(self.identity);
        }
        if let Err(e) = guard::unmount(&self.point, Unmount::Detach) {
            tracing::error!("a mount whose server has died stays: {e}");
        }
        Err(Error::new(
            ErrorKind::FailedPrecondition,
            "the process that served the mount has died, and the mount was taken away: activate it \
             again: it was on",
        )
        .with_path(self.point.path()))
    }

    fn server(&self) -> Option<BorrowedFd<'_>> {
        Some(self.helper.end())
    }

    fn has_lock(&self) -> bool {
        self.has_lock
    }
}
