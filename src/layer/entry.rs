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
