//! What one directory of one layer says of a name.

use std::io;

use super::LayerFormat;
use super::marks::{self, Mark};
use crate::path::Name;
use crate::sys::dir::Dir;
use crate::sys::stat::Stat;

/// What one layer says of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Nothing: look below.
    Nothing,
    /// It is deleted.
    Whiteout,
    /// It is there; `ends` if what lies below is hidden whatever it is.
    Entry { stat: Stat, ends: bool },
}

/// Looks `name` up in a directory of a layer; without a format nothing is a mark.
pub(crate) fn find(format: Option<LayerFormat>, dir: &Dir, name: &Name) -> io::Result<Found> {
    let hidden = match format.and_then(|format| marks::separate_whiteout(format, name)) {
        Some(mark) => dir.try_stat_at(&mark)?.is_some(),
        None => false,
    };
    Ok(match dir.try_stat_at(name)? {
        None if hidden => Found::Whiteout,
        None => Found::Nothing,
        Some(stat) => match format.map_or(Mark::None, |f| marks::decode(f, name, &stat)) {
            Mark::None => Found::Entry { stat, ends: hidden },
            Mark::Whiteout(_) => Found::Whiteout,
            // The format's own files are not part of the union.
            Mark::Opaque | Mark::Internal => Found::Nothing,
        },
    })
}

/// As [`find`], in a layer that is not the topmost writable one: there an overlay's whiteout may also be an
/// empty file with an xattr, in a directory that says so. The kernel writes such into layers that are
/// themselves in an overlay, where no device 0:0 can be.
///
/// Source: the kernel's `Documentation/filesystems/overlayfs.rst`, "Nesting overlayfs mounts".
pub(crate) fn find_in_lower(format: LayerFormat, dir: &Dir, name: &Name) -> io::Result<Found> {
    let found = find(Some(format), dir, name)?;
    if let Found::Entry { stat, .. } = &found
        && marks::may_be_xattr_whiteout(stat)
        && marks::is_xattr_whiteout(format, dir, name)?
        && marks::has_xattr_whiteouts(format, dir)?
    {
        return Ok(Found::Whiteout);
    }
    Ok(found)
}
