//! A mount that threads of this process serve.

use std::io::PipeReader;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use crate::driver::guard::{ActiveMount, Held, is_topmost};
use crate::driver::identity::{MountIdentity, MountState};
use crate::driver::target::{MountPoint, Target};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::fuse::{Session, View};
use crate::sys::mount::Unmount;
use crate::sys::{mountinfo, wait};

/// How long the threads of a mount that is gone may take to notice. It waits for nothing but them, unless
/// files in it are still open: then it waits in vain.
const TO_NOTICE: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Served {
    session: Session,
    point: MountPoint,
    identity: MountIdentity,
    /// Its other end is closed when nothing is served any more.
    ended: PipeReader,
}

impl Served {
    pub(super) fn mount(view: &View, target: Target) -> Result<Served> {
        let dir = target.dir().try_clone_to_owned().at("keep open", target.path())?;
        let (ended, until_end) = std::io::pipe().at("make a pipe for", target.path())?;
        // Dropping the session unmounts.
        let session = view.mount(&dir, target.path(), Some(until_end.into()))?;
        let root = session.root()?;
        let ids = mountinfo::ids(&root).at("identify the mount on", target.path())?;
        drop((root, dir));
        let identity = MountIdentity::new(ids)?;
        Ok(Served { session, point: target.into_point(), identity, ended })
    }

    /// The features of the kernel that were asked for, and whether they were granted.
    pub(super) fn granted(&self) -> Vec<(&'static str, bool)> {
        self.session.granted()
    }

    /// Takes leave of a mount that is out of the tree.
    fn end(&mut self) -> Result<()> {
        let ended = wait::until_readable([self.ended.as_fd()], Some(TO_NOTICE));
        match ended.at("wait for the end of the mount on", self.point.path())? {
            [true] => self.session.wait(),
            // Its last file ends it: see `release`.
            [false] => Ok(()),
        }
    }
}

impl ActiveMount for Served {
    fn target(&self) -> &Path {
        self.point.path()
    }

    fn identity(&self) -> &MountIdentity {
        &self.identity
    }

    fn state(&self) -> Result<MountState> {
        self.identity.state(self.point.path())
    }

    fn unmount(&mut self, how: Unmount) -> Result<()> {
        if !is_topmost(&self.point, &self.identity)? {
            return self.end();
        }
        match how {
            Unmount::WhenIdle => self.session.unmount(false),
            Unmount::Detach => self.session.unmount(true),
        }
    }

    fn leave(mut self: Box<Self>) -> Result<MountIdentity> {
        let done = match self.unmount(Unmount::WhenIdle) {
            Err(e) if e.kind() == ErrorKind::Busy => self.unmount(Unmount::Detach),
            done => done,
        };
        if let Err(e) = done {
            tracing::error!("a mount stays: {e}");
        }
        Err(Error::new(
            ErrorKind::FailedPrecondition,
            "this process serves the mount, which cannot outlive it and was unmounted; have it served by \
             a helper process: it was on",
        )
        .with_path(self.point.path()))
    }

    /// While files in it are open the layer may still be written to.
    fn release(self: Box<Self>, held: Held) {
        let Served { mut session, point, .. } = *self;
        let path = point.path().to_owned();
        let has_ended = session.has_ended();
        let wait = move || {
            if let Err(e) = session.wait() {
                tracing::error!("a mount did not end well: {e}");
            }
            // It has a lock, too, which whoever gets the other will want.
            drop(session);
            drop(held);
        };
        if has_ended {
            return wait();
        }
        let thread = std::thread::Builder::new().name("stratafs-detached".to_owned());
        if let Err(e) = thread.spawn(wait) {
            tracing::error!(?path, error = %e, "nobody waits for the end of a detached mount");
        }
    }
}
