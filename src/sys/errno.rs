//! The few error numbers that code outside the fence makes or tells apart, where
//! `std::io::ErrorKind` has no name for them.

use std::io;

/// An input/output error: also what the kernel's overlayfs answers on damaged marks.
pub(crate) fn eio() -> io::Error {
    io::Error::from_raw_os_error(libc::EIO)
}

/// A name longer than the file system takes.
pub(crate) fn name_too_long() -> io::Error {
    io::Error::from_raw_os_error(libc::ENAMETOOLONG)
}

/// Whether a path led through too many symlinks.
pub(crate) fn is_loop(e: &io::Error) -> bool {
    e.raw_os_error() == Some(libc::ELOOP)
}

/// Whether the file system is full, or the quota used up.
pub(crate) fn is_full(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}

/// Whether two names cannot be exchanged on this file system, or one of them is not there.
pub(crate) fn cannot_exchange(e: &io::Error) -> bool {
    matches!(
        e.raw_os_error(),
        Some(libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP | libc::EPERM | libc::ENOENT)
    )
}
