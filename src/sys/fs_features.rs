//! What a file system can do that an upper directory of overlayfs needs, found by doing it.
//!
//! Source: the kernel's `Documentation/filesystems/overlayfs.rst`, section "Upper and lower", and
//! `ovl_make_workdir` of `fs/overlayfs/super.c`.

use std::ffi::OsStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, RawDir, RenameFlags, XattrFlags};

/// The name by which error texts call the file system that a descriptor is on, from the magic
/// numbers of statfs(2).
pub(crate) fn file_system_name(fd: impl AsFd) -> io::Result<String> {
    let magic = rustix::fs::fstatfs(fd)?.f_type;
    let magic = u64::try_from(magic).unwrap_or_default() & 0xFFFF_FFFF;
    Ok(match magic {
        0xEF53 => "ext4".to_owned(),
        0x5846_5342 => "xfs".to_owned(),
        0x9123_683E => "btrfs".to_owned(),
        0x0102_1994 => "tmpfs".to_owned(),
        0x794C_7630 => "overlay".to_owned(),
        0x6573_5546 => "fuse".to_owned(),
        0x6969 => "nfs".to_owned(),
        0xFF53_4D42 => "cifs".to_owned(),
        0xFE53_4D42 => "smb2".to_owned(),
        0x0102_1997 => "9p".to_owned(),
        0x4D44 => "vfat".to_owned(),
        0x2011_BAB0 => "exfat".to_owned(),
        0x2FC1_2FC1 => "zfs".to_owned(),
        0xF2F5_2010 => "f2fs".to_owned(),
        0xCA45_1A4E => "bcachefs".to_owned(),
        0xF15F => "ecryptfs".to_owned(),
        0x7371_7368 => "squashfs".to_owned(),
        0xE0F5_E1E2 => "erofs".to_owned(),
        other => format!("of magic number {other:#x}"),
    })
}

/// Whether changes of names reach the disk in the order in which they were made. Those of Btrfs need not: it
/// writes each file that is synced to a log of its own, with the names that it has or has lost.
pub(crate) fn keeps_order(fd: impl AsFd) -> io::Result<bool> {
    Ok(file_system_name(fd)? != "btrfs")
}

/// Whether overlayfs is known to take a file system of this name for its upper directory.
pub(crate) fn known_as_upper(name: &str) -> bool {
    const KNOWN: [&str; 7] = ["ext4", "xfs", "btrfs", "tmpfs", "f2fs", "bcachefs", "zfs"];
    KNOWN.contains(&name)
}

/// Whether listings tell the type of a file. `dir` must be an open directory that has a
/// subdirectory.
pub(crate) fn listings_tell_types(dir: impl AsFd) -> io::Result<bool> {
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut entries = RawDir::new(dir, &mut buffer);
    while let Some(entry) = entries.next() {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            return Ok(entry.file_type() != FileType::Unknown);
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

/// Sets an xattr on a directory.
pub(crate) fn set_xattr(dir: impl AsFd, key: &str) -> io::Result<()> {
    Ok(rustix::fs::fsetxattr(dir, key, b"y", XattrFlags::empty())?)
}

/// Makes a file without a name.
pub(crate) fn make_unnamed_file(dir: impl AsFd) -> io::Result<OwnedFd> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(dir, ".", flags, Mode::RUSR | Mode::WUSR)?)
}

/// Makes a whiteout: the character device 0:0.
pub(crate) fn make_whiteout(dir: impl AsFd, name: &OsStr) -> io::Result<()> {
    let mode = Mode::empty();
    Ok(rustix::fs::mknodat(dir, name, FileType::CharacterDevice, mode, 0)?)
}

/// Renames a file and leaves a whiteout in its place.
pub(crate) fn rename_leaving_whiteout(dir: impl AsFd, old: &OsStr, new: &OsStr) -> io::Result<()> {
    let flags = RenameFlags::WHITEOUT;
    Ok(rustix::fs::renameat_with(&dir, old, &dir, new, flags)?)
}
