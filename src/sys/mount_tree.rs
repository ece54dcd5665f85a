//! Mounts that are made up before they are attached, and the places for them in a container's root.
//!
//! Places are opened without the links of /proc that lead anywhere (`/proc/self/fd/N`, `/proc/PID/root`):
//! a process that still has descriptors of another root is not led there.
//!
//! Sources: open_tree(2), mount_setattr(2), openat2(2).

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags};
use rustix::mount::{MountAttrFlags, OpenTreeFlags, UnmountFlags};

use super::mount::{Attributes, FsContext};

/// A mount of `path` and of all that is mounted below it, attached nowhere yet.
pub(crate) fn clone(path: &Path) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    Ok(rustix::mount::open_tree(CWD, path, flags)?)
}

/// As [`clone`], of a mount or file that is open.
pub(crate) fn clone_open(root: impl AsFd) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::AT_EMPTY_PATH;
    Ok(rustix::mount::open_tree(root, "", flags)?)
}

/// A new file system of a kind, attached nowhere yet. Each option is `key` or `key=value`.
pub(crate) fn new(kind: &str, options: &[&str], attributes: Attributes) -> io::Result<OwnedFd> {
    let context = FsContext::open(kind)?;
    context.set_string("source", kind)?;
    for option in options {
        match option.split_once('=') {
            Some((key, value)) => context.set_string(key, value)?,
            None => context.set_flag(option)?,
        }
    }
    context.create()?;
    context.mount(attributes)
}

/// Adds attributes to a mount and to all below it. Linux 5.12.
pub(crate) fn restrict(mount: impl AsFd, attributes: Attributes) -> io::Result<()> {
    set(mount, flags_of(attributes), 0, libc::AT_RECURSIVE)
}

/// Makes a mount read-only, or writable again; not what is below it.
pub(crate) fn set_read_only(mount: impl AsFd, read_only: bool) -> io::Result<()> {
    let flag = u64::from(MountAttrFlags::MOUNT_ATTR_RDONLY.bits());
    let (add, take) = if read_only { (flag, 0) } else { (0, flag) };
    set(mount, add, take, 0)
}

fn flags_of(attributes: Attributes) -> u64 {
    let mut flags = MountAttrFlags::empty();
    flags.set(MountAttrFlags::MOUNT_ATTR_RDONLY, attributes.read_only);
    flags.set(MountAttrFlags::MOUNT_ATTR_NOSUID, attributes.nosuid);
    flags.set(MountAttrFlags::MOUNT_ATTR_NODEV, attributes.nodev);
    flags.set(MountAttrFlags::MOUNT_ATTR_NOEXEC, attributes.noexec);
    flags.bits().into()
}

fn set(mount: impl AsFd, add: u64, take: u64, how: i32) -> io::Result<()> {
    /// The kernel's `struct mount_attr`, first version.
    #[repr(C)]
    struct MountAttr {
        set: u64,
        clear: u64,
        propagation: u64,
        user_namespace: u64,
    }
    let attr = MountAttr { set: add, clear: take, propagation: 0, user_namespace: 0 };
    // SAFETY: the path is a NUL-terminated constant; `attr` is a live `struct mount_attr` of the size given,
    // which the kernel only reads.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | how,
            std::ptr::from_ref(&attr),
            size_of::<MountAttr>(),
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether a symbolic link at the end of a path leads on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LastLink {
    Followed,
    Kept,
}

/// Opens what is at a path as a bare path: see the module's head.
pub(crate) fn open(path: &Path, last: LastLink) -> io::Result<OwnedFd> {
    let mut flags = OFlags::PATH | OFlags::CLOEXEC;
    flags.set(OFlags::NOFOLLOW, last == LastLink::Kept);
    Ok(rustix::fs::openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS)?)
}

pub(crate) fn make_dir(parent: impl AsFd, name: &OsStr, mode: u32) -> io::Result<()> {
    Ok(rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(mode))?)
}

/// An empty file, which must not be there yet.
pub(crate) fn make_file(parent: impl AsFd, name: &OsStr) -> io::Result<()> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(0o644)).map(drop)?)
}

pub(crate) fn make_link(parent: impl AsFd, name: &str, target: &str) -> io::Result<()> {
    Ok(rustix::fs::symlinkat(target, parent, name)?)
}

/// Removes an empty directory, or a file.
pub(crate) fn remove(parent: impl AsFd, name: &OsStr, is_dir: bool) -> io::Result<()> {
    let flags = if is_dir { AtFlags::REMOVEDIR } else { AtFlags::empty() };
    Ok(rustix::fs::unlinkat(parent, name, flags)?)
}

/// Takes the topmost mount on `path` away, and all below it, though they are in use.
pub(crate) fn detach(path: &Path) -> io::Result<()> {
    Ok(rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?)
}
