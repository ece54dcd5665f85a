//! The union file system of this crate, over FUSE: for where the kernel's overlayfs may not be mounted,
//! and for layers that it does not read.
//!
//! The mount is this process's own, if it may mount in its user namespace; else the program fusermount3
//! makes it, which is how ordinary users get one. It is served by threads of this process, and ends with
//! it; or by a helper process ([`helper`](crate::helper)), which outlives this one.
//!
//! What an engine gets as its work directory is the kernel's; in it, [`own_work`](super::own_work) is the
//! union's own.

mod helped;
mod served;
mod trial;

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::overlay::refuse_unreadable_marks;
use super::target::Target;
use super::{
    Driver, Guard, Mount, MountRequest, Probe, ProbeTarget, Restrictions, own_work, sealed,
};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::fuse::{Transport, View, ViewUpper};
use crate::helper::HelperCommand;
use crate::idmap::{IdMap, IdRange, joined};
use crate::layer::LayerFormat;
use crate::sys::fuse::{self, FuseMount};
use crate::sys::mount::{self as sys, Attributes, Refusal};
use crate::sys::owners::Owners;
use crate::sys::userns;

use helped::Helped;
use served::Served;

/// Who serves mounts over FUSE.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum FuseServer {
    /// Threads of this process: its mounts end with it.
    #[default]
    InProcess,
    /// A process for each mount, which outlives this one if the guard is [left](Guard::leave), or if this
    /// process is killed.
    Helper(HelperCommand),
}

/// The engine that mounts this crate's own union file system over FUSE.
///
/// It finds out once how it gets its mounts, and remembers it: keep one driver.
///
/// ```no_run
/// use stratafs::{Driver, FuseDriver, LayerFormat, MountRequest};
///
/// let mut request = MountRequest::new(LayerFormat::OverlayUser, "/store/empty");
/// request.lower = vec!["/store/2".into(), "/store/1".into()];
/// let mut guard = FuseDriver::new().activate(&request, "/mnt".as_ref())?;
/// println!("{:?}", std::fs::read_dir(guard.target()));
/// guard.unmount()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Default)]
pub struct FuseDriver {
    server: FuseServer,
    /// How mounts are made; or of what kind the hindrance is, and what it is.
    transport: OnceLock<Result<Transport, (ErrorKind, String)>>,
}

impl FuseDriver {
    /// An engine that has yet to find out how it gets its mounts.
    pub fn new() -> Self {
        FuseDriver::default()
    }

    /// An engine whose mounts are served so.
    ///
    /// ```no_run
    /// use stratafs::helper::{HelperCommand, run_if_requested};
    /// use stratafs::{Driver, FuseDriver, FuseServer, LayerFormat, MountRequest};
    ///
    /// run_if_requested(); // First in main.
    /// let driver = FuseDriver::served_by(FuseServer::Helper(HelperCommand::CurrentExe));
    /// let mut request = MountRequest::new(LayerFormat::OverlayUser, "/store/empty");
    /// request.lower = vec!["/store/1".into()];
    /// let identity = driver.activate(&request, "/mnt".as_ref())?.leave()?;
    /// // The mount stays when this process ends; whoever has its identity can unmount it:
    /// stratafs::unmount_at("/mnt".as_ref(), Some(&identity))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn served_by(server: FuseServer) -> Self {
        FuseDriver { server, ..FuseDriver::default() }
    }

    fn transport(&self) -> Result<Transport> {
        let found =
            self.transport.get_or_init(|| find_transport().map_err(|e| (e.kind(), e.to_string())));
        found.clone().map_err(|(kind, text)| Error::new(kind, text))
    }

    fn view(&self, request: &MountRequest) -> Result<View> {
        let mut lowers = Vec::with_capacity(request.lower.len());
        for layer in layers(request) {
            lowers.push(absolute(layer)?);
        }
        let upper = match &request.upper {
            None => None,
            Some(upper) => Some(ViewUpper {
                dir: absolute(&upper.dir)?,
                work: absolute(&upper.work)?,
                own: own_work()?,
            }),
        };
        let (uids, gids) = shown_ids(request)?;
        Ok(View {
            lowers,
            upper,
            format: request.format,
            owners: request.owners,
            uids,
            gids,
            volatile: request.options.volatile,
            attributes: restrictions(request).attributes(),
            transport: self.transport()?,
        })
    }

    /// What is to be mounted on `target`, if that may be.
    fn plan(&self, request: &MountRequest, target: &Target) -> Result<View> {
        let view = self.view(request)?;
        marks_can_be_read(request.format)?;
        for layer in view.lowers.iter().chain(view.upper.as_ref().map(|upper| &upper.dir)) {
            let dir = sys::open_dir_path(layer).at("open layer", layer)?;
            target.keep_apart(&dir, layer)?;
        }
        Ok(view)
    }

    fn serve(&self, request: &MountRequest, target: Target) -> Result<Served> {
        Served::mount(&self.plan(request, &target)?, target)
    }
}

/// A union needs a layer, though it be empty.
fn layers(request: &MountRequest) -> Vec<&PathBuf> {
    match (request.lower.as_slice(), &request.upper) {
        ([], None) => vec![&request.empty],
        (lower, _) => lower.iter().collect(),
    }
}

/// Whose the files are shown to be. Where owners are in xattrs, root in a user namespace that has all ids sees them
/// as they are. Anybody else could do nothing with files of ids that are not his: he sees all as his own, as in a
/// copy, and what he makes is root's. Unless it is said how they are to be shown.
fn shown_ids(request: &MountRequest) -> Result<(IdMap, IdMap)> {
    let ids = &request.options.ids;
    if !ids.is_empty() {
        ids.check()?;
        return Ok((IdMap::new(ids.uids.clone(), None), IdMap::new(ids.gids.clone(), None)));
    }
    let (user, group) = fuse::user_and_group();
    let has_all = || userns::has_all_ids().at("look at the ids of", "this user namespace");
    if request.owners == Owners::OfFiles || (user == 0 && has_all()?) {
        return Ok((IdMap::default(), IdMap::default()));
    }
    let own = |id| IdMap::new(vec![IdRange { host: 0, shown: id, len: 1 }], Some(id));
    Ok((own(user), own(group)))
}

fn restrictions(request: &MountRequest) -> Restrictions {
    let restrictions = request.options.restrictions;
    match request.upper {
        Some(_) => restrictions,
        None => Restrictions { read_only: true, ..restrictions },
    }
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).at("make absolute the path", path)
}

/// `trusted.*` is shown to nobody who may not administer the machine: the marks would not be seen.
pub(super) fn marks_can_be_read(format: LayerFormat) -> Result<()> {
    refuse_unreadable_marks(format)?;
    if format == LayerFormat::OverlayTrusted
        && !userns::may_administer().at("look at the capabilities of", "this thread")?
    {
        return Err(Error::new(
            ErrorKind::PermissionDenied,
            "marks of the format overlay-trusted can be read only with CAP_SYS_ADMIN; without it, use a \
             store of the format overlay-user",
        ));
    }
    Ok(())
}

/// Finds out who mounts, by making a mount that is attached nowhere.
pub(super) fn find_transport() -> Result<Transport> {
    let device = fuse::open_device().map_err(|e| match e.kind() {
        std::io::ErrorKind::PermissionDenied => {
            Error::io("open", "/dev/fuse", e).context("its mode should be 0666, to serve FUSE")
        }
        _ => Error::new(
            ErrorKind::Unsupported,
            "there is no FUSE here: load the kernel's module `fuse`, and let the container have",
        )
        .with_path("/dev/fuse")
        .with_source(e),
    })?;
    let request = FuseMount {
        source: "stratafs".as_ref(),
        attributes: Attributes::default(),
        allow_other: true,
        options: &[],
    };
    let e = match fuse::mount_detached(&device, &request) {
        Ok(mount) => {
            // The mount goes unanswered, and waits for nobody, once there is nobody.
            drop(device);
            drop(mount);
            return Ok(Transport::Direct);
        }
        Err(e) => e,
    };
    let program = fuse::FUSERMOUNT;
    match (Refusal::of(&e), fuse::fusermount_version()) {
        (Refusal::NoSuchFileSystem, _) => Err(Error::new(
            ErrorKind::Unsupported,
            "this kernel has no FUSE; load the module `fuse`",
        )
        .with_source(e)),
        (refusal, Ok(version)) => {
            tracing::debug!(?refusal, version, "FUSE is mounted by {program}, since: {e}");
            Ok(Transport::Fusermount)
        }
        (Refusal::NoSuchCall, Err(missing)) => Err(Error::new(
            ErrorKind::Unsupported,
            format!("this kernel lacks fsopen(2), and {program} is not there ({missing})"),
        )
        .with_source(e)),
        (_, Err(missing)) => Err(Error::new(
            ErrorKind::PermissionDenied,
            format!(
                "mounting FUSE needs CAP_SYS_ADMIN, or the program {program}, of the package fuse3, \
                 which is not there ({missing})"
            ),
        )
        .with_source(e)),
    }
}

impl sealed::Sealed for FuseDriver {}

impl Driver for FuseDriver {
    fn name(&self) -> &'static str {
        "fuse"
    }

    fn probe(&self, target: &ProbeTarget) -> Result<Probe> {
        trial::probe(self, target)
    }

    fn try_out(&self, target: &ProbeTarget) -> Result<()> {
        self.transport()?;
        marks_can_be_read(target.format)
    }

    fn is_served(&self) -> bool {
        true
    }

    fn has_helpers(&self) -> bool {
        matches!(self.server, FuseServer::Helper(_))
    }

    fn follows_redirects(&self) -> bool {
        true
    }

    fn mounts(&self, request: &MountRequest) -> Result<Vec<Mount>> {
        let mut options = vec![format!("format={}", request.format)];
        if request.options.volatile && request.upper.is_some() {
            options.push("volatile".to_owned());
        }
        match request.owners {
            Owners::OfFiles => {}
            Owners::InXattrs => options.push("xattr_permissions=2".to_owned()),
            Owners::InSecurityXattrs => options.push("xattr_permissions=1".to_owned()),
        }
        let ids = &request.options.ids;
        ids.check()?;
        for (key, ranges) in [("uidmapping", &ids.uids), ("gidmapping", &ids.gids)] {
            if !ranges.is_empty() {
                options.push(format!("{key}={}", joined(ranges, ":")));
            }
        }
        // What others than who mounts may do is as with other mounts; an ordinary user cannot ask.
        if userns::may_administer().at("look at the capabilities of", "this thread")? {
            options.push("allow_other".to_owned());
        }
        Ok(vec![Mount::Fuse {
            lower: layers(request).into_iter().cloned().collect(),
            upper: request.upper.clone(),
            options,
            restrictions: restrictions(request),
        }])
    }

    fn activate(&self, request: &MountRequest, target: &Path) -> Result<Guard> {
        let target = Target::open(target)?;
        Ok(match &self.server {
            FuseServer::InProcess => Guard::new(Box::new(self.serve(request, target)?)),
            FuseServer::Helper(command) => {
                let view = self.plan(request, &target)?;
                let lock = request.lock.as_ref().map(|lock| lock.0.as_fd());
                Guard::new(Box::new(Helped::mount(command, &view, target, lock)?))
            }
        })
    }
}
