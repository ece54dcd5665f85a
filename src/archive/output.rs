//! Where an archive that is being packed goes: gathered in blocks, digested, written.
//!
//! The caller's thread reads files right into a block and writes full blocks out; with the first full
//! one a thread starts that digests them meanwhile, if that is wanted. At most
//! [`BLOCKS`](super::blocks::BLOCKS) blocks are under way.

use std::io::{self, Read, Write};
use std::thread::Scope;

use super::blocks::{BLOCK, Digester, Pool};
use super::entry::Sink;
use crate::digest::Digest;
use crate::error::{IoContext, Result};

/// An archive on its way out.
pub(super) struct Output<'scope, 'env, 'out> {
    out: &'out mut dyn Write,
    pool: Pool,
    block: Vec<u8>,
    filled: usize,
    digester: Digester<'scope>,
    /// Where to start a thread, while none was started that is wanted.
    scope: Option<&'scope Scope<'scope, 'env>>,
}

impl<'scope, 'env, 'out> Output<'scope, 'env, 'out> {
    /// With `scope`, digests on a thread of its own.
    pub(super) fn new(
        out: &'out mut dyn Write,
        scope: Option<&'scope Scope<'scope, 'env>>,
    ) -> Self {
        let pool = Pool::new(BLOCK);
        Output { out, pool, block: Vec::new(), filled: 0, digester: Digester::here(), scope }
    }

    /// Writes what is left; returns the digest and the size of all.
    pub(super) fn finish(mut self) -> Result<(Digest, u64)> {
        // A small archive needs no thread.
        self.scope = None;
        self.send().and_then(|()| self.out.flush()).at("write the end of", "the archive")?;
        self.digester.finish()
    }

    /// Digests and writes the block.
    fn send(&mut self) -> io::Result<()> {
        if let Some(scope) = self.scope.take() {
            match Digester::spawn(scope) {
                Ok(digester) => self.digester = digester,
                Err(e) => tracing::debug!(error = %e, "no thread to digest on"),
            }
        }
        let filled = std::mem::take(&mut self.filled);
        let block = self.pool.share(std::mem::take(&mut self.block), filled);
        self.digester.take(std::sync::Arc::clone(&block))?;
        self.out.write_all(&block)
    }

    /// Room in the block, at least a byte.
    fn room(&mut self) -> io::Result<&mut [u8]> {
        if self.filled >= self.block.len() {
            if self.filled > 0 {
                self.send()?;
            }
            self.block = self.pool.take(&mut || Ok(()))?;
        }
        Ok(self.block.get_mut(self.filled..).unwrap_or_default())
    }
}

impl Write for Output<'_, '_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut room = self.room()?;
        let n = room.write(bytes)?;
        self.filled = self.filled.saturating_add(n);
        Ok(n)
    }

    /// Full blocks alone are written, but for the last.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Sink for Output<'_, '_, '_> {
    fn take_from(&mut self, content: &mut dyn Read, most: u64) -> io::Result<(usize, usize)> {
        let room = self.room()?;
        let most = usize::try_from(most).unwrap_or(usize::MAX).min(room.len());
        let n = content.read(room.get_mut(..most).unwrap_or_default())?;
        self.filled = self.filled.saturating_add(n);
        Ok((n, most))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_is_written_comes_out_digested_on_any_thread() {
        for size in [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7] {
            let bytes: Vec<u8> = (0..size).map(|i| u8::try_from(i % 251).unwrap()).collect();
            for threaded in [false, true] {
                let mut out = Vec::new();
                let done = std::thread::scope(|scope| {
                    let mut output = Output::new(&mut out, threaded.then_some(scope));
                    let (head, rest) = bytes.split_at(size / 3);
                    output.write_all(head).unwrap();
                    let mut rest = rest;
                    while output.take_from(&mut rest, 1000).unwrap().0 > 0 {}
                    output.finish().unwrap()
                });
                assert_eq!(done, (Digest::of(&bytes), bytes.len() as u64));
                assert!(out == bytes, "{size} {threaded}");
            }
        }
    }

    #[test]
    fn an_error_of_the_writer_ends_it_and_the_thread() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let written = std::thread::scope(|scope| {
            let mut full = Full;
            let mut output = Output::new(&mut full, Some(scope));
            output.write_all(&vec![0; 2 * BLOCK])
        });
        assert_eq!(written.unwrap_err().kind(), io::ErrorKind::StorageFull);
    }
}
