//! The one error type of the crate.
//!
//! An [`Error`] says what was tried, on what, and why it failed; where there is a remedy, its text
//! names it. Programs match on [`Error::kind`]; a file system server or a gRPC service answers with
//! [`Error::errno`]. The constants below come from `libc` as plain numbers: this module makes no
//! system call.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// What kind of failure an [`Error`] is.
///
/// The kinds follow the codes that containerd's snapshotters answer with, and add those that a
/// storage library needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A key, name, image, file or directory that does not exist.
    NotFound,
    /// The key or name is in use.
    AlreadyExists,
    /// The request itself is malformed; repeating it cannot help.
    InvalidArgument,
    /// The object is not in the state that the operation needs.
    FailedPrecondition,
    /// Another process or mount holds what is needed; a later call may succeed.
    Busy,
    /// The kernel, the file system or this build lacks what the operation needs.
    Unsupported,
    /// The caller lacks a right.
    PermissionDenied,
    /// A layer archive that is damaged, ambiguous or hostile.
    InvalidArchive,
    /// An image whose manifest, configuration or layout is damaged or contradictory.
    InvalidImage,
    /// Bytes do not have the digest or size they were promised to have.
    DigestMismatch,
    /// A bound given in the options was reached.
    LimitExceeded,
    /// The file system or a quota is full.
    NoSpace,
    /// The file system or the store was opened read-only.
    ReadOnly,
    /// What is on disk contradicts itself.
    Corrupt,
    /// The store was written by a newer version or in a format this process cannot use.
    Incompatible,
    /// The progress callback asked to stop; everything done was rolled back.
    Cancelled,
    /// An earlier failure of this handle left it unusable; open the store again.
    Poisoned,
    /// Any other failure of the system.
    Io,
}

/// The result of every fallible call of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure: what was tried, on which path, why, and what to do about it.
///
/// [`fmt::Display`] prints all of it, the cause included, on one line.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    message: Cow<'static, str>,
    path: Option<PathBuf>,
    source: Option<Box<dyn StdError + Send + Sync + 'static>>,
}

impl Error {
    /// A failure that the crate itself found.
    pub(crate) fn new(kind: ErrorKind, message: impl Into<Cow<'static, str>>) -> Self {
        Error(Box::new(Inner { kind, message: message.into(), path: None, source: None }))
    }

    /// A failed system call: `op` is a verb phrase such as `"create directory"`.
    pub(crate) fn io(
        op: impl Into<Cow<'static, str>>,
        path: impl AsRef<Path>,
        e: io::Error,
    ) -> Self {
        let op = op.into();
        Error::new(kind_of(&e), format!("cannot {op}")).with_path(path).with_source(e)
    }

    /// Adds the path that the failure is about.
    pub(crate) fn with_path(mut self, path: impl AsRef<Path>) -> Self {
        self.0.path = Some(path.as_ref().to_owned());
        self
    }

    /// Adds the path where the error names none yet.
    pub(crate) fn with_path_if_none(self, path: impl AsRef<Path>) -> Self {
        if self.0.path.is_some() { self } else { self.with_path(path) }
    }

    /// Adds the cause.
    pub(crate) fn with_source(mut self, e: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.source = Some(e.into());
        self
    }

    /// Puts another error around this one: the outer says what the inner's failure prevented.
    pub(crate) fn context(self, message: impl Into<Cow<'static, str>>) -> Self {
        Error::new(self.kind(), message).with_source(self)
    }

    /// The kind, for programs to match on.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The path that the failure is about, where there is one.
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// The error of the operating system at the bottom of the chain, where there is one.
    pub fn io_error(&self) -> Option<&io::Error> {
        let mut source = self.source();
        while let Some(e) = source {
            if let Some(io) = e.downcast_ref::<io::Error>() {
                return Some(io);
            }
            source = e.source();
        }
        None
    }

    /// The number from `errno.h` that fits best: the system's own where it failed, else one that
    /// stands for the kind.
    pub fn errno(&self) -> i32 {
        if let Some(n) = self.io_error().and_then(io::Error::raw_os_error) {
            return n;
        }
        match self.kind() {
            ErrorKind::NotFound => libc::ENOENT,
            ErrorKind::AlreadyExists => libc::EEXIST,
            ErrorKind::InvalidArgument
            | ErrorKind::InvalidArchive
            | ErrorKind::InvalidImage
            | ErrorKind::FailedPrecondition => libc::EINVAL,
            ErrorKind::Busy => libc::EBUSY,
            ErrorKind::Unsupported | ErrorKind::Incompatible => libc::EOPNOTSUPP,
            ErrorKind::PermissionDenied => libc::EPERM,
            ErrorKind::DigestMismatch => libc::EBADMSG,
            ErrorKind::LimitExceeded => libc::EFBIG,
            ErrorKind::NoSpace => libc::ENOSPC,
            ErrorKind::ReadOnly => libc::EROFS,
            ErrorKind::Cancelled => libc::ECANCELED,
            ErrorKind::Corrupt | ErrorKind::Poisoned | ErrorKind::Io => libc::EIO,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)?;
        if let Some(path) = &self.0.path {
            // Debug, not Display: quotes it, and keeps control characters off the terminal.
            write!(f, " {path:?}")?;
        }
        if let Some(source) = &self.0.source {
            write!(f, ": {source}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Error")
            .field("kind", &self.0.kind)
            .field("message", &self.0.message)
            .field("path", &self.0.path)
            .field("source", &self.0.source)
            .finish()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|e| e as &(dyn StdError + 'static))
    }
}

impl From<Error> for io::Error {
    /// Keeps the whole error as the `io::Error`'s payload.
    fn from(e: Error) -> io::Error {
        let kind = io::Error::from_raw_os_error(e.errno()).kind();
        io::Error::new(kind, e)
    }
}

/// The kind that stands for a failure of the system; an [`Error`] that travelled inside an
/// `io::Error`, through a `Read` for instance, keeps its own.
fn kind_of(e: &io::Error) -> ErrorKind {
    if let Some(inner) = e.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
        return inner.kind();
    }
    match e.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => ErrorKind::PermissionDenied,
        Some(libc::ENOSPC | libc::EDQUOT) => ErrorKind::NoSpace,
        Some(libc::ENOSYS | libc::EOPNOTSUPP) => ErrorKind::Unsupported,
        Some(libc::EBUSY | libc::ETXTBSY) => ErrorKind::Busy,
        Some(libc::EROFS) => ErrorKind::ReadOnly,
        Some(libc::EINVAL | libc::ENAMETOOLONG | libc::ENOTDIR | libc::EISDIR | libc::ELOOP) => {
            ErrorKind::InvalidArgument
        }
        _ => match e.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::AlreadyExists => ErrorKind::AlreadyExists,
            io::ErrorKind::Unsupported => ErrorKind::Unsupported,
            io::ErrorKind::ResourceBusy => ErrorKind::Busy,
            _ => ErrorKind::Io,
        },
    }
}

/// Says what failed and on what: `fs.mkdir(..).at("create directory", path)?`.
pub(crate) trait IoContext<T> {
    /// Turns the system's error into an [`Error`] that names `op` (a verb phrase) and `path`.
    fn at(self, op: &'static str, path: impl AsRef<Path>) -> Result<T>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn at(self, op: &'static str, path: impl AsRef<Path>) -> Result<T> {
        self.map_err(|e| Error::io(op, path, e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_on_what_and_why() {
        let e = Error::io("open", "/a\nb", io::Error::from_raw_os_error(libc::ENOENT));
        assert_eq!(e.to_string(), "cannot open \"/a\\nb\": No such file or directory (os error 2)");
        assert_eq!(e.kind(), ErrorKind::NotFound);
        assert_eq!(e.errno(), libc::ENOENT);
    }

    #[test]
    fn keeps_kind_and_errno_through_context_and_io_error() {
        let e = Error::io("write", "f", io::Error::from_raw_os_error(libc::ENOSPC));
        let e = e.context("import of image x stopped");
        assert_eq!((e.kind(), e.errno()), (ErrorKind::NoSpace, libc::ENOSPC));
        let through: io::Error = Error::new(ErrorKind::InvalidArchive, "bad header").into();
        let back = Error::io("apply", "layer", through);
        assert_eq!(back.kind(), ErrorKind::InvalidArchive);
    }
}
