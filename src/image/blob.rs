//! Blobs: what a descriptor promises, and a reader that holds bytes to it.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use oci_spec::image::Descriptor;

use super::quote::quoted;
use crate::digest::{Digest, Hashing};
use crate::error::{Error, ErrorKind, Result};

/// The identity of a blob: its digest, and how many bytes it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Blob {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
}

impl Blob {
    /// The identity of these bytes.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Blob { digest: Digest::of(bytes), size: bytes.len() as u64 }
    }
}

impl TryFrom<&Descriptor> for Blob {
    type Error = Error;

    /// # Errors
    /// [`ErrorKind::Unsupported`] if the digest is not a sha256.
    fn try_from(descriptor: &Descriptor) -> Result<Self> {
        let digest = descriptor.digest().as_ref();
        let digest = digest.parse().map_err(|e: Error| match digest.len() {
            // The message quotes it.
            0..=160 => e,
            _ => Error::new(e.kind(), format!("bad digest {}", quoted(digest))),
        })?;
        Ok(Blob { digest, size: descriptor.size() })
    }
}

/// A part of a file, read without its cursor, so that many may be read at once.
#[derive(Clone, Debug)]
pub(crate) struct Section {
    file: Arc<File>,
    at: u64,
    left: u64,
}

impl Section {
    /// `size` bytes from offset `at`.
    pub(crate) fn new(file: Arc<File>, at: u64, size: u64) -> Self {
        Section { file, at, left: size }
    }

    /// What is left to read, in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.left
    }
}

impl Read for Section {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = buf.len().min(usize::try_from(self.left).unwrap_or(buf.len()));
        let n = self.file.read_at(buf.get_mut(..n).unwrap_or_default(), self.at)?;
        self.at = self.at.saturating_add(n as u64);
        self.left = self.left.saturating_sub(n as u64);
        Ok(n)
    }
}

/// A reader that gives no more bytes than promised, and gives the last of them only once size and
/// digest of the whole are right. Its errors are this crate's, inside `io::Error`.
///
/// Who stops before the end has verified nothing.
#[derive(Debug)]
pub(crate) struct Verified<R> {
    promised: Blob,
    state: State<R>,
}

#[derive(Debug)]
enum State<R> {
    Reading(Hashing<R>),
    Verified,
    Refused,
}

impl<R: Read> Verified<R> {
    pub(crate) fn new(inner: R, promised: Blob) -> Self {
        Verified { promised, state: State::Reading(Hashing::new(inner)) }
    }

    /// Reads all of it into memory, where it may have at most `max` bytes.
    ///
    /// # Errors
    /// [`ErrorKind::DigestMismatch`], [`ErrorKind::LimitExceeded`], and whatever the reader below
    /// fails with.
    pub(crate) fn read_all(mut self, max: u64) -> Result<Vec<u8>> {
        let Blob { digest, size } = self.promised;
        if size > max {
            return Err(Error::new(
                ErrorKind::LimitExceeded,
                format!("blob {digest} is {size} bytes long, more than the {max} allowed here"),
            ));
        }
        let mut bytes = Vec::new();
        self.read_to_end(&mut bytes).map_err(|e| reading(digest, e))?;
        Ok(bytes)
    }

    /// At the end: there must be nothing more, and the digest must be right.
    fn verify(&mut self) -> Result<(), io::Error> {
        let Blob { digest, size } = self.promised;
        let State::Reading(mut inner) = std::mem::replace(&mut self.state, State::Refused) else {
            return Ok(());
        };
        let before = inner.passed();
        if before == size && read_retrying(&mut inner, &mut [0; 1])? > 0 {
            return Err(mismatch(format!(
                "blob {digest} is longer than the {size} bytes promised"
            )));
        }
        let (_, found, bytes) = inner.finish();
        if bytes != size {
            return Err(mismatch(format!(
                "blob {digest} ends after {bytes} of the {size} bytes promised"
            )));
        }
        if found != digest {
            return Err(mismatch(format!("blob {digest} has the digest {found}")));
        }
        self.state = State::Verified;
        Ok(())
    }
}

fn mismatch(message: String) -> io::Error {
    Error::new(ErrorKind::DigestMismatch, message).into()
}

/// What became of reading a blob: this crate's own error as it is, another with the blob named.
pub(crate) fn reading(digest: Digest, e: io::Error) -> Error {
    e.downcast::<Error>().unwrap_or_else(|e| {
        Error::new(ErrorKind::Io, format!("cannot read blob {digest}")).with_source(e)
    })
}

fn read_retrying(inner: &mut impl Read, buf: &mut [u8]) -> io::Result<usize> {
    loop {
        match inner.read(buf) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

impl<R: Read> Read for Verified<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        let inner = match &mut self.state {
            State::Reading(inner) => inner,
            State::Verified => return Ok(0),
            State::Refused => {
                return Err(mismatch(format!(
                    "blob {} was found to be damaged",
                    self.promised.digest
                )));
            }
        };
        let left = self.promised.size.saturating_sub(inner.passed());
        let most = buf.len().min(usize::try_from(left).unwrap_or(buf.len()));
        let n = read_retrying(inner, buf.get_mut(..most).unwrap_or_default())?;
        if n == 0 || n as u64 == left {
            self.verify()?;
        }
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn promise(size: u64, bytes: &[u8]) -> Blob {
        Blob { digest: Digest::of(bytes), size }
    }

    fn read(bytes: &[u8], promised: Blob) -> Result<Vec<u8>> {
        Verified::new(bytes, promised).read_all(1 << 20)
    }

    #[test]
    fn gives_what_is_as_promised() {
        assert_eq!(read(b"hello", Blob::of(b"hello")).unwrap(), b"hello");
        assert_eq!(read(b"", Blob::of(b"")).unwrap(), b"");
        Verified::new(&b"hello"[..], Blob::of(b"hello")).read_all(5).unwrap();
    }

    #[test]
    fn refuses_another_size_or_digest() {
        for (bytes, promised, why) in [
            (&b"hell"[..], promise(5, b"hello"), "ends after 4 of the 5"),
            (b"hello!", promise(5, b"hello"), "longer than the 5"),
            (b"jello", promise(5, b"hello"), "has the digest"),
            (b"", promise(0, b"hello"), "has the digest"),
            (b"x", promise(0, b""), "longer than the 0"),
        ] {
            let e = read(bytes, promised).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::DigestMismatch);
            assert!(e.to_string().contains(why), "{e}");
            assert!(e.to_string().contains(&promised.digest.to_string()), "{e}");
            let e = Verified::new(bytes, promised).read_all(1 << 20).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::DigestMismatch);
        }
    }

    #[test]
    fn the_last_bytes_of_a_damaged_blob_are_never_given() {
        let mut r = Verified::new(&b"jello"[..], promise(5, b"hello"));
        let mut buf = [0; 3];
        assert_eq!(r.read(&mut buf).unwrap(), 3);
        assert!(r.read(&mut buf).is_err());
        assert!(r.read(&mut buf).is_err(), "and stays so");
    }

    #[test]
    fn a_promise_above_the_bound_is_refused_unread() {
        let e = Verified::new(io::empty(), promise(u64::MAX, b"")).read_all(4).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::LimitExceeded);
    }
}
