//! A FUSE mount and the threads that serve it.

use std::ffi::OsString;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use fuser::SessionACL;

use super::busy_poll::BusyPoll;
use super::capabilities::Granted;
use super::latch::Latch;
use super::requests::Requests;
use super::union_fs::UnionFs;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::sys::dir::Dir;
use crate::sys::fuse::{self, FuseMount};
use crate::sys::mount::{self, Attributes, Unmount};
use crate::sys::mountinfo;
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
    /// For how long a thread that has answered asks for the next request before it sleeps; see
    /// [`BusyPoll`].
    pub(crate) busy_poll: Duration,
    /// With [`Transport::Fusermount`]: unmounts when this process ends, however it does.
    pub(crate) auto_unmount: bool,
    pub(crate) transport: Transport,
}

/// Where a mount is: what it takes to unmount it, from any thread.
#[derive(Clone, Debug)]
pub(crate) struct Mounted {
    target: PathBuf,
    transport: Transport,
    /// The mount's identity: what is unmounted must be this one.
    ids: mountinfo::MountIds,
}

/// A mount that this process serves. Dropped, it unmounts.
#[derive(Debug)]
pub(crate) struct Session {
    mounted: Mounted,
    granted: Arc<Granted>,
    requests: Arc<Requests>,
    server: Option<JoinHandle<Ended>>,
    /// At whose closing fusermount3 unmounts.
    _auto_unmount: Option<OwnedFd>,
}

impl Session {
    /// Mounts on the directory `target`, of which `dir` is an open descriptor (O_PATH will do), and
    /// serves it on threads of its own. When this returns, the mount answers.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] without /dev/fuse or fusermount3, [`ErrorKind::PermissionDenied`]
    /// without the right to mount; what the kernel or fusermount3 said is in the text.
    pub(crate) fn mount(
        union: Arc<Union>,
        dir: &OwnedFd,
        target: &Path,
        options: &SessionOptions,
    ) -> Result<Session> {
        Session::mount_until(union, dir, target, options, None)
    }

    /// As [`Session::mount`]; `until_end` is closed when the mount has ended, and its threads with it.
    pub(crate) fn mount_until(
        union: Arc<Union>,
        dir: &OwnedFd,
        target: &Path,
        options: &SessionOptions,
        until_end: Option<OwnedFd>,
    ) -> Result<Session> {
        let granted = Arc::new(Granted::default());
        let latch = Arc::new(Latch::new());
        let requests = Arc::new(Requests::new());
        let request = FuseMount {
            source: &options.source,
            attributes: options.attributes,
            allow_other: options.allow_other,
            options: &options.kernel_options,
        };
        let (device, mount, auto_unmount) = match options.transport {
            Transport::Direct => {
                let device = fuse::open_device().at("open", "/dev/fuse")?;
                let mount = fuse::mount_detached(&device, &request).at("mount FUSE on", target)?;
                (device, Some(mount), None)
            }
            Transport::Fusermount => {
                let (device, socket) =
                    fuse::mount_by_fusermount(target, &request, options.auto_unmount)
                        .at("mount FUSE on", target)?;
                (device, None, socket)
            }
        };
        let poll = device.try_clone().at("share", "/dev/fuse")?;
        let poll = BusyPoll::new(poll, options.busy_poll);
        let fs = UnionFs::new(
            union,
            options,
            Arc::clone(&granted),
            Arc::clone(&latch),
            Arc::clone(&requests),
            poll,
        );
        let served = serve(fs, device, options, until_end);
        let undo = |e: Error| {
            if options.transport == Transport::Fusermount
                && let Err(e) = fuse::unmount_by_fusermount(target, true)
            {
                tracing::warn!(?target, error = %e, "cannot undo a mount");
            }
            e
        };
        let server = served.at("serve FUSE on", target).map_err(undo)?;
        let identify =
            |root: &OwnedFd| mountinfo::ids(root).at("ask for the identity of the mount", target);
        let ids = match mount {
            Some(mount) => {
                // Dropping it unmounts, which ends the threads. Once it is attached, the descriptor only
                // keeps it in use, so everything is asked before.
                latch_on(&mount, &latch).at("use the new mount on", target)?;
                let ids = identify(&mount)?;
                mount::attach(&mount, dir).at("attach the mount to", target)?;
                if let Err(e) = mount::make_private(&mount) {
                    tracing::debug!(?target, error = %e, "the mount is as shared as what it is on");
                }
                ids
            }
            None => {
                let opened = mount::open_dir_path(target).at("open the root of the mount", target);
                let root = opened.map_err(undo)?;
                latch_on(&root, &latch).at("use the new mount on", target).map_err(undo)?;
                identify(&root).map_err(undo)?
            }
        };
        Ok(Session {
            mounted: Mounted { target: target.to_owned(), transport: options.transport, ids },
            granted,
            requests,
            server: Some(server),
            _auto_unmount: auto_unmount,
        })
    }

    /// The features of the kernel that were asked for, by their names in `linux/fuse.h`, and whether
    /// they were granted.
    pub(crate) fn granted(&self) -> Vec<(&'static str, bool)> {
        self.granted.features()
    }

    /// How many requests the kernel has sent, of each kind of which there was one.
    pub(crate) fn requests(&self) -> Vec<(&'static str, u64)> {
        self.requests.counted()
    }

    /// The root of the mount, opened with O_PATH: for its identity (`mountinfo::ids`). It keeps the
    /// mount busy for as long as it is open.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if something else is there now.
    pub(crate) fn root(&self) -> Result<OwnedFd> {
        self.mounted.root()
    }

    /// What it takes to unmount it.
    pub(crate) fn mounted(&self) -> &Mounted {
        &self.mounted
    }

    /// Whether the threads that serve it have ended, since somebody unmounted it.
    pub(crate) fn has_ended(&self) -> bool {
        self.server.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits until somebody has unmounted it, and all that was written is with the layer's file system.
    pub(crate) fn wait(&mut self) -> Result<()> {
        let Some(server) = self.server.take() else { return Ok(()) };
        let ended = server.join().unwrap_or_else(|_| Ended {
            served: Ok(()),
            closed: Err(io::Error::other("it panicked")),
        });
        ended.served.at("serve the mount on", &self.mounted.target)?;
        ended.closed.at("write to disk the layer of", &self.mounted.target)
    }

    /// Unmounts, and waits as [`Session::wait`]. A mount that is in use is refused with
    /// [`ErrorKind::Busy`], or with `detach` leaves the tree at once and ends with its last file: then
    /// this does not wait.
    ///
    /// # Errors
    /// Besides, those of writing back what the kernel still kept: then the mount stays, but with
    /// `detach` it goes nevertheless.
    pub(crate) fn unmount(&mut self, detach: bool) -> Result<()> {
        let kept = if self.has_ended() { Ok(()) } else { self.mounted.unmount(detach)? };
        if detach && !self.has_ended() {
            return kept;
        }
        self.wait().and(kept)
    }
}

impl Mounted {
    /// The root of the mount, opened with O_PATH: for its identity (`mountinfo::ids`). It keeps the
    /// mount busy for as long as it is open.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if something else is there now.
    pub(crate) fn root(&self) -> Result<OwnedFd> {
        let root = mount::open_dir_path(&self.target).at("open", &self.target)?;
        let ids = mountinfo::ids(&root).at("ask for the identity of", &self.target)?;
        if ids != self.ids {
            let message = "the mount is not there any more, or something is mounted over it";
            return Err(Error::new(ErrorKind::NotFound, message).with_path(&self.target));
        }
        Ok(root)
    }

    /// Writes back what the kernel still keeps, and unmounts. With `detach` the failure of the first does
    /// not prevent the second, and comes back inside.
    ///
    /// # Errors
    /// As [`Session::unmount`].
    pub(crate) fn unmount(&self, detach: bool) -> Result<Result<()>> {
        let root = self.root()?;
        let kept = match fuse::sync_file_system(&root) {
            // Its root may not be opened by us: unmounting writes back, too, but does not tell.
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Ok(()),
            synced => synced.at("write back what was written to", &self.target),
        };
        drop(root);
        if !detach {
            kept?;
            self.unmount_now(false).at("unmount", &self.target)?;
            return Ok(Ok(()));
        }
        self.unmount_now(true).at("unmount", &self.target)?;
        Ok(kept)
    }

    fn unmount_now(&self, detach: bool) -> io::Result<()> {
        if self.transport == Transport::Fusermount {
            return fuse::unmount_by_fusermount(&self.target, detach);
        }
        let (parent, name) = match (self.target.parent(), self.target.file_name()) {
            (Some(parent), Some(name)) => (parent, name),
            _ => (Path::new("/"), std::ffi::OsStr::new(".")),
        };
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        let parent = mount::open_dir_path(parent)?;
        let how = if detach { Unmount::Detach } else { Unmount::WhenIdle };
        mount::unmount(&parent, name, how)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if self.server.is_none() {
            return;
        }
        if !self.has_ended()
            && let Err(e) = self.root().and_then(|root| {
                drop(root);
                self.mounted.unmount_now(true).at("unmount", &self.mounted.target)
            })
        {
            tracing::error!(target = ?self.mounted.target, error = %e, "a dropped mount stays");
        }
        // Its threads go on until the last file in it is closed.
        if self.has_ended()
            && let Err(e) = self.wait()
        {
            tracing::error!(target = ?self.mounted.target, error = %e, "a dropped mount did not end well");
        }
    }
}

/// How a mount ended.
#[derive(Debug)]
struct Ended {
    served: io::Result<()>,
    closed: io::Result<()>,
}

/// Answers the kernel's first request, and the others on threads.
fn serve(
    fs: UnionFs,
    device: OwnedFd,
    options: &SessionOptions,
    until_end: Option<OwnedFd>,
) -> io::Result<JoinHandle<Ended>> {
    let threads = options.threads.map_or_else(
        || std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 4)),
        NonZeroUsize::get,
    );
    let mut config = fuser::Config::default();
    config.n_threads = Some(threads);
    // Who may use the mount is the kernel's to check. fuser's own check would refuse what the kernel
    // writes back in nobody's name.
    config.acl = SessionACL::All;
    let union = Arc::clone(&fs.union);
    let session = fuser::Session::from_fd(fs, device, SessionACL::All, config)?;
    std::thread::Builder::new().name("stratafs-fuse".to_owned()).spawn(move || {
        let served = catch_unwind(AssertUnwindSafe(|| session.run()));
        let served = served.unwrap_or_else(|_| Err(io::Error::other("it panicked")));
        // Whatever ended it, and whoever waits for it.
        let closed = union.close();
        if let Err(e) = &closed {
            tracing::error!(error = %e, "cannot write a layer to disk when its mount has ended");
        }
        drop(until_end);
        Ended { served, closed }
    })
}

/// Opens a file and lists a directory, after which the kernel asks about neither any more.
fn latch_on(root: impl AsFd, latch: &Latch) -> io::Result<()> {
    let opened = fuse::open_in(&root, latch.name());
    latch.remove();
    drop(opened?);
    let dir = Dir::try_from(fuse::open_in(&root, std::ffi::OsStr::new("."))?)?;
    dir.entries_once()?;
    Ok(())
}
