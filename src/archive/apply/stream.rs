//! The two ends of decompression: what is read is digested and counted, what comes out is digested,
//! counted and bounded.

use std::cell::Cell;
use std::io::{self, Read};

use super::ApplyLimits;
use crate::digest::{Digest, Hashing};
use crate::error::{Error, ErrorKind};

/// How much may come out before the ratio counts, in bytes.
const RATIO_FROM: u64 = 64 << 20;

/// The input as it comes.
pub(super) struct Tap<'a> {
    input: Hashing<&'a mut dyn Read>,
    /// Bytes read so far, for others to see.
    read: &'a Cell<u64>,
}

impl<'a> Tap<'a> {
    pub(super) fn new(input: &'a mut dyn Read, read: &'a Cell<u64>) -> Self {
        Tap { input: Hashing::new(input), read }
    }

    /// The digest and the size of all that was read.
    pub(super) fn finish(self) -> (Digest, u64) {
        let (_, digest, bytes) = self.input.finish();
        (digest, bytes)
    }
}

impl Read for Tap<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.input.read(buf)?;
        self.read.set(self.read.get().saturating_add(n as u64));
        Ok(n)
    }
}

/// The uncompressed archive; reading it fails where a limit is reached.
pub(super) struct Metered<'a, R> {
    stream: Hashing<R>,
    bytes: u64,
    max_bytes: u64,
    max_ratio: u64,
    ratio_from: u64,
    /// Bytes of input read.
    read: &'a Cell<u64>,
}

impl<'a, R: Read> Metered<'a, R> {
    pub(super) fn new(stream: R, limits: &ApplyLimits, read: &'a Cell<u64>) -> Self {
        Metered {
            stream: Hashing::new(stream),
            bytes: 0,
            max_bytes: limits.max_unpacked_bytes,
            max_ratio: limits.max_ratio,
            ratio_from: RATIO_FROM,
            read,
        }
    }

    /// The digest and the size of all that came.
    pub(super) fn finish(self) -> (Digest, u64) {
        let (_, digest, bytes) = self.stream.finish();
        (digest, bytes)
    }
}

impl<R: Read> Read for Metered<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.stream.read(buf)?;
        self.bytes = self.bytes.saturating_add(n as u64);
        let bytes = self.bytes;
        if bytes > self.max_bytes {
            let max = self.max_bytes;
            return Err(over(format!("the archive is over the limit max_unpacked_bytes of {max}")));
        }
        let ratio = self.max_ratio.saturating_mul(self.read.get());
        if bytes > self.ratio_from && bytes > ratio {
            let max = self.max_ratio;
            return Err(over(format!(
                "the archive is over {max} times as large as its compressed form, the limit max_ratio"
            )));
        }
        Ok(n)
    }
}

fn over(message: String) -> io::Error {
    Error::new(ErrorKind::LimitExceeded, message).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratio_counts_only_once_enough_came_out() {
        for (out, from, fails) in
            [(90_000, 50_000, true), (90_000, 100_000, false), (40_000, 0, false)]
        {
            let read = Cell::new(100);
            let limits = ApplyLimits { max_ratio: 500, ..ApplyLimits::default() };
            let mut stream = Metered::new(io::repeat(0).take(out), &limits, &read);
            stream.ratio_from = from;
            match io::copy(&mut stream, &mut io::sink()) {
                Ok(n) => assert!(!fails && n == out, "{out}"),
                Err(e) => assert!(fails && e.to_string().contains("max_ratio"), "{e}"),
            }
        }
    }
}
