//! Marks: how a layer says "deleted" (whiteout), "nothing from below" (opaque), and where a directory
//! came from (redirect).
//!
//! Decoding is pure, over bytes and attributes; the few functions that read or write a mark take a
//! directory descriptor. Only the marks of the given [`LayerFormat`] are known to it.
//!
//! Sources: OCI image specification `layer.md` (whiteouts); the kernel's
//! `Documentation/filesystems/overlayfs.rst`; aufs(5).

use std::io;
use std::os::fd::AsFd as _;

use super::LayerFormat;
use crate::path::{Name, RelPath};
use crate::sys::dir::{Dir, Node};
use crate::sys::errno;
use crate::sys::stat::{FileType, Stat};
use crate::sys::xattr::{self, Of};

/// The prefix of AUFS and OCI whiteouts.
pub(crate) const WHITEOUT_PREFIX: &[u8] = b".wh.";
/// The name that makes its directory opaque, in AUFS and OCI.
pub(crate) const OPAQUE_NAME: &[u8] = b".wh..wh..opq";

/// What a name means in AUFS layers and in layer archives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum DotWh {
    /// No mark.
    Plain,
    /// `.wh.NAME`: the name is deleted.
    Whiteout(Name),
    /// `.wh..wh..opq`: the directory hides what lies below.
    Opaque,
    /// `.wh..wh.*`: AUFS's own files (`aufs`, `plnk`, `orph`).
    Internal,
    /// `.wh.`, `.wh..`, `.wh...`: would name a directory itself or the one above.
    Malformed,
}

/// Reads a name as AUFS and OCI do.
pub(crate) fn decode_name(name: &Name) -> DotWh {
    let bytes = name.as_bytes();
    let Some(rest) = bytes.strip_prefix(WHITEOUT_PREFIX) else {
        return DotWh::Plain;
    };
    if bytes == OPAQUE_NAME {
        return DotWh::Opaque;
    }
    if rest.starts_with(WHITEOUT_PREFIX) {
        return DotWh::Internal;
    }
    Name::new(rest).map_or(DotWh::Malformed, DotWh::Whiteout)
}

/// The name of the whiteout of `name`; none if that is over 255 bytes, or would itself read as
/// another mark.
pub(crate) fn whiteout_name(name: &Name) -> Option<Name> {
    if name.as_bytes().starts_with(WHITEOUT_PREFIX) {
        return None;
    }
    Name::new([WHITEOUT_PREFIX, name.as_bytes()].concat()).ok()
}

/// What an entry of a layer directory is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    /// An ordinary entry.
    None,
    /// It deletes the name, which in AUFS is not the entry's own.
    Whiteout(Name),
    /// It makes its directory opaque (AUFS).
    Opaque,
    /// It belongs to the format and is never shown.
    Internal,
}

/// What the entry `name` with these attributes is in a layer of `format`.
pub(crate) fn decode(format: LayerFormat, name: &Name, stat: &Stat) -> Mark {
    match format {
        LayerFormat::OverlayTrusted | LayerFormat::OverlayUser => {
            if is_zero_device(stat) {
                Mark::Whiteout(name.clone())
            } else {
                Mark::None
            }
        }
        LayerFormat::Aufs => match decode_name(name) {
            DotWh::Plain => Mark::None,
            DotWh::Whiteout(of) => Mark::Whiteout(of),
            DotWh::Opaque => Mark::Opaque,
            DotWh::Internal | DotWh::Malformed => Mark::Internal,
        },
    }
}

/// Whether it is the character device 0:0, overlayfs's whiteout.
pub(crate) fn is_zero_device(stat: &Stat) -> bool {
    stat.file_type == FileType::CharDevice && stat.rdev == (0, 0)
}

/// Whether a listing's type leaves open that an entry is a mark, so that it must be looked at.
pub(crate) fn may_be_mark(format: LayerFormat, name: &Name, file_type: FileType) -> bool {
    match format {
        LayerFormat::OverlayTrusted | LayerFormat::OverlayUser => {
            matches!(file_type, FileType::CharDevice | FileType::Unknown)
        }
        LayerFormat::Aufs => name.as_bytes().starts_with(WHITEOUT_PREFIX),
    }
}

/// The names that would delete `name`, if they are in the directory: what a lookup must try beside
/// the name itself. In overlay formats that is the name itself, so none.
pub(crate) fn separate_whiteout(format: LayerFormat, name: &Name) -> Option<Name> {
    match format {
        LayerFormat::OverlayTrusted | LayerFormat::OverlayUser => None,
        LayerFormat::Aufs => whiteout_name(name),
    }
}

/// Whether a directory hides what lies below it.
pub(crate) fn is_opaque(format: LayerFormat, dir: &Dir) -> io::Result<bool> {
    match xattr_key(format, "opaque") {
        Some(key) => Ok(xattr::get(Of::dir(dir), key.as_bytes())?.as_deref() == Some(b"y")),
        None => {
            let name = opaque_name()?;
            Ok(dir.try_stat_at(&name)?.is_some_and(|s| s.is_file()))
        }
    }
}

/// Makes a directory opaque.
pub(crate) fn make_opaque(format: LayerFormat, dir: &Dir) -> io::Result<()> {
    match xattr_key(format, "opaque") {
        Some(key) => xattr::set(Of::dir(dir), key.as_bytes(), b"y"),
        None => make_file(dir, &opaque_name()?),
    }
}

/// Marks `name` deleted in `dir`, where no entry of that name may be.
pub(crate) fn make_whiteout(format: LayerFormat, dir: &Dir, name: &Name) -> io::Result<()> {
    match format {
        LayerFormat::OverlayTrusted | LayerFormat::OverlayUser => {
            dir.make_node(name, Node::Char { major: 0, minor: 0 }, 0)
        }
        LayerFormat::Aufs => {
            let mark = whiteout_name(name).ok_or_else(errno::name_too_long)?;
            make_file(dir, &mark)
        }
    }
}

/// Makes a mark that is a file, unless it is there. Its mode is the same whatever the umask is, which may be that of
/// somebody who asked this thread for something before.
fn make_file(dir: &Dir, mark: &Name) -> io::Result<()> {
    const MODE: u32 = 0o444;
    let file = match dir.create_file(mark, MODE) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        made => made?,
    };
    let place = dir.place(Of::Fd(file.as_fd()));
    let given = place.stat().and_then(|stat| match stat.mode {
        MODE => Ok(()),
        _ => place.chmod(MODE),
    });
    // What failed is not to have happened.
    given.inspect_err(|_| {
        if let Err(e) = dir.unlink(mark) {
            tracing::warn!(?mark, error = %e, "cannot remove a mark that could not be completed");
        }
    })
}

fn opaque_name() -> io::Result<Name> {
    Name::new(OPAQUE_NAME).map_err(io::Error::other)
}

fn xattr_key(format: LayerFormat, suffix: &str) -> Option<String> {
    format.xattr_prefix().map(|prefix| format!("{prefix}{suffix}"))
}

/// Where a directory's contents in lower layers are to be found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Redirect {
    /// Under another name in the same directory.
    Sibling(Name),
    /// At a path from the layer's root.
    Path(RelPath),
}

/// Reads the value of a redirect xattr; none if it is malformed, which the kernel answers with EIO.
pub(crate) fn decode_redirect(value: &[u8]) -> Option<Redirect> {
    use std::os::unix::ffi::OsStrExt;
    match value.strip_prefix(b"/") {
        Some(path) => {
            let path = RelPath::new(std::ffi::OsStr::from_bytes(path)).ok()?;
            (!path.is_root()).then_some(Redirect::Path(path))
        }
        None => Name::new(value).ok().map(Redirect::Sibling),
    }
}

/// The redirect of a directory, if it has one.
///
/// # Errors
/// EIO for a malformed one.
pub(crate) fn redirect(format: LayerFormat, dir: &Dir) -> io::Result<Option<Redirect>> {
    let Some(key) = xattr_key(format, "redirect") else {
        return Ok(None);
    };
    match xattr::get(Of::dir(dir), key.as_bytes())? {
        None => Ok(None),
        Some(value) => match decode_redirect(&value) {
            Some(redirect) => Ok(Some(redirect)),
            None => Err(errno::eio()),
        },
    }
}

/// Whether an entry's data or place is still in a lower layer: it has a `redirect` or `metacopy`
/// mark, so that its layer is not settled.
pub(crate) fn refers_below(format: LayerFormat, of: Of<'_>) -> io::Result<bool> {
    let Some(prefix) = format.xattr_prefix() else {
        return Ok(false);
    };
    Ok(xattr::list(of)?.iter().any(|key| {
        key.strip_prefix(prefix.as_bytes()).is_some_and(|s| s == b"redirect" || s == b"metacopy")
    }))
}

/// Whether a file's data are in a lower layer, as overlayfs leaves it under `metacopy`.
#[cfg(feature = "fuse")]
pub(crate) fn has_data_below(format: LayerFormat, of: Of<'_>) -> io::Result<bool> {
    match xattr_key(format, "metacopy") {
        Some(key) => Ok(xattr::get(of, key.as_bytes())?.is_some()),
        None => Ok(false),
    }
}

/// Whether an xattr belongs to a union file system, of whatever format or implementation: such are
/// never taken from an archive nor put into one.
pub(crate) fn is_union_xattr(key: &[u8]) -> bool {
    const PREFIXES: [&[u8]; 5] = [
        b"trusted.overlay.",
        b"user.overlay.",
        b"user.fuseoverlayfs.",
        b"security.fuseoverlayfs.",
        b"user.containers.override_",
    ];
    PREFIXES.iter().any(|prefix| key.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::owners::Owners;

    fn name(s: &str) -> Name {
        Name::new(s).unwrap()
    }

    #[test]
    fn names_of_marks() {
        for (text, mark) in [
            ("a", DotWh::Plain),
            (".wh", DotWh::Plain),
            ("a.wh.b", DotWh::Plain),
            (".wh.a", DotWh::Whiteout(name("a"))),
            (".wh..a", DotWh::Whiteout(name(".a"))),
            (".wh....", DotWh::Whiteout(name("..."))),
            (".wh..wh..opq", DotWh::Opaque),
            (".wh..wh.plnk", DotWh::Internal),
            (".wh..wh.aufs", DotWh::Internal),
            (".wh..wh.", DotWh::Internal),
            (".wh.", DotWh::Malformed),
            (".wh..", DotWh::Malformed),
            (".wh...", DotWh::Malformed),
        ] {
            assert_eq!(decode_name(&name(text)), mark, "{text}");
        }
    }

    #[test]
    fn a_whiteout_has_no_whiteout_and_fits_a_name() {
        assert_eq!(whiteout_name(&name("a")), Some(name(".wh.a")));
        assert_eq!(whiteout_name(&name(".wh.a")), None);
        assert!(whiteout_name(&name(&"n".repeat(251))).is_some());
        assert_eq!(whiteout_name(&name(&"n".repeat(252))), None);
    }

    #[test]
    fn redirects_are_names_or_absolute_paths() {
        let path = |p: &str| Some(Redirect::Path(RelPath::new(p).unwrap()));
        assert_eq!(decode_redirect(b"old"), Some(Redirect::Sibling(name("old"))));
        assert_eq!(decode_redirect(b"/a/b"), path("a/b"));
        for bad in [&b""[..], b"/", b"a/b", b"..", b"/a/../b", b"/a//b"] {
            assert_eq!(decode_redirect(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn marks_written_are_read_back_in_each_format() {
        let tmp = tempfile::tempdir_in("/var/tmp").unwrap();
        let dir = Dir::open(tmp.path()).unwrap();
        for format in [LayerFormat::OverlayUser, LayerFormat::Aufs] {
            let sub = name(format.as_str());
            dir.make_dir(&sub, 0o700).unwrap();
            let sub = dir.open_dir(&sub).unwrap();
            assert!(!is_opaque(format, &sub).unwrap());
            make_opaque(format, &sub).unwrap();
            make_opaque(format, &sub).unwrap();
            assert!(is_opaque(format, &sub).unwrap());
            make_whiteout(format, &sub, &name("gone")).unwrap();
            let marks: Vec<Mark> = sub
                .entries()
                .unwrap()
                .iter()
                .map(|e| decode(format, &e.name, &sub.stat_at(&e.name).unwrap()))
                .collect();
            assert!(marks.contains(&Mark::Whiteout(name("gone"))), "{marks:?}");
            assert!(!marks.contains(&Mark::None), "{marks:?}");
        }
    }

    #[test]
    fn marks_that_are_files_have_one_mode_whatever_the_umask_is() {
        use crate::sys::umask;
        let tmp = tempfile::tempdir_in("/var/tmp").unwrap();
        for owners in [Owners::OfFiles, Owners::InXattrs] {
            for mask in [0, 0o022, 0o027, 0o777] {
                umask::set_on_this_thread(0o022).unwrap();
                let path = tmp.path().join(format!("{owners:?}-{mask:o}"));
                std::fs::create_dir(&path).unwrap();
                let dir = Dir::open_with(&path, owners).unwrap();
                umask::set_on_this_thread(mask).unwrap();
                make_opaque(LayerFormat::Aufs, &dir).unwrap();
                make_whiteout(LayerFormat::Aufs, &dir, &name("gone")).unwrap();
                for mark in [".wh..wh..opq", ".wh.gone"] {
                    let mode = dir.stat_at(&name(mark)).unwrap().mode;
                    assert_eq!(mode, 0o444, "{mark}, {owners:?}, {mask:o}");
                }
            }
        }
    }

    #[test]
    fn another_formats_marks_are_plain() {
        let tmp = tempfile::tempdir_in("/var/tmp").unwrap();
        let dir = Dir::open(tmp.path()).unwrap();
        make_opaque(LayerFormat::OverlayUser, &dir).unwrap();
        make_whiteout(LayerFormat::Aufs, &dir, &name("x")).unwrap();
        let mark = name(".wh.x");
        let stat = dir.stat_at(&mark).unwrap();
        assert!(!is_opaque(LayerFormat::OverlayTrusted, &dir).unwrap());
        assert_eq!(decode(LayerFormat::OverlayTrusted, &mark, &stat), Mark::None);
        assert!(!is_opaque(LayerFormat::Aufs, &dir).unwrap());
    }
}
