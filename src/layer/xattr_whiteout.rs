//! Whiteouts that are empty files with an xattr, in directories that say that there are such.
//!
//! The kernel's overlayfs reads them in lower layers only, and in a mount of an overlay on another they are
//! what the upper one writes, since no device 0:0 can be made there. No layer of a store has them: `adopt`
//! makes devices of them.
//!
//! Source: the kernel's `Documentation/filesystems/overlayfs.rst`, "Nesting overlayfs mounts".

use std::io;

use super::LayerFormat;
use super::entry::{self, Found};
use crate::path::Name;
use crate::sys::dir::Dir;
use crate::sys::stat::Stat;
use crate::sys::xattr::{self, Of};

/// As [`entry::find`], with these whiteouts, too: in a layer that is not the writable one.
pub(crate) fn find(format: LayerFormat, dir: &Dir, name: &Name) -> io::Result<Found> {
    let found = entry::find(Some(format), dir, name)?;
    if let Found::Entry { stat, .. } = &found
        && is_whiteout(format, dir, name, stat)?
        && may_hold(format, dir)?
    {
        return Ok(Found::Whiteout);
    }
    Ok(found)
}

/// Whether an entry is such a whiteout, if its directory [may hold](may_hold) any.
pub(crate) fn is_whiteout(
    format: LayerFormat,
    dir: &Dir,
    name: &Name,
    stat: &Stat,
) -> io::Result<bool> {
    match format.xattr_prefix() {
        Some(prefix) if stat.is_file() && stat.size == 0 => {
            let key = format!("{prefix}whiteout");
            match xattr::get(Of::Child(dir, name), key.as_bytes()) {
                // A file that is closed to its owner, who has no privilege: no overlay makes such.
                Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Ok(false),
                value => Ok(value?.is_some()),
            }
        }
        _ => Ok(false),
    }
}

/// Whether a directory says that there may be such whiteouts in it.
pub(crate) fn may_hold(format: LayerFormat, dir: &Dir) -> io::Result<bool> {
    match format.xattr_prefix() {
        Some(prefix) => {
            let key = format!("{prefix}opaque");
            Ok(xattr::get(Of::dir(dir), key.as_bytes())?.as_deref() == Some(b"x"))
        }
        None => Ok(false),
    }
}
