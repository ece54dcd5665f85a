//! The tar entry codec: header blocks, PAX records and sparse maps, over any `Read` and `Write`.
//!
//! It is our own because it has to be strict. Tar grew five dialects that say the same thing in
//! different places, and a lenient reader picks one where another reader picks the other: then a
//! scanner sees one list of files and the unpacker another (RUSTSEC-2021-0080, RUSTSEC-2025-0111
//! "TARmageddon", RUSTSEC-2026-0068, RUSTSEC-2026-0112). So whatever two readers in use may read
//! differently is refused here, with the entry's name, and never guessed. Each rule stands where it
//! is enforced: numbers and magic in [`header`], records in [`pax`], maps of holes in [`sparse`],
//! and how they combine in [`reader`].
//!
//! Invariants:
//! - A path that leaves the layer cannot come out: paths and hard links are [`RelPath`]s.
//! - Memory is bounded by [`EntryLimits`], whatever the sizes that headers claim.
//! - What [`EntryWriter`] writes, [`EntryReader`] reads back as the same [`Entry`].
//! - The same entries give the same bytes: no clock, no process id, no user database.
//!
//! Sources: POSIX.1-2024 `pax` ("ustar Interchange Format", "pax Interchange Format"), the GNU tar
//! manual ("Basic Tar Format", "Storing Sparse Files"), libarchive's tar(5), and the behaviour of
//! Go's archive/tar, GNU tar 1.34, libarchive and Python's tarfile.

mod header;
mod listing;
mod pax;
mod reader;
mod sparse;
mod writer;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use crate::error::{Error, ErrorKind, Result};
use crate::path::RelPath;

#[doc(hidden)]
pub use listing::{ListedEntry, list_archive};
pub(crate) use reader::EntryReader;
pub(crate) use writer::{EntryWriter, Sink};

/// One file, directory or other object, as an archive describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Normalised: no leading, doubled or trailing slash and no `.` components.
    pub(crate) path: RelPath,
    pub(crate) kind: EntryKind,
    /// The low twelve bits: permissions, set-id and sticky.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Timestamp,
    /// From PAX only: the GNU header's own field is written by incremental dumps alone.
    pub(crate) atime: Option<Timestamp>,
    /// Full names (`user.x`), raw values.
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Access control lists in the text form of `SCHILY.acl.access` and `SCHILY.acl.default`, not
    /// interpreted: they may hold names, which only the image's own user database could resolve.
    pub(crate) acl_access: Option<Vec<u8>>,
    pub(crate) acl_default: Option<Vec<u8>>,
}

/// What an entry is, with what only that kind has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum EntryKind {
    /// `size` is that of the whole file. With `sparse`, the content is only the extents' bytes, one
    /// after the other, and all else is holes.
    File {
        size: u64,
        sparse: Option<Vec<Extent>>,
    },
    HardLink {
        target: RelPath,
    },
    /// 1 to 4095 bytes without NUL, otherwise as they came.
    Symlink {
        target: Vec<u8>,
    },
    Directory,
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Fifo,
}

/// A point in time: `secs` since 1970 (negative before), and `nanos` (0 to 999,999,999) after that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Timestamp {
    pub(crate) secs: i64,
    pub(crate) nanos: u32,
}

/// A stretch of data in a file with holes; in a list they ascend, never overlap, are not empty, and
/// end within the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

/// What an archive may make the reader hold, or do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EntryLimits {
    /// The longest path or link target, in bytes. Default 4096, `PATH_MAX`.
    pub(crate) max_path: usize,
    /// The most bytes of extended header (PAX records, sparse map) of one entry. Default 1 MiB: room
    /// for a few xattrs of the kernel's maximum, 64 KiB.
    pub(crate) max_pax_bytes: u64,
    /// The most headers in one archive, global ones included. Default 10 million.
    pub(crate) max_entries: u64,
}

impl Default for EntryLimits {
    fn default() -> Self {
        EntryLimits { max_path: 4096, max_pax_bytes: 1 << 20, max_entries: 10_000_000 }
    }
}

/// The largest device numbers that the kernel's `dev_t` holds: 12 and 20 bits.
const MAX_MAJOR: u32 = 0xfff;
const MAX_MINOR: u32 = 0xf_ffff;
/// The longest symbolic link target that the kernel stores.
const MAX_SYMLINK: usize = 4095;
/// The longest xattr name that the kernel stores (`XATTR_NAME_MAX`).
const MAX_XATTR_NAME: usize = 255;

/// Why a header or a record is refused; the reader adds the entry's name.
type Reason = Cow<'static, str>;
type Parsed<T> = std::result::Result<T, Reason>;

impl Entry {
    /// The bytes of content that follow the entry's headers.
    pub(crate) fn stored_size(&self) -> u64 {
        match &self.kind {
            EntryKind::File { sparse: Some(extents), .. } => {
                extents.iter().fold(0, |sum, e| sum.saturating_add(e.len))
            }
            EntryKind::File { size, sparse: None } => *size,
            _ => 0,
        }
    }

    /// Whether it has xattrs or access control lists.
    pub(crate) fn has_xattrs(&self) -> bool {
        !self.xattrs.is_empty() || self.acl_access.is_some() || self.acl_default.is_some()
    }

    /// Whether it has access control lists, in whichever form.
    pub(crate) fn has_acls(&self) -> bool {
        self.acl_access.is_some()
            || self.acl_default.is_some()
            || self.xattrs.keys().any(|key| key.starts_with(b"system.posix_acl_"))
    }

    /// What must hold of an entry read and of one to be written alike.
    fn check(&self) -> Parsed<()> {
        match &self.kind {
            EntryKind::Directory => {}
            _ if self.path.is_root() => {
                return Err("the layer's root can only be a directory".into());
            }
            EntryKind::HardLink { target } if target.is_root() => {
                return Err("it is a hard link to the layer's root".into());
            }
            EntryKind::Symlink { target } => {
                if target.is_empty() || target.len() > MAX_SYMLINK || target.contains(&0) {
                    return Err(
                        "its link target is empty, longer than 4095 bytes, or has a NUL byte"
                            .into(),
                    );
                }
            }
            EntryKind::CharDevice { major, minor } | EntryKind::BlockDevice { major, minor } => {
                if *major > MAX_MAJOR || *minor > MAX_MINOR {
                    return Err(format!(
                        "its device number {major}:{minor} is beyond {MAX_MAJOR}:{MAX_MINOR}"
                    )
                    .into());
                }
            }
            EntryKind::File { size, .. } if *size > MAX_FILE => {
                return Err("its size is beyond that of any file".into());
            }
            EntryKind::File { .. } | EntryKind::HardLink { .. } | EntryKind::Fifo => {}
        }
        // chown takes -1 for "leave as it is", so it is nobody's id.
        if self.uid == u32::MAX || self.gid == u32::MAX {
            return Err("its owner or group is 4294967295, which stands for no id".into());
        }
        if self.mtime.nanos > 999_999_999 || self.atime.is_some_and(|t| t.nanos > 999_999_999) {
            return Err("its time has more than 999999999 nanoseconds".into());
        }
        for name in self.xattrs.keys() {
            if name.is_empty() || name.len() > MAX_XATTR_NAME || name.contains(&0) {
                return Err(
                    format!("{:?} is not the name of an xattr", OsStr::from_bytes(name)).into()
                );
            }
        }
        Ok(())
    }
}

/// The largest size of a file: offsets are signed, and a block of padding is room for sums.
const MAX_FILE: u64 = i64::MAX as u64 - 512;

/// The error for an entry that is refused.
fn refused(path: impl AsRef<OsStr>, reason: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidArchive, "refused the archive entry")
        .with_path(path.as_ref())
        .with_source(reason.into())
}

/// The error for a path or link target over [`EntryLimits::max_path`].
fn over_path_limit(len: usize, max: usize) -> Error {
    let message = format!("a name of {len} bytes in the archive is over the limit of {max}");
    Error::new(ErrorKind::LimitExceeded, message)
}

/// Brings a name from an archive into the one form that paths have in the library.
fn normalise(raw: &[u8], max: usize) -> Result<RelPath> {
    if raw.len() > max {
        return Err(over_path_limit(raw.len(), max));
    }
    let mut path = Vec::with_capacity(raw.len());
    for component in raw.split(|b| *b == b'/') {
        if !component.is_empty() && component != b"." {
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(component);
        }
    }
    if raw.is_empty() {
        return Err(refused("", "it has an empty name"));
    }
    RelPath::new(OsStr::from_bytes(&path)).map_err(|e| {
        Error::new(ErrorKind::InvalidArchive, "refused the archive entry")
            .with_path(OsStr::from_bytes(raw))
            .with_source(e)
    })
}

#[cfg(test)]
mod round_trip;
#[cfg(test)]
mod smuggle_tests;
#[cfg(test)]
mod tests;
