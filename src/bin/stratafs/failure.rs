//! Failures, and the one place where they become exit codes: see `--help`.

use std::fmt;
use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitCode;

#[cfg(feature = "fuse")]
use stratafs::container::NotStarted;
use stratafs::{Error, ErrorKind};

/// Why a command did not do what it was asked for.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The library says why.
    Library(Error),
    /// As that, about an archive that only the program knows the name of.
    Archive { name: String, kind: ErrorKind, why: String },
    /// The request cannot be right.
    Usage(String),
    /// Nothing has the name that was given.
    NotFound(String),
    /// The program's own reading or writing failed.
    Io { what: String, source: io::Error },
    /// Whoever read our output has gone; nobody needs to be told.
    OutputClosed,
    /// `check` found this many problems.
    Problems(usize),
    /// A signal stopped the program where the library was not asked to stop.
    Interrupted,
    /// The command that was to be run has failed with this code; it has said why.
    #[cfg(feature = "fuse")]
    Status(u8),
    /// The command that was to be run cannot be.
    #[cfg(feature = "fuse")]
    NotStarted(NotStarted),
    /// The command has run, and what it did is in the snapshot `key`.
    #[cfg(feature = "fuse")]
    NotCommitted { name: String, key: String, source: Error },
    /// There is nothing to run a command in.
    #[cfg(feature = "fuse")]
    NoContainer(Box<Failure>),
}

/// The library's kinds by the names that JSON has for them, and the exit codes.
fn word_and_code(kind: ErrorKind) -> (&'static str, u8) {
    match kind {
        ErrorKind::InvalidArgument => ("invalid-argument", 2),
        ErrorKind::InvalidArchive => ("invalid-archive", 3),
        ErrorKind::InvalidImage => ("invalid-image", 3),
        ErrorKind::DigestMismatch => ("digest-mismatch", 3),
        ErrorKind::NotFound => ("not-found", 4),
        ErrorKind::AlreadyExists => ("already-exists", 5),
        ErrorKind::FailedPrecondition => ("failed-precondition", 6),
        ErrorKind::Busy => ("busy", 6),
        ErrorKind::Unsupported => ("unsupported", 7),
        ErrorKind::PermissionDenied => ("permission-denied", 7),
        ErrorKind::ReadOnly => ("read-only", 7),
        ErrorKind::Incompatible => ("incompatible", 7),
        ErrorKind::NoSpace => ("no-space", 8),
        ErrorKind::LimitExceeded => ("limit-exceeded", 8),
        ErrorKind::Cancelled => ("interrupted", 130),
        ErrorKind::Corrupt => ("corrupt", 1),
        ErrorKind::Poisoned => ("poisoned", 1),
        _ => ("io", 1),
    }
}

impl Failure {
    /// A failure of the program's own input or output: `what` is a verb phrase.
    pub(crate) fn io(what: &str, path: &Path, source: io::Error) -> Failure {
        Failure::Io { what: format!("cannot {what} {path:?}"), source }
    }

    /// What the library says of the archive that was read from `name`: what is wrong with its
    /// contents is told with the name, anything else is not about it.
    pub(crate) fn of_archive(name: &Path, error: Error) -> Failure {
        match error.kind() {
            ErrorKind::InvalidArchive | ErrorKind::DigestMismatch | ErrorKind::LimitExceeded => {
                Failure::archive(name, error.kind(), error.to_string())
            }
            _ => error.into(),
        }
    }

    /// An archive of no bytes at all: no archive is, and it is what a producer that failed leaves.
    pub(crate) fn empty_archive(name: &Path) -> Failure {
        let why =
            "it is empty, which no archive is: see whether what should have written it failed";
        Failure::archive(name, ErrorKind::InvalidArchive, why.to_owned())
    }

    fn archive(name: &Path, kind: ErrorKind, why: String) -> Failure {
        let name =
            if name == Path::new("-") { "standard input".to_owned() } else { format!("{name:?}") };
        Failure::Archive { name, kind, why }
    }

    fn word_and_code(&self) -> (&'static str, u8) {
        match self {
            Failure::Library(e) => word_and_code(e.kind()),
            Failure::Archive { kind, .. } => word_and_code(*kind),
            Failure::Usage(_) => ("usage", 2),
            Failure::NotFound(_) => word_and_code(ErrorKind::NotFound),
            Failure::Io { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => word_and_code(ErrorKind::NotFound),
                io::ErrorKind::AlreadyExists => word_and_code(ErrorKind::AlreadyExists),
                io::ErrorKind::PermissionDenied => word_and_code(ErrorKind::PermissionDenied),
                io::ErrorKind::ReadOnlyFilesystem => word_and_code(ErrorKind::ReadOnly),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    word_and_code(ErrorKind::NoSpace)
                }
                io::ErrorKind::IsADirectory | io::ErrorKind::NotADirectory => {
                    word_and_code(ErrorKind::InvalidArgument)
                }
                _ => word_and_code(ErrorKind::Io),
            },
            Failure::OutputClosed => ("output-closed", 141),
            Failure::Problems(_) => word_and_code(ErrorKind::Corrupt),
            Failure::Interrupted => word_and_code(ErrorKind::Cancelled),
            #[cfg(feature = "fuse")]
            Failure::Status(code) => ("status", *code),
            #[cfg(feature = "fuse")]
            Failure::NotStarted(e) => ("not-started", e.exit_code()),
            #[cfg(feature = "fuse")]
            Failure::NotCommitted { source, .. } => (word_and_code(source.kind()).0, 125),
            #[cfg(feature = "fuse")]
            Failure::NoContainer(failure) => (failure.word_and_code().0, 125),
        }
    }

    /// Whether it is about a command that was run, not about this program.
    pub(crate) fn is_of_a_command(&self) -> bool {
        #[cfg(feature = "fuse")]
        return matches!(
            self,
            Failure::Status(_) | Failure::NotStarted(_) | Failure::NoContainer(_)
        );
        #[cfg(not(feature = "fuse"))]
        false
    }

    /// Says it on stderr, and gives the exit code.
    pub(crate) fn report(&self, json: bool) -> ExitCode {
        let (word, code) = self.word_and_code();
        let line = match self {
            Failure::OutputClosed => return ExitCode::from(code),
            #[cfg(feature = "fuse")]
            Failure::Status(_) => return ExitCode::from(code),
            _ if json => error_object(word, &self.to_string()),
            _ => format!("stratafs: {self}"),
        };
        // Should stderr be closed, the exit code still tells.
        let _ = writeln!(io::stderr(), "{line}");
        ExitCode::from(code)
    }
}

/// What `--json` prints on stderr.
pub(crate) fn error_object(kind: &str, message: &str) -> String {
    serde_json::json!({ "error": { "kind": kind, "message": message } }).to_string()
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Library(e) => e.fmt(f),
            Failure::Archive { name, why, .. } => write!(f, "cannot unpack {name}: {why}"),
            Failure::Usage(text) | Failure::NotFound(text) => f.write_str(text),
            Failure::Io { what, source } => write!(f, "{what}: {source}"),
            Failure::OutputClosed => f.write_str("the output was closed"),
            Failure::Problems(1) => f.write_str("the store has a problem"),
            Failure::Problems(n) => write!(f, "the store has {n} problems"),
            Failure::Interrupted => f.write_str("interrupted"),
            #[cfg(feature = "fuse")]
            Failure::Status(code) => write!(f, "the command ended with {code}"),
            #[cfg(feature = "fuse")]
            Failure::NotStarted(e) => e.fmt(f),
            #[cfg(feature = "fuse")]
            Failure::NotCommitted { name, key, source } => write!(
                f,
                "cannot commit as {name:?} what the command has changed: {source}; it is kept: `stratafs \
                 commit NAME {key}`"
            ),
            #[cfg(feature = "fuse")]
            Failure::NoContainer(failure) => failure.fmt(f),
        }
    }
}

impl From<Error> for Failure {
    fn from(e: Error) -> Failure {
        let closed = |io: &io::Error| io.kind() == io::ErrorKind::BrokenPipe;
        if e.io_error().is_some_and(closed) { Failure::OutputClosed } else { Failure::Library(e) }
    }
}

/// What writing to stdout gives.
impl From<io::Error> for Failure {
    fn from(source: io::Error) -> Failure {
        if source.kind() == io::ErrorKind::BrokenPipe {
            Failure::OutputClosed
        } else {
            Failure::Io { what: "cannot write to standard output".to_owned(), source }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_that_has_gone_is_no_news() {
        let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
        assert!(matches!(Failure::from(gone()), Failure::OutputClosed));
        assert_eq!(Failure::OutputClosed.word_and_code().1, 141);
    }

    #[test]
    fn the_programs_own_errors_have_the_codes_of_the_librarys() {
        let io = |kind| Failure::io("open", Path::new("f"), io::Error::from(kind));
        assert_eq!(io(io::ErrorKind::NotFound).word_and_code().1, 4);
        assert_eq!(io(io::ErrorKind::StorageFull).word_and_code().1, 8);
        assert_eq!(io(io::ErrorKind::Other).word_and_code().1, 1);
    }
}
