//! From the input to the blocks that entries are cut from.
//!
//! [`Tap`] counts and digests what is read; the decompressor reads from it; [`Metered`] counts what
//! comes out and bounds it; [`Feed`] fills whole blocks with that. A block is full but for the last
//! one, and an error comes behind all that was read before it: so what the entries are cut from does
//! not depend on how the input came in, nor on which threads there are. [`BlockReader`] is the other
//! end.
//!
//! Everything is digested once: the blob of a plain archive is the archive, so there [`Tap`] leaves
//! it to whoever digests the blocks.

use std::cell::Cell;
use std::io::{self, BufRead, Read};

use super::ApplyLimits;
use crate::digest::{Digest, Hashing};
use crate::error::{Error, ErrorKind};

/// How much may come out before the ratio counts, in bytes.
const RATIO_FROM: u64 = 64 << 20;

/// What the two ends of decompression tell each other, on one thread.
#[derive(Debug, Default)]
pub(super) struct Meter {
    /// Bytes of input read.
    pub(super) read: Cell<u64>,
    /// The input need not be digested: it is what comes out.
    pub(super) plain: Cell<bool>,
}

/// The input as it comes.
pub(super) struct Tap<'a> {
    input: &'a mut dyn Read,
    hashing: Hashing<()>,
    meter: &'a Meter,
}

impl<'a> Tap<'a> {
    pub(super) fn new(input: &'a mut dyn Read, meter: &'a Meter) -> Self {
        Tap { input, hashing: Hashing::new(()), meter }
    }

    /// The digest of all that was read; none for a plain archive.
    pub(super) fn finish(self) -> Option<Digest> {
        let ((), digest, _) = self.hashing.finish();
        (!self.meter.plain.get()).then_some(digest)
    }
}

impl Read for Tap<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.input.read(buf)?;
        if !self.meter.plain.get() {
            self.hashing.count(buf.get(..n).unwrap_or_default());
        }
        self.meter.read.set(self.meter.read.get().saturating_add(n as u64));
        Ok(n)
    }
}

/// The uncompressed archive; reading it fails where a limit is reached.
pub(super) struct Metered<'a, R> {
    stream: R,
    bytes: u64,
    max_bytes: u64,
    /// More came than that.
    beyond: bool,
    max_ratio: u64,
    ratio_from: u64,
    meter: &'a Meter,
}

impl<'a, R: Read> Metered<'a, R> {
    pub(super) fn new(stream: R, limits: &ApplyLimits, meter: &'a Meter) -> Self {
        Metered {
            stream,
            bytes: 0,
            max_bytes: limits.max_unpacked_bytes,
            beyond: false,
            max_ratio: limits.max_ratio,
            ratio_from: RATIO_FROM,
            meter,
        }
    }
}

impl<R: Read> Read for Metered<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut n = match self.beyond {
            false => self.stream.read(buf)?,
            true => 0,
        };
        // What is within the limit passes, however it was read.
        let within = self.max_bytes.saturating_sub(self.bytes);
        if n as u64 > within {
            self.beyond = true;
            n = usize::try_from(within).unwrap_or(n);
        }
        if self.beyond && n == 0 {
            let max = self.max_bytes;
            return Err(over(format!("the archive is over the limit max_unpacked_bytes of {max}")));
        }
        self.bytes = self.bytes.saturating_add(n as u64);
        let bytes = self.bytes;
        let ratio = self.max_ratio.saturating_mul(self.meter.read.get());
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

/// Fills blocks from a reader.
pub(super) struct Feed<R> {
    stream: R,
    /// What the next block fails with: it came when there was something in this one.
    failed: Option<io::Error>,
}

impl<R: Read> Feed<R> {
    pub(super) fn new(stream: R) -> Self {
        Feed { stream, failed: None }
    }

    /// Fills `block` from its start, and returns how much of it: less than all only at the end or
    /// before an error, 0 at the end alone.
    pub(super) fn fill(&mut self, block: &mut [u8]) -> io::Result<usize> {
        if let Some(e) = self.failed.take() {
            return Err(e);
        }
        let mut filled = 0;
        while let Some(space @ [_, ..]) = block.get_mut(filled..) {
            match self.stream.read(space) {
                Ok(0) => break,
                Ok(n) => filled = filled.saturating_add(n),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if filled == 0 => return Err(e),
                Err(e) => {
                    self.failed = Some(e);
                    break;
                }
            }
        }
        Ok(filled)
    }
}

/// Where blocks come from.
pub(super) trait Blocks {
    /// Goes on to the next block, or to an empty one at the end.
    fn advance(&mut self) -> io::Result<()>;

    /// The block.
    fn block(&self) -> &[u8];
}

/// The archive's bytes, block by block, without a copy for whoever takes them from the buffer.
pub(super) struct BlockReader<B> {
    blocks: B,
    /// How much of the block has been read.
    at: usize,
}

impl<B: Blocks> BlockReader<B> {
    pub(super) fn new(blocks: B) -> Self {
        BlockReader { blocks, at: 0 }
    }

    pub(super) fn into_inner(self) -> B {
        self.blocks
    }
}

impl<B: Blocks> BufRead for BlockReader<B> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at >= self.blocks.block().len() {
            self.blocks.advance()?;
            self.at = 0;
        }
        Ok(self.blocks.block().get(self.at..).unwrap_or_default())
    }

    fn consume(&mut self, n: usize) {
        self.at = self.at.saturating_add(n);
    }
}

impl<B: Blocks> Read for BlockReader<B> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.fill_buf()?.read(buf)?;
        self.consume(n);
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratio_counts_only_once_enough_came_out() {
        for (out, from, fails) in
            [(90_000, 50_000, true), (90_000, 100_000, false), (40_000, 0, false)]
        {
            let meter = Meter::default();
            meter.read.set(100);
            let limits = ApplyLimits { max_ratio: 500, ..ApplyLimits::default() };
            let mut stream = Metered::new(io::repeat(0).take(out), &limits, &meter);
            stream.ratio_from = from;
            match io::copy(&mut stream, &mut io::sink()) {
                Ok(n) => assert!(!fails && n == out, "{out}"),
                Err(e) => assert!(fails && e.to_string().contains("max_ratio"), "{e}"),
            }
        }
    }
}
