//! The formats in which a layer directory says what is deleted and what is opaque.
//!
//! A store has one format, and so has a branch; it is recorded, never sniffed per entry. Only that
//! format's marks are honoured: all others are plain names and xattrs, since on a trusted mount any
//! user may set `user.overlay.*` on a file of his own.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, ErrorKind, Result};

/// How a layer directory marks deletions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LayerFormat {
    /// Kernel overlayfs with `trusted.overlay.*`: needs CAP_SYS_ADMIN in the initial user namespace
    /// even to read. Whiteouts are character devices 0:0.
    OverlayTrusted,
    /// Kernel overlayfs with `user.overlay.*`, as mounted with `userxattr`: works without privilege.
    /// Whiteouts are character devices 0:0.
    OverlayUser,
    /// AUFS: `.wh.NAME` files and `.wh..wh..opq`. The kernel's overlayfs does not read it.
    Aufs,
}

impl LayerFormat {
    /// The prefix of the format's own xattrs; none for AUFS, which has files instead.
    pub(crate) fn xattr_prefix(self) -> Option<&'static str> {
        match self {
            LayerFormat::OverlayTrusted => Some("trusted.overlay."),
            LayerFormat::OverlayUser => Some("user.overlay."),
            LayerFormat::Aufs => None,
        }
    }

    /// The name by which stores record it and options spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            LayerFormat::OverlayTrusted => "overlay-trusted",
            LayerFormat::OverlayUser => "overlay-user",
            LayerFormat::Aufs => "aufs",
        }
    }
}

impl fmt::Display for LayerFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for LayerFormat {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        [LayerFormat::OverlayTrusted, LayerFormat::OverlayUser, LayerFormat::Aufs]
            .into_iter()
            .find(|format| format.as_str() == s)
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::InvalidArgument,
                    format!(
                        "{s:?} is not a layer format: use overlay-trusted, overlay-user or aufs"
                    ),
                )
            })
    }
}
