//! Content digests, and the two identities that OCI builds from them.
//!
//! - [`Digest`]: SHA-256 of a blob as stored or sent.
//! - [`DiffId`]: SHA-256 of a layer's uncompressed tar.
//! - [`ChainId`]: the identity of a layer together with all layers below it; the name under which
//!   an imported layer is committed, so that images share what they have in common.
//!
//! Source: OCI image specification, `config.md`, "Layer DiffID" and "Layer ChainID".

use std::fmt;
use std::io::{self, Read, Write};
use std::str::FromStr;

use sha2::{Digest as _, Sha256};

use crate::error::{Error, ErrorKind, Result};

/// A SHA-256 digest, written `sha256:<64 hexadecimal digits>`.
///
/// ```
/// let d: stratafs::Digest =
///     "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855".parse()?;
/// assert_eq!(d, stratafs::Digest::of(b""));
/// # Ok::<(), stratafs::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Digest(Sha256::digest(bytes).into())
    }

    /// A digest that was kept as its 32 bytes.
    pub(crate) fn from_bytes(bytes: [u8; 32]) -> Self {
        Digest(bytes)
    }

    /// The 32 bytes.
    pub(crate) fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The 64 lower-case hexadecimal digits, without the algorithm.
    pub fn hex(&self) -> String {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let digit = |n: u8| DIGITS.get(usize::from(n & 15)).copied().map_or('0', char::from);
        self.0.iter().flat_map(|b| [digit(b >> 4), digit(*b)]).collect()
    }

    /// Reads 64 lower-case hexadecimal digits.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for anything else.
    pub fn from_hex(hex: &str) -> Result<Self> {
        let bad = || {
            Error::new(
                ErrorKind::InvalidArgument,
                format!("{hex:?} is not a sha256 digest: 64 lower-case hexadecimal digits needed"),
            )
        };
        let digit = |c: u8| match c {
            b'0'..=b'9' => Ok(c - b'0'),
            b'a'..=b'f' => Ok(c - b'a' + 10),
            _ => Err(bad()),
        };
        let mut out = [0; 32];
        let (pairs, rest) = hex.as_bytes().as_chunks::<2>();
        if pairs.len() != out.len() || !rest.is_empty() {
            return Err(bad());
        }
        for (byte, [high, low]) in out.iter_mut().zip(pairs) {
            *byte = digit(*high)? << 4 | digit(*low)?;
        }
        Ok(Digest(out))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = Error;

    /// # Errors
    /// [`ErrorKind::Unsupported`] for an algorithm other than sha256, else
    /// [`ErrorKind::InvalidArgument`].
    fn from_str(s: &str) -> Result<Self> {
        match s.split_once(':') {
            Some(("sha256", hex)) => Digest::from_hex(hex),
            Some((algorithm, _)) if !algorithm.is_empty() => Err(Error::new(
                ErrorKind::Unsupported,
                format!("digest algorithm {algorithm:?} is not supported: only sha256 is"),
            )),
            _ => Err(Error::new(
                ErrorKind::InvalidArgument,
                format!("{s:?} is not a digest: it must look like sha256:<hexadecimal digits>"),
            )),
        }
    }
}

macro_rules! identity {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Digest);

        impl $name {
            /// The digest itself.
            pub fn digest(&self) -> &Digest {
                &self.0
            }
        }

        impl From<Digest> for $name {
            fn from(d: Digest) -> Self {
                $name(d)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = Error;

            fn from_str(s: &str) -> Result<Self> {
                s.parse().map($name)
            }
        }
    };
}

identity! {
    /// The digest of a layer's uncompressed tar.
    DiffId
}

identity! {
    /// The identity of a layer on top of its parents.
    ChainId
}

impl ChainId {
    /// The chain id of the layer `diff` on top of `parent`.
    ///
    /// ```
    /// # use stratafs::{ChainId, DiffId, Digest};
    /// let base = ChainId::new(None, DiffId::from(Digest::of(b"base")));
    /// assert_eq!(base.digest(), &Digest::of(b"base"));
    /// let next = ChainId::new(Some(base), DiffId::from(Digest::of(b"next")));
    /// let text = format!("{} {}", Digest::of(b"base"), Digest::of(b"next"));
    /// assert_eq!(next.digest(), &Digest::of(text.as_bytes()));
    /// ```
    pub fn new(parent: Option<ChainId>, diff: DiffId) -> ChainId {
        match parent {
            None => ChainId(diff.0),
            Some(parent) => ChainId(Digest::of(format!("{parent} {diff}").as_bytes())),
        }
    }
}

/// Counts and digests what passes through: wrap a reader or a writer in it.
#[derive(Debug)]
pub(crate) struct Hashing<T> {
    inner: T,
    hasher: Sha256,
    bytes: u64,
}

impl<T> Hashing<T> {
    pub(crate) fn new(inner: T) -> Self {
        Hashing { inner, hasher: Sha256::new(), bytes: 0 }
    }

    /// What passed through so far, in bytes.
    pub(crate) fn passed(&self) -> u64 {
        self.bytes
    }

    /// The inner value, the digest of all that passed, and its size in bytes.
    pub(crate) fn finish(self) -> (T, Digest, u64) {
        (self.inner, Digest(self.hasher.finalize().into()), self.bytes)
    }

    /// Counts and digests bytes that pass by another way.
    pub(crate) fn count(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.bytes = self.bytes.saturating_add(bytes.len() as u64);
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.count(buf.get(..n).unwrap_or_default());
        Ok(n)
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(buf)?;
        self.count(buf.get(..n).unwrap_or_default());
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_read_back_as_written() {
        let d = Digest::of(b"x");
        assert_eq!(d.to_string().parse::<Digest>().unwrap(), d);
    }

    #[test]
    fn refuses_what_is_not_a_digest() {
        for (text, kind) in [
            ("", ErrorKind::InvalidArgument),
            ("sha256", ErrorKind::InvalidArgument),
            ("sha256:", ErrorKind::InvalidArgument),
            ("sha256:ab", ErrorKind::InvalidArgument),
            ("sha512:ab", ErrorKind::Unsupported),
            (":ab", ErrorKind::InvalidArgument),
        ] {
            assert_eq!(text.parse::<Digest>().unwrap_err().kind(), kind, "{text:?}");
        }
        let upper = Digest::of(b"").to_string().to_uppercase().replace("SHA", "sha");
        assert!(upper.parse::<Digest>().is_err());
        assert!(format!("{}0", Digest::of(b"")).parse::<Digest>().is_err());
    }

    #[test]
    fn hashing_counts_what_passes() {
        let mut r = Hashing::new(&b"hello"[..]);
        io::copy(&mut r, &mut io::sink()).unwrap();
        let (_, digest, bytes) = r.finish();
        assert_eq!((digest, bytes), (Digest::of(b"hello"), 5));
    }
}
