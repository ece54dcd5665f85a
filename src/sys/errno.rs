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

/// Whether a file's xattrs have no room, or its file system has none.
pub(crate) fn has_no_room_for_xattrs(e: &io::Error) -> bool {
    is_full(e) || matches!(e.raw_os_error(), Some(libc::E2BIG | libc::ERANGE | libc::EOPNOTSUPP))
}

/// Whether two names cannot be exchanged on this file system, or one of them is not there.
pub(crate) fn cannot_exchange(e: &io::Error) -> bool {
    matches!(
        e.raw_os_error(),
        Some(libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP | libc::EPERM | libc::ENOENT)
    )
}

/// What file system calls answer, where a union has to answer for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Code {
    Perm,
    NoEntry,
    Exists,
    CrossDevice,
    NotDirectory,
    IsDirectory,
    Invalid,
    ReadOnly,
    NameTooLong,
    NotEmpty,
    NoData,
    Range,
    Overflow,
    NotSupported,
    Stale,
    NotTty,
    Io,
}

impl Code {
    fn number(self) -> i32 {
        match self {
            Code::Perm => libc::EPERM,
            Code::NoEntry => libc::ENOENT,
            Code::Exists => libc::EEXIST,
            Code::CrossDevice => libc::EXDEV,
            Code::NotDirectory => libc::ENOTDIR,
            Code::IsDirectory => libc::EISDIR,
            Code::Invalid => libc::EINVAL,
            Code::ReadOnly => libc::EROFS,
            Code::NameTooLong => libc::ENAMETOOLONG,
            Code::NotEmpty => libc::ENOTEMPTY,
            Code::NoData => libc::ENODATA,
            Code::Range => libc::ERANGE,
            Code::Overflow => libc::EOVERFLOW,
            Code::NotSupported => libc::EOPNOTSUPP,
            Code::Stale => libc::ESTALE,
            Code::NotTty => libc::ENOTTY,
            Code::Io => libc::EIO,
        }
    }

    /// Whether this is what a call answered.
    pub(crate) fn is(self, e: &io::Error) -> bool {
        e.raw_os_error() == Some(self.number())
    }
}

impl From<Code> for io::Error {
    fn from(code: Code) -> io::Error {
        io::Error::from_raw_os_error(code.number())
    }
}

/// Whether the process has no descriptor left.
pub(crate) fn is_out_of_descriptors(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

/// The number to answer a request with that failed so.
pub(crate) fn number(e: &io::Error) -> i32 {
    let number = e.raw_os_error().or_else(|| {
        e.get_ref().and_then(|inner| inner.downcast_ref::<crate::error::Error>()).map(|e| e.errno())
    });
    number.filter(|n| *n > 0).unwrap_or(libc::EIO)
}
