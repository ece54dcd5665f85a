//! Busy polling: while one request follows the other, the thread that has answered looks for the next one for
//! a moment before it sleeps.
//!
//! What a request over FUSE costs is not its work but two wakes: the server's when it is asked, and that of
//! whoever asked when it is answered. On an idle processor each takes tens of microseconds, under a hypervisor
//! more. A thread that is still awake when the next request comes saves the first of the two. As the kernel's
//! halt polling does, this adapts itself: nobody polls until a request has come within the limit of the answer
//! before it, and nobody any more once polling has been in vain. So a mount on which little is asked costs
//! nothing, and each row of requests at most one limit of processor time at its end. Other threads that want
//! the processor get it between two looks.
//!
//! `cargo bench --bench fuse` measures with and without.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::sys::wait;

/// For how long by default.
pub(crate) const BUSY_POLL: Duration = Duration::from_micros(100);

/// When threads that serve a mount poll.
#[derive(Debug)]
pub(super) struct BusyPoll {
    device: OwnedFd,
    /// Nanoseconds; 0 if never.
    limit: u64,
    start: Instant,
    /// Nanoseconds from `start` to the last answer.
    answered: AtomicU64,
    /// The last request came within the limit of the answer before.
    in_a_row: AtomicBool,
    /// A thread polls; more than one would only be in each other's way.
    polling: AtomicBool,
}

impl BusyPoll {
    /// For the device by which requests come, which is not read from here.
    pub(super) fn new(device: OwnedFd, limit: Duration) -> BusyPoll {
        // On a single processor it would keep back what is to come.
        let alone = thread::available_parallelism().is_ok_and(|n| n.get() == 1);
        let limit = if alone { Duration::ZERO } else { limit };
        BusyPoll {
            device,
            limit: nanos(limit),
            start: Instant::now(),
            answered: AtomicU64::new(0),
            in_a_row: AtomicBool::new(false),
            polling: AtomicBool::new(false),
        }
    }

    /// A request has come.
    pub(super) fn asked(&self) {
        if self.limit != 0 && !self.in_a_row.load(Ordering::Relaxed) {
            let since = self.now().saturating_sub(self.answered.load(Ordering::Relaxed));
            self.in_a_row.store(since <= self.limit, Ordering::Relaxed);
        }
    }

    /// A request has been answered. Returns when the next one is there, or it is time to sleep.
    pub(super) fn answered(&self) {
        if self.limit == 0 {
            return;
        }
        let answered = self.now();
        self.answered.store(answered, Ordering::Relaxed);
        if !self.in_a_row.load(Ordering::Relaxed) || self.polling.swap(true, Ordering::Acquire) {
            return;
        }
        while !self.is_ready() {
            if self.now().saturating_sub(answered) > self.limit {
                self.in_a_row.store(false, Ordering::Relaxed);
                break;
            }
            thread::yield_now();
        }
        self.polling.store(false, Ordering::Release);
    }

    /// Whether a request is there, or reading will tell why not.
    fn is_ready(&self) -> bool {
        let ready: io::Result<_> =
            wait::until_readable([self.device.as_fd()], Some(Duration::ZERO));
        ready.map_or(true, |[ready]| ready)
    }

    fn now(&self) -> u64 {
        nanos(self.start.elapsed())
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
