//! Which threads read, digest and unpack an archive.
//!
//! ```text
//! caller's thread                          digester            unpacker
//! input -> digest of the blob (if it is
//! compressed) -> decompress -> blocks  --> digest of the
//!   calls the progress callback        \    archive
//!                                       -----------------> entries -> files
//! ```
//!
//! - The caller's thread alone touches the input and calls the callback, so neither need be `Send`.
//! - Blocks go to both others in order ([`blocks`](crate::archive::blocks)), and are bounded in
//!   number: the input is read at most 4 MiB ahead of what was unpacked.
//! - The unpacker hears of an error of the input where it stands in the archive, behind what was read
//!   before it. So whichever of the two fails first fails the call, as if all were one thread.
//! - A callback that breaks stops the unpacker between two entries or blocks.
//! - A thread that ends early drops its end of the channel, which ends the others: nobody is waited
//!   for who cannot come.
//!
//! All of it happens on the caller's thread where [`ApplyOptions::threads`] says so, where the archive
//! is so small that it fits a block, and where this process may have no more threads.

use std::io;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::{Builder, Scope, ScopedJoinHandle};

use super::stream::{BlockReader, Blocks, Feed, Meter, Metered, Tap};
use super::watch::{Caller, Shared, tell};
use super::{ApplyOptions, LayerTarget, Unpack, Unpacked};
use crate::archive::blocks::{BLOCK, Block, Digester, Pool, broken_off, channel, wait};
use crate::archive::record::Capture;
use crate::compression::{Compression, Decompressor};
use crate::digest::{Digest, Hashing};
use crate::error::Result;
use crate::progress::ProgressFn;
use crate::sys::dir::Dir;

/// What came of an archive.
pub(super) struct Outcome {
    pub(super) unpacked: Unpacked,
    /// The digest of the uncompressed archive, and its size.
    pub(super) archive: (Digest, u64),
    /// The digest of the input as it came, and its size.
    pub(super) blob: (Digest, u64),
}

/// One archive to unpack, and where to.
#[derive(Clone, Copy)]
pub(super) struct Job<'a> {
    pub(super) root: &'a Dir,
    pub(super) target: LayerTarget,
    pub(super) options: &'a ApplyOptions,
    /// Where it is written down what it takes to give the archive back.
    pub(super) capture: Option<&'a Mutex<Capture>>,
    /// The size of blocks; other than [`BLOCK`] in tests only.
    pub(super) block: usize,
}

impl<'a> Job<'a> {
    pub(super) fn new(
        root: &'a Dir,
        target: LayerTarget,
        options: &'a ApplyOptions,
        capture: Option<&'a Mutex<Capture>>,
    ) -> Self {
        Job { root, target, options, capture, block: BLOCK }
    }

    /// Does it.
    pub(super) fn run(
        self,
        input: &mut dyn io::Read,
        progress: &mut ProgressFn<'_>,
    ) -> Result<Outcome> {
        let meter = Meter::default();
        let mut tap = Tap::new(input, &meter);
        let stream = Decompressor::new(&mut tap)?;
        meter.plain.set(stream.compression() == Compression::None);
        let mut feed = Feed::new(Metered::new(stream, &self.options.limits, &meter));
        let (unpacked, archive) = self.unpack(&mut feed, &meter, progress)?;
        drop(feed);
        let blob = tap.finish().unwrap_or(archive.0);
        Ok(Outcome { unpacked, archive, blob: (blob, meter.read.get()) })
    }

    fn unpack<R: io::Read>(
        self,
        feed: &mut Feed<R>,
        meter: &Meter,
        progress: &mut ProgressFn<'_>,
    ) -> Result<(Unpacked, (Digest, u64))> {
        let mut pool = Pool::new(self.block);
        let mut first = pool.take(&mut || Ok(()))?;
        let filled = feed.fill(&mut first);
        let small = !matches!(filled, Ok(n) if n == first.len());
        if self.options.threads > 1 && !small {
            let shared = Shared::default();
            let done = std::thread::scope(|scope| -> Result<_> {
                let Ok(crew) = Crew::hire(scope, self, &shared) else {
                    tracing::debug!("no more threads to be had: unpacking on the caller's");
                    return Ok(None);
                };
                let first = pool.share(std::mem::take(&mut first), self.block);
                let mut report = || tell(progress, meter.read.get(), shared.entries());
                crew.work(first, feed, &mut pool, &mut report).map(Some)
            })?;
            if let Some(done) = done {
                return Ok(done);
            }
        }
        let blocks =
            Here { feed, hashing: Hashing::new(()), filled: Some(filled), block: first, len: 0 };
        let mut blocks = BlockReader::new(blocks);
        let unpacked = Unpack::all(self, &mut blocks, &mut Caller::new(&meter.read, progress))?;
        let ((), digest, bytes) = blocks.into_inner().hashing.finish();
        Ok((unpacked, (digest, bytes)))
    }
}

/// Blocks that are filled when they are asked for.
struct Here<'a, R> {
    feed: &'a mut Feed<R>,
    hashing: Hashing<()>,
    /// What came of filling the first one.
    filled: Option<io::Result<usize>>,
    block: Vec<u8>,
    len: usize,
}

impl<R: io::Read> Blocks for Here<'_, R> {
    fn advance(&mut self) -> io::Result<()> {
        self.len = 0;
        self.len = match self.filled.take() {
            Some(first) => first,
            None => self.feed.fill(&mut self.block),
        }?;
        self.hashing.count(self.block.get(..self.len).unwrap_or_default());
        Ok(())
    }

    fn block(&self) -> &[u8] {
        self.block.get(..self.len).unwrap_or_default()
    }
}

/// What the unpacker gets: a block, the end (none), or the error that stands in its place.
type Sent = io::Result<Option<Arc<Block>>>;

/// Blocks that another thread fills.
struct There {
    sent: Receiver<Sent>,
    block: Option<Arc<Block>>,
    ended: bool,
}

impl Blocks for There {
    fn advance(&mut self) -> io::Result<()> {
        // Before the wait: the buffer may be what the other thread waits for.
        self.block = None;
        if !self.ended {
            self.block = self.sent.recv().unwrap_or_else(|_| Err(broken_off().into()))?;
            self.ended = self.block.is_none();
        }
        Ok(())
    }

    fn block(&self) -> &[u8] {
        self.block.as_deref().map_or(&[], |block| block)
    }
}

/// The threads beside the caller's, and what leads to them.
struct Crew<'scope> {
    digester: Digester<'scope>,
    blocks: SyncSender<Sent>,
    unpacker: ScopedJoinHandle<'scope, Result<Unpacked>>,
    /// Nothing ever comes, until the unpacker ends.
    done: Receiver<()>,
    shared: &'scope Shared,
}

impl<'scope> Crew<'scope> {
    /// # Errors
    /// EAGAIN where this process may have no more threads.
    fn hire<'env>(
        scope: &'scope Scope<'scope, 'env>,
        job: Job<'env>,
        shared: &'env Shared,
    ) -> io::Result<Self> {
        let digester = match job.options.threads {
            0..=2 => Digester::here(),
            _ => Digester::spawn(scope)?,
        };
        let (blocks, sent) = channel();
        let (working, done) = sync_channel(0);
        let builder = Builder::new().name("stratafs-unpack".to_owned());
        let unpacker = builder.spawn_scoped(scope, move || {
            let _working: SyncSender<()> = working;
            let mut blocks = BlockReader::new(There { sent, block: None, ended: false });
            Unpack::all(job, &mut blocks, &mut &*shared)
        })?;
        Ok(Crew { digester, blocks, unpacker, done, shared })
    }

    /// Feeds the others to the end, and waits for what they made of it.
    fn work<R: io::Read>(
        mut self,
        first: Arc<Block>,
        feed: &mut Feed<R>,
        pool: &mut Pool,
        report: &mut dyn FnMut() -> Result<()>,
    ) -> Result<(Unpacked, (Digest, u64))> {
        let fed = self.feed(first, feed, pool, report);
        drop(self.blocks);
        let waited = fed.and_then(|()| wait(&self.done, report));
        if waited.is_err() {
            self.shared.stop();
        }
        let unpacked = self.unpacker.join().unwrap_or_else(|_| Err(broken_off()));
        waited?;
        let unpacked = unpacked?;
        // The last word on how many entries there were.
        report()?;
        Ok((unpacked, self.digester.finish()?))
    }

    /// Fills and sends blocks to the end of the archive, or until nobody wants them.
    fn feed<R: io::Read>(
        &mut self,
        first: Arc<Block>,
        feed: &mut Feed<R>,
        pool: &mut Pool,
        report: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let mut next = Ok(Some(first));
        loop {
            let block = match &next {
                Ok(Some(block)) => Some(Arc::clone(block)),
                _ => None,
            };
            if self.blocks.send(next).is_err() {
                // It failed, and will say why.
                return Ok(());
            }
            let Some(block) = block else {
                return Ok(());
            };
            self.digester.take(block)?;
            report()?;
            let mut buffer = pool.take(report)?;
            next = match feed.fill(&mut buffer) {
                Ok(0) => Ok(None),
                Ok(filled) => Ok(Some(pool.share(buffer, filled))),
                Err(e) => Err(e),
            };
        }
    }
}
