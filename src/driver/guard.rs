//! An active mount, and who ends it.

use std::any::Any;
use std::fmt;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use super::identity::{MountIdentity, MountState, NamespaceId};
use super::target::MountPoint;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::sys::mount::{self as sys, Refusal, Unmount};
use crate::sys::{fs_features, fuse, mountinfo};

/// What an engine keeps of a mount that it made.
pub(super) trait ActiveMount: fmt::Debug + Send + Sync {
    fn target(&self) -> &Path;
    fn identity(&self) -> &MountIdentity;
    fn state(&self) -> Result<MountState>;
    /// Does nothing if it is gone already.
    fn unmount(&mut self, how: Unmount) -> Result<()>;
    /// Lets it stay when the guard, and perhaps the process, is gone.
    fn leave(self: Box<Self>) -> Result<MountIdentity>;
    /// What becomes readable when the process that serves it ends, if that is another.
    fn server(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    /// Whether another process keeps the lock that came with the request.
    fn has_lock(&self) -> bool {
        false
    }
    /// Lets go of what was held for a mount that is out of the tree, as soon as nothing can be written
    /// through it any more.
    fn release(self: Box<Self>, held: Held) {
        drop(held);
    }
}

/// What a guard keeps.
pub(super) type Held = Vec<Box<dyn Any + Send + Sync>>;

/// Who sees a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Visibility {
    /// The calling thread, and all that share its mount namespace.
    Caller,
    /// Only who is, or enters, this mount namespace.
    Namespace(NamespaceId),
}

/// A mount that this process holds. Dropping it unmounts; where files are still in use the mount is
/// detached instead: it leaves the tree at once, and ends with the last of them.
///
/// ```no_run
/// use stratafs::{Driver, LayerFormat, MountRequest, OverlayDriver};
///
/// let mut request = MountRequest::new(LayerFormat::OverlayTrusted, "/store/empty");
/// request.lower = vec!["/store/2".into(), "/store/1".into()];
/// let mut guard = OverlayDriver::new().activate(&request, "/mnt".as_ref())?;
/// println!("{:?}", std::fs::read_dir(guard.target()));
/// guard.unmount()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "dropping the guard unmounts at once"]
pub struct Guard {
    /// None once it is unmounted or left.
    mount: Option<Box<dyn ActiveMount>>,
    target: PathBuf,
    identity: MountIdentity,
    /// Dropped only after the mount is gone.
    held: Held,
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guard")
            .field("mount", &self.mount)
            .field("target", &self.target)
            .field("identity", &self.identity)
            .field("held", &self.held.len())
            .finish()
    }
}

impl Guard {
    pub(super) fn new(mount: Box<dyn ActiveMount>) -> Self {
        Guard {
            target: mount.target().to_owned(),
            identity: mount.identity().clone(),
            mount: Some(mount),
            held: Vec::new(),
        }
    }

    /// Keeps `what` until the mount is gone: a lock, or a directory that must outlive it.
    pub(crate) fn hold(&mut self, what: Box<dyn Any + Send + Sync>) {
        self.held.push(what);
    }

    /// The directory on which it is mounted, as it was given; or, of a tree that is used
    /// [in place](MountIdentity::is_in_place), the tree.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Which mount it is.
    pub fn identity(&self) -> &MountIdentity {
        &self.identity
    }

    /// Who sees the mount.
    ///
    /// # Errors
    /// If /proc is not mounted.
    pub fn visibility(&self) -> Result<Visibility> {
        let namespace = self.identity.mount_namespace();
        Ok(match namespace == NamespaceId::current()? {
            true => Visibility::Caller,
            false => Visibility::Namespace(namespace),
        })
    }

    /// Whether the mount is there and alive: somebody else may have unmounted it.
    ///
    /// # Errors
    /// Those of [`MountIdentity::state`].
    pub fn state(&self) -> Result<MountState> {
        match &self.mount {
            Some(mount) => mount.state(),
            None => Ok(MountState::Gone),
        }
    }

    /// A descriptor that becomes readable when the process that serves the mount ends, if that is a helper:
    /// to be waited for with others, as by poll(2). Then [`Guard::state`] says whether the mount was
    /// unmounted or is [dead](MountState::Dead). Nothing is to be read from it.
    pub fn server(&self) -> Option<BorrowedFd<'_>> {
        self.mount.as_ref().and_then(|mount| mount.server())
    }

    /// Whether another process keeps the lock that came with the request.
    pub(crate) fn has_lock(&self) -> bool {
        self.mount.as_ref().is_some_and(|mount| mount.has_lock())
    }

    /// Unmounts, unless files are in use. What is gone already is no error.
    ///
    /// # Errors
    /// - [`ErrorKind::Busy`] while files in it are in use, or another mount lies over it: the mount
    ///   stays and the guard holds it, so that the call may be repeated.
    /// - [`ErrorKind::Io`] if what was written could not be written to the layer, or the process that served
    ///   the mount has died: a dead mount is taken away.
    pub fn unmount(&mut self) -> Result<()> {
        if let Some(mount) = &mut self.mount {
            mount.unmount(Unmount::WhenIdle)?;
        }
        if let Some(mount) = self.mount.take() {
            mount.release(std::mem::take(&mut self.held));
        }
        Ok(())
    }

    /// Leaves the mount in place for others, and gives what is needed to know it again:
    /// [`unmount_at`] ends it.
    ///
    /// # Errors
    /// [`ErrorKind::FailedPrecondition`] for a mount that is unmounted, or that cannot outlive this
    /// process.
    pub fn leave(mut self) -> Result<MountIdentity> {
        match self.mount.take() {
            Some(mount) => mount.leave(),
            None => Err(Error::new(ErrorKind::FailedPrecondition, "already unmounted from")
                .with_path(&self.target)),
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let Some(mut mount) = self.mount.take() else { return };
        let mut done = mount.unmount(Unmount::WhenIdle);
        if let Err(e) = &done
            && e.kind() == ErrorKind::Busy
        {
            tracing::warn!("detaching: {e}");
            done = mount.unmount(Unmount::Detach);
        }
        if let Err(e) = done {
            tracing::error!("a mount did not end well: {e}");
        }
        mount.release(std::mem::take(&mut self.held));
    }
}

/// Whether a mount is there to be unmounted; false if it is gone.
///
/// # Errors
/// [`ErrorKind::Busy`] if another mount lies over it; [`ErrorKind::FailedPrecondition`] if it is in
/// another mount namespace.
pub(super) fn is_topmost(point: &MountPoint, identity: &MountIdentity) -> Result<bool> {
    let path = point.path();
    match identity.state(path)? {
        MountState::Gone => return Ok(false),
        MountState::OtherNamespace => {
            return Err(Error::new(
                ErrorKind::FailedPrecondition,
                "cannot unmount from another mount namespace",
            )
            .with_path(path));
        }
        MountState::Mounted | MountState::Unknown | MountState::Dead => {}
    }
    if !identity.is(point.topmost().at("look at mount", path)?) {
        return Err(Error::new(
            ErrorKind::Busy,
            "another mount lies over the one to be unmounted; unmount that one first from",
        )
        .with_path(path));
    }
    Ok(true)
}

/// A mount that the kernel alone keeps.
#[derive(Debug)]
pub(super) struct KernelMount {
    point: MountPoint,
    identity: MountIdentity,
}

impl KernelMount {
    pub(super) fn new(point: MountPoint, identity: MountIdentity) -> Self {
        KernelMount { point, identity }
    }
}

impl ActiveMount for KernelMount {
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
            return Ok(());
        }
        unmount(&self.point, how)
    }

    fn leave(self: Box<Self>) -> Result<MountIdentity> {
        Ok(self.identity)
    }
}

/// A tree that is used where it is. As with a mount that the kernel keeps, the use ends by a call only,
/// not with the process: a file stands for it.
#[derive(Debug)]
pub(super) struct InPlace {
    tree: PathBuf,
    identity: MountIdentity,
}

impl InPlace {
    /// The file `lease` is the caller's to make.
    pub(super) fn new(tree: PathBuf, lease: &Path) -> Result<Self> {
        let dir = sys::open_dir_path(&tree).at("open tree", &tree)?;
        let ids = mountinfo::ids(&dir).at("identify the mount of", &tree)?;
        Ok(InPlace { tree, identity: MountIdentity::in_place(ids, lease)? })
    }
}

impl ActiveMount for InPlace {
    fn target(&self) -> &Path {
        &self.tree
    }

    fn identity(&self) -> &MountIdentity {
        &self.identity
    }

    fn state(&self) -> Result<MountState> {
        self.identity.state(&self.tree)
    }

    /// Nobody knows whether files in it are in use.
    fn unmount(&mut self, _: Unmount) -> Result<()> {
        end_lease(&self.identity)
    }

    fn leave(self: Box<Self>) -> Result<MountIdentity> {
        Ok(self.identity)
    }
}

fn end_lease(identity: &MountIdentity) -> Result<()> {
    let Some(lease) = identity.lease() else { return Ok(()) };
    match std::fs::remove_file(&lease) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        done => done.at("remove", &lease),
    }
}

/// Unmounts the topmost mount on `target`, unless files in it are in use. A symbolic link there is
/// not followed. With `expect`, only if it is that mount; or ends the use of that tree, if it is used
/// [in place](MountIdentity::is_in_place).
///
/// # Errors
/// [`ErrorKind::FailedPrecondition`] if nothing is mounted there, or something else than expected;
/// [`ErrorKind::Busy`] while files in it are in use;
/// [`ErrorKind::PermissionDenied`] without the rights.
pub fn unmount_at(target: &Path, expect: Option<&MountIdentity>) -> Result<()> {
    if let Some(expect) = expect
        && expect.is_in_place()
    {
        return end_lease(expect);
    }
    let point = MountPoint::open(target)?;
    let topmost = point.topmost().at("look at mount", target)?;
    let fault = if !point.is_mounted().at("look at mount", target)? {
        Some("nothing is mounted on")
    } else if let Some(expect) = expect
        && MountIdentity::new(topmost)? != *expect
    {
        Some("not the mount that was made, but another, is on")
    } else {
        None
    };
    if let Some(fault) = fault {
        return Err(Error::new(ErrorKind::FailedPrecondition, fault).with_path(target));
    }
    unmount(&point, Unmount::WhenIdle)
}

/// Takes the mount away from `target`, also if files in it are in use, if it is the topmost there; whether
/// it was.
pub(crate) fn detach_at(target: &Path, identity: &MountIdentity) -> Result<bool> {
    let point = MountPoint::open(target)?;
    if !identity.is(point.topmost().at("look at mount", target)?) {
        return Ok(false);
    }
    unmount(&point, Unmount::Detach)?;
    Ok(true)
}

/// What a mount over FUSE is to put in its layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WriteBack {
    /// What was written to it, and is still with the kernel.
    Written,
    /// From now on also the data of all files that are in the layer, though they were not written.
    AllData,
}

/// Has what belongs to a FUSE mount on `target` written to its layer; other mounts hold nothing back. What
/// is gone, under another mount, or where the caller cannot look, is passed over.
pub(crate) fn write_back(target: &Path, identity: &MountIdentity, what: WriteBack) -> Result<()> {
    if identity.is_in_place() || identity.state(target)? != MountState::Mounted {
        return Ok(());
    }
    let Ok(point) = MountPoint::open(target) else { return Ok(()) };
    let Ok(root) = point.open_topmost() else { return Ok(()) };
    let ids = mountinfo::ids(&root).at("identify the mount on", target)?;
    if !identity.is(ids) || !is_fuse(&point) {
        return Ok(());
    }
    let done = match what {
        WriteBack::Written => Ok(()),
        WriteBack::AllData => match fuse::keep_data(&root) {
            // A server of an earlier version, which makes nothing without its data.
            Err(e) if fuse::is_unknown_call(&e) => Ok(()),
            done => done,
        },
    };
    match done.and_then(|()| fuse::sync_file_system(&root)) {
        // Its server has died: there is nothing that could still be written.
        Err(e) if e.kind() == std::io::ErrorKind::NotConnected => Ok(()),
        done => done.at("write back what was written to", target),
    }
}

pub(super) fn unmount(point: &MountPoint, how: Unmount) -> Result<()> {
    let done = match point.unmount(how) {
        Err(e) if Refusal::of(&e) == Refusal::NotPermitted && is_fuse(point) => {
            // It may have been made by it, too.
            fuse::unmount_by_fusermount(point.path(), how == Unmount::Detach)
        }
        done => done,
    };
    done.map_err(|e| {
        let remedy = match Refusal::of(&e) {
            Refusal::Busy => {
                Some("files in it are in use; end the processes that `fuser -m` lists")
            }
            Refusal::NotPermitted => {
                Some("only root of the user namespace that owns the mount namespace may unmount")
            }
            _ => None,
        };
        let error = Error::io("unmount", point.path(), e);
        match remedy {
            Some(remedy) => error.context(remedy),
            None => error,
        }
    })
}

fn is_fuse(point: &MountPoint) -> bool {
    match point.open_topmost().and_then(fs_features::file_system_name) {
        Ok(name) => name == "fuse",
        // Its server has died.
        Err(e) => e.kind() == std::io::ErrorKind::NotConnected,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::sys::mountinfo::MountIds;

    type Log = Arc<Mutex<Vec<&'static str>>>;

    /// A mount of no engine, which says what happens to it.
    #[derive(Debug)]
    struct Scripted {
        log: Log,
        identity: MountIdentity,
        busy: bool,
    }

    impl ActiveMount for Scripted {
        fn target(&self) -> &Path {
            Path::new("/target")
        }

        fn identity(&self) -> &MountIdentity {
            &self.identity
        }

        fn state(&self) -> Result<MountState> {
            Ok(MountState::Mounted)
        }

        fn unmount(&mut self, how: Unmount) -> Result<()> {
            let mut log = self.log.lock().unwrap();
            if how == Unmount::WhenIdle && self.busy {
                log.push("busy");
                return Err(Error::new(ErrorKind::Busy, "busy"));
            }
            log.push(match how {
                Unmount::WhenIdle => "unmounted",
                Unmount::Detach => "detached",
            });
            Ok(())
        }

        fn leave(self: Box<Self>) -> Result<MountIdentity> {
            self.log.lock().unwrap().push("left");
            Ok(self.identity)
        }
    }

    struct Held(Log);

    impl Drop for Held {
        fn drop(&mut self) {
            self.0.lock().unwrap().push("released");
        }
    }

    fn guard(busy: bool) -> (Guard, Log) {
        let log = Log::default();
        let ids = MountIds { id: 1, unique: Some(1) };
        let mut guard = Guard::new(Box::new(Scripted {
            log: Arc::clone(&log),
            identity: MountIdentity::new(ids).unwrap(),
            busy,
        }));
        guard.hold(Box::new(Held(Arc::clone(&log))));
        (guard, log)
    }

    #[test]
    fn what_is_held_outlives_the_mount() {
        let (held, log) = guard(false);
        drop(held);
        assert_eq!(*log.lock().unwrap(), ["unmounted", "released"]);

        let (mut held, log) = guard(false);
        held.unmount().unwrap();
        assert_eq!(*log.lock().unwrap(), ["unmounted", "released"]);
        assert_eq!(held.state().unwrap(), MountState::Gone);
        drop(held);
        assert_eq!(*log.lock().unwrap(), ["unmounted", "released"]);
    }

    #[test]
    fn a_busy_mount_is_kept_by_unmount_and_detached_by_drop() {
        let (mut held, log) = guard(true);
        assert_eq!(held.unmount().unwrap_err().kind(), ErrorKind::Busy);
        assert_eq!(*log.lock().unwrap(), ["busy"]);
        assert_eq!(held.state().unwrap(), MountState::Mounted);
        drop(held);
        assert_eq!(*log.lock().unwrap(), ["busy", "busy", "detached", "released"]);
    }

    #[test]
    fn a_mount_that_is_left_is_not_unmounted() {
        let (held, log) = guard(false);
        held.leave().unwrap();
        assert_eq!(*log.lock().unwrap(), ["left", "released"]);

        let (mut held, _) = guard(false);
        held.unmount().unwrap();
        let e = held.leave().unwrap_err();
        assert_eq!(e.kind(), ErrorKind::FailedPrecondition);
    }

    #[test]
    fn guards_and_drivers_may_go_to_other_threads() {
        fn check<T: Send + Sync + 'static>() {}
        check::<Guard>();
        check::<Box<dyn crate::driver::Driver>>();
    }
}
