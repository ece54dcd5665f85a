//! Who hears how far unpacking has come, and may stop it.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::error::{Error, ErrorKind, Result};
use crate::progress::{self, Phase, Progress, ProgressFn};

/// Told by whoever makes the entries, of each and in the middle of long work.
pub(super) trait Watch {
    /// So many entries were begun. An error is the word to stop.
    fn entries(&mut self, entries: u64) -> Result<()>;

    /// Something went on.
    fn moved(&mut self) -> Result<()>;
}

/// Calls the callback, of a call that does everything on its caller's thread.
pub(super) struct Caller<'a, 'p> {
    /// Bytes of input read.
    read: &'a Cell<u64>,
    progress: &'a mut ProgressFn<'p>,
    entries: u64,
}

impl<'a, 'p> Caller<'a, 'p> {
    pub(super) fn new(read: &'a Cell<u64>, progress: &'a mut ProgressFn<'p>) -> Self {
        Caller { read, progress, entries: 0 }
    }
}

impl Watch for Caller<'_, '_> {
    fn entries(&mut self, entries: u64) -> Result<()> {
        self.entries = entries;
        self.moved()
    }

    fn moved(&mut self) -> Result<()> {
        tell(self.progress, self.read.get(), self.entries)
    }
}

pub(super) fn tell(progress: &mut ProgressFn<'_>, bytes: u64, entries: u64) -> Result<()> {
    let mut report = Progress::new(Phase::Apply);
    (report.bytes, report.entries) = (bytes, entries);
    progress::report(progress, report)
}

/// What the thread that makes the entries and the caller's tell each other.
///
/// Two plain words: neither orders anything else, so relaxed loads and stores are enough.
#[derive(Debug, Default)]
pub(super) struct Shared {
    entries: AtomicU64,
    stop: AtomicBool,
}

impl Shared {
    pub(super) fn entries(&self) -> u64 {
        self.entries.load(Ordering::Relaxed)
    }

    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Watch for &Shared {
    fn entries(&mut self, entries: u64) -> Result<()> {
        self.entries.store(entries, Ordering::Relaxed);
        self.moved()
    }

    fn moved(&mut self) -> Result<()> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Cancelled, "stopped by the caller's thread"));
        }
        Ok(())
    }
}
