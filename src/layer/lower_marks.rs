//! Marks as they are read in the lower layers of a union, where more of them are understood than are ever
//! written:
//!
//! - whiteouts that are empty files with an xattr, in directories that say that there are such. The kernel's
//!   overlayfs reads them in lower layers only, and in a mount of an overlay on another they are what the upper
//!   one writes, since no device 0:0 can be made there;
//! - in layers of containers/storage the marks of AUFS, too: for a program that mounts in the kernel's place
//!   (`mount_program`) it unpacks images with those, beside what the kernel writes.
//!
//! No layer of a store has any of them: `adopt` makes the marks of its format of them.
//!
//! Sources: the kernel's `Documentation/filesystems/overlayfs.rst`, "Nesting overlayfs mounts"; what podman
//! unpacks.

use std::io;

use super::LayerFormat;
use super::entry::{self, Found};
use super::marks::{self, DotWh, Mark};
use crate::path::Name;
use crate::sys::dir::Dir;
use crate::sys::stat::{FileType, Stat};
use crate::sys::xattr::{self, Of};

/// How a lower layer says what is deleted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LowerMarks {
    pub(crate) format: LayerFormat,
    /// `.wh.NAME` and `.wh..wh..opq` are marks, whatever the format.
    pub(crate) dot_wh: bool,
}

impl LowerMarks {
    /// As [`entry::find`].
    pub(crate) fn find(self, dir: &Dir, name: &Name) -> io::Result<Found> {
        if self.dot_wh && marks::decode_name(name) != DotWh::Plain {
            return Ok(Found::Nothing);
        }
        let mut found = entry::find(Some(self.format), dir, name)?;
        if let Found::Entry { stat, .. } = &found
            && self.is_xattr_whiteout(dir, name, stat)?
            && self.may_hold_xattr_whiteouts(dir)?
        {
            found = Found::Whiteout;
        }
        let beside = if self.dot_wh { marks::whiteout_name(name) } else { None };
        if let Some(mark) = beside
            && found != Found::Whiteout
            && dir.try_stat_at(&mark)?.is_some()
        {
            return Ok(match found {
                Found::Entry { stat, .. } => Found::Entry { stat, ends: true },
                Found::Nothing | Found::Whiteout => Found::Whiteout,
            });
        }
        Ok(found)
    }

    /// As [`marks::decode`].
    pub(crate) fn decode(self, name: &Name, stat: &Stat) -> Mark {
        match marks::decode(self.format, name, stat) {
            Mark::None if self.dot_wh => marks::decode(LayerFormat::Aufs, name, stat),
            mark => mark,
        }
    }

    /// As [`marks::may_be_mark`].
    pub(crate) fn may_be_mark(self, name: &Name, file_type: FileType) -> bool {
        marks::may_be_mark(self.format, name, file_type)
            || (self.dot_wh && marks::may_be_mark(LayerFormat::Aufs, name, file_type))
    }

    /// As [`marks::is_opaque`].
    pub(crate) fn is_opaque(self, dir: &Dir) -> io::Result<bool> {
        Ok(marks::is_opaque(self.format, dir)?
            || (self.dot_wh && marks::is_opaque(LayerFormat::Aufs, dir)?))
    }

    /// Whether an entry is a whiteout by its xattr, if its directory
    /// [may hold](Self::may_hold_xattr_whiteouts) any.
    pub(crate) fn is_xattr_whiteout(self, dir: &Dir, name: &Name, stat: &Stat) -> io::Result<bool> {
        match self.format.xattr_prefix() {
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
    pub(crate) fn may_hold_xattr_whiteouts(self, dir: &Dir) -> io::Result<bool> {
        match self.format.xattr_prefix() {
            Some(prefix) => {
                let key = format!("{prefix}opaque");
                Ok(xattr::get(Of::dir(dir), key.as_bytes())?.as_deref() == Some(b"x"))
            }
            None => Ok(false),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn layers_of_containers_storage_have_the_marks_of_both() {
        let tmp = tempfile::tempdir().unwrap();
        for file in [".wh.gone", "plain", "again", ".wh.again", ".wh..wh..opq", ".wh..wh.plnk"] {
            fs::write(tmp.path().join(file), "").unwrap();
        }
        let dir = Dir::open(tmp.path()).unwrap();
        let find = |dot_wh: bool, name: &str| {
            let marks = LowerMarks { format: LayerFormat::OverlayUser, dot_wh };
            match marks.find(&dir, &Name::new(name).unwrap()).unwrap() {
                Found::Nothing => "nothing",
                Found::Whiteout => "whiteout",
                Found::Entry { ends: false, .. } => "entry",
                Found::Entry { ends: true, .. } => "entry that ends",
            }
        };
        for (name, both, one) in [
            ("gone", "whiteout", "nothing"),
            ("plain", "entry", "entry"),
            ("again", "entry that ends", "entry"),
            ("other", "nothing", "nothing"),
            (".wh.gone", "nothing", "entry"),
            (".wh..wh..opq", "nothing", "entry"),
            (".wh..wh.plnk", "nothing", "entry"),
        ] {
            assert_eq!((find(true, name), find(false, name)), (both, one), "{name}");
        }
        let opaque = |dot_wh: bool| {
            LowerMarks { format: LayerFormat::OverlayUser, dot_wh }.is_opaque(&dir).unwrap()
        };
        assert!(opaque(true) && !opaque(false));
    }
}
