//! The kernel's overlayfs.
//!
//! Source: the kernel's `Documentation/filesystems/overlayfs.rst`. Options are always spelled out,
//! since their defaults differ between distributions:
//!
//! - `redirect_dir=nofollow`: layers are settled and bear no redirects; one in a foreign layer must
//!   not be followed. Also what `userxattr` implies, so the two do not conflict;
//! - `metacopy=off`: a layer holds the data of its files, and a copied-up inode alone is no diff;
//! - `index=off`: an index binds an upper to its lowers by file handle, and a store that was moved or
//!   restored would be refused as stale;
//! - `xino=auto`: one device number for the whole tree even where layers are on several file systems
//!   (`find -xdev`, `tar --one-file-system`), if inode numbers leave room for it. On one file system
//!   it changes nothing.
//!
//! All four are known to every kernel since 4.19; mount ids need 5.8.

mod ladder;
pub(super) mod refusal;
mod trial;

use std::path::Path;

use super::guard::KernelMount;
use super::identity::MountIdentity;
use super::mapped::Mapped;
use super::target::Target;
use super::{
    Driver, Guard, Mount, MountRequest, Probe, ProbeTarget, Restrictions, Shown, bind,
    only_by_mounting, sealed,
};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::layer::LayerFormat;
use crate::sys::owners::Owners;
use crate::sys::{mountinfo, userns};

use ladder::Ladder;
pub use ladder::Rung;

/// The most read-only layers that overlayfs takes (`OVL_MAX_STACK`).
pub const MAX_LAYERS: usize = 500;

/// The engine that mounts the kernel's overlayfs, or a bind mount where that is enough.
///
/// It finds out once how the kernel takes layers, and remembers it: keep one driver.
#[derive(Debug, Default)]
pub struct OverlayDriver {
    ladder: Ladder,
}

impl OverlayDriver {
    /// An engine that has yet to find out what the kernel can do.
    pub fn new() -> Self {
        OverlayDriver::default()
    }

    /// An engine that mounts in this one way, for tests and measurements.
    #[doc(hidden)]
    pub fn with_rung(rung: Rung) -> Self {
        OverlayDriver { ladder: Ladder::forced(rung) }
    }

    /// Gives layers with other ids as to kernels before 6.15, for tests.
    #[doc(hidden)]
    pub fn with_layers_in_own_namespace(self) -> Self {
        OverlayDriver { ladder: self.ladder.in_own_namespace() }
    }

    /// The one mount that shows the view.
    fn plan(&self, request: &MountRequest) -> Result<Mount> {
        if request.format == LayerFormat::Aufs {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "the kernel's overlayfs does not read layers of the format aufs, whose whiteouts \
                 are plain files to it",
            ));
        }
        owners_can_be_shown(request.owners)?;
        request.options.ids.check()?;
        if request.lower.len() > MAX_LAYERS {
            return Err(Error::new(
                ErrorKind::LimitExceeded,
                format!(
                    "overlay refused {} layers: the kernel's limit is {MAX_LAYERS}",
                    request.lower.len()
                ),
            ));
        }
        let restrictions = request.options.restrictions;
        let read_only = Restrictions { read_only: true, ..restrictions };
        let ids = request.options.ids.clone();
        let bind = |source: &Path, restrictions| Mount::Bind {
            source: source.to_owned(),
            ids: ids.clone(),
            restrictions,
        };
        Ok(match (request.lower.as_slice(), &request.upper) {
            ([], None) => bind(&request.empty, read_only),
            ([], Some(upper)) => bind(&upper.dir, restrictions),
            ([lower], None) if !request.lower_has_marks => bind(lower, read_only),
            (lower, upper) => {
                let mut lower = lower.to_vec();
                if upper.is_none() && lower.len() == 1 {
                    lower.push(request.empty.clone());
                }
                Mount::Overlay {
                    lower,
                    upper: upper.clone(),
                    options: options(request),
                    ids,
                    restrictions: match upper {
                        Some(_) => restrictions,
                        None => read_only,
                    },
                }
            }
        })
    }
}

fn options(request: &MountRequest) -> Vec<String> {
    let mut options: Vec<String> =
        ["redirect_dir=nofollow", "metacopy=off", "index=off", "xino=auto"]
            .map(str::to_owned)
            .into();
    if request.format == LayerFormat::OverlayUser {
        options.push("userxattr".to_owned());
    }
    if request.options.volatile && request.upper.is_some() {
        options.push("volatile".to_owned());
    }
    options
}

/// The kernel shows files as they are.
fn owners_can_be_shown(owners: Owners) -> Result<()> {
    match owners {
        Owners::OfFiles => Ok(()),
        Owners::InXattrs | Owners::InSecurityXattrs => Err(Error::new(
            ErrorKind::Unsupported,
            "the kernel's overlayfs does not read owners that are kept in xattrs: every file would be this \
             user's; use the driver fuse",
        )),
    }
}

/// In a user namespace marks of the trusted format are not seen: the kernel mounts such layers
/// nevertheless.
pub(super) fn refuse_unreadable_marks(format: LayerFormat) -> Result<()> {
    if format == LayerFormat::OverlayTrusted
        && !userns::is_initial().at("identify the user namespace", "/proc/self/ns/user")?
    {
        return Err(Error::new(
            ErrorKind::PermissionDenied,
            "marks of the format overlay-trusted can be read only outside of user namespaces; in one, \
             use a store of the format overlay-user",
        ));
    }
    Ok(())
}

impl sealed::Sealed for OverlayDriver {}

impl Driver for OverlayDriver {
    fn name(&self) -> &'static str {
        "overlay"
    }

    fn reads_owners(&self, owners: Owners) -> bool {
        owners_can_be_shown(owners).is_ok()
    }

    fn probe(&self, target: &ProbeTarget) -> Result<Probe> {
        trial::probe(self, target)
    }

    fn try_out(&self, target: &ProbeTarget) -> Result<()> {
        trial::try_out(target)
    }

    fn mounts(&self, request: &MountRequest) -> Result<Vec<Mount>> {
        Ok(vec![self.plan(request)?])
    }

    fn may_show(&self, request: &MountRequest, shown: Shown) -> Result<()> {
        if shown == Shown::InPlace {
            return Err(only_by_mounting(self.name()));
        }
        owners_can_be_shown(request.owners)?;
        match userns::may_administer() {
            Ok(false) => Err(Error::new(ErrorKind::PermissionDenied, refusal::RIGHTS)),
            // Where it cannot be told the mount will tell.
            _ => Ok(()),
        }
    }

    fn activate(&self, request: &MountRequest, target: &Path) -> Result<Guard> {
        let mount = self.plan(request)?;
        if matches!(mount, Mount::Overlay { .. }) {
            refuse_unreadable_marks(request.format)?;
        }
        let target = Target::open(target)?;
        let root = match &mount {
            Mount::Bind { source, ids, restrictions } => {
                bind::mount(source, ids, *restrictions, &target)?
            }
            Mount::Overlay { lower, upper, options, ids, restrictions } => {
                let mapped = Mapped::new(ids)?;
                let plan = ladder::Plan {
                    lower,
                    upper: upper.as_ref(),
                    options,
                    attributes: restrictions.attributes(),
                    mapped: mapped.as_ref(),
                };
                self.ladder.mount(&plan, &target)?
            }
            Mount::Fuse { .. } => return Err(Error::new(ErrorKind::Unsupported, "not an overlay")),
        };
        let identity = mountinfo::ids(&root)
            .at("identify the mount on", target.path())
            .and_then(MountIdentity::new);
        drop(root);
        match identity {
            Ok(identity) => {
                let mount = KernelMount::new(target.into_point(), identity);
                Ok(Guard::new(Box::new(mount)))
            }
            Err(e) => {
                target.abandon();
                Err(e)
            }
        }
    }
}
