//! Blocks of an archive on their way between threads.
//!
//! A [`Pool`] bounds how many blocks there are, and so the memory between two threads and how far
//! one runs ahead of the other. A block is shared, never copied: by the thread that digests it and
//! the one that makes use of it. Whoever lets go of it last sends its buffer home. The channels that
//! blocks travel in have room for all there are, so nobody ever waits to send one: the only wait of
//! the thread that fills them is [`Pool::take`], which lets it report meanwhile.

use std::io;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::mpsc::{
    Receiver, RecvTimeoutError, SyncSender, TryRecvError, TrySendError, sync_channel,
};
use std::thread::{Builder, Scope, ScopedJoinHandle};
use std::time::Duration;

use crate::digest::{Digest, Hashing};
use crate::error::{Error, ErrorKind, Result};

/// The size of a block, in bytes: it lies in the second-level cache of common processors while it
/// goes from one thread to the other.
pub(super) const BLOCK: usize = 256 * 1024;

/// How many blocks there are: enough that neither side waits where files are large for a while and
/// small for a while, and 4 MiB in all.
pub(super) const BLOCKS: usize = 16;

/// How long a caller's thread waits for others before it calls its progress callback again.
const TICK: Duration = Duration::from_millis(100);

/// A stretch of an archive.
#[derive(Debug)]
pub(super) struct Block {
    bytes: Vec<u8>,
    filled: usize,
    home: SyncSender<Vec<u8>>,
}

impl Deref for Block {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes.get(..self.filled).unwrap_or_default()
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        match self.home.try_send(std::mem::take(&mut self.bytes)) {
            // The pool may be gone, and with it the need for buffers; it has room for all.
            Ok(()) | Err(TrySendError::Disconnected(_) | TrySendError::Full(_)) => {}
        }
    }
}

/// The buffers of blocks.
#[derive(Debug)]
pub(super) struct Pool {
    size: usize,
    left_to_make: usize,
    free: Receiver<Vec<u8>>,
    home: SyncSender<Vec<u8>>,
}

impl Pool {
    /// A pool of [`BLOCKS`] blocks of `size` bytes, which are made when they are first needed.
    pub(super) fn new(size: usize) -> Self {
        let (home, free) = sync_channel(BLOCKS);
        Pool { size, left_to_make: BLOCKS, free, home }
    }

    /// An empty buffer, of the size of a block. While there is none, `meanwhile` is called from time to
    /// time, and ends the wait by its error.
    pub(super) fn take(&mut self, meanwhile: &mut dyn FnMut() -> Result<()>) -> Result<Vec<u8>> {
        match self.free.try_recv() {
            Ok(buffer) => return Ok(buffer),
            Err(TryRecvError::Empty | TryRecvError::Disconnected) => {}
        }
        if let Some(left) = self.left_to_make.checked_sub(1) {
            self.left_to_make = left;
            return Ok(vec![0; self.size]);
        }
        wait(&self.free, meanwhile)?.ok_or_else(broken_off)
    }

    /// A block of the first `filled` bytes of a buffer.
    pub(super) fn share(&self, bytes: Vec<u8>, filled: usize) -> Arc<Block> {
        Arc::new(Block { bytes, filled, home: self.home.clone() })
    }
}

/// What comes next out of a channel, none if nothing ever will. `meanwhile` is called from time to
/// time, and ends the wait by its error.
pub(super) fn wait<T>(
    from: &Receiver<T>,
    meanwhile: &mut dyn FnMut() -> Result<()>,
) -> Result<Option<T>> {
    loop {
        match from.recv_timeout(TICK) {
            Ok(value) => return Ok(Some(value)),
            Err(RecvTimeoutError::Timeout) => meanwhile()?,
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
        }
    }
}

/// A channel with room for all the blocks of a pool, and for a last word.
pub(super) fn channel<T>() -> (SyncSender<T>, Receiver<T>) {
    sync_channel(BLOCKS + 1)
}

/// Digests blocks in the order in which it gets them.
#[derive(Debug)]
pub(super) enum Digester<'scope> {
    /// On the thread that hands them over.
    Here(Hashing<()>),
    /// On one of its own.
    There { blocks: SyncSender<Arc<Block>>, thread: ScopedJoinHandle<'scope, (Digest, u64)> },
}

impl<'scope> Digester<'scope> {
    pub(super) fn here() -> Self {
        Digester::Here(Hashing::new(()))
    }

    /// # Errors
    /// EAGAIN where this process may have no more threads.
    pub(super) fn spawn(scope: &'scope Scope<'scope, '_>) -> io::Result<Self> {
        let (blocks, sent) = channel::<Arc<Block>>();
        let thread =
            Builder::new().name("stratafs-digest".to_owned()).spawn_scoped(scope, || {
                let mut hashing = Hashing::new(());
                for block in sent {
                    hashing.count(&block);
                }
                let ((), digest, bytes) = hashing.finish();
                (digest, bytes)
            })?;
        Ok(Digester::There { blocks, thread })
    }

    pub(super) fn take(&mut self, block: Arc<Block>) -> Result<()> {
        match self {
            Digester::Here(hashing) => {
                hashing.count(&block);
                Ok(())
            }
            Digester::There { blocks, .. } => blocks.send(block).map_err(|_| broken_off()),
        }
    }

    /// The digest and the size of all that it got.
    pub(super) fn finish(self) -> Result<(Digest, u64)> {
        match self {
            Digester::Here(hashing) => {
                let ((), digest, bytes) = hashing.finish();
                Ok((digest, bytes))
            }
            Digester::There { blocks, thread } => {
                drop(blocks);
                thread.join().map_err(|_| broken_off())
            }
        }
    }
}

/// The error for a thread that ended without a result: it panicked, and said so on standard error.
pub(super) fn broken_off() -> Error {
    Error::new(ErrorKind::Io, "a thread that worked on the archive broke off")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_has_so_many_blocks_and_no_more() {
        let mut pool = Pool::new(8);
        let held: Vec<_> = (0..BLOCKS)
            .map(|_| {
                let buffer = pool.take(&mut || Ok(())).unwrap();
                pool.share(buffer, 8)
            })
            .collect();
        let mut waits = 0;
        let e = pool.take(&mut || {
            waits += 1;
            if waits == 2 { Err(broken_off()) } else { Ok(()) }
        });
        assert!(e.is_err() && waits == 2);
        drop(held);
        assert_eq!(pool.take(&mut || Ok(())).unwrap().len(), 8);
    }

    #[test]
    fn a_block_is_digested_while_others_hold_it() {
        let mut pool = Pool::new(4);
        let digest = std::thread::scope(|scope| {
            let mut digester = Digester::spawn(scope).unwrap();
            let mut buffer = pool.take(&mut || Ok(())).unwrap();
            buffer.copy_from_slice(b"abcd");
            let block = pool.share(buffer, 3);
            digester.take(Arc::clone(&block)).unwrap();
            assert_eq!(&**block, b"abc");
            digester.finish().unwrap()
        });
        assert_eq!(digest, (Digest::of(b"abc"), 3));
    }

    #[test]
    fn a_thread_that_panics_is_an_error() {
        std::thread::scope(|scope| {
            let (blocks, sent) = channel();
            let thread = scope.spawn(move || {
                drop(sent);
                panic!("on purpose");
            });
            let mut digester = Digester::There { blocks, thread };
            let pool = Pool::new(1);
            while digester.take(pool.share(vec![0], 1)).is_ok() {}
            assert!(digester.finish().is_err());
        });
    }
}
