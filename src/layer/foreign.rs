//! What marks mean in layer directories that other union file systems wrote. Read only; pure, over
//! names, keys and values.
//!
//! Only the marks of the stated format are understood. What another format would take for a mark is
//! [`Key::OtherUnion`] or [`NameMark::OtherUnion`], and what nobody is known to write is `Unknown`:
//! the caller must not guess, for a mark that is passed over shows what was deleted.
//!
//! Sources: the kernel's `Documentation/filesystems/overlayfs.rst`, sections "Whiteouts and opaque
//! directories", "redirect_dir", "Metadata only copy up", "fs-verity support", "Nesting overlayfs
//! mounts", and `fs/overlayfs/overlayfs.h`; fuse-overlayfs(1); aufs(5) and its `design/06xattr.txt`.

use std::fmt;
use std::str::FromStr;

use super::LayerFormat;
use super::marks::{self, DotWh};
use crate::error::{Error, ErrorKind};
use crate::path::Name;
use crate::sys::override_stat;
use crate::sys::stat::FileType;

/// Which program wrote a foreign layer directory, and so how it says what is deleted.
///
/// It is stated, not guessed: the same entry means different things in different formats (`.wh.x` is
/// a file like any other to the kernel, and `user.overlay.opaque` is, unless it was mounted with
/// `userxattr`, what any user may set on a directory of his own).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ForeignFormat {
    /// The kernel's overlayfs: character devices 0:0, `trusted.overlay.*`. What Docker's `overlay2`,
    /// containers/storage's `overlay` and containerd's `overlayfs` write as root.
    Overlay,
    /// The kernel's overlayfs mounted with `userxattr`, as rootless: `user.overlay.*`.
    OverlayUser,
    /// fuse-overlayfs: character devices 0:0 or `.wh.NAME`, `.wh..wh..opq`, and `opaque` in three
    /// families of xattrs.
    FuseOverlayfs,
    /// AUFS: `.wh.NAME`, `.wh..wh..opq`, and hidden directories at the root.
    Aufs,
}

impl ForeignFormat {
    const ALL: [ForeignFormat; 4] = [
        ForeignFormat::Overlay,
        ForeignFormat::OverlayUser,
        ForeignFormat::FuseOverlayfs,
        ForeignFormat::Aufs,
    ];

    /// The name by which options spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            ForeignFormat::Overlay => "overlay",
            ForeignFormat::OverlayUser => "overlay-user",
            ForeignFormat::FuseOverlayfs => "fuse-overlayfs",
            ForeignFormat::Aufs => "aufs",
        }
    }

    /// The prefix of the marks of the kernel's overlayfs, if it is that.
    pub(crate) fn overlay_prefix(self) -> Option<&'static str> {
        match self {
            ForeignFormat::Overlay => LayerFormat::OverlayTrusted.xattr_prefix(),
            ForeignFormat::OverlayUser => LayerFormat::OverlayUser.xattr_prefix(),
            ForeignFormat::FuseOverlayfs | ForeignFormat::Aufs => None,
        }
    }

    /// Whether character devices 0:0 are whiteouts.
    fn has_device_whiteouts(self) -> bool {
        self != ForeignFormat::Aufs
    }

    /// Whether `.wh.NAME` is a whiteout.
    pub(crate) fn has_named_whiteouts(self) -> bool {
        matches!(self, ForeignFormat::FuseOverlayfs | ForeignFormat::Aufs)
    }
}

/// The foreign format that is read as a store's own layers are.
impl From<LayerFormat> for ForeignFormat {
    fn from(own: LayerFormat) -> Self {
        match own {
            LayerFormat::OverlayTrusted => ForeignFormat::Overlay,
            LayerFormat::OverlayUser => ForeignFormat::OverlayUser,
            LayerFormat::Aufs => ForeignFormat::Aufs,
        }
    }
}

impl fmt::Display for ForeignFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for ForeignFormat {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self, Error> {
        ForeignFormat::ALL.into_iter().find(|format| format.as_str() == s).ok_or_else(|| {
            let text = format!(
                "{s:?} is not the format of a foreign layer: use overlay, overlay-user, \
                 fuse-overlayfs or aufs"
            );
            Error::new(ErrorKind::InvalidArgument, text)
        })
    }
}

/// AUFS's directory of pseudo-links, at the root of a branch.
pub(crate) const PSEUDO_LINKS: &[u8] = b".wh..wh.plnk";

/// What the name and type of an entry say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NameMark {
    /// Nothing: it is what it is.
    Plain,
    /// It deletes a name; `own` if that is its own.
    Whiteout { of: Name, own: bool },
    /// It makes its directory opaque.
    Opaque,
    /// AUFS's directory of pseudo-links.
    PseudoLinks,
    /// A file of AUFS's own that says nothing of the layer.
    Internal,
    /// Another format's mark, if it is one.
    OtherUnion,
    /// It looks like a mark of this format, and is none that is known.
    Unknown,
}

/// What the entry `name` is: `device` is its number if it is a device, `size` its bytes.
pub(crate) fn decode_name(
    format: ForeignFormat,
    name: &Name,
    file_type: FileType,
    device: (u32, u32),
    size: u64,
    at_root: bool,
) -> NameMark {
    if file_type == FileType::CharDevice && device == (0, 0) {
        return if format.has_device_whiteouts() {
            NameMark::Whiteout { of: name.clone(), own: true }
        } else {
            NameMark::OtherUnion
        };
    }
    let mark = marks::decode_name(name);
    if mark == DotWh::Plain {
        return NameMark::Plain;
    }
    if !format.has_named_whiteouts() {
        return NameMark::OtherUnion;
    }
    let is_mark = file_type == FileType::Regular && size == 0;
    match mark {
        DotWh::Whiteout(of) if is_mark => NameMark::Whiteout { of, own: false },
        DotWh::Opaque if is_mark => NameMark::Opaque,
        DotWh::Internal if format == ForeignFormat::Aufs && at_root => match name.as_bytes() {
            PSEUDO_LINKS if file_type == FileType::Directory => NameMark::PseudoLinks,
            b".wh..wh.orph" if file_type == FileType::Directory => NameMark::Internal,
            b".wh..wh.aufs" if is_mark => NameMark::Internal,
            _ => NameMark::Unknown,
        },
        _ => NameMark::Unknown,
    }
}

/// What an xattr's key says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Key {
    /// Nothing: it belongs to the file.
    Plain,
    /// `opaque`: of a directory, by its value.
    Opaque,
    /// `redirect`: where its contents are in lower layers.
    Redirect,
    /// `metacopy`: its data is in a lower layer.
    Metacopy,
    /// `whiteout`: of an empty file, that its name is deleted.
    Whiteout,
    /// What the union file system notes for itself, and no tree shows.
    Note,
    /// A mark of a union inside the union: one `overlay.` too many.
    Escaped,
    /// What the file should be, by an unprivileged implementation.
    OverrideStat,
    /// Another union file system's.
    OtherUnion,
    /// What this machine's policy gives: labels, signatures of the inode, flags of the file system.
    Machine,
    /// In this format's family, and nothing that is known.
    Unknown,
}

/// What a key of a file in a layer of `format` says.
pub(crate) fn decode_key(format: ForeignFormat, key: &[u8]) -> Key {
    if override_stat::KEYS.contains(&key) {
        return Key::OverrideStat;
    }
    if let Some(prefix) = format.overlay_prefix()
        && let Some(rest) = key.strip_prefix(prefix.as_bytes())
    {
        return match rest {
            b"opaque" => Key::Opaque,
            b"redirect" => Key::Redirect,
            b"metacopy" => Key::Metacopy,
            b"whiteout" => Key::Whiteout,
            b"origin" | b"impure" | b"nlink" | b"upper" | b"uuid" | b"protattr" => Key::Note,
            _ if rest.starts_with(b"overlay.") => Key::Escaped,
            _ => Key::Unknown,
        };
    }
    if format == ForeignFormat::FuseOverlayfs {
        let families: [&[u8]; 3] = [b"trusted.overlay.", b"user.overlay.", b"user.fuseoverlayfs."];
        if let Some(rest) = families.iter().find_map(|family| key.strip_prefix(*family)) {
            return match rest {
                b"opaque" => Key::Opaque,
                b"origin" | b"impure" | b"nlink" | b"upper" | b"uuid" | b"protattr" => Key::Note,
                _ => Key::Unknown,
            };
        }
    }
    if marks::is_union_xattr(key) || key.starts_with(b"security.fuseoverlayfs.") {
        return Key::OtherUnion;
    }
    match key.split(|b| *b == b'.').next().unwrap_or_default() {
        b"user" | b"trusted" => Key::Plain,
        b"security" if key == b"security.capability" || key == b"security.ima" => Key::Plain,
        b"system" if key.starts_with(b"system.posix_acl_") => Key::Plain,
        _ => Key::Machine,
    }
}

/// The value of `opaque`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Opaque {
    /// The directory hides what lies below.
    Yes,
    /// It holds whiteouts that are files with an xattr, and hides nothing itself.
    HasXattrWhiteouts,
}

/// Reads the value of `opaque`; none if it is neither.
pub(crate) fn decode_opaque(format: ForeignFormat, value: &[u8]) -> Option<Opaque> {
    match value {
        b"y" => Some(Opaque::Yes),
        b"x" if format.overlay_prefix().is_some() => Some(Opaque::HasXattrWhiteouts),
        _ => None,
    }
}

/// The digest that a `metacopy` names for the data, as fs-verity computes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum VerityDigest {
    Sha256([u8; 32]),
    Sha512([u8; 64]),
}

/// Reads the value of `metacopy`: outer none if it is malformed, inner none if it names no digest.
pub(crate) fn decode_metacopy(value: &[u8]) -> Option<Option<VerityDigest>> {
    // Before Linux 6.6 it was empty. Since: version, length, flags, algorithm, digest.
    let Some((header, digest)) = value.split_first_chunk::<4>() else {
        return value.is_empty().then_some(None);
    };
    let [version, length, flags, algorithm] = *header;
    if version != 0 || usize::from(length) != value.len() || flags != 0 {
        return None;
    }
    // The numbers of FS_VERITY_HASH_ALG_*.
    match algorithm {
        0 => digest.is_empty().then_some(None),
        1 => Some(Some(VerityDigest::Sha256(digest.try_into().ok()?))),
        2 => Some(Some(VerityDigest::Sha512(digest.try_into().ok()?))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(s: &str) -> Name {
        Name::new(s).unwrap()
    }

    fn at(format: ForeignFormat, s: &str, file_type: FileType, size: u64, root: bool) -> NameMark {
        decode_name(format, &name(s), file_type, (0, 0), size, root)
    }

    #[test]
    fn devices_and_names_mean_what_their_format_says() {
        use ForeignFormat::{Aufs, FuseOverlayfs, Overlay, OverlayUser};
        let own = |of: &str| NameMark::Whiteout { of: name(of), own: true };
        let beside = |of: &str| NameMark::Whiteout { of: name(of), own: false };
        let (file, dir, device) = (FileType::Regular, FileType::Directory, FileType::CharDevice);
        for (format, text, file_type, size, root, mark) in [
            (Overlay, "x", device, 0, false, own("x")),
            (OverlayUser, "x", device, 0, false, own("x")),
            (FuseOverlayfs, "x", device, 0, false, own("x")),
            (Aufs, "x", device, 0, false, NameMark::OtherUnion),
            (Overlay, ".wh.x", file, 0, false, NameMark::OtherUnion),
            (Overlay, ".wh..wh..opq", file, 0, true, NameMark::OtherUnion),
            (FuseOverlayfs, ".wh.x", file, 0, false, beside("x")),
            (Aufs, ".wh.x", file, 0, false, beside("x")),
            (Aufs, ".wh.x", file, 1, false, NameMark::Unknown),
            (Aufs, ".wh.x", dir, 0, false, NameMark::Unknown),
            (Aufs, ".wh..", file, 0, false, NameMark::Unknown),
            (Aufs, ".wh..wh..opq", file, 0, false, NameMark::Opaque),
            (Aufs, ".wh..wh..opq", dir, 0, false, NameMark::Unknown),
            (FuseOverlayfs, ".wh..wh..opq", file, 0, false, NameMark::Opaque),
            (Aufs, ".wh..wh.plnk", dir, 0, true, NameMark::PseudoLinks),
            (Aufs, ".wh..wh.orph", dir, 0, true, NameMark::Internal),
            (Aufs, ".wh..wh.aufs", file, 0, true, NameMark::Internal),
            (Aufs, ".wh..wh.plnk", dir, 0, false, NameMark::Unknown),
            (Aufs, ".wh..wh.dr.1", file, 0, true, NameMark::Unknown),
            (FuseOverlayfs, ".wh..wh.plnk", dir, 0, true, NameMark::Unknown),
            (Aufs, "x", file, 0, true, NameMark::Plain),
        ] {
            assert_eq!(at(format, text, file_type, size, root), mark, "{format} {text}");
        }
        let zero = decode_name(Overlay, &name("x"), device, (1, 3), 0, false);
        assert_eq!(zero, NameMark::Plain);
    }

    #[test]
    fn keys_mean_what_their_format_says() {
        use ForeignFormat::{Aufs, FuseOverlayfs, Overlay, OverlayUser};
        for (format, key, meaning) in [
            (Overlay, "trusted.overlay.opaque", Key::Opaque),
            (Overlay, "trusted.overlay.redirect", Key::Redirect),
            (Overlay, "trusted.overlay.metacopy", Key::Metacopy),
            (Overlay, "trusted.overlay.whiteout", Key::Whiteout),
            (Overlay, "trusted.overlay.origin", Key::Note),
            (Overlay, "trusted.overlay.overlay.opaque", Key::Escaped),
            (Overlay, "trusted.overlay.news", Key::Unknown),
            (Overlay, "user.overlay.opaque", Key::OtherUnion),
            (OverlayUser, "user.overlay.opaque", Key::Opaque),
            (OverlayUser, "trusted.overlay.opaque", Key::OtherUnion),
            (FuseOverlayfs, "trusted.overlay.opaque", Key::Opaque),
            (FuseOverlayfs, "user.overlay.opaque", Key::Opaque),
            (FuseOverlayfs, "user.fuseoverlayfs.opaque", Key::Opaque),
            (FuseOverlayfs, "user.fuseoverlayfs.origin", Key::Note),
            (FuseOverlayfs, "user.overlay.redirect", Key::Unknown),
            (FuseOverlayfs, "user.containers.override_stat", Key::OverrideStat),
            (Overlay, "security.fuseoverlayfs.override_stat", Key::OverrideStat),
            (Aufs, "trusted.overlay.opaque", Key::OtherUnion),
            (Aufs, "user.mime", Key::Plain),
            (Aufs, "trusted.own", Key::Plain),
            (Aufs, "security.capability", Key::Plain),
            (Aufs, "security.selinux", Key::Machine),
            (Aufs, "system.posix_acl_default", Key::Plain),
            (Aufs, "btrfs.compression", Key::Machine),
        ] {
            assert_eq!(decode_key(format, key.as_bytes()), meaning, "{format} {key}");
        }
    }

    #[test]
    fn metacopy_values() {
        assert_eq!(decode_metacopy(b""), Some(None));
        assert_eq!(decode_metacopy(&[0, 4, 0, 0]), Some(None));
        let sha256 = [&[0, 36, 0, 1][..], &[7; 32]].concat();
        assert_eq!(decode_metacopy(&sha256), Some(Some(VerityDigest::Sha256([7; 32]))));
        let sha512 = [&[0, 68, 0, 2][..], &[7; 64]].concat();
        assert_eq!(decode_metacopy(&sha512), Some(Some(VerityDigest::Sha512([7; 64]))));
        for bad in
            [&[0][..], &[1, 4, 0, 0], &[0, 5, 0, 0], &[0, 4, 1, 0], &[0, 4, 0, 1], &[0, 5, 0, 9, 1]]
        {
            assert_eq!(decode_metacopy(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn formats_read_back() {
        for format in ForeignFormat::ALL {
            assert_eq!(format.as_str().parse::<ForeignFormat>().unwrap(), format);
        }
        assert!("auto".parse::<ForeignFormat>().is_err());
    }
}
