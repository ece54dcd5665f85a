//! The layers of an image, unpacked side by side and committed in order.
//!
//! Each worker takes the next layer that nobody has, the lowest first, and unpacks it in a place of its
//! own; then it waits until the layer below is committed ([`Below`]), gives the directories that the
//! archive has no entry for the attributes that they have there, and commits. Who waits, waits for
//! layers that were taken before, so there is always one that does not. The result is that of one layer
//! after the other.
//!
//! The callback is the calling thread's: workers send it what they do, and wait while it is behind. When
//! it says stop, and when a layer fails, those that wait give up, and those that unpack stop at their
//! next report.

use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread;

use crate::archive::Below;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::progress::{Phase, Progress, ProgressFn, report};

/// The most layers that are unpacked at once by default: each takes memory and descriptors.
const DEFAULT_MAX: usize = 8;
/// How many reports may wait for the callback.
const QUEUE: usize = 64;
/// A worker tells of its progress after so many entries, or bytes.
const TELL_ENTRIES: u64 = 32;
const TELL_BYTES: u64 = 256 << 10;

/// A layer to be brought in.
pub(super) trait Layer: Sync {
    /// Its size as stored, in bytes.
    fn size(&self) -> u64;

    /// Unpacks and commits it, unless it is there; whether it did.
    fn bring(&self, below: &Below, progress: &mut ProgressFn<'_>) -> Result<bool>;

    /// It is there: tells the one above where it and those below it are.
    fn tell(&self, above: &Below) -> Result<()>;
}

/// How many layers are unpacked at once if the caller has no wish.
pub(super) fn default_threads() -> NonZeroUsize {
    let most = NonZeroUsize::new(DEFAULT_MAX).unwrap_or(NonZeroUsize::MIN);
    thread::available_parallelism().unwrap_or(NonZeroUsize::MIN).min(most)
}

/// Brings all layers in, given with the lowest first, whose parent is there. Gives the indices of those
/// that were not there, in order, after a failure too.
pub(super) fn bring_all<L: Layer>(
    layers: &[L],
    parent: &Below,
    threads: NonZeroUsize,
    progress: &mut ProgressFn<'_>,
) -> (Vec<usize>, Result<()>) {
    let below = (0..layers.len()).map(|n| if n == 0 { parent.clone() } else { Below::default() });
    let work = Work {
        layers,
        below: below.collect(),
        next: AtomicUsize::new(0),
        stopped: AtomicBool::new(false),
        brought: Mutex::new(Vec::new()),
    };
    let mut sum = Sum::new(layers);
    let done = match threads.get().min(layers.len()) {
        0 => Ok(()),
        1 => (0..layers.len()).try_for_each(|n| {
            work.one(n, &mut |did| {
                sum.update(n, did);
                progress(sum.progress)
            })
        }),
        threads => work.side_by_side(threads, sum, progress),
    };
    (work.brought.into_inner().unwrap_or_else(PoisonError::into_inner), done)
}

/// What the workers share.
struct Work<'l, L> {
    layers: &'l [L],
    /// For each layer, what is below it.
    below: Vec<Below>,
    next: AtomicUsize,
    stopped: AtomicBool,
    brought: Mutex<Vec<usize>>,
}

/// What a worker tells of a layer.
enum News {
    Did(usize, Progress),
    Failed(usize, Error),
}

impl<L: Layer> Work<'_, L> {
    fn side_by_side(
        &self,
        threads: usize,
        mut sum: Sum,
        progress: &mut ProgressFn<'_>,
    ) -> Result<()> {
        let (tell, news) = sync_channel(QUEUE);
        thread::scope(|scope| {
            for n in 0..threads {
                let tell = tell.clone();
                let worker = thread::Builder::new().name(format!("import-{n}"));
                match worker.spawn_scoped(scope, move || self.run(&tell)) {
                    Ok(_) => {}
                    Err(e) if n == 0 => return Err(e).at("start a thread", "to unpack a layer"),
                    // Fewer do as well.
                    Err(e) => {
                        tracing::debug!(error = %e, "no more threads for an import");
                        break;
                    }
                }
            }
            drop(tell);
            let mut cancelled = Ok(());
            let mut failed: Option<(usize, Error)> = None;
            for news in news {
                match news {
                    News::Did(layer, did) => {
                        sum.update(layer, did);
                        if cancelled.is_ok() {
                            cancelled = report(progress, sum.progress);
                            if cancelled.is_err() {
                                self.stop();
                            }
                        }
                    }
                    News::Failed(layer, e) => {
                        if failed.as_ref().is_none_or(|(lowest, _)| layer < *lowest) {
                            failed = Some((layer, e));
                        }
                    }
                }
            }
            cancelled.and(failed.map_or(Ok(()), |(_, e)| Err(e)))
        })
    }

    /// A worker: takes layers until there are none left.
    fn run(&self, tell: &SyncSender<News>) {
        // Who is told is gone only when the whole import is.
        let send = |news| tell.send(news).is_ok();
        loop {
            let layer = self.next.fetch_add(1, Ordering::Relaxed);
            if layer >= self.layers.len() || self.is_stopped() {
                return;
            }
            let mut told: Option<Progress> = None;
            let done = self.one(layer, &mut |did| {
                let due = told.is_none_or(|told| {
                    did.entries >= told.entries.saturating_add(TELL_ENTRIES)
                        || did.bytes >= told.bytes.saturating_add(TELL_BYTES)
                });
                if due && did.phase == Phase::Apply {
                    told = Some(did);
                    if !send(News::Did(layer, did)) {
                        return ControlFlow::Break(());
                    }
                }
                if self.is_stopped() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
            match done {
                Ok(()) => {
                    let mut all = Progress::new(Phase::Apply);
                    all.bytes = self.layers.get(layer).map_or(0, Layer::size);
                    send(News::Did(layer, all));
                }
                // It was stopped for what another found, or the callback said.
                Err(e) if e.kind() == ErrorKind::Cancelled && self.is_stopped() => return,
                Err(e) => {
                    self.stop();
                    send(News::Failed(layer, e));
                    return;
                }
            }
        }
    }

    fn one(&self, index: usize, progress: &mut ProgressFn<'_>) -> Result<()> {
        let (Some(layer), Some(below)) = (self.layers.get(index), self.below.get(index)) else {
            return Ok(());
        };
        if layer.bring(below, progress)? {
            self.brought.lock().unwrap_or_else(PoisonError::into_inner).push(index);
        }
        self.below.get(index + 1).map_or(Ok(()), |above| layer.tell(above))
    }

    fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.below.iter().for_each(Below::will_not_be);
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }
}

/// The progress of all layers together.
struct Sum {
    progress: Progress,
    each: Vec<Progress>,
}

impl Sum {
    fn new<L: Layer>(layers: &[L]) -> Self {
        let mut progress = Progress::new(Phase::Apply);
        progress.total_bytes =
            Some(layers.iter().fold(0, |sum, layer| layer.size().saturating_add(sum)));
        Sum { progress, each: vec![Progress::new(Phase::Apply); layers.len()] }
    }

    /// One layer has come so far; what counts something else is no news.
    fn update(&mut self, layer: usize, did: Progress) {
        if did.phase == Phase::Apply
            && let Some(before) = self.each.get_mut(layer)
        {
            let entries = did.entries.saturating_sub(before.entries);
            let bytes = did.bytes.saturating_sub(before.bytes);
            before.entries = before.entries.max(did.entries);
            before.bytes = before.bytes.max(did.bytes);
            self.progress.entries = self.progress.entries.saturating_add(entries);
            self.progress.bytes = self.progress.bytes.saturating_add(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::Barrier;

    use super::*;
    use crate::progress::ignore_progress;

    /// A layer that waits at a barrier before it asks for what is below, and may fail before or after.
    struct Fake<'t> {
        number: usize,
        barrier: &'t Barrier,
        fails: Option<When>,
        log: &'t Mutex<Vec<usize>>,
    }

    #[derive(Clone, Copy, PartialEq)]
    enum When {
        Unpacking,
        Committing,
    }

    impl Layer for Fake<'_> {
        fn size(&self) -> u64 {
            10
        }

        fn bring(&self, below: &Below, progress: &mut ProgressFn<'_>) -> Result<bool> {
            self.barrier.wait();
            let failure = |when| match self.fails == Some(when) {
                true => Err(Error::new(ErrorKind::InvalidArchive, self.number.to_string())),
                false => Ok(()),
            };
            failure(When::Unpacking)?;
            report(progress, Progress { bytes: 4, entries: 1, ..Progress::new(Phase::Apply) })?;
            assert_eq!(below.wait()?.len(), self.number, "those below are all there");
            failure(When::Committing)?;
            self.log.lock().unwrap().push(self.number);
            Ok(self.number != 1)
        }

        fn tell(&self, above: &Below) -> Result<()> {
            above.are(vec![PathBuf::new(); self.number + 1]);
            Ok(())
        }
    }

    fn run(
        fails: &[(usize, When)],
        progress: &mut ProgressFn<'_>,
    ) -> (Vec<usize>, Vec<usize>, Result<()>) {
        let (barrier, log) = (Barrier::new(4), Mutex::new(Vec::new()));
        let layers: Vec<Fake<'_>> = (0..4)
            .map(|number| {
                let fails = fails.iter().find(|(n, _)| *n == number).map(|(_, when)| *when);
                Fake { number, barrier: &barrier, fails, log: &log }
            })
            .collect();
        let parent = Below::default();
        parent.are(Vec::new());
        // The barrier lets nobody go on before all four run at once.
        let four = NonZeroUsize::new(4).unwrap();
        let (brought, done) = bring_all(&layers, &parent, four, progress);
        (log.into_inner().unwrap(), brought, done)
    }

    #[test]
    fn layers_are_unpacked_at_once_and_committed_in_order() {
        let mut last = Progress::new(Phase::Walk);
        let (log, brought, done) = run(&[], &mut |progress| {
            assert!(progress.bytes >= last.bytes && progress.entries >= last.entries);
            last = progress;
            ControlFlow::Continue(())
        });
        done.unwrap();
        assert_eq!((log, brought), (vec![0, 1, 2, 3], vec![0, 2, 3]));
        assert_eq!((last.bytes, last.total_bytes, last.entries), (40, Some(40), 4));
    }

    #[test]
    fn a_failure_stops_those_that_wait_and_is_the_one_that_is_told() {
        for when in [When::Unpacking, When::Committing] {
            let (log, brought, done) = run(&[(2, when)], &mut ignore_progress);
            let e = done.unwrap_err();
            assert_eq!((e.kind(), e.to_string().as_str()), (ErrorKind::InvalidArchive, "2"));
            assert!(!log.contains(&3) && !brought.contains(&3));
            assert_eq!(brought, log.into_iter().filter(|n| *n != 1).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_callback_that_says_stop_is_obeyed_and_called_no_more() {
        for stop_at in 1..8 {
            let mut calls = 0;
            let (_, _, done) = run(&[], &mut |_| {
                calls += 1;
                if calls >= stop_at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
            assert_eq!(done.unwrap_err().kind(), ErrorKind::Cancelled);
            assert_eq!(calls, stop_at);
        }
    }
}
