//! Bind mounts: views that need no union.

use std::os::fd::OwnedFd;
use std::path::Path;

use super::mapped::Mapped;
use super::mounts::Restrictions;
use super::overlay::refusal;
use super::target::Target;
use crate::error::{IoContext, Result};
use crate::idmap::ShownIds;
use crate::sys::mount::{self as sys, Attributes, Refusal};

/// Mounts `source` on the target and gives the root of the mount.
///
/// By open_tree and mount_setattr, so that a read-only mount is never writable, not for an instant;
/// by mount(2) where these are lacking (before Linux 5.12) or filtered, which cannot map ids.
pub(super) fn mount(
    source: &Path,
    ids: &ShownIds,
    restrictions: Restrictions,
    target: &Target,
) -> Result<OwnedFd> {
    let dir = sys::open_dir_path(source).at("open directory to mount", source)?;
    target.keep_apart(&dir, source)?;
    let attributes = restrictions.attributes();
    let mapped = match Mapped::new(ids)? {
        Some(mapped) => Some(mapped.mount(&dir, source)?),
        None => None,
    };
    let may_fall_back = mapped.is_none();
    let detached = mapped.map_or_else(|| sys::clone_tree(&dir), Ok).and_then(|mount| {
        if attributes != Attributes::default() {
            sys::add_attributes(&mount, attributes)?;
        }
        sys::attach(&mount, target.dir())?;
        Ok(mount)
    });
    let mount = match detached {
        Ok(mount) => mount,
        Err(e)
            if may_fall_back
                && matches!(Refusal::of(&e), Refusal::NoSuchCall | Refusal::NotPermitted) =>
        {
            tracing::debug!("bind mount by mount(2), since open_tree says: {e}");
            let point = target.point();
            sys::bind(&dir, target.dir(), point.parent(), point.name(), attributes)
                .map_err(|e| refusal::of_bind(source, target.path(), e))?;
            point.open_topmost().at("open mount", target.path())?
        }
        Err(e) => return Err(refusal::of_bind(source, target.path(), e)),
    };
    make_private(mount, target)
}

/// Makes a new mount private; on failure it is unmounted again.
pub(super) fn make_private(mount: OwnedFd, target: &Target) -> Result<OwnedFd> {
    if let Err(e) = sys::make_private(&mount) {
        drop(mount);
        target.abandon();
        return Err(e).at("make the mount private on", target.path());
    }
    Ok(mount)
}
