//! Mounting: the fsopen family, mount attributes, mount(2) from a throw-away thread, unmounting.
//!
//! What is mounted on, from and where is named by descriptors, so that nothing is resolved twice and
//! paths may have any length and any bytes. Descriptors are handed to calls that want text as
//! `/proc/thread-self/fd/N`; /proc must be mounted. The caller's own working directory, umask and
//! namespaces are never touched: mount(2) with many layers needs another working directory, and
//! runs in a thread that has one of its own.
//!
//! Sources: mount(2), umount2(2), mount_setattr(2), the kernel's `fs/fsopen.c` and `fs/namespace.c`.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags,
};
use rustix::thread::UnshareFlags;

/// The kernel takes paths of up to 4095 bytes; longer ones are opened in pieces of at most this.
const PIECE: usize = 4000;

/// Why a mounting call failed, as far as callers tell the reasons apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// ENOSYS: the kernel lacks the call, or a filter hides it.
    NoSuchCall,
    /// ENODEV: the kernel lacks the file system.
    NoSuchFileSystem,
    /// EPERM or EACCES.
    NotPermitted,
    /// EINVAL: everything that has no number of its own.
    Invalid,
    /// EBUSY.
    Busy,
    /// ELOOP.
    Loop,
    /// ESTALE.
    Stale,
    /// ENAMETOOLONG.
    TooLong,
    /// EMFILE, ENFILE.
    NoDescriptors,
    /// ENOSPC: for mounts, fs.mount-max is reached.
    NoSpace,
    /// Any other.
    Other,
}

impl Refusal {
    pub(crate) fn of(e: &io::Error) -> Refusal {
        match e.raw_os_error() {
            Some(libc::ENOSYS) => Refusal::NoSuchCall,
            Some(libc::ENODEV) => Refusal::NoSuchFileSystem,
            Some(libc::EPERM | libc::EACCES) => Refusal::NotPermitted,
            Some(libc::EINVAL) => Refusal::Invalid,
            Some(libc::EBUSY) => Refusal::Busy,
            Some(libc::ELOOP) => Refusal::Loop,
            Some(libc::ESTALE) => Refusal::Stale,
            Some(libc::ENAMETOOLONG) => Refusal::TooLong,
            Some(libc::EMFILE | libc::ENFILE) => Refusal::NoDescriptors,
            Some(libc::ENOSPC) => Refusal::NoSpace,
            _ => Refusal::Other,
        }
    }
}

/// What a mount forbids.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Attributes {
    pub(crate) read_only: bool,
    pub(crate) nosuid: bool,
    pub(crate) nodev: bool,
    pub(crate) noexec: bool,
}

impl Attributes {
    fn for_new_calls(self) -> MountAttrFlags {
        let mut flags = MountAttrFlags::empty();
        flags.set(MountAttrFlags::MOUNT_ATTR_RDONLY, self.read_only);
        flags.set(MountAttrFlags::MOUNT_ATTR_NOSUID, self.nosuid);
        flags.set(MountAttrFlags::MOUNT_ATTR_NODEV, self.nodev);
        flags.set(MountAttrFlags::MOUNT_ATTR_NOEXEC, self.noexec);
        flags
    }

    fn for_mount(self) -> MountFlags {
        let mut flags = MountFlags::empty();
        flags.set(MountFlags::RDONLY, self.read_only);
        flags.set(MountFlags::NOSUID, self.nosuid);
        flags.set(MountFlags::NODEV, self.nodev);
        flags.set(MountFlags::NOEXEC, self.noexec);
        flags
    }
}

/// Opens a directory for use as a layer: for reading, or as a bare path where it may not be read.
///
/// Linux 6.13 and 6.14 do not take bare path descriptors as layers.
pub(crate) fn open_layer(path: &Path) -> io::Result<OwnedFd> {
    match open_path(path, OFlags::RDONLY | OFlags::DIRECTORY) {
        Err(Errno::ACCESS) => Ok(open_path(path, OFlags::PATH | OFlags::DIRECTORY)?),
        other => Ok(other?),
    }
}

/// Opens a directory as a bare path: enough to name it.
pub(crate) fn open_dir_path(path: &Path) -> io::Result<OwnedFd> {
    Ok(open_path(path, OFlags::PATH | OFlags::DIRECTORY)?)
}

/// Opens what `name` in `parent` is, a symbolic link itself and not what it points to. Of a mount
/// point, that is the root of the topmost mount.
pub(crate) fn open_child(parent: impl AsFd, name: &OsStr) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(parent, name, flags, Mode::empty())?)
}

/// Opens a path of any length, following symbolic links.
fn open_path(path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::CLOEXEC;
    let pieces = pieces(path);
    let Some((last, firsts)) = pieces.split_last() else {
        return Err(Errno::NOENT);
    };
    let mut dir: Option<OwnedFd> = None;
    for piece in firsts {
        let on_the_way = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        dir = Some(open_at(dir.as_ref(), piece, on_the_way)?);
    }
    open_at(dir.as_ref(), last, flags)
}

fn open_at(dir: Option<&OwnedFd>, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let dir = dir.map_or(CWD, AsFd::as_fd);
    rustix::fs::openat(dir, path, flags, Mode::empty())
}

/// Cuts a path between components; joined, the pieces are the path.
fn pieces(path: &Path) -> Vec<PathBuf> {
    if path.as_os_str().len() <= PIECE {
        return match path.as_os_str().is_empty() {
            true => Vec::new(),
            false => vec![path.to_owned()],
        };
    }
    let mut pieces = vec![PathBuf::new()];
    for component in path.components() {
        let component = Path::new(match &component {
            Component::Prefix(_) => continue,
            other => other.as_os_str(),
        });
        match pieces.last_mut() {
            Some(last)
                if last.as_os_str().len() + component.as_os_str().len() < PIECE
                    || last.as_os_str().is_empty() =>
            {
                last.push(component);
            }
            _ => pieces.push(component.to_owned()),
        }
    }
    pieces
}

/// The path by which text interfaces reach a descriptor of the calling thread.
pub(crate) fn fd_name(fd: impl AsFd) -> String {
    format!("/proc/thread-self/fd/{}", fd.as_fd().as_raw_fd())
}

/// Where a descriptor's file is, as the kernel tells it. None where it cannot: /proc is missing, the
/// path is longer than a page, or the file was deleted.
pub(crate) fn where_is(fd: impl AsFd) -> Option<PathBuf> {
    std::fs::read_link(fd_name(fd)).ok()
}

/// A file system that is being configured: fsopen(2), fsconfig(2), fsmount(2). Linux 5.2.
#[derive(Debug)]
pub(crate) struct FsContext(OwnedFd);

impl FsContext {
    pub(crate) fn open(fstype: &str) -> io::Result<Self> {
        let flags = FsOpenFlags::FSOPEN_CLOEXEC;
        Ok(FsContext(rustix::mount::fsopen(fstype, flags)?))
    }

    pub(crate) fn set_flag(&self, key: &str) -> io::Result<()> {
        Ok(rustix::mount::fsconfig_set_flag(&self.0, key)?)
    }

    /// At most 255 bytes of value.
    pub(crate) fn set_string(&self, key: &str, value: &str) -> io::Result<()> {
        Ok(rustix::mount::fsconfig_set_string(&self.0, key, value)?)
    }

    pub(crate) fn set_fd(&self, key: &str, fd: impl AsFd) -> io::Result<()> {
        Ok(rustix::mount::fsconfig_set_fd(&self.0, key, fd)?)
    }

    pub(crate) fn create(&self) -> io::Result<()> {
        Ok(rustix::mount::fsconfig_create(&self.0)?)
    }

    /// The mount, attached nowhere yet: closing it unmounts it.
    pub(crate) fn mount(&self, attributes: Attributes) -> io::Result<OwnedFd> {
        Ok(rustix::mount::fsmount(
            &self.0,
            FsMountFlags::FSMOUNT_CLOEXEC,
            attributes.for_new_calls(),
        )?)
    }

    /// What the kernel said about the calls so far, a message a line; each is told once. The level
    /// (`e `, `w `, `i `) is cut off.
    pub(crate) fn take_log(&self) -> Vec<String> {
        let mut messages = Vec::new();
        let mut message = [0; 1024];
        // Ends with ENODATA; any other failure ends it as well, for then there is no more to tell.
        while let Ok(n @ 1..) = rustix::io::read(&self.0, &mut message) {
            let text = String::from_utf8_lossy(message.get(..n).unwrap_or_default());
            let text = text.trim_end();
            messages.push(text.get(2..).unwrap_or(text).to_owned());
        }
        messages
    }
}

/// A second mount of the directory `source` alone, attached nowhere yet. Linux 5.2.
pub(crate) fn clone_tree(source: impl AsFd) -> io::Result<OwnedFd> {
    Ok(rustix::mount::open_tree(
        source,
        "",
        OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH,
    )?)
}

/// Attaches a mount that is attached nowhere to the directory `target`.
pub(crate) fn attach(mount: impl AsFd, target: impl AsFd) -> io::Result<()> {
    Ok(rustix::mount::move_mount(
        mount,
        "",
        target,
        "",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
    )?)
}

/// The kernel's `struct mount_attr`, first version.
#[repr(C)]
#[derive(Default)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

fn mount_setattr(mount: BorrowedFd<'_>, attr: &MountAttr) -> io::Result<()> {
    // SAFETY: the path is a NUL-terminated constant; `attr` is a live `struct mount_attr` of the size
    // given, which the kernel only reads.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            std::ptr::from_ref(attr),
            size_of::<MountAttr>(),
        )
    };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Adds attributes to a mount, given the root of it. Linux 5.12.
pub(crate) fn add_attributes(mount: impl AsFd, attributes: Attributes) -> io::Result<()> {
    let attr = MountAttr {
        attr_set: u64::from(attributes.for_new_calls().bits()),
        ..MountAttr::default()
    };
    mount_setattr(mount.as_fd(), &attr)
}

/// Has a mount that is attached nowhere show the ids of a user namespace, given the root of it. Linux 5.12.
pub(crate) fn map_ids(mount: impl AsFd, user_namespace: impl AsFd) -> io::Result<()> {
    let attr = MountAttr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        userns_fd: u64::try_from(user_namespace.as_fd().as_raw_fd()).unwrap_or_default(),
        ..MountAttr::default()
    };
    mount_setattr(mount.as_fd(), &attr)
}

/// Opens the directory at a path below another, following nothing and leaving the mount nowhere; a bare path
/// if it may not be read.
pub(crate) fn open_below(dir: impl AsFd, path: &Path) -> io::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(&dir, path, flags | OFlags::RDONLY, Mode::empty()) {
        Err(Errno::ACCESS) => {
            Ok(rustix::fs::openat(&dir, path, flags | OFlags::PATH, Mode::empty())?)
        }
        other => Ok(other?),
    }
}

/// Stops a mount from passing on, and from receiving, what is mounted below it.
pub(crate) fn make_private(mount: impl AsFd) -> io::Result<()> {
    let attr = MountAttr { propagation: libc::MS_PRIVATE, ..MountAttr::default() };
    match mount_setattr(mount.as_fd(), &attr) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) => {
            let flags = MountPropagationFlags::PRIVATE;
            Ok(rustix::mount::mount_change(fd_name(&mount), flags)?)
        }
        other => other,
    }
}

/// mount(2) of a bind mount of `source` on `target`, with `name` in `parent` naming the target again
/// once it is mounted. It is writable for an instant before its attributes are set.
pub(crate) fn bind(
    source: impl AsFd,
    target: impl AsFd,
    parent: impl AsFd,
    name: &OsStr,
    attributes: Attributes,
) -> io::Result<()> {
    rustix::mount::mount_bind(fd_name(source), fd_name(target))?;
    if attributes == Attributes::default() {
        return Ok(());
    }
    let flags = MountFlags::BIND | attributes.for_mount();
    rustix::mount::mount_remount(child_name(&parent, name), flags, c"").map_err(|e| {
        let undone = unmount(&parent, name, Unmount::Detach);
        undone.err().unwrap_or_else(|| e.into())
    })
}

/// mount(2) of `fstype` on `target`, in a thread whose working directory is the list of its own
/// descriptors: in `options`, a descriptor's number is a path to it.
pub(crate) fn mount_from_descriptors(
    fstype: &str,
    options: &str,
    target: impl AsFd,
    attributes: Attributes,
) -> io::Result<()> {
    let options = CString::new(options)?;
    let target = target.as_fd().as_raw_fd().to_string();
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("stratafs-mount".to_owned())
            .spawn_scoped(scope, || -> io::Result<()> {
                // SAFETY: only the working directory and the umask of this very thread become its
                // own; descriptors stay shared.
                unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?;
                rustix::process::chdir("/proc/thread-self/fd")?;
                let flags = attributes.for_mount();
                rustix::mount::mount(fstype, &target, fstype, flags, options.as_c_str())?;
                Ok(())
            })?
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the mounting thread panicked")))
    })
}

/// How to unmount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unmount {
    /// Fails with EBUSY while files in it are in use.
    WhenIdle,
    /// Takes it out of the tree at once; it ends with its last open file.
    Detach,
}

/// Unmounts the topmost mount on `name` in `parent`, which is not followed if it is a symbolic link.
pub(crate) fn unmount(parent: impl AsFd, name: &OsStr, how: Unmount) -> io::Result<()> {
    let mut flags = UnmountFlags::NOFOLLOW;
    flags.set(UnmountFlags::DETACH, how == Unmount::Detach);
    Ok(rustix::mount::unmount(child_name(parent, name), flags)?)
}

fn child_name(parent: impl AsFd, name: &OsStr) -> Vec<u8> {
    let mut path = fd_name(parent).into_bytes();
    path.push(b'/');
    path.extend_from_slice(name.as_bytes());
    path
}

/// Whether a descriptor is a directory.
pub(crate) fn is_directory(fd: impl AsFd) -> io::Result<bool> {
    let stat = rustix::fs::statat(fd, "", AtFlags::EMPTY_PATH)?;
    Ok(rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_paths_are_cut_between_components() {
        let component = "c".repeat(250);
        let long: PathBuf =
            std::iter::once("/").chain(std::iter::repeat_n(component.as_str(), 60)).collect();
        let pieces = pieces(&long);
        assert!(pieces.len() > 3);
        assert!(pieces.iter().all(|p| p.as_os_str().len() <= PIECE));
        assert!(pieces.iter().skip(1).all(|p| p.is_relative()));
        assert_eq!(pieces.iter().collect::<PathBuf>(), long);
    }

    #[test]
    fn short_paths_stay_as_they_are() {
        assert_eq!(pieces(Path::new("./a//b/../c/")), [PathBuf::from("./a//b/../c/")]);
        assert!(pieces(Path::new("")).is_empty());
    }

    #[test]
    fn directories_beyond_path_max_can_be_opened() {
        let temp = tempfile::tempdir().unwrap();
        let mut path = temp.path().to_owned();
        let mut dir = open_dir_path(&path).unwrap();
        while path.as_os_str().len() < 9000 {
            let name = "n".repeat(200);
            rustix::fs::mkdirat(&dir, &name, Mode::RWXU).unwrap();
            dir = open_child(&dir, OsStr::new(&name)).unwrap();
            path.push(name);
        }
        let again = open_layer(&path).unwrap();
        let ino = |fd: &OwnedFd| rustix::fs::fstat(fd).unwrap().st_ino;
        assert_eq!(ino(&again), ino(&dir));
    }

    #[test]
    fn a_refused_mount_in_the_thread_leaves_the_working_directory_alone() {
        let before = std::env::current_dir().unwrap();
        let temp = tempfile::tempdir().unwrap();
        let target = open_dir_path(temp.path()).unwrap();
        let options = "lowerdir=no-such-descriptor";
        let refused = mount_from_descriptors("overlay", options, &target, Attributes::default());
        assert!(refused.is_err());
        assert_eq!(std::env::current_dir().unwrap(), before);
    }
}
