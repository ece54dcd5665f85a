//! The extended attributes of a child of a directory, whose name is not followed.
//!
//! Linux 6.13 has system calls for it. Elsewhere, and where a filter of system calls knows none of these,
//! the child is reached by a path through `/proc/self/fd`, which takes several times as long.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::OnceLock;

use libc::{c_long, c_uint};
use rustix::fs::XattrFlags;
use rustix::io::{Errno, Result};
use rustix::path::Arg;

use super::dir::{Dir, proc_path};
use crate::path::Name;

/// The calls' numbers, which architectures that came after 2001 share.
const SETXATTRAT: c_long = 463;
const GETXATTRAT: c_long = 464;
const LISTXATTRAT: c_long = 465;
const REMOVEXATTRAT: c_long = 466;
const HAS_NUMBERS: bool = cfg!(any(
    target_arch = "x86_64",
    target_arch = "aarch64",
    target_arch = "riscv64",
    target_arch = "powerpc64",
    target_arch = "s390x",
    target_arch = "loongarch64",
)) && cfg!(target_pointer_width = "64");
const NO_FOLLOW: c_uint = libc::AT_SYMLINK_NOFOLLOW.unsigned_abs();

/// `struct xattr_args` of `linux/xattr.h`.
#[repr(C)]
struct Args {
    value: u64,
    size: u32,
    flags: u32,
}

impl Args {
    const SIZE: usize = size_of::<Args>();

    fn new(value: *const u8, size: usize, flags: u32) -> Args {
        // What is longer is longer than any attribute.
        Args {
            value: value.expose_provenance() as u64,
            size: u32::try_from(size).unwrap_or(u32::MAX),
            flags,
        }
    }
}

/// Whether there are these calls.
fn exist() -> bool {
    static EXIST: OnceLock<bool> = OnceLock::new();
    #[cfg(test)]
    if tests::ABSENT.get() {
        return false;
    }
    HAS_NUMBERS
        && *EXIST.get_or_init(|| {
            // SAFETY: a path and a key, both ending in 0, and a structure of the given size; of a
            // descriptor that cannot be nothing is read.
            let answer = unsafe {
                let args = Args::new(std::ptr::null(), 0, 0);
                libc::syscall(
                    GETXATTRAT,
                    -1,
                    c"x".as_ptr(),
                    0,
                    c"user.x".as_ptr(),
                    &args,
                    Args::SIZE,
                )
            };
            answer == -1 && std::io::Error::last_os_error().raw_os_error() == Some(libc::EBADF)
        })
}

fn length(answer: c_long) -> Result<usize> {
    usize::try_from(answer)
        .map_err(|_| Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}

fn both<T>(name: &Name, key: &[u8], call: impl FnOnce(&CStr, &CStr) -> Result<T>) -> Result<T> {
    name.as_os_str().into_with_c_str(|name| key.into_with_c_str(|key| call(name, key)))
}

/// Reads a value into `value`, and tells its length.
pub(super) fn get(dir: &Dir, name: &Name, key: &[u8], value: &mut [u8]) -> Result<usize> {
    if !exist() {
        return rustix::fs::lgetxattr(proc_path(dir, Some(name)), key, value);
    }
    let dir = dir.as_fd().as_raw_fd();
    both(name, key, |name, key| {
        let args = Args::new(value.as_mut_ptr(), value.len(), 0);
        // SAFETY: the strings end in 0, `args` is of the given size, and the value has room for as much as
        // it says.
        length(unsafe {
            libc::syscall(
                GETXATTRAT,
                dir,
                name.as_ptr(),
                NO_FOLLOW,
                key.as_ptr(),
                &args,
                Args::SIZE,
            )
        })
    })
}

/// Reads the keys into `keys`, each followed by a 0, and tells their length.
pub(super) fn list(dir: &Dir, name: &Name, keys: &mut [u8]) -> Result<usize> {
    if !exist() {
        return rustix::fs::llistxattr(proc_path(dir, Some(name)), keys);
    }
    let dir = dir.as_fd().as_raw_fd();
    name.as_os_str().into_with_c_str(|name| {
        // SAFETY: the name ends in 0, and `keys` has room for as much as is said.
        length(unsafe {
            let (at, room) = (keys.as_mut_ptr(), keys.len());
            libc::syscall(LISTXATTRAT, dir, name.as_ptr(), NO_FOLLOW, at, room)
        })
    })
}

pub(super) fn set(
    dir: &Dir,
    name: &Name,
    key: &[u8],
    value: &[u8],
    flags: XattrFlags,
) -> Result<()> {
    if !exist() {
        return rustix::fs::lsetxattr(proc_path(dir, Some(name)), key, value, flags);
    }
    let dir = dir.as_fd().as_raw_fd();
    both(name, key, |name, key| {
        let args = Args::new(value.as_ptr(), value.len(), flags.bits());
        // SAFETY: the strings end in 0, `args` is of the given size, and the value is as long as it says.
        length(unsafe {
            libc::syscall(
                SETXATTRAT,
                dir,
                name.as_ptr(),
                NO_FOLLOW,
                key.as_ptr(),
                &args,
                Args::SIZE,
            )
        })
    })
    .map(|_| ())
}

pub(super) fn remove(dir: &Dir, name: &Name, key: &[u8]) -> Result<()> {
    if !exist() {
        return rustix::fs::lremovexattr(proc_path(dir, Some(name)), key);
    }
    let dir = dir.as_fd().as_raw_fd();
    both(name, key, |name, key| {
        // SAFETY: the strings end in 0.
        length(unsafe { libc::syscall(REMOVEXATTRAT, dir, name.as_ptr(), NO_FOLLOW, key.as_ptr()) })
    })
    .map(|_| ())
}

#[cfg(test)]
pub(super) mod tests {
    use std::cell::Cell;

    use super::*;

    thread_local! {
        /// Whether this thread is to do without.
        pub(in crate::sys) static ABSENT: Cell<bool> = const { Cell::new(false) };
    }

    #[test]
    fn both_ways_say_the_same_of_errors() {
        let tmp = tempfile::tempdir_in("/var/tmp").unwrap();
        let dir = Dir::open(tmp.path()).unwrap();
        let name = |name: &str| Name::new(name).unwrap();
        dir.create_file(&name("file"), 0o600).unwrap();
        dir.symlink(b"file", &name("symlink")).unwrap();
        let mut answers = Vec::new();
        for absent in [false, true] {
            ABSENT.set(absent);
            let buffer = &mut [0; 2];
            answers.push((
                set(&dir, &name("file"), b"user.a", b"long", XattrFlags::empty()),
                set(&dir, &name("file"), b"user.a", b"long", XattrFlags::CREATE),
                set(&dir, &name("file"), b"user.b", b"long", XattrFlags::REPLACE),
                set(&dir, &name("symlink"), b"user.a", b"", XattrFlags::empty()),
                get(&dir, &name("file"), b"user.a", buffer),
                get(&dir, &name("file"), b"user.b", buffer),
                get(&dir, &name("absent"), b"user.a", buffer),
                list(&dir, &name("absent"), buffer),
                remove(&dir, &name("file"), b"user.a"),
                remove(&dir, &name("file"), b"user.a"),
            ));
        }
        ABSENT.set(false);
        assert_eq!(answers[0], answers[1]);
        assert_eq!(answers[0].4, Err(Errno::RANGE));
        assert_eq!(answers[0].9, Err(Errno::NODATA));
    }
}
